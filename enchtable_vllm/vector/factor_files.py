"""A vector's factors on disk: computed once, so that a plan need not factor it again.

The files lie beside the vector and are no part of it: its fingerprint does not change with
them. A plan made with them is the plan made without, byte for byte: both use the same
function in the same setting (`workers`), and what is stored is what it returned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import closing

import torch
from blake3 import blake3

from enchtable_vllm.checkpoint import AdditionTransaction, Checkpoint, ShardWriter, TensorHeader
from enchtable_vllm.checkpoint.fingerprint import raw_bytes
from enchtable_vllm.checkpoint.writer import assign_shards, write_index
from enchtable_vllm.errors import CheckpointError, ConfigError, SafetyVectorError, summarize_faults
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector.factors import (
    COMPUTATION,
    Factors,
    check_rank_fraction,
    factor,
    kept_directions,
)
from enchtable_vllm.vector.format import (
    FACTORS_FILE_STEM,
    VECTOR_MANIFEST,
    CachedFactors,
    MatrixFactors,
    VectorManifest,
)
from enchtable_vllm.vector.safety_vector import SafetyVector
from enchtable_vllm.vector.workers import in_order, worker_count, workers

_CURE = (
    "Make them again with 'enchtable vector factor', or delete "
    f"'{FACTORS_FILE_STEM}*': a plan then does without."
)


def matrices(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix or a stack of matrices as a stack."""
    return tensor if tensor.ndim == 3 else tensor[None]


class FactorFiles:
    """Opened factors; what they hand out has been checked on the very bytes they hand out.

    Args:
        vector: The vector that they lie beside, whose manifest describes them.

    Raises:
        SafetyVectorError: They are damaged, or were made from other content.
    """

    def __init__(self, vector: SafetyVector) -> None:
        assert vector.manifest.factors is not None
        self._entry = vector.manifest.factors
        self._vector = vector
        self.what = f"{vector.what}, file '{FACTORS_FILE_STEM}.safetensors'"
        if self._entry.vector != vector.fingerprint:
            raise self._unusable(f"factors of {vector.fingerprint}", self._entry.vector)
        try:
            self._files = Checkpoint(
                vector.location.path, stem=FACTORS_FILE_STEM, what="factors of safety vector"
            )
        except CheckpointError as error:
            raise self._unusable("whole files", error) from error
        self._check_headers()

    def read(self, name: str) -> tuple[Factors, ...]:
        """The factors of each of a tensor's matrices, on the CPU.

        Raises:
            SafetyVectorError: They are not what was written, or not finite.
        """
        found = []
        for i, entry in enumerate(self._entry.tensors[name]):
            try:
                pair = [self._files.read(f"{name}.{i}.{side}") for side in _SIDES]
            except CheckpointError as error:
                raise self._unusable("readable bytes", error) from error
            digest = _digest(self._vector, self._entry.rank_fraction, name, entry, *pair)
            if digest != entry.digest:
                raise self._unusable(f"tensor '{name}.{i}' with {entry.digest}", digest)
            if not all(bool(torch.isfinite(side).all()) for side in pair):
                raise self._unusable("finite values", f"NaN or infinity in '{name}.{i}'")
            left, right = pair[0][:, : entry.rank].contiguous(), pair[1][: entry.rank]
            found.append(Factors(left, right, entry.exponent, entry.rung))
        return tuple(found)

    def _check_headers(self) -> None:
        expected = {h.name: h for h in _headers(self._vector, self._entry.rank_fraction)}
        stored = self._files.tensors
        faults = [f"'{name}' on one side only" for name in sorted(expected.keys() ^ stored.keys())]
        for name in expected.keys() & stored.keys():
            one, other = expected[name], stored[name]
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                faults.append(f"'{name}' is {other.dtype} {list(other.shape)}")
        stacks = {n: len(entries) for n, entries in self._entry.tensors.items()}
        if stacks != _stacks(self._vector):
            faults.append(f"the manifest's 'factors' name {len(stacks)} tensors")
        if faults:
            raise self._unusable("factors of every matrix", summarize_faults(sorted(faults)))

    def _unusable(self, expected: object, got: object) -> SafetyVectorError:
        return SafetyVectorError(self.what, expected=expected, got=got, fix=_CURE)


def open_factors(vector: SafetyVector, rank_fraction: float, device: str) -> FactorFiles | None:
    """The vector's cached factors, or None where they would not give the same plan.

    Args:
        vector: The vector.
        rank_fraction: The plan's γ.
        device: Where the plan's linear algebra runs.

    Raises:
        SafetyVectorError: They are there for this γ, and damaged or stale.
    """
    entry = vector.manifest.factors
    if entry is None or not _present(vector):
        return None
    made_for = (entry.rank_fraction, entry.computation, entry.device)
    if made_for != (rank_fraction, COMPUTATION, torch.device(device).type):
        return None
    return FactorFiles(vector)


def add_factors(
    vector: SafetyVector,
    *,
    rank_fraction: float = 0.5,
    device: str = "cpu",
    jobs: int | None = None,
    max_shard_bytes: int,
    progress: Progress = silent,
) -> VectorManifest:
    """Compute a vector's factors and lay them beside it. Memory: a few tensors for each job.

    Args:
        vector: In a local folder; factors that are there already are replaced.
        rank_fraction: γ of the plans that are to use them.
        device: Where the linear algebra runs.
        jobs: How many tensors at once; see `worker_count`.
        max_shard_bytes: Larger ones are sharded.
        progress: Called with each tensor's name, how many are done, and how many there are.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: The folder is a Hub cache's or has no room for the file, or γ is not in (0, 1].
        SafetyVectorError, NonFiniteError: The vector is damaged.
    """
    check_rank_fraction(rank_fraction)
    if vector.location.repo_id is not None:
        raise ConfigError(
            vector.what,
            expected="a folder of your own",
            got="one of the Hub's cache",
            fix="Download it with 'hf download --local-dir', and factor that.",
        )
    folder = vector.location.path
    for old in folder.glob(f"{FACTORS_FILE_STEM}*"):
        if old.is_dir() and not old.is_symlink():
            raise ConfigError(
                vector.what,
                expected="room for the file of factors",
                got=f"a folder of the name '{old.name}'",
                fix="Move it away.",
            )
    names = list(_stacks(vector))
    shards = assign_shards(_headers(vector, rank_fraction), FACTORS_FILE_STEM, max_shard_bytes)
    entries: dict[str, tuple[MatrixFactors, ...]] = {}
    count = worker_count(jobs, device)

    def work(name: str) -> list[Factors]:
        delta, _ = vector.dense(name)
        return [factor(matrix.to(device), rank_fraction) for matrix in matrices(delta)]

    def computed() -> Generator[tuple[str, torch.Tensor]]:
        with workers(count) as pool:
            for done, (name, found) in enumerate(in_order(pool, work, names, count), 1):
                row = []
                for i, factors in enumerate(found):
                    pair = _padded(factors, rank_fraction)
                    row.append(_entry(vector, rank_fraction, name, factors, pair))
                    yield from zip((f"{name}.{i}.{side}" for side in _SIDES), pair, strict=True)
                entries[name] = tuple(row)
                progress(name, done, len(names))

    bare = vector.manifest.model_copy(update={"factors": None})
    adding = AdditionTransaction(
        folder, FACTORS_FILE_STEM, index=VECTOR_MANIFEST, without=_document(bare)
    )
    with adding as partial, closing(computed()) as tensors:
        for file, shard in shards.items():
            with ShardWriter(partial / file, shard, {"format": "pt"}) as writer:
                for _ in shard:
                    writer.write(*next(tensors))
        for _ in tensors:
            raise AssertionError("more factors than headers")
        write_index(partial, FACTORS_FILE_STEM, shards)
        kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
        manifest = vector.manifest.model_copy(
            update={
                "factors": CachedFactors(
                    computation=COMPUTATION,
                    device=kind,
                    rank_fraction=rank_fraction,
                    vector=vector.fingerprint,
                    tensors=entries,
                )
            }
        )
        (partial / VECTOR_MANIFEST).write_text(_document(manifest), encoding="utf-8")
    return manifest


def _document(manifest: VectorManifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"


_SIDES = ("left", "right")


def _stacks(vector: SafetyVector) -> dict[str, int]:
    """Tensors that have factors → how many matrices they are."""
    return {
        name: entry.shape[0] if len(entry.shape) == 3 else 1
        for name, entry in vector.tensors.items()
        if len(entry.shape) in (2, 3)
    }


def _headers(vector: SafetyVector, rank_fraction: float) -> list[TensorHeader]:
    """In writing order. Ranks are not known ahead: shapes are those of full rank."""
    headers = []
    for name, count in _stacks(vector).items():
        short, long = sorted(vector.tensors[name].shape[-2:])
        wanted = kept_directions(short, rank_fraction)
        for i in range(count):
            headers.append(TensorHeader(f"{name}.{i}.left", "F32", (short, wanted), ""))
            headers.append(TensorHeader(f"{name}.{i}.right", "F32", (wanted, long), ""))
    return headers


def _padded(factors: Factors, rank_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors on the CPU, with zeros up to full rank."""
    missing = kept_directions(factors.left.shape[0], rank_fraction) - factors.rank
    pad = torch.nn.functional.pad
    return pad(factors.left.cpu(), (0, missing)), pad(factors.right.cpu(), (0, 0, 0, missing))


def _entry(
    vector: SafetyVector,
    rank_fraction: float,
    name: str,
    factors: Factors,
    pair: tuple[torch.Tensor, torch.Tensor],
) -> MatrixFactors:
    entry = MatrixFactors(
        rung=factors.rung, rank=factors.rank, exponent=factors.exponent, digest=_UNKNOWN
    )
    digest = _digest(vector, rank_fraction, name, entry, *pair)
    return entry.model_copy(update={"digest": digest})


_UNKNOWN = "blake3:" + "0" * 64


def _digest(
    vector: SafetyVector,
    rank_fraction: float,
    name: str,
    entry: MatrixFactors,
    left: torch.Tensor,
    right: torch.Tensor,
) -> str:
    """Over everything that a plan takes from the factors, and what they were made from."""
    made_from: Mapping[str, object] = {
        "delta": vector.tensors[name].digest,
        "rank_fraction": rank_fraction,
        **entry.model_dump(exclude={"digest"}),
    }
    hasher = blake3(json.dumps(made_from, sort_keys=True).encode(), max_threads=blake3.AUTO)
    hasher.update(raw_bytes(left)).update(raw_bytes(right))
    return f"blake3:{hasher.hexdigest()}"


def factor_bytes(vector: SafetyVector) -> int:
    """What the factors take on disk; 0 where there are none."""
    entry = vector.manifest.factors
    headers = [] if entry is None else _headers(vector, entry.rank_fraction)
    return sum(4 * math.prod(header.shape) for header in headers)


def verify_factors(vector: SafetyVector) -> None:
    """Check every byte of a vector's cached factors, if they are there.

    Raises:
        SafetyVectorError: They are damaged or stale.
    """
    if vector.manifest.factors is not None and _present(vector):
        files = FactorFiles(vector)
        for name in vector.manifest.factors.tensors:
            files.read(name)


def _present(vector: SafetyVector) -> bool:
    """Whether any of the files is there: a download may have left them out."""
    return any(vector.location.path.glob(f"{FACTORS_FILE_STEM}*"))
