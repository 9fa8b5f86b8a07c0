"""The shapes of real models, from 0.1B to 1T parameters: what costs are derived for.

From their published configurations; a matrix is (rows, columns) of the stored weight, and an
expert's matrices count once for each expert.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped queries.

    Attributes:
        name: Its family's.
        layers, hidden, queries, keys, ffn, vocabulary: Of its configuration; ``queries`` and
            ``keys`` are the widths of all heads together.
        experts: In each layer, with ``ffn`` for one of them; 0: a dense model.
        tied: Whether the head is the embedding.
    """

    name: str
    layers: int
    hidden: int
    queries: int
    keys: int
    ffn: int
    vocabulary: int
    experts: int = 0
    tied: bool = False

    def attention(self) -> Counter[Shape]:
        """The matrices of attention, how often each shape."""
        found: Counter[Shape] = Counter()
        for shape, count in (
            ((self.queries, self.hidden), 1),
            ((self.keys, self.hidden), 2),
            ((self.hidden, self.queries), 1),
        ):
            found[shape] += count * self.layers
        return found

    def feed_forward(self) -> Counter[Shape]:
        """Those of the feed-forward layers: every expert's."""
        each = self.layers * max(1, self.experts)
        return Counter({(self.ffn, self.hidden): 2 * each, (self.hidden, self.ffn): each})

    @property
    def attention_parameters(self) -> int:
        """What a vector of the scope 'attention' holds."""
        return _elements(self.attention())

    @property
    def matrix_parameters(self) -> int:
        """What a vector of the scope 'attention+ffn' holds."""
        return self.attention_parameters + _elements(self.feed_forward())

    @property
    def parameters(self) -> int:
        """All, but for norms and biases, which are thousands."""
        heads = 1 if self.tied else 2
        router = self.layers * self.experts * self.hidden
        return self.matrix_parameters + heads * self.vocabulary * self.hidden + router


def random_of(layers: int, hidden: int) -> Architecture:
    """Of the random model that plans are measured on: SmolLM2-135M's proportions, no embedding."""
    return Architecture("random", layers, hidden, hidden, hidden // 3, hidden * 8 // 3, 0)


def _elements(shapes: Counter[Shape]) -> int:
    return sum(rows * columns * count for (rows, columns), count in shapes.items())


SMOLLM2_135M = Architecture("SmolLM2-135M", 30, 576, 576, 192, 1536, 49152, tied=True)
LLAMA_1B = Architecture("Llama-3.2-1B", 16, 2048, 2048, 512, 8192, 128256, tied=True)
LLAMA_3B = Architecture("Llama-3.2-3B", 28, 3072, 3072, 1024, 8192, 128256, tied=True)
LLAMA_8B = Architecture("Llama-3.1-8B", 32, 4096, 4096, 1024, 14336, 128256)
LLAMA_70B = Architecture("Llama-3.1-70B", 80, 8192, 8192, 1024, 28672, 128256)
LLAMA_405B = Architecture("Llama-3.1-405B", 126, 16384, 16384, 1024, 53248, 128256)
#: No one model: 61 layers of 384 experts, as the largest open ones have, with grouped queries.
EXPERTS_1T = Architecture("1T mixture of experts", 61, 7168, 8192, 1024, 2048, 163840, experts=384)

#: What the cost of a plan is shown for.
GROWING = (SMOLLM2_135M, LLAMA_1B, LLAMA_3B, LLAMA_8B, LLAMA_70B)
