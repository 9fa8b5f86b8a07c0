"""``--load-format enchtable``: vLLM's own loader, with the merge in its weight path.

The merged stream is the only one this loader has. Loading and in-place reload both ask for it,
and a failure anywhere raises: no path ends in unmerged weights being served.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from tqdm.auto import tqdm

from enchtable_vllm.errors import EnchTableError, IncompleteMergeError, MismatchError
from enchtable_vllm.merge import MergeStream, under_both_names
from enchtable_vllm.serving import (
    compat,
    compat_swap,
    compat_swappable,
    last_word,
    records,
    versions,
)
from enchtable_vllm.serving.choice import Choice, choose_at_start
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.merging import Merging
from enchtable_vllm.serving.prepare import (
    OpenTask,
    Prepared,
    open_task,
    prepare,
    refuse_other_names,
)
from enchtable_vllm.serving.room import (
    Active,
    Room,
    ServedTask,
    enter,
    merge_identity,
    refuse_another,
    refuse_another_task,
    room_of,
    until_complete,
)
from enchtable_vllm.serving.spans import span
from enchtable_vllm.serving.swap.describe import describe_active, describe_modules
from enchtable_vllm.serving.swap.rank import WORKER_METHOD, answer

_log = compat.logger("loader")
_BAR = "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"

_KEPT_KV = (
    "KV connector %s may hand over what was computed with other weights: let no server with "
    "another safety vector, another beta or none share what it keeps, and clear it before a "
    "restart with one"
)
_UNMERGED = "model '%s' is served WITHOUT a safety vector, as asked for by '@none'"

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
        if self.config.vector_root is not None:
            _say_what_swapping_lacks()
        self._draft = False
        self._found: _Found | None = None
        self._merging: Merging | None = None

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
        compat.refuse_weight_transfer(vllm_config)
        self._draft = compat.is_draft(vllm_config, model_config)
        model: torch.nn.Module
        with span("enchtable.load", model=model_config.model, draft=self._draft):
            if not self._draft:
                if kept := compat_swappable.connector_that_keeps(vllm_config.kv_transfer_config):
                    _log.warning(_KEPT_KV, kept)
                compat_swap.add_worker_method(WORKER_METHOD, answer)
                with span("enchtable.prepare"):
                    self._found = self._find(model_config, compat.target_device(vllm_config))
                    self._found.refuse_disagreement()
                if self._found.prepared is not None:  # begun while vLLM makes its empty model
                    device = compat.target_device(vllm_config)
                    self._merging = self._begin(self._found.prepared, device)
            try:
                model = super().load_model(vllm_config, model_config, prefix)
            finally:
                if self._merging is not None:
                    self._merging.close()
                    self._merging = None
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
        found = self._found or self._find(model_config, _device_of(model))
        self._found = None
        pinned = compat.read_from(model_config, str(found.task.location.path))
        if found.prepared is None:
            _log.warning(_UNMERGED, model_config.model)
            self._inner.load_weights(model, pinned)
            self._enter(model, found.task, Active(found.choice, None))
            return
        merging = self._merging or self._begin(found.prepared, _device_of(model))
        merging.begin(model.parameters())
        stream = self._stream(found, merging, model)
        # The inner loader iterates its own `get_all_weights`; give it the merged one.
        stored = self._inner.get_all_weights
        self._inner.get_all_weights = lambda config, module: self._merged(
            found.task, stream, stored(config, module)
        )
        try:
            self._inner.load_weights(model, pinned)
        finally:
            del self._inner.get_all_weights
            merging.close()
        if stream.report is None:
            raise IncompleteMergeError(
                f"model '{model_config.model}'",
                expected="every weight to be read",
                got="a model that stopped reading before the end",
                fix="Report this with the model's architecture; it cannot be served merged.",
            )
        prepared = found.prepared
        active = Active(found.choice, stream.report, prepared.plan_source, prepared.signed_by)
        self._enter(model, found.task, active)

    def get_all_weights(
        self, model_config: compat.ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The merged stream of what this model serves now, for reload.

        vLLM makes a new loader for each reload, from the config that the server was started
        with; what has been swapped in since is in the model's room. What headers can tell is
        checked before this returns.

        Raises:
            EnchTableError: Something does not fit, or is not what is served any more; the model
                has not been touched.
        """
        room = room_of(model)
        if room is not None and room.half_reloaded:  # vLLM would go on counting where it stopped
            compat_swap.restore_after_failed_reload(model)
        device = _device_of(model)  # a reload moves it to nowhere, soon
        found = self._find(model_config, device, room.active.choice if room else None)
        if room is not None:
            refuse_another_task(room.task, found.task)
            refuse_another(room.active, merge_identity(found.prepared))
        pinned = compat.read_from(model_config, str(found.task.location.path))
        tensors = compat.all_weights(self._inner, pinned, model)
        if found.prepared is None:
            _log.warning(_UNMERGED, model_config.model)
        else:
            tensors = self._merged_anew(found, model, device, tensors)
        return tensors if room is None else until_complete(room, tensors)

    def _merged_anew(
        self,
        found: _Found,
        model: torch.nn.Module,
        device: torch.device,
        stored: Iterator[tuple[str, torch.Tensor]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        assert found.prepared is not None
        merging = self._begin(found.prepared, device)
        try:
            yield from self._merged(found.task, self._stream(found, merging, model), stored)
        finally:
            merging.close()

    def _find(
        self,
        model_config: compat.ModelConfig,
        device: torch.device,
        choice: Choice | None = None,
    ) -> _Found:
        bar: Any = None  # there is none unless a plan is computed

        def progress(_: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = self._bar("Computing the merge plan", total)
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        task = open_task(
            self.config, model_config.model, model_config.revision, self.load_config.download_dir
        )
        refuse_other_names(task.checkpoint, compat.architectures(model_config))
        compat.pin_format(self._inner, task.load_format)
        choice = choice or choose_at_start(self.config, task)
        served = compat.served_dtype(model_config)
        if choice.config is None:
            return _Found(task, choice, None, served)
        plans_on = str(device) if device.type == "cuda" else "cpu"
        prepared = prepare(choice.config, task, device=plans_on, progress=progress)
        if prepared.signed_by is not None:
            _log.info("safety vector '%s' is signed: %s", prepared.vector.name, prepared.signed_by)
        return _Found(task, choice, prepared, served)

    def _enter(self, model: torch.nn.Module, task: OpenTask, active: Active) -> None:
        """Remember what was loaded, here and for the API servers."""
        enter(model, Room(self.config, ServedTask.of(task), active))
        records.leave(describe_active(active) | {"modules": describe_modules(active)})

    def _begin(self, prepared: Prepared, device: torch.device) -> Merging:
        return Merging(
            prepared,
            device,
            reads_stored=compat.hands_over_what_is_stored(self._inner),
            verify_content=self.config.verify == "content",
        )

    def _stream(self, found: _Found, merging: Merging, model: torch.nn.Module) -> MergeStream:
        total = len(merging.merge_one.resolved.plan.tensors)
        bar = self._bar("Loading weights, merging", total)

        def on_tensor(_: str) -> None:
            bar.update()
            if bar.n == bar.total:
                bar.close()

        return MergeStream(
            merging.merge_one,
            ahead=merging.ahead,
            may_filter=lambda name: compat.is_skipped_expert(self._inner, name),
            foreign=bool(getattr(model, "secondary_weights", ())),
            served=found.served,
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
        self, task: OpenTask, stream: MergeStream, stored: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        yield from under_both_names(stream.merge, stored, task.checkpoint.second_names)
        task.checkpoint.refuse_changed()  # the inner loader opened them again, by name
        assert stream.report is not None
        for warning in stream.report.warnings():
            _log.warning(warning)
        _log.info(stream.report.line())


@dataclass(frozen=True)
class _Found:
    """What this rank is to load; ``prepared`` is None where that is no vector at all.

    It is converted to the dtype ``served``.
    """

    task: OpenTask
    choice: Choice
    prepared: Prepared | None
    served: torch.dtype

    def refuse_disagreement(self) -> None:
        """Refuse to load where other ranks found something else.

        Their files may be on other machines, and a ``current.json`` may change between two looks.

        Raises:
            MismatchError: They did, and every rank says so.
        """
        resolved = self.prepared.resolved if self.prepared else None
        mine = (
            self.task.fingerprint,
            resolved and resolved.plan.safety_vector.fingerprint,
            resolved and resolved.digest,
            resolved and resolved.beta,
        )
        all_of_them = compat_swap.gather(mine)
        if any(theirs != mine for theirs in all_of_them):
            raise MismatchError(
                "ranks of one engine",
                expected="the same task model, safety vector, plan and beta on each",
                got="; ".join(f"rank {i}: {found}" for i, found in enumerate(all_of_them)),
                fix="Give every machine the same files, and start again.",
            )


@functools.cache  # a reload makes a new loader
def _say_what_swapping_lacks() -> None:
    if lacks := compat.missing_for_swapping():
        _log.warning(
            "vectors of the 'vector_root' cannot be exchanged while this server runs: its vLLM "
            "lacks %s; from vLLM %s on nothing is lacking",
            ", ".join(lacks),
            versions.swapping_bound(),
        )


def _device_of(model: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
