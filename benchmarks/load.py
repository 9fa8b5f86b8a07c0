"""Weight loading through ``--load-format enchtable`` against vLLM's plain ``auto``.

In one vLLM process, interleaved: the loader's whole ``load_model`` each time, and within it
``load_weights``, which is what vLLM logs as "Loading weights took"; for us it holds reading and
hashing the vector, and merging. ``load_model`` holds besides, for both, making the empty model
and packing its weights, and for us opening and checking plan, vector and task model. Correctness
first: what is loaded must equal, bit for bit, what plain vLLM loads from the offline merge.

    python benchmarks/load.py [--model small|1b|both] [--rounds 9]

``small`` is SmolLM2-135M-Instruct; ``1b`` has the shapes of Llama-3.2-1B and random weights.
Both get an attention-scope vector and a plan whose attenuation is 1 (it does not change the
cost). Memory is the anonymous part of the process: files that are mapped cost none.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _harness import quantiles, row, write
from safetensors.torch import save_file

from enchtable_vllm.checkpoint import Checkpoint, Location, tensor_digest
from enchtable_vllm.demo.fetch import small_model
from enchtable_vllm.envs import cache_folder
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import MergePlan, PlannedTensor, VectorReference, read_plan, resolve_plan
from enchtable_vllm.vector import ModelReference, SafetyVector, build_vector

STORED = ("bf16", "int8")
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    """Measure, print ratios, append rows to results/load.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["small", "1b", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.model == "both":
        for which in ("small", "1b"):
            command = [sys.executable, __file__, "--model", which, "--rounds", str(options.rounds)]
            subprocess.run(command, check=True)
        return
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="enchtable-load-") as scratch:
        print(f"{options.model}: making the model, its vectors and the offline merges", flush=True)
        # In a process of its own: vLLM 0.32 does not start where llvmlite was imported before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            case = pool.submit(_make, options.model, Path(scratch)).result()
        _report(options.model, _in_vllm(case, options.rounds))


@dataclasses.dataclass(frozen=True)
class Case:
    """A task model and what it is compared with.

    Attributes:
        task: Its folder.
        extras: Provider → the loader's extra config; None is plain ``auto``.
        merged: Provider → the offline merge that it must equal.
    """

    task: Path
    extras: dict[str, dict[str, str] | None]
    merged: dict[str, Path]


def _make(which: str, folder: Path) -> Case:
    if which == "small":
        task = small_model(cache_folder() / "demo" / "smollm2-135m-instruct")
    else:
        task = _random_llama(folder / "task")
    extras: dict[str, dict[str, str] | None] = {"auto": None}
    merged = {}
    for stored in STORED:
        vector = SafetyVector(Location(random_vector(task, folder / stored, stored)))
        plan = folder / f"{stored}.json"
        plan.write_text(plan_without_interference(task, vector).to_json())
        merged[f"enchtable {stored}"] = folder / f"merged-{stored}"
        merge_checkpoint(
            Location(task), vector, resolve_plan(*read_plan(plan)), folder / f"merged-{stored}"
        )
        extras[f"enchtable {stored}"] = {
            "safety_vector": str(vector.location.path),
            "merge_plan": str(plan),
        }
    return Case(task, extras, merged)


def _random_llama(folder: Path) -> Path:
    hidden, inner, layers = 2048, 8192, 16
    shapes = {"model.embed_tokens.weight": (128256, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, rows in (("q_proj", 2048), ("k_proj", 512), ("v_proj", 512), ("o_proj", 2048)):
            shapes[f"{at}self_attn.{name}.weight"] = (rows, hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA_1B))
    return folder


def random_vector(task: Path, folder: Path, stored: str, *, seed: int = 1) -> Path:
    """An attention-scope vector of small random deltas."""
    generator = torch.Generator().manual_seed(seed)
    opened = Checkpoint(task)
    surrogate = folder.with_name(f"{folder.name}-surrogate")
    surrogate.mkdir()
    tensors = {}
    for name in opened.tensors:
        weight = opened.read(name)
        if ".self_attn." in name and weight.ndim == 2:
            weight = weight.float() + torch.randn(weight.shape, generator=generator) * 1e-3
        tensors[name] = weight
    save_file(tensors, surrogate / "model.safetensors", metadata={"format": "pt"})
    build_vector(Location(task), Location(surrogate), folder, dtype=stored)
    return folder


def plan_without_interference(task: Path, vector: SafetyVector) -> MergePlan:
    """A plan whose interference is zero everywhere: its making costs nothing here."""
    opened = Checkpoint(task, what="task model")
    reference = ModelReference.of(Location(task), opened)
    zero, one = (0.0,), (1.0,)
    tensors = {}
    for name in opened.tensors:
        digest = tensor_digest(opened.read(name))
        delta = vector.tensors.get(name)
        if delta is None:
            tensors[name] = PlannedTensor(action="keep", task_digest=digest, reason="no delta")
        else:
            tensors[name] = PlannedTensor(
                action="merge", task_digest=digest, safety_norm=delta.norm, a=zero, b=zero,
                interference=zero, attenuation=one, coefficient=one,
            )  # fmt: skip
    norm = math.sqrt(math.fsum(delta.norm**2 for delta in vector.tensors.values()))
    return MergePlan(
        task_model=reference,
        base_model=reference,
        safety_vector=VectorReference(name=vector.name, fingerprint=vector.fingerprint),
        beta=0.5, rank_fraction=0.5, scope="attention", task_norm=2 * norm, safety_norm=norm,
        norm_scale=1.0, retained_share=1.0, tensors=tensors,
    )  # fmt: skip


def _in_vllm(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of each provider, from a worker of a real vLLM."""
    from vllm import LLM

    llm = LLM(
        model=str(case.task),
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        distributed_executor_backend="uni",
    )
    found: dict[str, Any] = llm.collective_rpc(_measure, args=(case, rounds))[0]
    return found


def _measure(worker: Any, case: Case, rounds: int) -> dict[str, Any]:
    for name, folder in case.merged.items():
        served = _loader(worker, case.task, case.extras[name])
        expected = _loader(worker, folder, None)
        if not _same(_weights(worker, *served), _weights(worker, *expected)):
            raise SystemExit(f"{name}: not the offline merge's bits: no speed is reported")
    found: dict[str, Any] = {name: {"weights": [], "model": [], "peak": []} for name in case.extras}
    for round_ in range(rounds + 1):
        for name, extra in case.extras.items():
            timed = _load(worker, *_loader(worker, case.task, extra))
            if round_:  # the first warms caches, allocators and the compiled loop
                for what, value in timed.items():
                    found[name][what].append(value)
    return found


def _loader(worker: Any, model: Path, extra: dict[str, str] | None) -> tuple[Any, Any]:
    """A loader and the config of what it loads."""
    from vllm.model_executor.model_loader import get_model_loader

    load_config = dataclasses.replace(
        worker.vllm_config.load_config,
        load_format="auto" if extra is None else "enchtable",
        model_loader_extra_config=extra or {},
        use_tqdm_on_load=False,
    )
    model_config = copy.copy(worker.vllm_config.model_config)
    model_config.model = str(model)
    return get_model_loader(load_config), model_config


@contextmanager
def _configured(worker: Any) -> Iterator[Any]:
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Layers register by name, and refuse to do so twice.
    worker.vllm_config.compilation_config.static_forward_context.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps for later would hide in the next peak
    with set_current_vllm_config(worker.vllm_config), set_default_torch_dtype(torch.bfloat16):
        yield worker.vllm_config


def _weights(worker: Any, loader: Any, model_config: Any) -> torch.nn.Module:
    """The loaded model before its weights are packed, so that they can be compared."""
    with _configured(worker) as vllm_config:
        module: torch.nn.Module = loader.create_model(vllm_config, model_config)
        loader.load_weights(module, model_config)
    return module


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(mine, theirs[name]) for name, mine in one.named_parameters())


def _load(worker: Any, loader: Any, model_config: Any) -> dict[str, float]:
    """Seconds for weights and model, peak of anonymous memory while weights load, in bytes."""
    found = {}
    load_weights = loader.load_weights

    def timed(*arguments: Any) -> None:
        with _peak_of_anonymous_memory() as peak:
            started = time.perf_counter()
            load_weights(*arguments)
            found["weights"] = time.perf_counter() - started
        found["peak"] = peak[0]

    loader.load_weights = timed
    with _configured(worker) as vllm_config:
        started = time.perf_counter()
        loader.load_model(vllm_config, model_config)
        found["model"] = time.perf_counter() - started
    return found


@contextmanager
def _peak_of_anonymous_memory() -> Iterator[list[float]]:
    """Sampled every 5 ms by a thread that costs next to nothing."""
    status = Path("/proc/self/status")
    peak, ended = [0.0], threading.Event()

    def anonymous() -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before = anonymous()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield peak
    ended.set()
    watcher.join()
    peak[0] = max(peak[0], anonymous() - before)


def _report(which: str, found: dict[str, Any]) -> None:
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    medians = {
        name: {what: quantiles(values)[1] for what, values in timed.items()}
        for name, timed in found.items()
    }
    plain = medians["auto"]
    rows: list[dict[str, object]] = []
    for provider, timed in found.items():
        mine, peak = medians[provider], max(timed["peak"])
        print(
            f"{which:5} {provider:14} weights {mine['weights']:6.3f} s "
            f"{mine['weights'] / plain['weights']:5.2f}x   model {mine['model']:6.3f} s "
            f"{mine['model'] / plain['model']:5.2f}x   peak {peak / 2**20:7.1f} MiB "
            f"{(peak - max(found['auto']['peak'])) / 2**20:+.1f}"
        )
        key = (provider, which, "bf16")
        rows.append(row("load_weights", *key, timed["weights"]))
        rows.append(row("load_model", *key, timed["model"]))
        rows.append(row("load_weights_peak", *key, timed["peak"], metric="memory", unit="B"))
    print(f"rows appended to {write('load', rows, device)}")


if __name__ == "__main__":
    main()
