"""What a server would merge, keep and refuse: told from headers.

No tensor is read whole but a head that may be its embedding again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enchtable_vllm.checkpoint import Checkpoint, locate, nothing_downloaded, short
from enchtable_vllm.doctor.finding import Finding, Status
from enchtable_vllm.errors import EnchTableError, NoPlanError
from enchtable_vllm.files import is_there
from enchtable_vllm.plan import PLAN_FILE
from enchtable_vllm.plan.classify import classify
from enchtable_vllm.plan.vector_root import NO_VECTOR, VectorRoot
from enchtable_vllm.serving.choice import choose_at_start
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import OpenTask, Prepared, open_task, prepare
from enchtable_vllm.signing import parse_requirement
from enchtable_vllm.vector import SCOPES, SafetyVector, in_scope


@dataclass(frozen=True)
class Question:
    """What would be served. Those beside the model are the loader's keys.

    Attributes:
        model: The task model: folder or Hub id.
        safety_vector, base_model, merge_plan: As in ``--model-loader-extra-config``.
        vector_root: Likewise; without a ``safety_vector``, each that is in it is asked for.
        require_signature: Likewise, or the path of a public key.
    """

    model: str
    safety_vector: str | None = None
    base_model: str | None = None
    merge_plan: str | None = None
    vector_root: str | None = None
    require_signature: str | None = None


def dry_run(question: Question) -> list[Finding]:
    """Check a model as the loader does, and say what it would do."""
    findings: list[Finding] = []
    with nothing_downloaded():
        findings.extend(_refused_if("dry run", _look(question)))
    return findings


def _refused_if(
    name: str, findings: Iterable[Finding], *, unplanned: Status = "fail"
) -> Iterator[Finding]:
    """The findings, and the refusal that ended them; ``unplanned``: how grave a missing plan is."""
    try:
        yield from findings
    except EnchTableError as error:
        refused = Finding.refused(name, error)
        status = unplanned if isinstance(error, NoPlanError) else refused.status
        yield dataclasses.replace(refused, status=status)


def _look(question: Question) -> Iterator[Finding]:
    folder = locate(question.model, what="task model").path
    task = Checkpoint(folder, what="task model")
    yield _describe(task)
    task.refuse_quantized()
    keys: dict[str, Any] = {
        "safety_vector": question.safety_vector,
        "base_model": question.base_model,
        "merge_plan": question.merge_plan,
        "vector_root": question.vector_root,
    }
    if question.require_signature is not None:
        keys["require_signature"] = parse_requirement(question.require_signature)
    config = LoaderConfig.parse({key: value for key, value in keys.items() if value is not None})
    if config.vector_root is not None:
        yield from _from_root(config, task, folder)
    elif config.base_model is not None:
        yield _computed(config, task)
    elif config.merge_plan is not None or is_there(folder / PLAN_FILE):
        yield _with_plan(config, open_task(config, str(folder), None, None))
    elif config.safety_vector is not None:
        yield _would_plan(task, None, SafetyVector.open(config.safety_vector))
    else:
        yield _scopes(task)


def _from_root(config: LoaderConfig, task: Checkpoint, folder: Path) -> Iterator[Finding]:
    """As a server chooses that takes its vectors from a root: plans are theirs, not the model's."""
    assert config.vector_root is not None
    opened = open_task(config, str(folder), None, None)
    if config.safety_vector is not None:
        yield from _chosen(config, task, opened)
        return
    for name in VectorRoot(config.vector_root).names():
        what, one = f"dry run, '{name}'", config.model_copy(update={"safety_vector": name})
        # A root may hold vectors of other models, too.
        for finding in _refused_if(what, _chosen(one, task, opened), unplanned="warn"):
            yield dataclasses.replace(finding, name=what)


def _chosen(config: LoaderConfig, task: Checkpoint, opened: OpenTask) -> Iterator[Finding]:
    settled = choose_at_start(config, opened).config
    if settled is None:
        yield Finding("dry run", "warn", "would serve it without a vector", f"'{NO_VECTOR}'", "")
    elif settled.base_model is not None:
        yield _computed(settled, task)
    else:
        yield _with_plan(settled, opened)


def _computed(config: LoaderConfig, task: Checkpoint) -> Finding:
    """Of a plan that the server computes itself: what it would contain."""
    assert config.safety_vector is not None  # LoaderConfig sees to it
    assert config.base_model is not None
    base = Checkpoint(locate(config.base_model, what="base model").path, what="base model")
    base.refuse_quantized()
    return _would_plan(task, base, SafetyVector.open(config.safety_vector))


def _describe(task: Checkpoint) -> Finding:
    dtypes = Counter(header.dtype for header in task.tensors.values())
    stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    found = f"{task.architecture}, {len(task.tensors)} tensors ({stored})"
    return Finding("model", "ok", found)


def _scopes(task: Checkpoint) -> Finding:
    names = [name for name, header in task.tensors.items() if header.is_float]
    counts = ", ".join(f"{s} {sum(in_scope(name, s) for name in names)}" for s in SCOPES)
    return Finding(
        "dry run",
        "warn",
        f"unquantised; tensors that a vector of each scope could change: {counts}",
        f"neither a plan in it ('{PLAN_FILE}') nor a safety vector was given",
        "Add --safety-vector, and --base-model or --merge-plan.",
    )


def _would_plan(task: Checkpoint, base: Checkpoint | None, vector: SafetyVector) -> Finding:
    """No plan yet: what one would contain."""
    # Names and shapes are all that is asked here: for those a task model stands for its base.
    classes = classify(task, base or task, vector, vector.manifest.scope)
    counts = _counts(len(classes.merge), classes.keep.values())
    unused = f"; unused: {_joined(classes.unused)}" if classes.unused else ""
    return Finding(
        "dry run",
        "ok" if base else "warn",
        f"a plan would {counts}{unused}",
        "" if base else "no base model was given: whether it fits is not known",
        "" if base else "Add --base-model; a plan needs it.",
    )


def _with_plan(config: LoaderConfig, task: OpenTask) -> Finding:
    """With a plan: the loader's own checks, in its own words."""
    prepared: Prepared = prepare(config, task, device="cpu")
    resolved = prepared.resolved
    counts = _counts(len(resolved.coefficients), resolved.kept.values())
    return Finding(
        "dry run",
        "ok",
        f"would {counts}; beta {resolved.beta:g}, scope {resolved.scope}, median attenuation "
        f"{resolved.median_attenuation:.3f}; vector '{prepared.vector.name}' "
        f"{short(prepared.vector.fingerprint)}, plan {short(resolved.digest)}"
        + (f"; signed: {prepared.signed_by}" if prepared.signed_by else ""),
    )


def _counts(merged: int, reasons: Iterable[str]) -> str:
    kept = Counter(reasons)
    why = "; ".join(f"{count}: {reason}" for reason, count in kept.most_common())
    return f"merge {merged} and keep {kept.total()} tensors" + (f" ({why})" if why else "")


def _joined(unused: Mapping[str, str]) -> str:
    return ", ".join(f"{count}: {why}" for why, count in Counter(unused.values()).most_common())
