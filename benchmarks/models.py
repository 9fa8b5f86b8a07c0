"""Models to load and vectors for them: the real small one, and a random one of 1B's shapes.

A vector is of the scope 'attention' with small random deltas, its plan has no interference:
neither changes what loading costs, and both are made in seconds.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from benchmarks.architectures import LLAMA_1B, SMOLLM2_135M, Architecture
from enchtable_vllm.checkpoint import Checkpoint, Location, tensor_digest
from enchtable_vllm.demo.fetch import small_model
from enchtable_vllm.envs import cache_folder
from enchtable_vllm.plan import MergePlan, PlannedTensor, VectorReference
from enchtable_vllm.vector import ModelReference, SafetyVector, build_vector

Stored = Literal["bf16", "int8"]
#: Short name → the model's own, as rows have it.
NAMES = {"small": "SmolLM2-135M-Instruct", "1b": "Llama-3.2-1B, random", "tiny": "tiny, random"}
#: ``tiny`` is for trying things out.
SHAPES = {
    "small": SMOLLM2_135M,
    "1b": LLAMA_1B,
    "tiny": Architecture("tiny", 2, 128, 128, 64, 256, 512, tied=True),
}
_HEAD = 64


def task_model(which: str, folder: Path) -> Path:
    """A model of `NAMES`: the small one from its package, the other written to the folder."""
    if which == "small":
        return small_model(cache_folder() / "demo" / "smollm2-135m-instruct")
    return _random_llama(folder, SHAPES[which])


def _random_llama(folder: Path, shape: Architecture) -> Path:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (shape.queries, shape.hidden),
            f"{at}self_attn.k_proj.weight": (shape.keys, shape.hidden),
            f"{at}self_attn.v_proj.weight": (shape.keys, shape.hidden),
            f"{at}self_attn.o_proj.weight": (shape.hidden, shape.queries),
            f"{at}mlp.gate_proj.weight": (shape.ffn, shape.hidden),
            f"{at}mlp.up_proj.weight": (shape.ffn, shape.hidden),
            f"{at}mlp.down_proj.weight": (shape.hidden, shape.ffn),
            f"{at}input_layernorm.weight": (shape.hidden,),
            f"{at}post_attention_layernorm.weight": (shape.hidden,),
        }
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(size, generator=generator) * 0.02).bfloat16()
        for name, size in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.queries // _HEAD, "num_key_value_heads": shape.keys // _HEAD,
        "head_dim": _HEAD, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": shape.tied,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_vector(task: Path, folder: Path, stored: Stored, *, seed: int = 1) -> SafetyVector:
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
    shutil.rmtree(surrogate)
    return SafetyVector(Location(folder))


def plan_without_interference(task: Path, vector: SafetyVector) -> MergePlan:
    """A plan whose interference is zero everywhere."""
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
