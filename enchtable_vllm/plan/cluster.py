"""A plan's linear algebra on a Ray cluster: several machines, or several GPUs of one.

The planning process still reads, digests and compares every tensor, which is cheap, keeps the
journal and writes the plan. What takes the time, a tensor's terms, becomes a task of one core or
one GPU. A task is told the digests of the bytes that the planning process has seen, and refuses
others: no machine can plan for files of its own. Ray runs a task again whose worker died.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from enchtable_vllm.checkpoint import Checkpoint, Location
from enchtable_vllm.errors import ConfigError, EnchTableError, MismatchError
from enchtable_vllm.plan.journal import Terms
from enchtable_vllm.plan.measure import Digests, Measurement
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.factor_files import open_factors
from enchtable_vllm.vector.factors import COMPUTATION

#: Of one task whose worker dies again and again, as one does that runs out of memory.
_RETRIES = 3
#: Each waits for a task in a thread; more would only wait longer.
_MOST_TASKS = 64


@dataclass(frozen=True)
class Inputs:
    """What a worker opens: once, and for all its tasks.

    Attributes:
        task, base, vector: Folders, the same on every machine.
        vector_fingerprint: The vector's, scales included.
        rank_fraction, device: γ, and where the linear algebra runs.
    """

    task: Path
    base: Path
    vector: Path
    vector_fingerprint: str
    rank_fraction: float
    device: str


class Cluster:
    """A Ray cluster that one plan's tensors are spread over.

    Args:
        inputs: The plan's.
        ray: The module.

    Attributes:
        slots: How many tensors it can work on at once.
    """

    def __init__(self, inputs: Inputs, ray: Any) -> None:
        self._ray = ray
        kind = "CPU" if inputs.device == "cpu" else "GPU"
        self.slots = min(int(ray.cluster_resources().get(kind, 0)), _MOST_TASKS)
        if self.slots < 1:
            raise ConfigError(
                "--executor ray",
                expected=f"a cluster that has a {kind}",
                got=f"{ray.cluster_resources()}",
                fix="Start Ray with one, or choose another --device.",
            )
        wanted = {"num_cpus": 1} if kind == "CPU" else {"num_cpus": 1, "num_gpus": 1}
        self._terms = ray.remote(_terms).options(max_retries=_RETRIES, **wanted)
        self._inputs = ray.put((inputs, _versions()))

    def terms(self, name: str, digests: Digests) -> Terms:
        """Find a tensor's terms somewhere; from any thread. Waits.

        Raises:
            EnchTableError: A worker refused its bytes, or died each time.
        """
        try:
            found = self._ray.get(self._terms.remote(self._inputs, name, digests))
        except self._ray.exceptions.RayError as error:
            raise ConfigError(
                f"Ray, tensor '{name}'",
                expected=f"a worker that lives through it, at most {_RETRIES + 1} tried",
                got=error,
                fix="See Ray's own logs. Workers need enchtable-vllm, torch, and memory for "
                "a few tensors each; '--jobs' bounds how many work at once.",
            ) from error
        if isinstance(found, EnchTableError):
            raise found
        assert isinstance(found, Terms)
        return found


@contextmanager
def cluster(inputs: Inputs) -> Iterator[Cluster]:
    """The cluster of ``RAY_ADDRESS``, the one that runs on this machine, or a new local one.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or has no core or GPU.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--executor ray",
            expected="Ray",
            got=error,
            fix="Install it: pip install 'enchtable-vllm[ray]'.",
        ) from error
    begun = not ray.is_initialized()
    if begun:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the cluster
        try:
            ray.init(log_to_driver=False, configure_logging=False)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                "--executor ray",
                expected=f"a cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r}",
                got=error,
                fix="Start it, or unset RAY_ADDRESS to use this machine alone.",
            ) from error
    try:
        yield Cluster(inputs, ray)
    finally:
        if begun:
            ray.shutdown()


def _versions() -> dict[str, str]:
    """Whatever decides the numbers, or how they travel."""
    return {
        "enchtable-vllm": version("enchtable-vllm"),
        "torch": torch.__version__,
        "computation": str(COMPUTATION),
    }


def _terms(told: tuple[Inputs, dict[str, str]], name: str, digests: Digests) -> object:
    """In a worker. An error of ours comes back as a value: Ray would wrap it in its traceback."""
    inputs, versions = told
    try:
        if versions != _versions():
            raise MismatchError(
                "a worker of the Ray cluster",
                expected=f"the versions of the planning process, {versions}",
                got=_versions(),
                fix="Install the same on every machine.",
            )
        return _measurement(inputs).terms(name, digests)
    except EnchTableError as error:
        return error


@functools.cache
def _measurement(inputs: Inputs) -> Measurement:
    torch.set_num_threads(1)  # as `vector.workers`: the bits do not depend on the cores
    torch.set_float32_matmul_precision("highest")
    vector = SafetyVector(Location(inputs.vector))
    if vector.fingerprint != inputs.vector_fingerprint:
        raise MismatchError(
            vector.what,
            expected=f"the one that the planning process has, {inputs.vector_fingerprint}",
            got=vector.fingerprint,
            fix="Give every machine of the cluster the same files under the same paths.",
        )
    return Measurement(
        Checkpoint(inputs.task, what="task model"),
        Checkpoint(inputs.base, what="base model"),
        vector,
        open_factors(vector, inputs.rank_fraction, inputs.device),
        inputs.rank_fraction,
        inputs.device,
    )
