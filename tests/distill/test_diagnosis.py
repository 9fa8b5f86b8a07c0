"""Linearity and disentanglement, against slow and plain computations of their definitions."""

import copy
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from enchtable_vllm.distill.answers import batches
from enchtable_vllm.distill.data import Pair
from enchtable_vllm.distill.disentangle import measure_disentanglement
from enchtable_vllm.distill.encode import collator, encode
from enchtable_vllm.distill.linearity import measure_linearity

CPU = torch.device("cpu")


@pytest.fixture
def model(aligned):
    return AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float64).eval()


@pytest.fixture
def examples(tokenizer):
    pairs = [Pair(i, f"question {'x' * i}", f"Sure {i}:") for i in range(5)]
    return encode(tokenizer, pairs, max_length=100)[0]


def data(model, tokenizer, examples):
    return list(batches(examples, collator(model, tokenizer), size=2, device=CPU))


def noise(model, only, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale
        for name, p in model.named_parameters()
        if only in name and p.ndim == 2
    }


def shifted(model, *changes):
    """A copy with other weights."""
    out = copy.deepcopy(model)
    for factor, change in changes:
        for name, parameter in out.named_parameters():
            if name in change:
                parameter.data += factor * change[name]
    return out


def one_by_one(model, examples):
    """Answer tokens' logits and targets of each pair alone: no padding, no batch."""
    with torch.no_grad():
        for example in examples:
            ids, count = torch.tensor([example["input_ids"]]), example["answer_length"]
            yield model(input_ids=ids).logits[0, -count - 1 : -1], ids[0, -count:]


def plain_loss(model, examples):
    total = tokens = 0
    for logits, targets in one_by_one(model, examples):
        total += float(cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
    return total / tokens


def says(model, examples):
    return torch.cat([logits.argmax(-1) for logits, _ in one_by_one(model, examples)])


def test_curves_are_the_losses_and_slopes_of_the_model_itself(model, tokenizer, examples):
    change = noise(model, "self_attn", 0.02)
    found = measure_linearity(model, change, data(model, tokenizer, examples), points=5)
    assert found.t == (0, 0.25, 0.5, 0.75, 1)
    assert found.tokens == sum(e["answer_length"] for e in examples)
    for t, loss in zip(found.t, found.actual, strict=True):
        expected = plain_loss(shifted(model, (t, change)), examples)
        assert loss == pytest.approx(expected, rel=1e-6)
    assert found.expanded[0] == pytest.approx(found.actual[0], rel=1e-12)
    h = 1e-3
    ends = [plain_loss(shifted(model, (s * h, change)), examples) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert found.derivative == pytest.approx(slope, rel=1e-3)
    assert found.tangent[4] == pytest.approx(found.actual[0] + found.derivative, rel=1e-12)
    assert found.expanded[4] != pytest.approx(found.actual[4], rel=1e-5)


def test_a_change_that_the_logits_are_linear_in_has_no_error(model, tokenizer, examples):
    change = noise(model, "lm_head", 0.2)
    found = measure_linearity(model, change, data(model, tokenizer, examples), points=3)
    assert found.logit_error < 1e-6
    assert found.loss_error < 1e-6
    assert found.actual[1] != pytest.approx(found.tangent[1], rel=1e-4)  # a loss bends anyway


def test_the_error_grows_with_the_change(model, tokenizer, examples):
    batch = data(model, tokenizer, examples)
    small, large = (
        measure_linearity(model, noise(model, "self_attn", s), batch, points=2).logit_error
        for s in (1e-3, 0.1)
    )
    assert 0 < small < 0.1 < large


def test_nothing_changed_has_no_error_to_speak_of(model, tokenizer, examples):
    change = {n: torch.zeros_like(d) for n, d in noise(model, "self_attn", 1).items()}
    found = measure_linearity(model, change, data(model, tokenizer, examples), points=2)
    assert (found.logit_error, found.loss_error) == (None, None)


def test_disentanglement_is_its_definition(model, tokenizer, examples):
    task, safety = noise(model, "mlp", 0.05, seed=1), noise(model, "self_attn", 0.2, seed=2)
    one, two = examples[:3], examples[3:]
    grid = (-1.0, 0.0, 0.5)
    found = measure_disentanglement(
        model,
        task,
        safety,
        data(model, tokenizer, one),
        data(model, tokenizer, two),
        alphas=grid,
    )
    for (i, a), (j, b) in itertools.product(enumerate(grid), enumerate(grid)):
        both = shifted(model, (a, task), (b, safety))
        alone = says(shifted(model, (a, task)), one), says(shifted(model, (b, safety)), two)
        expected = sum(
            float((says(both, part) != own).double().mean())
            for part, own in zip((one, two), alone, strict=True)
        )
        assert found.error[i][j] == pytest.approx(expected)
    assert found.error[1][1] == 0
    assert found.mean == pytest.approx(sum(found.error[i][j] for i in (0, 2) for j in (0, 2)) / 4)
    assert found.mean > 0
