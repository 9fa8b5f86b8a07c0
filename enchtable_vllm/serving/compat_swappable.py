"""Which engines vLLM cannot exchange weights of; see `compat_swap` for how it exchanges them.

Read of vLLM's configs, and besides:

* ``KVConnectorFactory.get_connector_class`` and the connectors' ``reset_cache``: whether a swap
  could clear what is kept there;
* ``kv_connector_extra_config`` of ``MultiConnector`` (``connectors``) and of
  ``OffloadingConnector`` (``spec_name``): what they pass a reset on to;
* attributes of layers (`_MARKERS`, `_KEPT`), read only, and whether the model has a step after
  loading of its own;
* ``offload_config.prefetch``: whether layers share memory on the device, and where the weights
  that last are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from enchtable_vllm.vector.scope import in_scope

__all__ = [
    "connector_that_keeps",
    "not_given_back",
    "why_not_swappable",
]

#: What `OffloadingConnector` offloads to by default: host memory, which a reset clears.
_CLEARED = "CPUOffloadingSpec"
#: What a layer has that vLLM takes apart when it loads, and cannot load again.
_MARKERS = {
    "_moonep_weight_layout": "experts as MoonEP lays them out, which vLLM does not reload",
    "_bf16x3_weight": "a router that vLLM splits for this GPU, and does not put back",
    "_combined_gate_weight": "a router that vLLM joins with another, and does not join anew",
}
#: What a layer computes of attention's weights when it is first used, and keeps.
_KEPT = "_merged_conv_weight"
_ELSEWHERE = (
    "layers are prefetched from host memory (--offload-group-size): vLLM reloads the copies on the "
    "device, which several layers share, and would go on with the old ones"
)


def why_not_swappable(worker: Any) -> str | None:
    """What about a rank's engine keeps any vector from being exchanged; None: nothing."""
    config = worker.vllm_config
    if method := config.model_config.quantization:
        return (
            f"the model is quantised while it loads ({method}), and vLLM does not give such a "
            "model its weights back when it reloads"
        )
    if reason := _keeps_weights_elsewhere(config):
        return reason
    if connector := connector_that_keeps(config.kv_transfer_config):
        return (
            f"KV connector {connector} keeps what was computed with other weights: vLLM cannot "
            "clear it, and it would be used with the new ones"
        )
    if reason := _keeps_what_was_computed(worker.model_runner.get_model()):
        return reason
    parallel = config.parallel_config
    alone = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    if parallel.data_parallel_size > 1 and alone and config.model_config.is_moe:
        return (
            "its engines are those of several servers (external or hybrid load balancing of a "
            "mixture of experts), which stop together, and this server reaches its own alone"
        )
    return None


def _keeps_weights_elsewhere(config: Any) -> str | None:
    """Why a reload would not reach the weights that last; None: it does."""
    offload = getattr(config, "offload_config", None)
    prefetch = getattr(offload, "prefetch", None)
    if offload is None or prefetch is None or offload.offload_backend == "uva":
        return None
    return _ELSEWHERE if prefetch.offload_group_size > 0 else None


def _keeps_what_was_computed(model: torch.nn.Module) -> str | None:
    """What the model computes of its weights once, and would go on with; None: nothing."""
    if hasattr(model, "process_weights_after_loading"):
        return (
            "the model ends its loading with a step of its own, which vLLM leaves out when it "
            "reloads weights"
        )
    if any(getattr(module, _KEPT, None) is not None for module in model.modules()):
        return "the model joins convolutions of its attention once, and vLLM would go on with those"
    return None


def connector_that_keeps(config: Any) -> str | None:
    """The KV connector that a reset of caches does not reach; vLLM takes that for a success."""
    if config is None or config.kv_connector is None:
        return None
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    name, further = str(config.kv_connector), config.kv_connector_extra_config or {}
    with suppress(Exception):  # one that is not known here is not known to be cleared
        if name == "MultiConnector":
            for one in further["connectors"]:
                if found := connector_that_keeps(KVTransferConfig(**one)):
                    return f"{name}'s {found}"
            return None
        if name == "OffloadingConnector" and further.get("spec_name", _CLEARED) != _CLEARED:
            return f"{name} ({further['spec_name']})"  # other tiers are left as they are
        connector = KVConnectorFactory.get_connector_class(config)
        if connector.reset_cache is not KVConnectorBase_V1.reset_cache:
            return None
    return name


def not_given_back(worker: Any, names: Sequence[str]) -> tuple[list[str], str]:
    """The checkpoint's tensors that a reload would lose or misplace, and why: experts.

    Checkpoints name them in many ways: where a model has any, all but attention counts as theirs.
    """
    model: torch.nn.Module = worker.model_runner.get_model()
    why = _why_not_given_back(model, worker.vllm_config.parallel_config.enable_eplb)
    return [name for name in names if why and not in_scope(name, "attention")], why


def _why_not_given_back(model: torch.nn.Module, balanced: bool) -> str:
    for marker, why in _MARKERS.items():
        if any(getattr(module, marker, None) is not None for module in model.modules()):
            return why
    if not any("experts" in name.split(".") for name, _ in model.named_modules()):
        return ""
    if balanced:
        return "experts, which vLLM moves between ranks (--enable-eplb) and reloads where they were"
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        return "experts, which vLLM's CPU build packs and does not give back"
    return ""
