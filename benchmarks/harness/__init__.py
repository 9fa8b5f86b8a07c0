"""What the benchmarks share: registry, options, timing, rows, comparisons, tables, plots."""

from benchmarks.harness.options import Options
from benchmarks.harness.registry import NotVerified
from benchmarks.harness.rows import Row, row
from benchmarks.harness.timing import interleaved

__all__ = ["NotVerified", "Options", "Row", "interleaved", "row"]
