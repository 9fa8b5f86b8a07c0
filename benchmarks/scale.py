"""Scale on paper: what larger models and fleets cost, derived from measured constants."""

from __future__ import annotations

from benchmarks.harness.tables import Blocks

TABLES: Blocks = {}
