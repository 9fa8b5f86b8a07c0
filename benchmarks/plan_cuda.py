"""Planning on a CUDA device: layers of Llama-3.1-8B's shapes, from files to the plan.

The peer is the method as published, on the same device: two full fp32 SVDs and the dense formula,
one pair of matrices after the other. It is timed on a single layer, because a layer takes it long;
ours on that and on more, of the 32 that the model has: a layer costs what another does.
Deltas are *decaying*, as those of fine-tunes are. A plan that is made on the device must agree with
one that is made on the CPU, which `plan` holds to float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from benchmarks.architectures import LLAMA_8B, Architecture
from benchmarks.harness import NotVerified, Row, interleaved, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.plan import TOLERANCE
from benchmarks.plan_bounds import PEER
from benchmarks.plan_cases import random_model
from benchmarks.plan_model import Model

__all__ = ["FULL", "PEER", "QUICK", "TABLES", "Options", "measure", "verify"]

QUICK = {"layers": 2, "shrink": 16, "rounds": 1}
FULL = {"layers": 8, "scope": "attention+ffn"}


class Options(BaseOptions):
    """Of planning on a GPU."""

    layers: int = Field(default=4, ge=1, description="of the larger model; the other has one")
    scope: Literal["attention", "attention+ffn"] = Field(
        default="attention", description="of the vector"
    )
    shrink: int = Field(default=1, ge=1, description="divides every side")
    rounds: int = Field(default=3, ge=1, description="how often each is timed")
    device: str = Field(default="cuda", description="where; cpu is a trial")

    def architecture(self, layers: int) -> Architecture:
        """Of so many layers."""
        sides = ("hidden", "queries", "keys", "ffn")
        smaller = {name: getattr(LLAMA_8B, name) // self.shrink for name in sides}
        return dataclasses.replace(LLAMA_8B, layers=layers, **smaller)


def verify(options: Options) -> None:
    """On the device as on the CPU, matrix by matrix; cached factors change nothing."""
    model = _model(options, 1, made=True)
    found = model.plan("cold")
    if model.plan("cached").tensors != found.tensors:
        raise NotVerified("a plan with factors", expected="the same plan", got="another", fix="")
    expected = model.plan("cold", device="cpu").merged
    for name, tensor in found.merged.items():
        for ours, exact in zip(tensor.interference, expected[name].interference, strict=True):
            if abs(ours / exact - 1) > TOLERANCE:
                raise NotVerified(
                    f"'{name}' on {options.device}", expected=f"the CPU's interference, {exact}",
                    got=ours, fix="No speed is reported.",
                )  # fmt: skip


def measure(options: Options) -> Iterator[Row]:
    """Seconds of whole commands: what was verified has warmed the device."""
    for layers in dict.fromkeys((1, options.layers)):
        model = _model(options, layers, made=layers != 1)
        ways: dict[str, Callable[[], object]] = {
            way: functools.partial(model.plan, way) for way in ("cold", "cached")
        }
        if layers == 1:
            ways[PEER] = model.published
        shape = f"{layers} layer{'s' * (layers > 1)} of {LLAMA_8B.name}, {options.scope}"
        for name, seconds in interleaved(ways, options.rounds, warm_up=False).items():
            yield row("plan_device", name, shape, "fp32", seconds)


def _model(options: Options, layers: int, *, made: bool) -> Model:
    """Of so many layers; made, or there already."""
    folder = options.scratch / f"{layers}-layers"
    if made:
        random_model(folder, options.architecture(layers), options.scope)
    paths = folder / "task", folder / "base", folder / "vector"
    return Model(folder, paths, device=options.device)


def _table(results: Results) -> Table:
    rows = results.published("plan-cuda")
    peers = {row.what: row for row in rows if row.provider == PEER}
    lines = [
        [
            row.shape,
            row.provider,
            shown(row.p50, "s"),
            str(ratio(peers[row.what], row)) if row.what in peers and row.provider != PEER else "",
        ]
        for row in rows
    ]
    return Table(["model, scope", "by", "plan made in", "faster by"], lines, rows)


TABLES = {"plan-cuda": _table}
