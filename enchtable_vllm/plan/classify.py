"""Which tensors are merged, which are kept and why: told from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from enchtable_vllm.checkpoint import Checkpoint, TensorHeader
from enchtable_vllm.errors import MismatchError, summarize_faults
from enchtable_vllm.vector import SafetyVector, Scope, in_scope

_VOCABULARY = {"embed_tokens", "wte", "lm_head", "embed_out", "word_embeddings", "tok_embeddings"}


@dataclass
class Classes:
    """The task model's tensors, sorted out.

    Attributes:
        merge: To be merged, in name order.
        keep: Name → why.
        unused: Of the base model or the vector, not in the task model: name → why.
        in_norm: Of one shape in task and base model: ‖T‖ runs over these.
    """

    merge: list[str] = field(default_factory=list)
    keep: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    in_norm: list[str] = field(default_factory=list)


def classify(task: Checkpoint, base: Checkpoint, vector: SafetyVector, scope: Scope) -> Classes:
    """Sort the tensors; all faults are reported at once.

    Raises:
        MismatchError: The three do not belong together.
    """
    classes = Classes()
    faults: list[str] = []
    for name, header in task.tensors.items():
        before = base.tensors.get(name)
        alike = before is not None and before.shape == header.shape
        if alike and header.is_float and before is not None and before.is_float:
            classes.in_norm.append(name)
        reason = _why_kept(header, before, vector, scope, faults)
        if reason is None:
            classes.merge.append(name)
        else:
            classes.keep[name] = reason
    for name in base.tensors.keys() - task.tensors.keys():
        classes.unused[name] = "only in the base model"
    tied = bool(task.config.get("tie_word_embeddings"))
    for name in vector.tensors.keys() - task.tensors.keys():
        if not in_scope(name, scope):
            continue
        if name in task.second_names or (tied and name.endswith("lm_head.weight")):
            classes.unused[name] = "the task model ties it to its embedding"
        else:
            faults.append(f"'{name}' is in the vector, not in the task model")
    classes.unused = dict(sorted(classes.unused.items()))
    if faults or not classes.merge:
        raise MismatchError(
            f"{task.what}, {base.what} and {vector.what}",
            expected="a base model, a fine-tune of it, and a safety vector of that base",
            got=summarize_faults(faults) if faults else f"no tensor to merge in scope '{scope}'",
            fix="Check the three paths; the vector must be built from the same base model.",
        )
    return classes


def _why_kept(
    header: TensorHeader,
    before: TensorHeader | None,
    vector: SafetyVector,
    scope: Scope,
    faults: list[str],
) -> str | None:
    """Why a task tensor is kept, or None if it is merged; mismatches go to ``faults``."""
    name = header.name
    delta = vector.tensors.get(name)
    if delta is None:
        return "not in the safety vector"
    if not in_scope(name, scope):
        return f"outside scope '{scope}'"
    if not header.is_float:
        faults.append(f"'{name}' is {header.dtype} in the task model")
        return "not a floating-point tensor"
    if before is None:
        return "only in the task model"
    if not before.is_float:
        faults.append(f"'{name}' is {before.dtype} in the base model")
        return "not a floating-point tensor"
    for other, shape in (("base model", before.shape), ("safety vector", delta.shape)):
        if shape != header.shape:
            reason = f"{list(header.shape)} in the task model, {list(shape)} in the {other}"
            if not _is_extended_vocabulary(header, shape):
                faults.append(f"'{name}' is {reason}")
            return reason
    if len(header.shape) > 3:
        return f"{len(header.shape)} dimensions: neither a matrix nor a stack of matrices"
    return None


def _is_extended_vocabulary(header: TensorHeader, shape: tuple[int, ...]) -> bool:
    """Whether a shape is the task model's with fewer rows, in an embedding or a head."""
    return (
        not _VOCABULARY.isdisjoint(header.name.split("."))
        and len(shape) == len(header.shape)
        and shape[1:] == header.shape[1:]
        and shape[0] < header.shape[0]
    )
