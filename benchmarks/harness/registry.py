"""Which benchmarks there are. One line registers one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from benchmarks.harness.options import Options, Size
from benchmarks.harness.rows import Row
from enchtable_vllm.errors import ConfigError, EnchTableError

Device = Literal["cpu", "cuda"]


class NotVerified(EnchTableError):
    """What was to be measured is not right: there is no figure."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its module is imported when it is needed.

    The module has ``Options``, ``verify(options)``, which raises `NotVerified`, and
    ``measure(options)``, which gives rows. It may have ``PEER``, the provider that the others are
    held against; ``QUICK`` and ``FULL``, the options of those sizes; ``bounds(rows)``, words for
    each bound that was missed; ``TABLES`` and ``PLOTS``, what of it pages show.

    Attributes:
        name: Of the benchmark, of its module, and of its file of results.
        summary: What is held against what, in a line.
        device: What it needs.
        minutes: What the default takes on two cores, or on one GPU.
    """

    name: str
    summary: str
    device: Device
    minutes: float

    def load(self) -> ModuleType:
        """Its module."""
        return import_module(f"benchmarks.{self.name.replace('-', '_')}")

    @property
    def options(self) -> type[Options]:
        """Its class of options."""
        kind: type[Options] = self.load().Options
        return kind

    def preset(self, size: Size) -> Mapping[str, object]:
        """What a size sets."""
        found: Mapping[str, object] = {}
        if size != "default":
            found = getattr(self.load(), size.upper(), found)
        return found

    def verify(self, options: Options) -> None:
        """Prove that what is measured is right."""
        self.load().verify(options)

    def measure(self, options: Options) -> Iterable[Row]:
        """Measure it."""
        rows: Iterable[Row] = self.load().measure(options)
        return rows

    def missed(self, rows: list[Row]) -> list[str]:
        """Bounds that were missed."""
        bounds: Callable[[list[Row]], Iterable[str]] = getattr(self.load(), "bounds", lambda _: ())
        return list(bounds(rows))

    @property
    def peer(self) -> str | None:
        """The provider that the others are held against."""
        return getattr(self.load(), "PEER", None)

    def shown(self, what: Literal["TABLES", "PLOTS"]) -> Mapping[str, Callable[..., Any]]:
        """What pages show of it, by name."""
        found: Mapping[str, Callable[..., Any]] = getattr(self.load(), what, {})
        return found


REGISTRY = (
    Benchmark("kernels", "The fused addition against memcpy and torch", "cpu", 1),
    Benchmark("kernels-cuda", "The same on a GPU, by size and variant", "cuda", 10),
    Benchmark("plan", "Planning against the algorithm as published", "cpu", 5),
    Benchmark("plan-cuda", "The same on a GPU, layers of 8B's shapes", "cuda", 6),
    Benchmark("load", "Loading against plain vLLM and merging to disk", "cpu", 7),
    Benchmark("load-cuda", "The merged stream to a GPU against plain safetensors", "cuda", 2),
    Benchmark("swap", "Swapping under load against a restart", "cpu", 4),
    Benchmark("serving", "A merged model served against the same unmerged", "cpu", 10),
    Benchmark("alternatives", "A merge against LoRA, Self-Reminder, SafeDecoding", "cpu", 5),
)


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: There is none.
    """
    for benchmark in REGISTRY:
        if benchmark.name == name:
            return benchmark
    raise ConfigError(
        "benchmark",
        expected=f"one of {', '.join(benchmark.name for benchmark in REGISTRY)}",
        got=name,
        fix="'python -m benchmarks list' says what each measures.",
    )
