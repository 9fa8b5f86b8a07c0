"""One rank's part of a swap: a method of vLLM's worker, told what to do from the API server.

It never raises: an exception in one of several ranks would make vLLM mix up later answers. And
it never waits: staging runs in a thread of its own while the rank goes on serving.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from enchtable_vllm.errors import NotSwappableError
from enchtable_vllm.serving import compat, compat_swap, compat_swappable
from enchtable_vllm.serving.choice import Choice, choose
from enchtable_vllm.serving.prepare import MADE_AHEAD, OpenTask, Prepared, open_task, prepare
from enchtable_vllm.serving.room import (
    Active,
    Earlier,
    Room,
    merge_identity,
    refuse_another,
    refuse_another_task,
    room_of,
)
from enchtable_vllm.serving.swap.describe import describe_active, describe_error, describe_modules
from enchtable_vllm.serving.swap.probe import served_digest
from enchtable_vllm.serving.swap.staging import (
    NOTHING,
    Side,
    Staged,
    StagingCancelled,
    StagingJob,
)

#: The name under which `answer` is a method of vLLM's workers.
WORKER_METHOD = "enchtable"

#: How long a swap may be silent before its lock may be taken from it.
LEASE_SECONDS = 30.0

#: Of weights that are not a swap's, nobody knows here what they were.
_HALF_RELOADED = "a reload of its weights broke off half-way: reload them again, or restart"

_log = compat.logger("swap")

Answer = dict[str, Any]


@dataclass
class _Swap:
    """A swap that holds this rank's lock.

    Attributes:
        owner: Who began it.
        heard: When its owner was last heard of.
        cancelled: Tells the thread to stop.
        thread: Stages.
        wanted: What is to be served.
        back_to: For a rollback: what it goes back to.
        staged: When that is done.
        error: When that failed.
        touched: Whether the weights have been, or generation stays paused.
        given_up: Whether its owner has, and leaves it to the next swap.
        unpublished: What `Rank.publish` replaced: active vector, epoch, history.
    """

    owner: str
    heard: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    wanted: Active | None = None
    back_to: Earlier | None = None
    staged: Staged | None = None
    error: dict[str, Any] | None = None
    touched: bool = False
    given_up: bool = False
    unpublished: tuple[Active, int, list[Any]] | None = None

    def heard_of(self) -> bool:
        """Whether its owner has it in hand still."""
        return not self.given_up and time.monotonic() - self.heard < LEASE_SECONDS


class Rank:
    """Everything that a rank can be told to do; each command answers with a dictionary.

    Args:
        worker: vLLM's worker.
        room: What it serves.
    """

    def __init__(self, worker: Any, room: Room) -> None:
        self._worker = worker
        self._room = room
        self._swap: _Swap | None = None
        #: Of what is served: it takes a look at every matrix, while the engine waits.
        self._described: tuple[Active, dict[str, Any], dict[str, Any]] | None = None

    def answer(self, command: str, arguments: dict[str, Any]) -> Answer:
        """Do what is asked."""
        if command == "status":
            return {"ok": True, **self.status(**arguments)}
        if command == "begin":
            return self.begin(**arguments)
        if command == "probe":
            return {"ok": True, "digest": served_digest(compat_swap.model_of(self._worker))}
        owner = arguments.pop("owner")
        if self._swap is None or self._swap.owner != owner:
            return _no("lost_lock", "this swap does not hold the lock of this rank any more")
        commands: dict[str, Callable[..., Answer]] = {
            "keep": self.keep,
            "stage": self.stage,
            "poll": self.poll,
            "commit": self.commit,
            "publish": self.publish,
            "restore": self.restore,
            "give_up": self.give_up,
            "finish": self.finish,
        }
        swap = self._swap
        swap.heard = time.monotonic()
        try:
            return commands[command](swap, **arguments)
        finally:
            swap.heard = time.monotonic()  # what takes long takes nothing from the lease

    def status(self, detail: bool = False) -> Answer:
        """What this rank serves, and whether it can be trusted."""
        room, active, swap = self._room, self._room.active, self._swap
        staged = swap.staged.nbytes if swap and swap.staged else 0
        found: Answer = {
            "rank": compat_swap.rank_of(self._worker),
            "epoch": room.epoch,
            "weight_version": active.weight_version,
            "identity": active.identity,
            "broken": room.broken or (_HALF_RELOADED if room.half_reloaded else None),
            "swapping": swap is not None and swap.heard_of(),
            "staged_bytes": staged,
            "not_swappable": compat_swappable.why_not_swappable(self._worker),
        }
        if detail:
            found["task_model"] = {
                "id": compat_swap.task_model_of(self._worker)[0],
                "fingerprint": room.task.fingerprint,
            }
            if self._described is None or self._described[0] is not active:
                self._described = active, describe_active(active), describe_modules(active)
            _, found["active"], found["modules"] = self._described
            found["rolls_back_to"] = room.before[-1][0].name if room.before else None
            found["persisted_before"] = room.before[-1][1] if room.before else None
            found["swaps"] = list(room.swaps)
        return found

    def begin(self, owner: str, expected_epoch: int | None = None) -> Answer:
        """Take the lock, unless somebody holds it who is still there."""
        held = self._swap
        if held is not None and held.owner != owner:
            if held.heard_of():
                return _no("swap_in_progress", "another swap holds the lock", "Try again later.")
            if held.touched:
                return {**_no("interrupted", "a swap was cut off half-way"), "owner": held.owner}
            self._drop(held)
        if expected_epoch is not None and expected_epoch != self._room.epoch:
            return _no("wrong_epoch", f"the server is at epoch {self._room.epoch}")
        self._swap = _Swap(owner, time.monotonic())
        return {"ok": True}

    def keep(self, _: _Swap) -> Answer:
        """Keep the lock; all commands do."""
        return {"ok": True}

    def stage(
        self,
        swap: _Swap,
        safety_vector: str | None,
        beta: float | None = None,
        engines: int = 1,
    ) -> Answer:
        """Begin to stage a vector.

        Args:
            swap: It.
            safety_vector: Its name; None: what was served before the last swap.
            beta: Another β than the plan's.
            engines: How many share this machine's memory.
        """
        if reason := compat_swappable.why_not_swappable(self._worker):
            return _no("not_swappable", reason)
        if self._room.half_reloaded:
            return _no("not_swappable", _HALF_RELOADED)
        if safety_vector is None:
            if not self._room.before:
                return _no("nothing_to_roll_back", "nothing was swapped that could be undone")
            swap.back_to = self._room.before[-1][0]
        swap.thread = threading.Thread(
            target=self._stage,
            args=(swap, safety_vector, beta, engines),
            name="enchtable-stage",
            daemon=True,
        )
        swap.thread.start()
        return {"ok": True}

    def poll(self, swap: _Swap) -> Answer:
        """How far staging is; keeps the lock."""
        if swap.error is not None:
            return {"ok": False, **swap.error}
        if swap.staged is None or swap.wanted is None:
            return {"ok": True, "staged": False}
        return {
            "ok": True,
            "staged": True,
            "published": swap.unpublished is not None,
            "identity": swap.wanted.identity,
            "weight_version": swap.wanted.weight_version,
            "same": swap.wanted.identity == self._room.active.identity
            and swap.wanted.name == self._room.active.name,
            "active": describe_active(swap.wanted),
            "old_digest": swap.staged.old.digest,
            "new_digest": swap.staged.new.digest,
            "staged_bytes": swap.staged.nbytes,
            "staging_seconds": swap.staged.seconds,
            "warnings": swap.wanted.report.warnings() if swap.wanted.report else [],
        }

    def commit(self, swap: _Swap) -> Answer:
        """Put the new tensors in. Generation is paused."""
        assert swap.staged is not None
        swap.touched = True
        if self._room.half_reloaded:
            return _no("commit_failed", _HALF_RELOADED)
        return self._put_in(swap.staged.new)

    def publish(self, swap: _Swap, persisted_before: dict[str, Any] | None) -> Answer:
        """The new vector is what is served now, and what was served can be gone back to.

        Args:
            swap: It.
            persisted_before: What the root's ``current.json`` said before, if it was written.
        """
        assert swap.wanted is not None
        room = self._room
        swap.unpublished = (room.active, room.epoch, list(room.before))
        if swap.back_to is not None:
            room.before.pop()
        else:
            room.before.append((Earlier.of(room.active), persisted_before))
        room.active = swap.wanted
        room.epoch += 1
        return {"ok": True, "epoch": room.epoch}

    def restore(self, swap: _Swap) -> Answer:
        """Put the old tensors back, whatever state the model is in."""
        assert swap.staged is not None
        room, model = self._room, compat_swap.model_of(self._worker)
        if room.broken is not None or compat_swap.has_meta_tensors(model):
            compat_swap.restore_after_failed_reload(model)
        answer = self._put_in(swap.staged.old)
        if answer["ok"] and swap.unpublished is not None:
            room.active, room.epoch, before = swap.unpublished
            room.before.clear()
            room.before.extend(before)
            swap.unpublished = None
        # Still touched: another rank may not be back yet, and needs this one to wait for it.
        return answer

    def give_up(self, swap: _Swap, reason: str) -> Answer:
        """Generation stays paused. What is staged stays, so that the next swap can go back."""
        self._room.broken = reason
        swap.touched = swap.given_up = True
        return {"ok": True}

    def finish(self, swap: _Swap, record: dict[str, Any] | None) -> Answer:
        """The swap is over: drop what was staged, release the lock, remember what is told of it."""
        if record is not None:
            self._room.swaps.appendleft({**record, "epoch": self._room.epoch})
        # What was given up has been brought to its end: the weights of either side are whole.
        if swap.given_up and not compat_swap.has_meta_tensors(compat_swap.model_of(self._worker)):
            self._room.broken = None
        self._drop(swap)
        return {"ok": True, "epoch": self._room.epoch}

    def _drop(self, swap: _Swap) -> None:
        swap.cancelled.set()
        swap.staged = None
        self._swap = None

    def _put_in(self, side: Side) -> Answer:
        model = compat_swap.model_of(self._worker)
        self._room.broken = "its weights are being exchanged"
        try:
            taken = compat_swap.reload(self._worker, side.tensors) if side.tensors else set()
            if lost := side.tensors.keys() - taken:
                raise RuntimeError(f"the model left {len(lost)} tensors unread, {min(lost)} first")
            if compat_swap.has_meta_tensors(model):
                raise RuntimeError("layers were left without weights")
        except Exception as error:
            self._room.broken = f"{type(error).__name__}: {error}"
            _log.exception("exchanging weights failed on this rank")
            return {"ok": False, **describe_error(error), "code": "commit_failed"}
        self._room.broken = None
        return {"ok": True, "digest": side.digest}

    def _stage(
        self,
        swap: _Swap,
        safety_vector: str | None,
        beta: float | None,
        engines: int,
    ) -> None:
        """In a thread of its own. Its result is set last: nobody looks at a half of it."""
        try:
            task = self._open_task()
            if safety_vector is None:
                assert swap.back_to is not None
                choice = swap.back_to.choice
            else:
                choice = choose(self._room.start, safety_vector, beta, task)
            active = self._room.active
            old, new = self._prepare(active.choice.verified(), task), self._prepare(choice, task)
            signed_by = new.signed_by if new else None
            if signed_by is not None:
                _log.info("safety vector '%s' is signed: %s", choice.name, signed_by)
            if (merge_identity(new), choice.name) == (active.identity, active.name):
                swap.wanted = Active(choice, active.report, signed_by=signed_by)
                swap.staged = NOTHING
                return
            job = StagingJob(
                task,
                old,
                new,
                ranks=engines * compat_swap.ranks_on_this_machine(self._worker),
                staging_gib=self._room.start.staging_gib,
                verify_content=self._room.start.verify == "content",
                served=compat.served_dtype(self._worker.vllm_config.model_config),
                cancelled=swap.cancelled,
            )
            self._refuse_lost(job.names())
            staged = job.run()
            refuse_another(active, Active(choice, staged.old.report).identity)
            source = new.plan_source if new else MADE_AHEAD
            wanted = Active(choice, staged.new.report, source, signed_by)
            if swap.back_to is not None:
                refuse_another(swap.back_to, wanted.identity)
            swap.wanted = wanted
            if not swap.cancelled.is_set():
                swap.staged = staged
        except StagingCancelled:
            pass
        except Exception as error:
            _log.warning("staging was refused: %s", error)
            swap.error = describe_error(error)

    def _open_task(self) -> OpenTask:
        room = self._room
        model, revision = compat_swap.task_model_of(self._worker)
        # The very folder that was loaded: a branch of the Hub may have moved since.
        if room.task.location.path.is_dir():
            model, revision = str(room.task.location.path), None
        task = open_task(room.start, model, revision, room.task.cache_dir)
        refuse_another_task(room.task, task)
        return task

    def _prepare(self, choice: Choice, task: OpenTask) -> Prepared | None:
        return None if choice.config is None else prepare(choice.config, task, device="cpu")

    def _refuse_lost(self, names: list[str]) -> None:
        lost, why = compat_swappable.not_given_back(self._worker, names)
        if lost:
            raise NotSwappableError(
                f"tensor '{lost[0]}'",
                expected="weights that vLLM can reload; where there are experts, attention's",
                got=why,
                fix="Use a vector of scope 'attention', or a restart.",
            )


def _no(code: str, message: str, fix: str = "") -> Answer:
    return {"ok": False, "code": code, "error": {"kind": "", "message": message, "fix": fix}}


def answer(worker: Any, command: str, arguments: dict[str, Any]) -> Answer:
    """The worker's method: see `Rank.answer`. Whatever fails is an answer too."""
    try:
        room = room_of(compat_swap.model_of(worker))
        if room is None:
            return _no("not_swappable", "this model was not loaded by --load-format enchtable")
        if room.rank is None:
            room.rank = Rank(worker, room)
        found: Answer = room.rank.answer(command, dict(arguments))
        return found
    except Exception as error:
        _log.exception("swap: '%s' failed", command)
        return {"ok": False, **describe_error(error)}
