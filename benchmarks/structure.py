"""What vLLM makes of a model: its modules, tensors and compiled code, apart from the values.

The proof that merging costs nothing while serving: with and without, vLLM computes with the same
modules and tensors of the same layout, by the same compiled code. A program of its own, because a
model is compiled once in a process:

    python -m benchmarks.structure FOLDER '{"model": …, "load_format": …}'

Of the compiled graph two things are compared: the key by which vLLM would take one's compiled model
for the other's (of the model, its config, the compiler and the environment), and what torch's
compiler wrote into a cache that was empty: the calls in their order, and each kernel. A cache of
one's own keeps one from being served what the other left.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import NotVerified

ROOT = Path(__file__).parent.parent
_CODE = (".py", ".cpp", ".h")


def structure(folder: Path, **engine: object) -> dict[str, Any]:
    """What a fresh vLLM makes of it.

    Args:
        folder: For its caches; not there yet.
        engine: Arguments of ``vllm.LLM``.

    Returns:
        ``modules`` and ``tensors``, as served and (``loaded``) before vLLM packs them for the
        processor; ``keys`` and ``code`` of what was compiled; and ``digests`` of the weights.
    """
    folder.mkdir(parents=True)
    environment = {
        "VLLM_PLUGINS": "enchtable",  # for all: vLLM's key holds this variable
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # sends `_look` to the worker
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.structure", str(folder), json.dumps(engine)],
        cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        got = (done.stdout + done.stderr)[-3000:]
        raise NotVerified(f"vLLM with {engine}", expected="a model", got=got, fix="")
    found: dict[str, Any] = json.loads((folder / "structure.json").read_text())
    return found


def structures(folder: Path, engines: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of several, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        begun = {
            name: pool.submit(structure, folder / name, **engine)
            for name, engine in engines.items()
        }
    return {name: future.result() for name, future in begun.items()}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part → what one has and the other has not; the parts that are the same are left out."""
    found = {}
    for part in sorted(ours.keys() | theirs.keys()):
        mine, yours = list(ours.get(part, ())), list(theirs.get(part, ()))
        if mine != yours:
            only = [f"-{item}" for item in yours if item not in mine]
            only += [f"+{item}" for item in mine if item not in yours]
            found[part] = only or ["the order"]
    return found


def _look(worker: Any) -> dict[str, Any]:
    """In the worker: what is served, and what is loaded before it is packed."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = worker.vllm_config
    served = worker.model_runner.get_model()
    found = {"modules": _modules(served), "tensors": _tensors(served)}
    # Layers register by name, and refuse to do so twice.
    config.compilation_config.static_forward_context.clear()
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
    ):
        loader = get_model_loader(config.load_config)
        loaded = loader.create_model(config, config.model_config)
        loader.load_weights(loaded, config.model_config)
    found |= {"loaded modules": _modules(loaded), "loaded tensors": _tensors(loaded)}
    digests = [f"{name}: {_digest(tensor)}" for name, tensor in loaded.named_parameters()]
    return {**found, "digests": digests}


def _modules(model: Any) -> list[str]:
    return [
        f"{name}: {type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"
        for name, module in model.named_modules()
    ]


def _tensors(model: Any) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [
        f"{name}: {tuple(t.shape)} {t.dtype} strides {t.stride()} from {t.storage_offset()} of "
        f"{t.untyped_storage().nbytes()} bytes on {t.device}"
        for name, t in named
    ]


def _digest(tensor: Any) -> str:
    import torch

    return _sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _compiled(cache: Path) -> dict[str, list[str]]:
    """The keys of vLLM, and the code that was generated; nothing where it does not compile."""
    keys = sorted(cache.iterdir()) if cache.exists() else []
    files = [path for key in keys for path in sorted(key.rglob("*")) if path.suffix in _CODE]
    code = [f"{path.name}: {_sha256(path.read_bytes())}" for path in files]
    return {"keys": [key.name for key in keys], "code": code}


def main() -> None:
    """Load one model and write what was found."""
    from vllm import LLM

    folder, engine = Path(sys.argv[1]), json.loads(sys.argv[2])
    common: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 2, "disable_log_stats": True,
        "skip_tokenizer_init": True, "distributed_executor_backend": "uni",
    }  # fmt: skip
    llm = LLM(**{**common, **engine})
    (found,) = llm.collective_rpc(_look)
    found |= _compiled(folder / "vllm" / "torch_compile_cache" / "torch_aot_compile")
    (folder / "structure.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
