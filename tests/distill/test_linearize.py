"""First-order expansions: against finite differences and reverse mode, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_moe import modeling_qwen3_moe

from enchtable_vllm.distill.linearize import (
    blocks,
    choose_forward_mode,
    linearize,
    linearize_module,
)
from enchtable_vllm.distill.parameters import choose_parameters
from enchtable_vllm.errors import ConfigError


class _Double:
    """torch, to which fp32 is fp64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _norms_and_softmax_in_the_models_own_dtype(monkeypatch):
    """transformers computes both in fp32, whatever the model is in: 1e-7 in place of 1e-16."""
    for module in (modeling_llama, modeling_qwen3_moe):
        monkeypatch.setattr(module, "torch", _Double())


SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(*, tied=False, attention="sdpa", dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, tie_word_embeddings=tied, initializer_range=0.2, attn_implementation=attention
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def batch():
    ids = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def step(model, scale=0.02):
    """Move every parameter that trains; returns how, by name."""
    generator = torch.Generator().manual_seed(2)
    moves = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            moves[name] = noise * scale
            parameter.data += moves[name]
    return moves


def reverse_mode_jvp(function, start, change):
    """J·change by the double-backward trick: no forward mode in it."""
    names = list(start)
    _, tangent = torch.autograd.functional.jvp(
        lambda *values: function(dict(zip(names, values, strict=True))),
        tuple(start[n] for n in names),
        tuple(change[n] for n in names),
    )
    return tangent


def central_difference(function, start, change, h=1e-4):
    """O(h⁴) by Richardson's extrapolation of two central differences."""

    def at(t):
        return function({n: start[n] + t * change[n] for n in start})

    def slope(h):
        return (at(h) - at(-h)) / (2 * h)

    return (4 * slope(h / 2) - slope(h)) / 3


@pytest.mark.parametrize("oracle", [reverse_mode_jvp, central_difference])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scope", ["attention", "all"])
def test_the_whole_model_is_f_plus_jd(scope, tied, attention, oracle):
    # the oracles differentiate through the eager model, which has both modes
    plain = tiny(tied=tied, attention="eager")
    model = tiny(tied=tied, attention=attention)
    names = choose_parameters(model, scope)
    linearize(model, "model")
    moves = step(model)
    start = {n: p.detach() for n, p in plain.named_parameters() if n in names}

    def logits(weights):
        return functional_call(plain, weights, (), batch()).logits

    with torch.no_grad():
        got = model(**batch()).logits
    expected = (logits(start) + oracle(logits, start, moves)).detach()
    tolerance = 1e-11 if oracle is reverse_mode_jvp else 1e-8
    assert (expected - logits(start)).abs().max() > 0.05  # there is something to get right
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("oracle", [reverse_mode_jvp, central_difference])
def test_a_block_is_f_plus_jd(oracle):
    block = tiny().model.layers[0].mlp
    plain = copy.deepcopy(block)
    linearize_module(block)
    moves = step(block)
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    start = {n: p.detach() for n, p in plain.named_parameters()}

    def f(weights):
        return functional_call(plain, weights, (x,))

    expected = (f(start) + oracle(f, start, moves)).detach()
    tolerance = 1e-12 if oracle is reverse_mode_jvp else 1e-8
    torch.testing.assert_close(block(x).detach(), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        own = functional_call(plain, {n: start[n] + moves[n] for n in start}, (x,))
    assert (own - expected).abs().max() > 1e-3  # an MLP is not its own expansion


@pytest.mark.parametrize("mode", ["module", "model"])
def test_it_is_exactly_linear_in_the_change(mode):
    """Outputs at θ0 + s·d are on one line, for a block with a fixed input and for the model."""
    model = tiny()
    choose_parameters(model, "ffn")
    linearize(model, mode)
    if mode == "module":
        part, x = model.model.layers[1].mlp, torch.randn(2, 5, 32, dtype=torch.float64)
    else:
        part = model

    def run():
        return part(x) if mode == "module" else part(**batch()).logits

    with torch.no_grad():
        zero = run()
        moves = step(part)
        one = run()
        for factor in (-3.0, 0.5, 10.0):
            for name, parameter in part.named_parameters():
                if name in moves:
                    parameter.data += moves[name] * (factor - 1)
            torch.testing.assert_close(run(), zero + factor * (one - zero), rtol=0, atol=1e-11)
            for name, parameter in part.named_parameters():
                if name in moves:
                    parameter.data -= moves[name] * (factor - 1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_lone_linear_layer_is_its_own_expansion(bias):
    torch.manual_seed(0)
    layer = nn.Linear(8, 5, bias=bias, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    linearize_module(layer)
    moves = step(layer, scale=1.0)
    for name, parameter in plain.named_parameters():
        parameter.data += moves[name]
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-14)


def test_attention_has_no_block_to_replace():
    model = tiny()
    choose_parameters(model, "attention")
    assert linearize(model, "module") == []
    choose_parameters(model, "attention+ffn")
    assert list(blocks(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_experts_and_their_router_are_one_block():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    )
    model = Qwen3MoeForCausalLM(config).double().eval()
    choose_parameters(model, "ffn")
    choose_forward_mode(model)
    assert list(blocks(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    before = model(**batch()).logits
    linearize(model, "module")
    torch.testing.assert_close(model(**batch()).logits, before, rtol=0, atol=1e-12)
    step(model, 1e-3)
    model(**batch()).logits.sum().backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["module", "model"])
def test_gradients_reach_theta_alone_and_the_start_stays(mode):
    model = tiny(tied=True)
    names = choose_parameters(model, "ffn")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    linearize(model, mode)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = batch()["input_ids"]
    outputs = []
    for _ in range(3):
        loss = model(**batch(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        outputs.append(float(loss.detach()))
    assert outputs[2] < outputs[1] < outputs[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (name in names)
        assert torch.equal(parameter, before[name]) is (name not in names)
    # θ0 stayed: at θ = θ0 the expansion is still the model that it was
    model.load_state_dict(before, strict=False)
    plain = tiny(tied=True)(**batch()).logits
    torch.testing.assert_close(model(**batch()).logits, plain, rtol=0, atol=1e-12)


def test_the_gradient_of_the_expansion_is_the_models_own_at_the_start():
    """∂/∂θ of f(θ0) + J(θ − θ0) at θ0 is J: the same as without; away from θ0 it is not."""
    gradients = []
    for mode in ("none", "model"):
        model = tiny()
        choose_parameters(model, "all")
        linearize(model, mode)
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("mode", "reentrant"), [("module", False), ("module", True), ("model", False)]
)
def test_gradient_checkpointing_changes_nothing(mode, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        choose_parameters(model, "attention+ffn")
        linearize(model, mode)
        step(model, 0.01)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["module", "model"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_autocast_over_fp32_weights(mode, checkpointing):
    """Close to fp32; gradients are fp32; and a second pass sees no cast of the first."""
    results = []
    for autocast in (False, True):
        model = tiny(dtype=torch.float32)
        choose_parameters(model, "attention+ffn")
        linearize(model, mode)
        step(model, 0.01)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch(), labels=batch()["input_ids"]).loss
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    (loss, gradient), (rounded_loss, rounded) = results
    assert abs(loss - rounded_loss) < 0.02 * loss
    assert torch.cosine_similarity(gradient, rounded, 0) > 0.99


def test_bf16_sees_a_change_that_rounding_the_weight_would_swallow():
    """2⁻¹² of a weight: ordinary bf16 gives the same output bits, the expansion J·d."""
    torch.manual_seed(0)
    block = tiny(dtype=torch.float32).model.layers[0].mlp
    x = torch.randn(4, 32)
    for parameter in block.parameters():
        parameter.data = parameter.data.bfloat16().float()
    plain, expanded, exact = (copy.deepcopy(block) for _ in range(3))
    linearize_module(expanded)
    changes = []
    for module, autocast in ((plain, True), (expanded, True), (exact, False)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = module(x)
            for parameter in module.parameters():
                parameter.data *= 1 + 2**-12
            changes.append((module(x) - before).float())
    assert not changes[0].any()
    assert (changes[1] - changes[2]).norm() < 0.02 * changes[2].norm()


def test_one_autocast_context_may_hold_many_passes():
    """Autocast keeps casts of weights until it ends: none may be one of θ0 or of a product."""
    model = tiny(dtype=torch.float32)
    choose_parameters(model, "all")
    linearize(model, "model")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        step(model, 0.05)
        second = model(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch()).logits, second, rtol=0, atol=0)


def test_an_attention_without_forward_mode_is_refused():
    model = tiny()
    choose_parameters(model, "attention")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="eager"):
        linearize(model, "model")


@pytest.mark.parametrize("mode", ["module", "model"])
def test_names_stay(mode):
    """So that checkpoints and optimisers see an ordinary model."""
    model = tiny()
    choose_parameters(model, "attention+ffn")
    names = [n for n, _ in model.named_parameters()]
    keys = list(model.state_dict())
    assert linearize(model, mode)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
