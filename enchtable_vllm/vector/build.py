"""Building a safety vector: aligned − surrogate, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    Location,
    ShardWriter,
    TensorHeader,
    local,
    tensor_digest,
)
from enchtable_vllm.checkpoint.norm import finite_norm
from enchtable_vllm.checkpoint.writer import assign_shards, write_index
from enchtable_vllm.errors import MismatchError, summarize_faults
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector.card import vector_card
from enchtable_vllm.vector.delta import Delta
from enchtable_vllm.vector.factor_files import add_factors
from enchtable_vllm.vector.factors import check_rank_fraction
from enchtable_vllm.vector.format import (
    SCALE,
    VECTOR_FILE_STEM,
    VECTOR_MANIFEST,
    ModelReference,
    VectorDtype,
    VectorManifest,
    VectorTensor,
    scale_shape,
    spread_sample,
)
from enchtable_vllm.vector.safety_vector import SafetyVector
from enchtable_vllm.vector.scope import Scope, in_scope

StoredDtype = Literal["bf16", "fp32", "int8"]
_SAFETENSORS: dict[StoredDtype, VectorDtype] = {"bf16": "BF16", "fp32": "F32", "int8": "I8"}
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class BuildReport:
    """What a build found.

    Attributes:
        manifest: As written.
        unchanged: Tensors in scope that are bit-identical in both models; left out.
        absent: Blocks of the aligned model that the surrogate lacks; left out.
        sixteen_bit_inputs: Whether a model was stored in 16 bits, and that has cost something.
    """

    manifest: VectorManifest
    unchanged: tuple[str, ...]
    absent: tuple[str, ...]
    sixteen_bit_inputs: bool

    @property
    def warnings(self) -> list[str]:
        """What the user should know before trusting the vector."""
        found = []
        if self.absent:
            found.append(
                "the surrogate lacks whole blocks of the aligned model, which are left out: "
                + summarize_faults([f"'{block}'" for block in self.absent])
            )
        if not self.sixteen_bit_inputs:
            return found
        return [
            *found,
            "an input is stored in 16 bits, so changes smaller than its rounding are lost: "
            f"{self.manifest.zero_share:.1%} of this vector's elements are exactly zero. "
            "Build it from fp32 checkpoints (training's master weights) if you have them.",
        ]


@dataclass(frozen=True)
class Difference:
    """Two opened checkpoints that belong together, and where they differ.

    Attributes:
        aligned, surrogate: The models.
        first, second: Opened.
        scope: Which parameters take part.
        changed: The tensors that differ.
        unchanged: Names of tensors in scope that are identical in both.
        absent: As `BuildReport`'s.
    """

    aligned: Location
    surrogate: Location
    first: Checkpoint
    second: Checkpoint
    scope: Scope
    changed: tuple[TensorHeader, ...]
    unchanged: tuple[str, ...]
    absent: tuple[str, ...]


def build_vector(
    aligned: Location,
    surrogate: Location,
    out: Path,
    *,
    scope: Scope = "attention",
    dtype: StoredDtype = "bf16",
    recipe: dict[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    factors: float | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Write the safety vector of two checkpoints. Memory: a few tensors, whatever their size.

    Args:
        aligned: The safe model.
        surrogate: The model distilled from it; every tensor in scope must be in both, alike.
        out: The folder to make.
        scope: Which parameters take part.
        dtype: How deltas are stored: differences are taken in fp32 and rounded once. ``int8`` has
            one scale for each 64 elements: half of bf16's bytes, at a relative error near 5e-3.
        recipe: Recorded in the manifest.
        max_shard_bytes: Larger vectors are sharded.
        factors: A γ: cache what plans with it need of the vector; see `add_factors`.
        overwrite: Replace ``out``.
        progress: Called with each tensor's name, how many are done, and how many there are.

    Returns:
        What was found and written.

    Raises:
        MismatchError: The models do not belong together, or nothing differs.
        NonFiniteError: A difference is not finite.
        CheckpointError: A checkpoint cannot be read or is quantised.
        ConfigError: ``out`` is in use, or γ is none.
    """
    if factors is not None:
        check_rank_fraction(factors)
    difference = compare(aligned, surrogate, scope)
    inputs = (aligned.path, surrogate.path)
    with FolderTransaction(out, overwrite=overwrite, inputs=inputs) as folder:
        return write_vector(
            difference,
            folder,
            name=out.name,
            dtype=dtype,
            recipe=recipe,
            max_shard_bytes=max_shard_bytes,
            factors=factors,
            progress=progress,
        )


def compare(aligned: Location, surrogate: Location, scope: Scope) -> Difference:
    """Open two checkpoints and find the tensors in which they differ.

    Raises:
        MismatchError: The models do not belong together, or nothing differs.
        CheckpointError: A checkpoint cannot be read or is quantised.
    """
    first = Checkpoint(aligned.path, what="aligned model")
    second = Checkpoint(surrogate.path, what="surrogate")
    for checkpoint in (first, second):
        checkpoint.refuse_quantized()
    chosen, absent = _choose(first, second, scope)
    changed = [h for h in chosen if not _identical(first, second, h.name)]
    unchanged = tuple(sorted({h.name for h in chosen} - {h.name for h in changed}))
    if not changed:
        raise MismatchError(
            f"surrogate '{surrogate}', scope '{scope}'",
            expected="weights that differ from the aligned model's",
            got=f"{len(chosen)} identical tensors",
            fix="Give the surrogate that was trained from it, or widen --scope.",
        )
    return Difference(aligned, surrogate, first, second, scope, tuple(changed), unchanged, absent)


def write_vector(
    difference: Difference,
    folder: Path,
    *,
    name: str,
    dtype: StoredDtype = "bf16",
    recipe: dict[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    factors: float | None = None,
    from_masters: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Write a vector's files into a folder that is there: one of a `FolderTransaction`.

    Args:
        difference: From `compare`.
        folder: Where to.
        name: The vector's, for its card.
        dtype: As in `build_vector`, and so the next three.
        recipe: Recorded in the manifest.
        max_shard_bytes: Larger vectors are sharded.
        factors: A γ: cache what plans with it need.
        from_masters: The surrogate was trained in fp32 from these very values of the aligned
            model: that those are stored in 16 bits has cost the difference nothing.
        progress: As in `build_vector`.

    Returns:
        What was found and written.

    Raises:
        MismatchError: Names that an int8 vector cannot hold.
        NonFiniteError: A difference is not finite.
    """
    first, second = difference.first, difference.second
    changed = list(difference.changed)
    shards = _shards(changed, dtype, max_shard_bytes)
    tensors: dict[str, VectorTensor] = {}
    zeros = 0
    for file, shard in shards.items():
        with ShardWriter(folder / file, shard, {"format": "pt"}) as writer:
            for tensor in (h.name for h in shard if not h.name.endswith(SCALE)):
                delta = _stored(_difference(first, second, tensor), dtype, tensor)
                dense = delta.float()
                tensors[tensor] = VectorTensor(
                    shape=tuple(dense.shape),
                    dtype=_SAFETENSORS[dtype],
                    norm=finite_norm(dense, f"difference of tensor '{tensor}'"),
                    digest=tensor_digest(delta.values),
                    scale_digest=None if delta.scales is None else tensor_digest(delta.scales),
                    aligned_sample=tuple(spread_sample(first.read(tensor)).tolist()),
                )
                zeros += dense.numel() - int(torch.count_nonzero(dense))
                writer.write(tensor, delta.values)
                if delta.scales is not None:
                    writer.write(tensor + SCALE, delta.scales)
                progress(tensor, len(tensors), len(changed))
    write_index(folder, VECTOR_FILE_STEM, shards)
    manifest = VectorManifest(
        aligned=ModelReference.of(difference.aligned, first),
        surrogate=ModelReference.of(difference.surrogate, second),
        architecture=first.architecture,
        scope=difference.scope,
        norm=math.sqrt(math.fsum(t.norm**2 for t in tensors.values())),
        zero_share=zeros / sum(math.prod(t.shape) for t in tensors.values()),
        recipe=recipe or {},
        tensors=dict(sorted(tensors.items())),
    )
    (folder / VECTOR_MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    (folder / "README.md").write_text(vector_card(manifest, name))
    if factors is not None:
        manifest = add_factors(
            SafetyVector(local(folder)),
            rank_fraction=factors,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    inputs = (second,) if from_masters else (first, second)
    dtypes = {c.tensors[h.name].dtype for c in inputs for h in changed}
    return BuildReport(manifest, difference.unchanged, difference.absent, not dtypes <= {"F32"})


def _choose(
    first: Checkpoint, second: Checkpoint, scope: Scope
) -> tuple[list[TensorHeader], tuple[str, ...]]:
    """The tensors in scope, all faults reported at once; and the blocks that the second lacks.

    transformers neither loads nor saves the layers that predict several tokens ahead: a surrogate
    of such a model is without them. Layers of the model proper that are gone are a fault.
    """
    names = [n for n in first.tensors.keys() | second.tensors.keys() if in_scope(n, scope)]
    stacks = {_block(name)[0] for name in second.tensors}
    layers = _layers(first)

    def is_absent(name: str) -> bool:
        stack, layer = _block(name)
        beyond = layers is not None and layer is not None and layer >= layers
        return stack not in stacks or (beyond and name not in second.tensors)

    absent = {name for name in names if is_absent(name)}
    names = [name for name in names if name not in absent]
    faults = []
    for name in sorted(names):
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            faults.append(
                f"'{name}' is only in the {'surrogate' if one is None else 'aligned model'}"
            )
        elif one.shape != two.shape:
            faults.append(f"'{name}' is {list(one.shape)} and {list(two.shape)}")
        elif not (one.is_float and two.is_float):
            faults.append(f"'{name}' is {one.dtype} and {two.dtype}")
    if faults or not names:
        raise MismatchError(
            f"{first.what} and {second.what}, scope '{scope}'",
            expected="the same bf16, fp16 or fp32 tensors in both",
            got=summarize_faults(faults) if faults else "no tensor in this scope",
            fix="Give the aligned model that the surrogate was trained from.",
        )
    found = map(_block, absent)
    blocks = {stack if layer is None else f"{stack}.{layer}" for stack, layer in found}
    return [first.tensors[name] for name in sorted(names)], tuple(sorted(blocks))


def _block(name: str) -> tuple[str, int | None]:
    """The stack of layers that a tensor is in, and which of them; or else the part of the model."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part)
    return parts[0], None


def _layers(checkpoint: Checkpoint) -> int | None:
    """Of the model proper, by its config."""
    config = checkpoint.config
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return found if isinstance(found, int) else None


def _shards(
    headers: list[TensorHeader], dtype: StoredDtype, max_shard_bytes: int
) -> dict[str, list[TensorHeader]]:
    """File name → its tensors.

    Scales lie in their values' file, and before them: fp32 needs offsets that are multiples of
    four, which int8 does not leave behind.
    """
    values = [TensorHeader(h.name, _SAFETENSORS[dtype], h.shape, "") for h in headers]
    shards = assign_shards(values, VECTOR_FILE_STEM, max_shard_bytes)
    if dtype != "int8":
        return shards
    names = {header.name for header in values}
    clashing = [f"'{name}'" for name in sorted(names) if name.endswith(SCALE)]
    if clashing:
        raise MismatchError(
            "tensors of both models",
            expected=f"no name that ends in '{SCALE}', which an int8 vector needs for itself",
            got=summarize_faults(clashing),
            fix="Build with --dtype bf16.",
        )
    return {
        file: [TensorHeader(h.name + SCALE, "F32", scale_shape(h.shape), "") for h in shard] + shard
        for file, shard in shards.items()
    }


def _stored(difference: torch.Tensor, dtype: StoredDtype, name: str) -> Delta:
    """Rounded once. Int8 cannot hold what is not finite, so that is refused before."""
    if dtype == "int8":
        finite_norm(difference, f"difference of tensor '{name}'")
        return Delta.quantized(difference)
    return Delta(difference.to(torch.bfloat16 if dtype == "bf16" else torch.float32))


def _identical(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    return torch.equal(first.read(name).float(), second.read(name).float())


def _difference(first: Checkpoint, second: Checkpoint, name: str) -> torch.Tensor:
    return first.read(name).float() - second.read(name).float()
