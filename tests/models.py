"""Small models for tests: random checkpoints of real architectures, and the real small model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import Location, locate
from enchtable_vllm.plan import MergePlan, PlanOptions, VectorLocation, compute_plan
from enchtable_vllm.vector import SafetyVector, build_vector


def tiny_llama(folder: Path, *, tied: bool = False, vocabulary: int = 512, seed: int = 0) -> Path:
    """A random Llama of 2 layers with 8/4 heads (so that tensor parallelism divides it)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def perturbed(
    source: Path,
    target: Path,
    *,
    scale: float,
    seed: int,
    only: str = "",
    norms: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """A copy whose matrices and biases differ by Gaussian noise: stands for a fine-tune.

    ``norms``: those too, by as much as beside 1 is not lost in bf16.
    """
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            continue
        tensors = load_file(path)
        for name, tensor in sorted(tensors.items()):
            if only in name and (tensor.ndim > 1 or name.endswith(".bias")):
                noise = torch.randn(tensor.shape, generator=generator) * scale
                tensor = (tensor.float() + noise).to(tensor.dtype)
            elif only in name and norms:
                noise = torch.randn(tensor.shape, generator=generator) * scale * 50
                tensor = (tensor.float() + noise).to(tensor.dtype)
            tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    if dtype is not None:
        config = json.loads((target / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config))
    return target


def in_two_files(source: Path, target: Path, second: str) -> Path:
    """A copy of a checkpoint whose tensors of that name part lie in a second, smaller file."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (second in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return target


def add_tokenizer(folder: Path) -> None:
    """One token for each byte, and a name for each of the rest, so that every answer has text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"Word{number}" for number in range(len(names), 512)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Family:
    """A base model and all that comes of it.

    Attributes:
        aligned, surrogate: fp32.
        base, task: bf16; ``task`` carries vector and plan, so that it is served as it is.
        vector: Inside ``task``.
        plan: ``task/merge_plan.json``.
    """

    aligned: Path
    surrogate: Path
    base: Path
    task: Path
    vector: Path
    plan: Path


def make_family(
    aligned: Path,
    folder: Path,
    *,
    scope: str = "attention",
    beta: float = 0.5,
    norms: bool = False,
    store: Callable[[Path], object] = lambda _: None,
    extend: Callable[[Path], object] = lambda _: None,
) -> Family:
    """Everything from one fp32 model, by random changes in place of training.

    Base and task model are stored anew by ``store``; the task model is changed by ``extend``.
    """
    only = "self_attn" if scope == "attention" else ""
    surrogate = perturbed(aligned, folder / "surrogate", scale=2e-3, seed=1, only=only, norms=norms)
    base = perturbed(aligned, folder / "base", scale=0.0, seed=0, dtype=torch.bfloat16)
    task = perturbed(base, folder / "task", scale=2e-3, seed=2, norms=norms)
    extend(task)
    for model in (base, task):
        store(model)
    vector = task / "safety-vector"
    build_vector(locate(aligned), locate(surrogate), vector, scope=scope)
    plan = plan_for(task, base, vector, beta=beta)
    path = task / "merge_plan.json"
    path.write_text(plan.to_json())
    return Family(aligned, surrogate, base, task, vector, path)


def plan_for(task: Path, base: Path, vector: Path, **options: object) -> MergePlan:
    inside = vector.is_relative_to(task)
    return compute_plan(
        Location(task),
        Location(base),
        SafetyVector.open(vector),
        PlanOptions(**options),
        vector_location=VectorLocation(path=str(vector.relative_to(task))) if inside else None,
    )


def copy_family(family: Family, folder: Path) -> Family:
    """A copy to damage."""
    names = ("aligned", "surrogate", "base", "task")
    for name in names:
        shutil.copytree(getattr(family, name), folder / name)
    task = folder / "task"
    return Family(
        *(folder / name for name in names), task / "safety-vector", task / "merge_plan.json"
    )
