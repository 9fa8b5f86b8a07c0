"""A task model to serve, with a vector to merge into it, and servers of both.

The peers are what a user has without us: vLLM with no plugin of ours in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from safetensors.torch import save_file

from benchmarks.models import plan_without_interference, random_vector, task_model
from enchtable_vllm.checkpoint import Checkpoint, Location
from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan

T = TypeVar("T")

#: vLLM's processes go on looking for work for a second after their last step.
IDLE_SECONDS = 1.2


@dataclass(frozen=True)
class Case:
    """A model and its merge.

    Attributes:
        task: The task model's folder.
        vector, plan: What is merged into it.
        offline: The same merge, written to disk.
    """

    task: Path
    vector: Path
    plan: Path
    offline: Path

    @classmethod
    def of(cls, folder: Path) -> Case:
        """What `small_case` made there."""
        task = Path((folder / "task.txt").read_text())
        return cls(task, folder / "vector", folder / "plan.json", folder / "offline")

    @property
    def keys(self) -> dict[str, str]:
        """Of the loader."""
        return {"safety_vector": str(self.vector), "merge_plan": str(self.plan)}

    @property
    def merging(self) -> list[str]:
        """Arguments that merge it while it loads."""
        keys = json.dumps(self.keys)
        return ["--load-format", "enchtable", "--model-loader-extra-config", keys]


def small_case(folder: Path, layers: int | None = None) -> Case:
    """The real small model, or its first layers; a random vector of the scope 'attention'.

    Neither the values of the deltas nor those of the plan change what serving costs.
    """
    folder.mkdir(parents=True)
    task = task_model("small", folder)
    if layers is not None:
        task = _first_layers(task, layers, folder / "task")
    vector = random_vector(task, folder / "vector", "bf16")
    plan = folder / "plan.json"
    plan.write_text(plan_without_interference(task, vector).to_json())
    merge_checkpoint(Location(task), vector, resolve_plan(*read_plan(plan)), folder / "offline")
    (folder / "task.txt").write_text(str(task))
    return Case.of(folder)


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


def apart(do: Callable[..., T], *arguments: object) -> T:
    """Do it in a process of its own: it imports what this one should not."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


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
            "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "16",
            "--disable-uvicorn-access-log", *mode, *arguments,
        ],
        log,
        port=free_port(),
        variables={"VLLM_PLUGINS": ",".join(plugins), **variables},
    )  # fmt: skip
