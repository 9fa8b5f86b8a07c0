"""A task model to serve, with a vector to merge into it, and servers of both.

The peers are what a user has without us: vLLM with no plugin of ours in it. One server that can
swap is both, one after the other, in the same process and the same memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import httpx
from safetensors.torch import save_file

from benchmarks.models import plan_without_interference, random_vector, task_model
from enchtable_vllm.checkpoint import Checkpoint, Location, sampled_fingerprint
from enchtable_vllm.demo.server import Server, free_port, served_dtype
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.plan.vector_root import plan_path

T = TypeVar("T")

#: For ``--dtype``: in bf16 only where the processor has instructions for it; and its short name.
COMPUTES = served_dtype()
DTYPE = {"bfloat16": "bf16", "float32": "fp32"}[COMPUTES]
#: The name of the vector in its root.
VECTOR = "sv"
_TOKEN = "the-token-of-this-benchmark"
#: The rank computes in its engine's own process, as it does on a GPU. vLLM's CPU build would start
#: one more for it, which takes a third of the time until a server is up.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
#: vLLM's processes go on looking for work for a second after their last step.
IDLE_SECONDS = 1.2


@dataclass(frozen=True)
class Case:
    """A model and its merge.

    Attributes:
        task: The task model's folder.
        root: A vector root, with one vector and its plan.
        plan: That plan.
        offline: The same merge, written to disk.
    """

    task: Path
    root: Path
    plan: Path
    offline: Path

    @classmethod
    def of(cls, folder: Path) -> Case:
        """What `small_case` made there."""
        task = Path((folder / "task.txt").read_text())
        (plan,) = (folder / "root" / VECTOR).glob("plans/*.json")
        return cls(task, folder / "root", plan, folder / "offline")

    @property
    def keys(self) -> dict[str, str]:
        """Of the loader."""
        return {"safety_vector": str(self.root / VECTOR), "merge_plan": str(self.plan)}

    @property
    def merging(self) -> list[str]:
        """Arguments that merge it while it loads."""
        return _arguments(self.keys)

    @property
    def swapping(self) -> list[str]:
        """Arguments that merge it while it loads, and can take it out again: see `Swapped`."""
        return _arguments({"vector_root": str(self.root), "safety_vector": VECTOR})


def small_case(folder: Path, layers: int | None = None) -> Case:
    """The real small model, or its first layers; a random vector of the scope 'attention'.

    Neither the values of the deltas nor those of the plan change what serving costs.
    """
    folder.mkdir(parents=True)
    task = task_model("small", folder)
    if layers is not None:
        task = _first_layers(task, layers, folder / "task")
    (folder / "root").mkdir()
    vector = random_vector(task, folder / "root" / VECTOR, "bf16")
    plan = plan_path(folder / "root" / VECTOR, sampled_fingerprint(Checkpoint(task)))
    plan.parent.mkdir()
    plan.write_text(plan_without_interference(task, vector).to_json())
    merge_checkpoint(Location(task), vector, resolve_plan(*read_plan(plan)), folder / "offline")
    (folder / "task.txt").write_text(str(task))
    return Case.of(folder)


def _arguments(extra: dict[str, str]) -> list[str]:
    return ["--load-format", "enchtable", "--model-loader-extra-config", json.dumps(extra)]


def _first_layers(model: Path, layers: int, folder: Path) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((model / "config.json").read_text())
    others = tuple(f".layers.{i}." for i in range(layers, config["num_hidden_layers"]))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    opened = Checkpoint(model)
    kept = {
        name: opened.read(name)
        for name in opened.tensors
        if not any(other in name for other in others)
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Swapped:
    """A server that merged `VECTOR` while it started, and serves it or none by turns."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._vector = VECTOR

    def serving(self, vector: str) -> Server:
        """The server, with this vector or `NO_VECTOR` from now on."""
        if vector != self._vector:
            answer = httpx.post(
                f"{self._server.url}/v1/enchtable/swap",
                json={"safety_vector": vector},
                headers={"X-Enchtable-Admin-Token": _TOKEN},
                timeout=120,
            )
            answer.raise_for_status()
            self._vector = vector
        return self._server


def apart(do: Callable[..., T], *arguments: object) -> T:
    """Do it in a process of its own: it imports what this one should not."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


def start_together(stack: ExitStack, servers: Iterable[Server]) -> None:
    """Wait for servers, which start beside each other; the stack stops all, whatever happens."""
    servers = list(servers)
    for one in servers:
        stack.callback(one.stop)
    for one in servers:
        stack.enter_context(one)


def server(
    model: Path,
    log: Path,
    arguments: Sequence[str] = (),
    *,
    plugins: Sequence[str] = (),
    compiled: bool = False,
    **variables: str,
) -> Server:
    """A server, starting; ``with`` waits for it."""
    mode = [] if compiled else ["--enforce-eager"]
    return Server(
        model,
        [
            "--dtype", COMPUTES, "--max-model-len", "512", "--max-num-seqs", "16",
            "--disable-uvicorn-access-log", *mode, *arguments,
        ],
        log,
        port=free_port(),
        variables={
            **ONE_PROCESS, "VLLM_PLUGINS": ",".join(plugins), "ENCHTABLE_ADMIN_TOKEN": _TOKEN,
            **variables,
        },
    )  # fmt: skip
