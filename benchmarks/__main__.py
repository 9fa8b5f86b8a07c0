"""``python -m benchmarks``."""

from __future__ import annotations

from benchmarks.commands import main

if __name__ == "__main__":
    main()
