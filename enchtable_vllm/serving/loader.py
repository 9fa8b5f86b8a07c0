"""``--load-format enchtable``: vLLM's own loader, with the merge in its weight path.

The merged stream is the only one this loader has. Loading and in-place reload both ask for it,
and a failure anywhere raises: no path ends in unmerged weights being served.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from tqdm.auto import tqdm

from enchtable_vllm.errors import EnchTableError, IncompleteMergeError
from enchtable_vllm.merge import MergeStream, under_both_names
from enchtable_vllm.serving import compat, last_word
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import Prepared, prepare

_log = compat.logger("loader")
_BAR = "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"

#: Enough to keep a thread busy, little beside any tensor that makes a difference.
_AHEAD_BYTES = 32 * 2**20

P = ParamSpec("P")
R = TypeVar("R")


def _refusing(method: Callable[P, R]) -> Callable[P, R]:
    """Leave an error's message where the user will read it last; the error goes on."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except EnchTableError as error:
            last_word.leave(error)
            raise

    return wrapper


class EnchTableModelLoader(compat.BaseModelLoader):  # type: ignore[misc]  # vllm is untyped here
    """Loads a task model and merges a safety vector into it on the way.

    Args:
        load_config: vLLM's; its extra config is a `LoaderConfig`.

    Raises:
        ConfigError: The extra config is not usable.
    """

    @_refusing
    def __init__(self, load_config: compat.LoadConfig) -> None:
        super().__init__(load_config)
        self.config = LoaderConfig.parse(load_config.model_loader_extra_config)
        self._inner = compat.inner_loader(
            load_config, self.config.inner_load_format, self.config.inner_extra_config
        )
        self._prepared: Prepared | None = None
        self._draft = False

    def download_model(self, model_config: compat.ModelConfig) -> None:
        """Fetch the task model, as the inner loader does."""
        self._inner.download_model(model_config)

    @_refusing
    def load_model(
        self,
        vllm_config: compat.VllmConfig,
        model_config: compat.ModelConfig,
        prefix: str = "",
    ) -> torch.nn.Module:
        """Check everything that headers can tell, then create the model and load it.

        Raises:
            EnchTableError: Something does not fit; nothing has been loaded, or what has been
                is given up.
        """
        self._draft = compat.is_draft(vllm_config, model_config)
        if not self._draft:
            self._prepared = self._prepare(model_config, compat.target_device(vllm_config))
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: compat.ModelConfig) -> None:
        """Load merged weights into a model: the inner loader's way, from the merged stream.

        Raises:
            EnchTableError: The merge failed or is not complete.
        """
        if self._draft:
            _log.info("draft model '%s' passes through unmerged", model_config.model)
            self._inner.load_weights(model, model_config)
            return
        prepared = self._prepared or self._prepare(model_config, _device_of(model))
        stream = self._stream(prepared, model)
        # The inner loader iterates its own `get_all_weights`; give it the merged one.
        stored = self._inner.get_all_weights
        self._inner.get_all_weights = lambda config, module: self._merged(
            prepared, stream, stored(config, module)
        )
        try:
            self._inner.load_weights(model, _checked(model_config, prepared))
        finally:
            del self._inner.get_all_weights
            self._prepared = None
        if stream.report is None:
            raise IncompleteMergeError(
                f"model '{model_config.model}'",
                expected="every weight to be read",
                got="a model that stopped reading before the end",
                fix="Report this with the model's architecture; it cannot be served merged.",
            )

    def get_all_weights(
        self, model_config: compat.ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The merged stream, for reload. What headers can tell is checked before it returns.

        Raises:
            EnchTableError: Something does not fit; the model has not been touched.
        """
        prepared = self._prepare(model_config, _device_of(model))
        stored = compat.all_weights(self._inner, _checked(model_config, prepared), model)
        return self._merged(prepared, self._stream(prepared, model), stored)

    def _prepare(self, model_config: compat.ModelConfig, device: torch.device) -> Prepared:
        bar: Any = None  # there is none unless a plan is computed

        def progress(_: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = self._bar("Computing the merge plan", total)
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        prepared = prepare(
            self.config,
            model_config.model,
            model_config.revision,
            self.load_config.download_dir,
            device=str(device) if device.type == "cuda" else "cpu",
            progress=progress,
        )
        compat.pin_format(self._inner, prepared.load_format)
        return prepared

    def _stream(self, prepared: Prepared, model: torch.nn.Module) -> MergeStream:
        bar = self._bar("Loading weights, merging", total=len(prepared.resolved.plan.tensors))

        def on_tensor(_: str) -> None:
            bar.update()
            if bar.n == bar.total:
                bar.close()

        device = _device_of(model)
        return MergeStream(
            prepared.resolved,
            prepared.vector,
            what=prepared.checkpoint.what,
            # On the GPU that the weights go to; elsewhere each tensor is merged where it is.
            device=device if device.type == "cuda" else None,
            ahead_bytes=_AHEAD_BYTES if compat.may_look_ahead(self._inner) else 0,
            masks=prepared.masks,
            rounding=self.config.rounding,
            may_filter=lambda name: compat.is_skipped_expert(self._inner, name),
            foreign=bool(getattr(model, "secondary_weights", ())),
            verify_content=self.config.verify == "content",
            digest_merged=self.config.verify == "content",
            on_tensor=on_tensor,
        )

    def _bar(self, title: str, total: int) -> Any:
        """A progress bar in the manner of vLLM's own."""
        return tqdm(
            total=total,
            desc=title,
            disable=not compat.shows_progress(self.load_config),
            bar_format=_BAR,
            mininterval=1.0,
        )

    def _merged(
        self,
        prepared: Prepared,
        stream: MergeStream,
        stored: Iterator[tuple[str, torch.Tensor]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        yield from under_both_names(stream.merge, stored, prepared.checkpoint.second_names)
        prepared.checkpoint.refuse_changed()  # the inner loader opened them again, by name
        assert stream.report is not None
        for warning in stream.report.warnings():
            _log.warning(warning)
        _log.info(stream.report.line())


def _checked(model_config: compat.ModelConfig, prepared: Prepared) -> compat.ModelConfig:
    return compat.read_from(model_config, str(prepared.task.path))


def _device_of(model: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
