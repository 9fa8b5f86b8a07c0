"""Loading onto a GPU without vLLM: the loader's merged stream against plain safetensors.

Both map the same files and copy tensor by tensor to the device, as vLLM's own loader does; ours
opens and checks plan, vector and task model besides, reads and hashes the vector ahead, and merges
on the device. The time is of all that, from paths to tensors, with the files in the page cache.

What arrives must equal, bit for bit, the offline merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from safetensors import safe_open

from benchmarks import load_cases
from benchmarks.harness import NotVerified, Row, interleaved, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.load_worker import Case
from enchtable_vllm.checkpoint import Checkpoint
from enchtable_vllm.merge import MergeStream
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.merging import Merging
from enchtable_vllm.serving.prepare import prepare_model

PEER = "safetensors"
QUICK = {"model": "tiny", "rounds": 2}
FULL = {"rounds": 15}


class Options(BaseOptions):
    """Of loading onto a GPU."""

    model: str = Field(default="1b", description="1b, small, tiny")
    rounds: int = Field(default=7, ge=1, description="how often each is loaded")
    device: str = Field(default="cuda", description="where to; cpu is a trial")


def verify(options: Options) -> None:
    """What arrives is the offline merge, bit for bit."""
    case = load_cases.make(options.model, options.scratch / "model")
    for stored in case.vectors:
        expected = Checkpoint(case.merge(stored))
        found = merged(case, stored, torch.device(options.device))
        wrong = [n for n in expected.tensors if not torch.equal(found[n].cpu(), expected.read(n))]
        if wrong or found.keys() != expected.tensors.keys():
            raise NotVerified(
                f"{case.name}, {stored}, on {options.device}", expected="the offline merge's bits",
                got=f"others in {len(wrong)} tensors", fix="No speed is reported.",
            )  # fmt: skip


def measure(options: Options) -> Iterator[Row]:
    """Seconds until all weights are on the device."""
    case = load_cases.case(options.model, options.scratch / "model")
    device = torch.device(options.device)
    ways: dict[str, Callable[[], object]] = {PEER: lambda: plain(case, device)}
    for stored in case.vectors:
        ways[f"enchtable {stored}"] = functools.partial(merged, case, stored, device)
    for provider, seconds in interleaved(ways, options.rounds).items():
        yield row("load_device", provider, f"{case.name}, warm", "bf16", seconds)


def plain(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """The task model's weights as they are stored."""
    return _arrived(_stored(case), device)


def merged(case: Case, stored: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The same, merged as the loader does on a GPU: what comes meets a vector read ahead."""
    config = LoaderConfig.parse(case.extra(stored))
    prepared = prepare_model(config, str(case.task), None, None, device="cpu")
    merging = Merging(prepared, device, reads_stored=False, verify_content=False)
    try:
        merging.begin([])
        return _arrived(MergeStream(merging.merge_one).merge(_stored(case)), device)
    finally:
        merging.close()


def _stored(case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(case.task.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def _arrived(
    source: Iterator[tuple[str, torch.Tensor]], device: torch.device
) -> dict[str, torch.Tensor]:
    found = {name: tensor.to(device) for name, tensor in source}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def _table(results: Results) -> Table:
    rows = results.published("load-cuda")
    peers = {row.what: row for row in rows if row.provider == PEER}
    lines = [
        [row.shape, row.provider, shown(row.p50, "s"), str(ratio(row, peers[row.what]))]
        for row in rows
    ]
    return Table(["model", "by", "on the GPU after", f"÷ {PEER}"], lines, rows)


TABLES = {"load-cuda": _table}
