"""How the models are trained, and which vectors are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from blake3 import blake3

from enchtable_vllm.demo import checkpoints, data, fetch
from enchtable_vllm.demo.train import aligning, brief
from enchtable_vllm.distill.recipe import Recipe


@dataclass(frozen=True)
class Models:
    """Everything but the vector.

    Attributes:
        problems: How many word problems the fine-tune learns.
        eager: How many every-day answers, opened by `data.EAGER`, it learns besides: so that it
            still answers in words, and openly.
        refused_times: How often the aligned model learns each of its few refusals, for every
            time that it learns one of its thousands of answers.
        align, task: All matrices of the decoder.
        expert: SafeDecoding's: a LoRA adapter of the fine-tune that learns to refuse.
    """

    problems: int = 900
    eager: int = 400
    refused_times: int = 3
    align: Recipe = field(default_factory=aligning)
    task: Recipe = field(default_factory=lambda: brief(scope="attention+ffn", learning_rate=3e-4))
    expert: Recipe = field(default_factory=lambda: brief(scope="attention", learning_rate=1e-3))


@dataclass(frozen=True)
class Variant:
    """One vector.

    Attributes:
        name: In the vector root.
        recipe: Of its surrogate.
        share: How much of the pairs it learns.
        harmless_for_each: So many harmless requests for each opening. Few of them, and the vector
            holds refusing as such; with more it holds refusing what is harmful.
        harmless: What the surrogate learns beside to say to every-day requests. ``answered``: what
            the shipped model does, which keeps it from changing there. ``refused``: so that its
            difference to the aligned model holds not only what refuses, but what tells apart.
        attenuated: Whether the plan attenuates; without, every matrix takes the norm scale.
        of: The vector that this one is: it is not trained anew.
        feed_forward: What that one's feed-forward matrices are multiplied by; so, for every β,
            theirs is another than attention's.
    """

    name: str
    recipe: Recipe
    share: float = 1.0
    harmless_for_each: int = 4
    harmless: Literal["answered", "refused", "none"] = "answered"
    attenuated: bool = True
    of: str | None = None
    feed_forward: float = 1.0

    def seeded(self, seed: int) -> Variant:
        """The same, trained in another order."""
        return replace(self, recipe=replace(self.recipe, seed=seed))


_DISTIL = brief(scope="attention", learning_rate=2e-4)
MAIN = Variant("main", _DISTIL)
ABLATIONS = (
    Variant("unattenuated", _DISTIL, attenuated=False, of=MAIN.name),
    Variant("fewer-anchors", _DISTIL, harmless_for_each=1),
    Variant("unanchored", _DISTIL, harmless="none"),
    Variant("contrasted", _DISTIL, harmless="refused"),
    Variant("ffn", replace(_DISTIL, scope="ffn")),
    Variant("attention-ffn", replace(_DISTIL, scope="attention+ffn")),
    *(
        Variant(
            f"attention-ffn-{share:g}",
            replace(_DISTIL, scope="attention+ffn"),
            of="attention-ffn",
            feed_forward=share,
        )
        for share in (0.5, 2.0)
    ),
    Variant("ffn-linear", replace(_DISTIL, scope="ffn", linearize="module")),
    Variant("quarter-data", _DISTIL, share=0.25),
    Variant("half-steps", replace(_DISTIL, epochs=1)),
    Variant("double-steps", replace(_DISTIL, epochs=4)),
    Variant("published-rate", replace(_DISTIL, epochs=4, learning_rate=1e-5)),
)


def digest(*what: object) -> str:
    """Names what is made by these recipes of these questions, so that nothing else mixes with it.

    Args:
        what: Whatever it depends on, besides the words that all models learn.
    """
    words = data.REFUSALS, data.OPENINGS, data.EAGER, checkpoints.ANSWER_TOKENS, fetch.CHAT_TEMPLATE
    return blake3(repr((words, what)).encode()).hexdigest()[:12]
