"""The table of README.md: a line for each thing that is measured, each beside its named peer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.harness.interval import Ratio, ratio
from benchmarks.harness.paired import paired_ratio
from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Blocks, Table
from benchmarks.harness.units import shown


@dataclass(frozen=True)
class Line:
    """One of the table's.

    Attributes:
        what: In words.
        benchmark: Whose rows.
        op, metric, shape: Which of them; the shape is a pattern.
        ours, peer: Whose.
    """

    what: str
    benchmark: str
    op: str
    metric: str
    shape: str
    ours: str
    peer: str

    def rows(self, results: Results) -> tuple[Row, Row] | None:
        """Ours and the peer's; None where they have not been measured."""
        try:
            known = results.published(self.benchmark)
        except NotMeasured:
            return None
        found = [r for r in known if (r.op, r.metric) == (self.op, self.metric)]
        found = [row for row in found if re.fullmatch(self.shape, row.shape)]
        ours = [row for row in found if row.provider == self.ours]
        for one in reversed(ours):
            for other in found:
                if (other.provider, other.what) == (self.peer, one.what):
                    return one, other
        return None


LINES = (
    Line("adding 64 MiB of delta to bf16 weights", "kernels", "fused_add", "time",
         r"64 MiB, bf16 \+ bf16", "fused_add", "memcpy"),
    Line("the same", "kernels", "fused_add", "time", r"64 MiB, bf16 \+ bf16", "fused_add",
         "torch reference"),
    Line("planning 10 layers of a 135M model", "plan", "plan", "time",
         "model of 10 layers, 576 wide", "cold", "authors' algorithm"),
    Line("loading a 1B model's weights", "load", "load_weights", "time",
         "Llama-3.2-1B, random, warm, .*", "enchtable bf16", "auto"),
    Line("the same", "load", "load_weights", "time", "Llama-3.2-1B, random, warm, .*",
         "enchtable bf16", "merge to disk, then auto"),
    Line("until a 135M model's API is ready", "load", "api_ready", "time", ".*, 1 rank",
         "enchtable bf16", "auto"),
    Line("a 135M model's time per token, 4 clients", "serving", "serve", "TPOT, p50",
         ".*, 4 clients, .*", "merged", "unmerged"),
    Line("how long a stream waits for a token while the vector changes, 135M", "swap", "swap",
         "wait of a stream", ".*", "enchtable", "restart"),
    Line("adding 256 MiB of delta to bf16 weights on a GPU", "kernels-cuda", "fused_add", "time",
         r"256 MiB, bf16 \+ bf16", "fused_add", "copy"),
)  # fmt: skip


def _summary(results: Results) -> Table:
    lines: list[list[str]] = []
    rows: list[Row] = []
    for line in LINES:
        if (found := line.rows(results)) is None:
            continue
        ours, peer = found
        rows += found
        figures = [f"{shown(one.p50, one.unit)} ({one.provider})" for one in found]
        lines.append([line.what, *figures, str(_ratio(line, ours, peer))])
    if not lines:
        raise NotMeasured("results", expected="rows of 'make bench'", got="none", fix="Run it.")
    return Table(["", "ours", "held against", "ratio (95% interval)"], lines, rows)


def _ratio(line: Line, ours: Row, peer: Row) -> Ratio:
    """As the benchmark's own page has it: of serving within pairs."""
    if line.benchmark == "serving":
        return paired_ratio(ours.samples, peer.samples)
    return ratio(ours, peer)


TABLES: Blocks = {"summary": _summary}
