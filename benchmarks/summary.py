"""The table of the README: one line for each benchmark."""

from __future__ import annotations

from benchmarks.harness.tables import Blocks

TABLES: Blocks = {}
