"""The first-order expansion of a model, or of its blocks, around where training starts.

With θ0 the weights at the start and θ those that train, a forward pass is replaced by

    f(x; θ0) + J(x; θ0) (θ − θ0)

computed by one Jacobian-vector product (`torch.func.jvp` over `torch.func.functional_call`), with
no Jacobian in memory. It is exactly linear in θ − θ0, and so is what is learned.

What ``module`` replaces. A layer that is linear in its own weights *is* its expansion: a
projection of the attention, a norm's scale, an embedding. Replacing those would cost a second
matrix product and change nothing, so they stay, and with the scope ``attention`` the whole mode
comes to ordinary attention-only training. What is not linear in its weights is a feed-forward
block: there two projections multiply each other behind an activation. So ``module`` replaces each
feed-forward block as a whole, experts and router included. The model between the blocks stays
itself: ``module`` makes each block linear in its weights, not the model.

``model`` replaces the whole decoder, from token ids to logits.

Parameters keep their names, and stay in the modules that they were in: only ``forward`` is
replaced. So checkpoints, optimisers and sharded training see an ordinary model, and what was
trained is an ordinary checkpoint.

Precision. Under bf16 autocast both terms are computed in bf16, each at its own magnitude, and
added in fp32. Ordinary bf16 training rounds θ itself: a change below 2⁻⁹ of its weight is not
seen by the forward pass at all; here it is.

Gradient checkpointing. In a replaced block the Jacobian-vector product is recomputed with its
layer. Of ``model`` the layers cannot be recomputed one by one, because they would be outside of
the product by then: their checkpointing is switched off inside, results are the same, and
activations take the memory of two forward passes.

Source: arXiv 2511.09880, its distillation stage; Ortiz-Jimenez, Favero and Frossard,
"Task Arithmetic in the Tangent Space", NeurIPS 2023, for the expansion.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from enchtable_vllm.distill.recipe import Linearize
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.vector import in_scope

Tensors = dict[str, torch.Tensor]


def linearize(model: nn.Module, mode: Linearize) -> list[str]:
    """Replace forward passes by their expansion around the weights as they are now.

    Args:
        model: A causal language model; the parameters that require a gradient are θ, all
            others are constants.
        mode: What is replaced.

    Returns:
        Names of what was replaced, ``""`` for the model itself. None for ``none``, and for
        ``module`` where no block trains that is not linear already.

    Raises:
        ConfigError: The attention's implementation has no forward-mode derivative.
    """
    if mode == "none":
        return []
    choose_forward_mode(model)
    if mode == "model":
        _linearize_model(model)
        return [""]
    chosen = blocks(model)
    for block in chosen.values():
        linearize_module(block)
    return list(chosen)


def choose_forward_mode(model: nn.Module) -> None:
    """Let a mixture of experts compute one expert after the other: grouped products have no J·d."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost feed-forward blocks that train."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if not inside and trains and in_scope(f"{name}.weight", "ffn"):
            found[name] = module
    return found


def linearize_module(module: nn.Module) -> None:
    """Replace one module's forward pass by its expansion in those of its weights that train."""
    expansion = _Expansion(module)

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return expansion(lambda call: call(*args, **kwargs))

    module.forward = forward


def first_order(
    function: Callable[[Tensors], Any], start: Tensors, change: Tensors
) -> tuple[Any, Any]:
    """(f(θ0), J(θ0)·change) of a function of weights.

    Args:
        function: Computes tensors from weights by name.
        start: θ0.
        change: θ − θ0, of the same names, shapes and dtypes.
    """
    # The fused attentions have no forward mode. And torch compiles some of its own rules for it
    # at their first use, with a function that it says is deprecated.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", DeprecationWarning)
        made = jvp(function, (start,), (change,))
    return made[0], made[1]


class _Original(nn.Module):
    """A module under the forward pass that it had, for `functional_call`, which calls modules."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._forward = module.forward

    def forward(self, work: Callable[[Callable[..., Any]], Any]) -> Any:
        return work(self._forward)


class _Expansion:
    """θ0 of one module, and the expansion around it.

    θ0 is no buffer of the module's: it is no part of a checkpoint, and need not be broadcast or
    sharded. It follows the parameters to their device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._original = _Original(module)
        self._start = {n: p.detach().clone() for n, p in _trained(self._original).items()}

    def __call__(self, work: Callable[[Callable[..., Any]], Any]) -> Any:
        theta = _trained(self._original)
        for name, parameter in theta.items():
            self._start[name] = self._start[name].to(parameter.device)
        value, tangent = first_order(
            lambda weights: functional_call(self._original, weights, (work,)),
            self._start,
            {name: parameter - self._start[name] for name, parameter in theta.items()},
        )
        return tree_map(_add, value, tangent)


def _trained(module: nn.Module) -> Tensors:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def _add(value: Any, tangent: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value  # an index has no derivative
    if value.dtype in (torch.bfloat16, torch.float16):  # there the sum would lose the small term
        return value.float() + tangent.float()
    return value + tangent


def _linearize_model(model: Any) -> None:
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in ("eager", "sdpa"):
        raise ConfigError(
            "--linearize model",
            expected="the attention 'eager' or 'sdpa', which have a forward-mode derivative",
            got=f"'{attention}'",
            fix="Give --attention sdpa.",
        )
    expansion = _Expansion(model)

    @functools.wraps(model.forward)
    def forward(*args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Expands the logits; the loss is computed from their expansion."""
        from transformers.modeling_outputs import CausalLMOutput

        counted = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        kwargs["use_cache"] = False
        with _without_checkpointing(model):
            logits = expansion(lambda call: call(*args, **kwargs).logits)
        loss = None
        if labels is not None:
            vocabulary = logits.shape[-1]
            loss = model.loss_function(
                logits=logits, labels=labels, vocab_size=vocabulary, **counted
            )
        return CausalLMOutput(loss=loss, logits=logits)

    model.forward = forward


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Layers that would be recomputed after the product has ended are not.

    Nor is there any need then for embeddings that require a gradient, which transformers sees to
    with a hook that cannot run inside the product.
    """
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()  # type: ignore[operator]
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
