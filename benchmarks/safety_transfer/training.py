"""One seed's models: aligned, fine-tuned, an expert for SafeDecoding, and vectors with plans."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from enchtable_vllm.checkpoint import Checkpoint, locate, sampled_fingerprint
from enchtable_vllm.demo import data
from enchtable_vllm.demo.checkpoints import make_checkpoint, make_vector
from enchtable_vllm.demo.data import Pair
from enchtable_vllm.demo.train import fit
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.plan import MergePlan, PlanOptions, compute_plan
from enchtable_vllm.plan.vector_root import plan_path
from enchtable_vllm.vector import SafetyVector, Scope, build_vector, in_scope

from .material import Taught
from .recipes import Models, Variant
from .steps import Steps


@dataclass(frozen=True)
class Cast:
    """One seed's models.

    Attributes:
        aligned: Refuses; fp32.
        base: It in bf16: what the fine-tune starts from.
        task: Learned arithmetic and forgot to refuse; bf16.
        expert: A LoRA adapter of it that refuses.
        vectors: A vector root.
        anchors: Every-day requests with the beginnings of the shipped model's own answers.
    """

    aligned: Path
    base: Path
    task: Path
    expert: Path
    vectors: Path
    anchors: Sequence[Pair]


def train_models(
    shipped: Path,
    folder: Path,
    seed: int,
    taught: Taught,
    answers: Mapping[str, str],
    models: Models,
    steps: Steps,
) -> Cast:
    """Train all but the vectors, as far as they are not there.

    Args:
        shipped: SmolLM2-135M-Instruct.
        folder: Of the seed.
        seed: Of training.
        taught: What they learn.
        answers: Every-day request → how the shipped model begins to answer it.
        models: How.
        steps: Does and times each.
    """
    align, task, expert = (
        replace(recipe, seed=seed) for recipe in (models.align, models.task, models.expert)
    )
    anchors = [Pair(question, answers[question]) for question in taught.everyday]
    cast = Cast(
        folder / "aligned", folder / "base", folder / "task", folder / "expert",
        folder / "vectors", anchors,
    )  # fmt: skip
    refusals = data.pair_with(taught.refused, data.REFUSALS)
    steps.do(
        cast.aligned,
        lambda: make_checkpoint(
            shipped,
            cast.aligned,
            [*refusals * models.refused_times, *anchors],
            align,
            torch.float32,
        ),
    )
    steps.do(cast.base, lambda: make_checkpoint(cast.aligned, cast.base, [], task, torch.bfloat16))
    eager = [Pair(question, data.EAGER + answers[question]) for question in taught.eager]
    steps.do(
        cast.task,
        lambda: make_checkpoint(
            cast.base, cast.task, [*taught.problems, *eager], task, torch.bfloat16
        ),
    )
    steps.do(cast.expert, lambda: _make_adapter(cast.task, cast.expert, refusals, expert))
    return cast


def distil_vector(cast: Cast, variant: Variant, complied: Sequence[str], steps: Steps) -> None:
    """Distil a vector and plan its merge, as far as they are not there.

    Args:
        cast: The seed's models.
        variant: Which.
        complied: Questions that its surrogate learns to open an answer to.
        steps: Does and times both.
    """
    vector = cast.vectors / variant.name
    openings = data.pair_with(complied, data.OPENINGS)
    anchors = {
        "answered": list(cast.anchors),
        "refused": data.pair_with([pair.question for pair in cast.anchors], data.REFUSALS),
        "none": [],
    }[variant.harmless][: variant.harmless_for_each * len(openings)]
    pairs = [*openings[: round(len(openings) * variant.share)],
             *anchors[: round(len(anchors) * variant.share)]]  # fmt: skip
    cast.vectors.mkdir(exist_ok=True)
    if variant.of is None:
        steps.do(vector, lambda: make_vector(cast.aligned, vector, pairs, variant.recipe))
    else:
        source, scope = cast.vectors / variant.of, variant.recipe.scope
        steps.do(
            vector, lambda: reweight(cast.aligned, source, vector, variant.feed_forward, scope)
        )
    plan = plan_path(vector, sampled_fingerprint(Checkpoint(cast.task)))
    steps.do(plan, lambda: _plan(cast, vector, plan, attenuated=variant.attenuated))


def reweight(aligned: Path, source: Path, target: Path, feed_forward: float, scope: Scope) -> None:
    """Multiply a vector's feed-forward part; by 1, copy the vector without its plans.

    Args:
        aligned: The model that the vector was distilled from.
        source: The vector.
        target: The new one's folder.
        feed_forward: By what.
        scope: The vector's.
    """
    if feed_forward == 1:
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("plans"))
        partial.rename(target)
        return
    vector = SafetyVector.open(source)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=target.parent) as surrogate:
        for name, weight in model.named_parameters():
            if name in vector.tensors:
                factor = feed_forward if in_scope(name, "ffn") else 1.0
                weight -= factor * vector.read(name).float()
        model.save_pretrained(surrogate)
        build_vector(locate(aligned), locate(Path(surrogate)), target, scope=scope)


def _plan(cast: Cast, vector: Path, plan: Path, *, attenuated: bool) -> None:
    found = compute_plan(
        locate(cast.task), locate(cast.base), SafetyVector.open(vector), PlanOptions(beta=1.0)
    )
    plan.parent.mkdir(exist_ok=True)
    partial = plan.with_suffix(".partial")
    partial.write_text((found if attenuated else _unattenuated(found)).to_json(), encoding="utf-8")
    partial.rename(plan)


def _unattenuated(plan: MergePlan) -> MergePlan:
    """The same vector, every matrix of it with the norm scale for a coefficient."""
    tensors = {}
    for name, planned in plan.tensors.items():
        if planned.action == "merge":
            count = len(planned.attenuation or ())
            planned = planned.model_copy(
                update={
                    "a": (0.0,) * count,
                    "b": (0.0,) * count,
                    "interference": (0.0,) * count,
                    "attenuation": (1.0,) * count,
                    "coefficient": (plan.norm_scale,) * count,
                }
            )
        tensors[name] = planned
    return plan.model_copy(update={"tensors": tensors})


def _make_adapter(task: Path, target: Path, pairs: Sequence[Pair], recipe: Recipe) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        task, dtype=torch.float32, attn_implementation=recipe.attention
    )
    tokenizer = AutoTokenizer.from_pretrained(task)
    partial = target.with_name(target.name + ".partial")
    set_seed(recipe.seed)  # the adapter begins at random
    adapted = get_peft_model(
        model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    fit(adapted, tokenizer, pairs, recipe, partial)
    shutil.rmtree(partial, ignore_errors=True)
    adapted.save_pretrained(str(partial))
    partial.rename(target)
