"""Everything of vLLM's that is touched, in one place.

Which versions were tested: `versions`, and docs/versions.md. Public extension points:
``register_model_loader``, ``BaseModelLoader``, ``get_model_loader``, ``init_logger``,
``load_general_plugins``. Internals, each named where used:

* ``ep_weight_filter.should_skip_weight`` and the inner loader's ``local_expert_ids``, to tell
  an expert of another rank from a tensor that went missing;
* the inner loader's ``load_config.load_format``, to know whose tensors stay valid;
* ``ModelConfig.runner_type == "draft"``, to leave draft models alone;
* ``ModelConfig.model``, ``revision`` and ``model_weights``, to read the weights from the folder
  that was checked;
* ``VllmConfig.weight_transfer_config``: weights that come by another way than a loader;
* ``AggregateStatLoggerBase``, what a stat logger must be.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from enchtable_vllm.errors import ConfigError

__all__ = [
    "BaseModelLoader",
    "LoadConfig",
    "ModelConfig",
    "VllmConfig",
    "all_weights",
    "architectures",
    "hands_over_what_is_stored",
    "inner_loader",
    "is_draft",
    "is_skipped_expert",
    "loader_by_plugins",
    "logger",
    "missing_for_swapping",
    "pin_format",
    "read_from",
    "refuse_weight_transfer",
    "register",
    "served_dtype",
    "shows_progress",
    "stat_logger_base",
    "target_device",
]


def logger(name: str) -> logging.Logger:
    """A logger that workers do not drop: they keep the ``vllm`` namespace only."""
    return cast(logging.Logger, init_logger(f"vllm.enchtable.{name}"))


def register(load_format: str, make: Callable[[LoadConfig], BaseModelLoader]) -> None:
    """Make a load format known in this process; its loader is made when it is asked for."""

    class EnchTableModelLoader(BaseModelLoader):  # type: ignore[misc]  # vllm is untyped here
        """Stands in for the loader, because vLLM wants a class and the loader is not imported."""

        def __new__(cls, load_config: LoadConfig) -> Any:
            return make(load_config)

    model_loader.register_model_loader(load_format)(EnchTableModelLoader)


def loader_by_plugins(load_format: str) -> str:
    """Load the general plugins, as each of vLLM's processes does, and make a format's loader.

    Returns:
        The loader's class.

    Raises:
        ValueError: VLLM does not know the format.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    kind = type(model_loader.get_model_loader(LoadConfig(load_format=load_format)))
    return f"{kind.__module__}.{kind.__qualname__}"


def inner_loader(load_config: LoadConfig, load_format: str, extra: dict[str, Any]) -> Any:
    """VLLM's own loader for the stored weights, without its progress bar.

    Raises:
        ConfigError: vLLM has no such format, refuses its extra config, or the format does not
            yield weights one by one, so that nothing could be merged into them.
    """
    try:
        inner = model_loader.get_model_loader(
            dataclasses.replace(
                load_config,
                load_format=load_format,
                model_loader_extra_config=extra,
                use_tqdm_on_load=False,
            )
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "model_loader_extra_config, 'inner_load_format' and 'inner_extra_config'",
            expected="a load format of vLLM's with an extra config that it accepts",
            got=f"'{load_format}' with {extra}: {error}",
            fix="See 'vllm serve --help=load-format'; 'auto' is the default.",
        ) from error
    if not hasattr(inner, "get_all_weights"):
        raise ConfigError(
            "model_loader_extra_config, 'inner_load_format'",
            expected="a format that yields checkpoint tensors, such as 'auto' or 'safetensors'",
            got=f"'{load_format}'",
            fix="Leave it out, or choose such a format.",
        )
    return inner


def pin_format(inner: Any, load_format: str) -> None:
    """Settle which files the inner loader reads: ``auto`` would look into the folder again."""
    inner.load_config.load_format = load_format


def all_weights(
    inner: Any, model_config: ModelConfig, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored weights, under their checkpoint names."""
    return cast(Iterator[tuple[str, torch.Tensor]], inner.get_all_weights(model_config, model))


def hands_over_what_is_stored(inner: Any) -> bool:
    """Whether this loader yields each tensor of the files as they hold it, under its own name.

    vLLM's own readers do. Others may stream from somewhere else, or convert.
    """
    return inner.load_config.load_format in ("auto", "hf", "safetensors", "pt", "mistral")


def is_skipped_expert(inner: Any, name: str) -> bool:
    """Whether vLLM leaves this tensor to another rank (expert parallelism)."""
    local = getattr(inner, "local_expert_ids", None)
    if local is None:
        return False
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, local))


def is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether this is a speculative draft, which inherits the load format of its target."""
    speculates = vllm_config.speculative_config is not None
    return bool(speculates and model_config.runner_type == "draft")


def read_from(model_config: ModelConfig, folder: str) -> ModelConfig:
    """The same model, its stored weights read from this very folder.

    vLLM would look a Hub id up again, and a branch may have moved since it was checked.
    """
    pinned = copy.copy(model_config)
    pinned.model, pinned.revision = folder, None
    if hasattr(pinned, "model_weights"):
        pinned.model_weights = ""  # a streamer would read those instead
    return pinned


def refuse_weight_transfer(vllm_config: VllmConfig) -> None:
    """Refuse a server whose weights a trainer replaces: what it sends is not merged.

    Raises:
        ConfigError: It is configured so.
    """
    if transfer := getattr(vllm_config, "weight_transfer_config", None):
        raise ConfigError(
            "--weight-transfer-config",
            expected="none beside '--load-format enchtable': what is sent would replace merged "
            "weights by unmerged ones",
            got=transfer,
            fix="Leave it out, or load with '--load-format auto'.",
        )


def served_dtype(model_config: ModelConfig) -> torch.dtype:
    """What weights are converted to that are stored in another."""
    return cast(torch.dtype, model_config.dtype)


def architectures(model_config: ModelConfig) -> list[str]:
    """Of the model that vLLM makes: by the config that it found, of two that may be there."""
    return list(model_config.architectures)


def target_device(vllm_config: VllmConfig) -> torch.device:
    """Where vLLM puts this model's weights."""
    chosen = vllm_config.load_config.device
    return torch.device(vllm_config.device_config.device if chosen is None else chosen)


def shows_progress(load_config: LoadConfig) -> bool:
    """Whether this process shows a progress bar: vLLM's rule, one rank and not switched off."""
    distributed = torch.distributed
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    return bool(load_config.use_tqdm_on_load) and first


def stat_logger_base() -> type:
    """What a class of ``vllm.stat_logger_plugins`` must be, to be made once in each API server."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase  # only there: it imports a lot

    return cast(type, AggregateStatLoggerBase)


#: What exchanging vectors in a running server will need: name → (module, attribute, parameter).
_FOR_SWAPPING = {
    "vllm.endpoint_plugins": ("vllm.plugins", "load_endpoint_plugins", None),
    "pause_generation(mode)": ("vllm.v1.engine.async_llm", "AsyncLLM.pause_generation", "mode"),
    "pause_generation(clear_cache)": (
        "vllm.v1.engine.async_llm",
        "AsyncLLM.pause_generation",
        "clear_cache",
    ),
    "resume_generation": ("vllm.v1.engine.async_llm", "AsyncLLM.resume_generation", None),
    "reload_weights(weights_iterator)": (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.reload_weights",
        "weights_iterator",
    ),
    "collective_rpc": ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", None),
    "update_weight_version": ("vllm.v1.engine.async_llm", "AsyncLLM.update_weight_version", None),
    "call_utility_all_async": (
        "vllm.v1.engine.core_client",
        "AsyncMPClient.call_utility_all_async",
        None,
    ),
    "weight_versions of completions": ("vllm.outputs", "CompletionOutput", "weight_versions"),
}


def missing_for_swapping() -> list[str]:
    """What of `_FOR_SWAPPING` this vLLM lacks, by name. Imports the engine: seconds."""
    missing = []
    for name, (module, path, parameter) in _FOR_SWAPPING.items():
        found: Any = None
        with contextlib.suppress(ModuleNotFoundError):
            found = import_module(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is None or (parameter and parameter not in inspect.signature(found).parameters):
            missing.append(name)
    return missing
