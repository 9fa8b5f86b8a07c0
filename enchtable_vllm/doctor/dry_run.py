"""What a server would merge, keep and refuse: told from headers, no tensor is read whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from enchtable_vllm.checkpoint import Checkpoint, locate, short
from enchtable_vllm.doctor.finding import Finding
from enchtable_vllm.errors import CheckpointError, EnchTableError
from enchtable_vllm.plan import PLAN_FILE
from enchtable_vllm.plan.classify import classify
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import prepare_model
from enchtable_vllm.signing import parse_requirement
from enchtable_vllm.vector import SCOPES, SafetyVector, in_scope


@dataclass(frozen=True)
class Question:
    """What would be served. The three beside the model are the loader's keys.

    Attributes:
        model: The task model: folder or Hub id.
        safety_vector, base_model, merge_plan: As in ``--model-loader-extra-config``.
        require_signature: Likewise, or the path of a public key.
    """

    model: str
    safety_vector: str | None = None
    base_model: str | None = None
    merge_plan: str | None = None
    require_signature: str | None = None


def dry_run(question: Question) -> list[Finding]:
    """Check a model as the loader does, and say what it would do."""
    findings: list[Finding] = []
    try:
        findings.extend(_look(question))
    except EnchTableError as error:
        findings.append(Finding.refused("dry run", error))
    return findings


def _look(question: Question) -> Iterator[Finding]:
    folder = _on_this_machine(question.model, "task model")
    task = Checkpoint(folder, what="task model")
    yield _describe(task)
    task.refuse_quantized()
    keys: dict[str, Any] = {
        "safety_vector": question.safety_vector,
        "base_model": question.base_model,
        "merge_plan": question.merge_plan,
    }
    if question.require_signature is not None:
        keys["require_signature"] = parse_requirement(question.require_signature)
    config = LoaderConfig.parse({key: value for key, value in keys.items() if value is not None})
    if config.base_model is not None:
        assert config.safety_vector is not None  # LoaderConfig sees to it
        base = Checkpoint(_on_this_machine(config.base_model, "base model"), what="base model")
        base.refuse_quantized()
        vector = SafetyVector.open(config.safety_vector)
        yield _would_plan(task, base, vector)
    elif config.merge_plan is not None or (folder / PLAN_FILE).is_file():
        yield _with_plan(config, folder)
    elif config.safety_vector is not None:
        yield _would_plan(task, None, SafetyVector.open(config.safety_vector))
    else:
        yield _scopes(task)


def _on_this_machine(reference: str, what: str) -> Path:
    """The folder of a model that is here already: a check downloads no weights."""
    if Path(reference).expanduser().is_dir():
        return locate(reference, what=what).path
    repo_id, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{what} '{reference}'",
            expected="an existing folder, or a Hub repository that has been downloaded",
            got="neither",
            fix="Check the path, or download it first: this check does not. "
            f"'hf download {reference}' does.",
        ) from error


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


def _with_plan(config: LoaderConfig, folder: Path) -> Finding:
    """With a plan: the loader's own checks, in its own words."""
    prepared = prepare_model(config, str(folder), None, None, device="cpu")
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
