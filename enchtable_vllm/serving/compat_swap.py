"""What of vLLM's is touched to exchange weights in a running server; see `compat` for loading.

Public: ``EngineClient.collective_rpc``, ``pause_generation``, ``resume_generation``,
``is_paused``, ``update_weight_version``; worker methods installed by a general plugin, as
vllm/plugins/endpoint_plugins/interface.py describes. Internals, each named where used:

* ``WorkerBase``, to which the worker's method is added;
* ``model_runner.get_model`` and ``reload_weights(weights_iterator=…)`` of the worker;
* ``model_loader.reload.layerwise``: ``get_layerwise_info`` and ``_place_kernel_tensors``, to put
  back what a reload that failed half-way has taken apart;
* a layer's ``cpu_linear`` and its ``quant_method.process_weights_after_loading``: the CPU build's
  packed copy of a weight, which a reload does not make anew for a head tied to its embedding;
* ``engine_core.call_utility_all_async`` and ``_call_utility_async``, because ``collective_rpc``
  returns only the first engine's results;
* ``renderer.clear_mm_cache_async`` and ``engine_core.pause_scheduler_async``: what
  ``pause_generation`` is made of, without the 20 ms that it sleeps at its end;
* ``RequestOutput.outputs[i].weight_versions``, seen by wrapping ``EngineClient.generate``, to
  tell with which weights an answer ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import torch
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.worker.worker_base import WorkerBase

from enchtable_vllm.vector.scope import in_scope

__all__ = [
    "EngineGoneError",
    "Engines",
    "add_worker_method",
    "engines_of",
    "gather",
    "has_meta_tensors",
    "model_of",
    "note_versions",
    "rank_of",
    "ranks_on_this_machine",
    "reload",
    "restore_after_failed_reload",
    "served_tensors",
    "task_model_of",
]

#: How often a call looks whether the engine is still there.
_HEARTBEAT_SECONDS = 0.5
#: How long after a call has failed the engine may turn out to be dead.
_DYING_SECONDS = 2.0

# Ranks.


def gather(value: object) -> list[Any]:
    """What every rank gives, in order; where there is but one, its own."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    group = parallel_state.get_world_group().cpu_group
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Let ``collective_rpc(name, …)`` call this on each rank, the worker as first argument."""
    setattr(WorkerBase, name, method)


def model_of(worker: Any) -> torch.nn.Module:
    """The model that a rank serves, without what vLLM wraps around it."""
    model: torch.nn.Module = worker.model_runner.get_model()
    return model


def rank_of(worker: Any) -> int:
    """Its place among the ranks of its engine."""
    return int(worker.rank)


def ranks_on_this_machine(worker: Any) -> int:
    """How many ranks of this engine share its machine's memory."""
    return max(1, int(worker.vllm_config.parallel_config.local_world_size))


def task_model_of(worker: Any) -> tuple[str, str | None]:
    """What the task model is called, and its Hub revision."""
    config = worker.vllm_config.model_config
    return config.model, config.revision


def served_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that a model computes with.

    On the CPU vLLM packs linear layers and leaves their ``weight`` empty; of embeddings and heads
    it keeps a packed copy beside it. An identity matrix sent through what is packed gives its
    weight back, exactly.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel():
            yield name, parameter
    for name, module in _packed_beside(model):
        identity = torch.eye(module.weight.shape[1], dtype=module.weight.dtype)
        yield f"{name}.weight, packed", module.cpu_linear(identity, module.weight, None)
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and module.weight.numel() == 0:
            width = getattr(module, "input_size_per_partition", module.input_size)
            identity = torch.eye(width, dtype=module.params_dtype)
            yield f"{name}.weight", module.quant_method.apply(module, identity)


# Exchanging weights.


def reload(worker: Any, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Put tensors into the served model, by vLLM's own in-place reload.

    Args:
        worker: The rank.
        tensors: Checkpoint name → tensor; whole fused groups.

    Returns:
        The names that the model asked for.

    Raises:
        Exception: Whatever vLLM raises; layers may then be on the meta device.
    """
    taken: set[str] = set()

    def each() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            taken.add(name)
            yield name, tensor

    with _without_complaints():
        worker.reload_weights(weights_iterator=each())
    if not all(in_scope(name, "attention+ffn") for name in tensors):
        _pack_tied_anew(model_of(worker))
    return taken


def _packed_beside(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers whose weight the CPU build keeps twice, as it is and packed: embeddings and heads."""
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            yield name, module


def _pack_tied_anew(model: torch.nn.Module) -> None:
    """A head tied to an embedding has a packed copy of its own, which a reload does not know."""
    owners: dict[int, int] = Counter(id(module.weight) for _, module in _packed_beside(model))
    for _, module in _packed_beside(model):
        if owners[id(module.weight)] > 1:
            module.quant_method.process_weights_after_loading(module)


def restore_after_failed_reload(model: torch.nn.Module) -> None:
    """Give every layer back the tensors it had before a reload that failed half-way.

    Layers that were finished hold new values: put the old ones in by another reload.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
        info.reset()
    layerwise.LOADING_LAYERS.clear()


def has_meta_tensors(model: torch.nn.Module) -> bool:
    """Whether a layer has lost its weights."""
    return any(p.is_meta for p in model.parameters()) or any(b.is_meta for b in model.buffers())


@contextmanager
def _without_complaints() -> Iterator[None]:
    """VLLM warns of every layer that a reload leaves alone: here nearly all of them, by intent."""
    names = ("layerwise", "inplace")
    loggers = [logging.getLogger(f"vllm.model_executor.model_loader.reload.{n}") for n in names]
    # A filter, not a level: setting that makes every logger of the process forget what it knows.
    for each in loggers:
        each.addFilter(_is_error)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


# The API server's side.


class EngineGoneError(Exception):
    """There is nobody who could answer any more."""


class Engines:
    """All engines behind an API server.

    Args:
        client: vLLM's ``EngineClient``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, method: str, *arguments: object) -> list[list[Any]]:
        """A worker method on every rank of every engine, all engines at once.

        Returns:
            For each engine what its ranks answered. The method must not raise: where there are
            several ranks, vLLM would mix up later answers.
        """
        core = self._client.engine_core
        called = core.call_utility_all_async("collective_rpc", method, None, arguments, None)
        return list(await self._while_alive(called))

    async def call_in_turn(
        self, method: str, *arguments: object, until: Callable[[list[Any]], bool]
    ) -> list[list[Any]]:
        """The same, one engine after the other in a fixed order, and no further than ``until``.

        Two clients that take a lock on every engine in one order cannot both get a part of it.
        """
        core, answers = self._client.engine_core, []
        for engine in core.core_engines:
            called = core._call_utility_async(
                "collective_rpc", method, None, arguments, None, engine=engine
            )
            answer = await self._while_alive(called)
            answers.append(answer)
            if until(answer):
                break
        return answers

    async def is_paused(self) -> bool:
        """Whether generation is paused on any engine."""
        core = self._client.engine_core
        called = core.call_utility_all_async("is_scheduler_paused")
        return any(await self._while_alive(called))

    async def pause(self, mode: str) -> None:
        """Pause generation on all engines and clear their KV caches.

        As ``pause_generation`` does it, but for its sleep of 20 ms after the engines have
        paused, "not required for correctness": here nobody is answered in between.
        """
        await self._while_alive(self._client.renderer.clear_mm_cache_async())
        core = self._client.engine_core
        await self._while_alive(core.pause_scheduler_async(mode=mode, clear_cache=True))

    async def resume(self) -> None:
        """Let generation go on."""
        await self._while_alive(self._client.resume_generation())

    async def set_version(self, version: str) -> None:
        """Name the weights that answers are computed with from now on."""
        await self._while_alive(self._client.update_weight_version(version))

    async def version(self) -> str:
        """The name of the weights."""
        return str(await self._while_alive(self._client.get_weight_version()))

    @property
    def on_this_machine(self) -> int:
        """How many of them are; an engine of several dense ones is not told that it has others."""
        parallel = self._client.vllm_config.parallel_config
        return max(1, int(parallel.data_parallel_size_local))

    @property
    def dead(self) -> bool:
        """Whether an engine has died: vLLM then ends the server."""
        return bool(self._client.errored)

    async def _while_alive(self, called: Awaitable[Any]) -> Any:
        """What was called for, unless the engine dies.

        VLLM leaves such calls without an answer, and a request that waits for one keeps the
        server from ending.
        """
        task = asyncio.ensure_future(called)
        try:
            while not (await asyncio.wait({task}, timeout=_HEARTBEAT_SECONDS))[0]:
                if self.dead:
                    raise EngineGoneError("the engine died")
            return task.result()
        except EngineGoneError:
            raise
        except Exception as error:
            # What a dying engine has not answered fails a little before it is known to be dead.
            deadline = time.monotonic() + _DYING_SECONDS
            while not self.dead and time.monotonic() < deadline:
                await asyncio.sleep(_HEARTBEAT_SECONDS / 10)
            if self.dead:
                raise EngineGoneError("the engine died") from error
            raise
        finally:
            task.cancel()


def engines_of(client: Any) -> tuple[Engines | None, str]:
    """The engines, if they load models by this project; else why there is nothing to swap."""
    if client is None:
        return None, "this server has no engine"
    load_config = client.vllm_config.load_config
    if str(load_config.load_format).lower() != "enchtable":
        return None, f"its model was loaded with --load-format {load_config.load_format}"
    if not hasattr(getattr(client, "engine_core", None), "call_utility_all_async"):
        return None, "its engine client cannot reach all engines; vLLM 0.32 can"
    return Engines(client), ""


def note_versions(client: Any, note: Callable[[str, str], None]) -> None:
    """Call ``note`` with a completion and the version that it has reached, in the asking task."""
    generate = client.generate

    async def noting(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        # Closed with its caller: that is how vLLM learns that a client has gone away.
        async with aclosing(generate(*arguments, **options)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    spans = getattr(completion, "weight_versions", None)
                    if spans:
                        note(f"{output.request_id} {completion.index}", spans[-1].version)
                yield output

    client.generate = noting
