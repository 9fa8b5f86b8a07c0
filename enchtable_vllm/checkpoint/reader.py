"""Reading a checkpoint, sharded or not, one tensor at a time.

Everything that headers and indexes can tell is checked when the checkpoint is opened, over
all files and at once, so that a fault is not met after twenty minutes of work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from enchtable_vllm.checkpoint.layout import find_layout
from enchtable_vllm.checkpoint.pickled import PickledFile
from enchtable_vllm.checkpoint.quantized import refuse_quantized
from enchtable_vllm.checkpoint.safetensors_file import SafetensorsFile
from enchtable_vllm.errors import CheckpointError, summarize_faults
from enchtable_vllm.files import is_there, read_json

#: safetensors' dtype names, as torch's.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor.

    Attributes:
        name: The checkpoint's own name.
        dtype: In safetensors' spelling: ``BF16``.
        shape: The shape.
        file: The file's name inside the folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def is_float(self) -> bool:
        """Whether this is one of the dtypes that the merge works on."""
        return self.dtype in TORCH_DTYPES


class Checkpoint:
    """An opened checkpoint folder; headers checked, tensors read on demand.

    Args:
        folder: The folder.
        stem: Files are ``{stem}.safetensors``, or shards named by
            ``{stem}.safetensors.index.json``. ``model`` also admits what else vLLM's default
            loader reads: see `find_layout`.
        what: How an error message calls it.

    Attributes:
        layout: Which of the folder's files are the weights.
        tensors: Name → header, in name order.
        second_names: Second name of a tensor → its first. A head that repeats the embedding it
            is tied to is no tensor of its own: whoever merged only one of the two would undo
            the tie. It is not among ``tensors``.

    Raises:
        CheckpointError: No weights, a shard missing or truncated, a tensor twice or
            missing, a header that is not one.
    """

    def __init__(self, folder: Path, *, stem: str = "model", what: str = "checkpoint") -> None:
        self.folder = folder
        self.what = f"{what} '{folder}'"
        self._open: dict[str, SafetensorsFile | PickledFile] = {}
        self.layout = find_layout(folder, stem, self.what)
        self.index_name = self.layout.index_name
        index = self._read_index()
        self.files = sorted(set(index.values())) if index else list(self.layout.files)
        self.tensors: Mapping[str, TensorHeader] = self._read_headers()
        if index:
            self._check_index(index)
        self.second_names = self._find_second_names() if stem == "model" else {}
        self.tensors = {n: h for n, h in self.tensors.items() if n not in self.second_names}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``; empty when there is none."""
        return self.json("config.json")

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder; empty when there is none."""
        path = self.folder / file
        return read_json_object(path, self.what) if is_there(path) else {}

    @property
    def architecture(self) -> str:
        """The first of the config's ``architectures``."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "unknown"

    def metadata(self, file: str) -> dict[str, str]:
        """The free-form metadata in a file's header."""
        return self._file(file).metadata

    def names_by_file(self) -> Iterator[tuple[str, list[str]]]:
        """Each file with its tensors' names in the order of their bytes."""
        for file in self.files:
            yield file, [name for name in self._file(file).entries if name in self.tensors]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored, on the CPU, in memory of its own.

        Raises:
            CheckpointError: The file changed or cannot be read any more.
        """
        try:
            return self._file(self.tensors[name].file).read(name)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    def nbytes(self, name: str) -> int:
        """How many bytes a tensor's data takes."""
        return self._file(self.tensors[name].file).nbytes(name)

    def read_into(self, name: str, at: int, target: memoryview) -> None:
        """A part of a tensor's bytes, from ``at`` on, into memory that is there already.

        Raises:
            CheckpointError: As `read`, or the part is not all the tensor's.
        """
        try:
            self._file(self.tensors[name].file).read_into(name, at, target)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    def read_bytes(self, name: str, at: int, count: int) -> bytes:
        """A part of a tensor's bytes; less than ``count`` at its end.

        Raises:
            CheckpointError: As `read`.
        """
        try:
            return self._file(self.tensors[name].file).read_bytes(name, at, count)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    def refuse_changed(self) -> None:
        """Refuse files that are not those that were opened: somebody else reads them by name.

        Raises:
            CheckpointError: One was replaced or written to since.
        """
        changed = [f for f, opened in self._open.items() if not opened.is_still(self.folder / f)]
        if changed:
            raise CheckpointError(
                self.what,
                expected="the files that were checked",
                got=summarize_faults([f"another '{file}'" for file in changed]),
                fix="They were replaced meanwhile: leave them alone, and start again.",
            )

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.what}, file '{self.tensors[name].file}', tensor '{name}'",
            expected="readable bytes",
            got=error,
            fix="Restore the file, leave it alone meanwhile, and try again.",
        )

    def refuse_quantized(self) -> None:
        """Refuse a checkpoint whose numbers are packed.

        Raises:
            QuantizedCheckpointError: A config names a quantisation method, or tensors show one.
        """
        refuse_quantized(self)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / self.index_name
        if not is_there(path):
            return {}
        index = read_json_object(path, self.what)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            names = {}
        if not names:
            raise CheckpointError(
                f"{self.what}, {self.index_name}",
                expected="an object 'weight_map' from tensor names to file names",
                got=type(index.get("weight_map")).__name__,
                fix="Restore the index from where the checkpoint came from.",
            )
        bad = [f for f in set(names.values()) if Path(f).name != f or "\0" in f]
        missing = [f for f in set(names.values()) if f not in bad and not self._has(f)]
        if bad or missing:
            faults = [f"'{f}' is not a plain file name" for f in sorted(bad)]
            faults += [f"'{f}' is missing" for f in sorted(missing)]
            raise CheckpointError(
                f"{self.what}, {self.index_name}",
                expected="every shard it names in the same folder",
                got=summarize_faults(faults),
                fix="Download the checkpoint again.",
            )
        return {str(name): str(file) for name, file in names.items()}

    def _has(self, file: str) -> bool:
        return is_there(self.folder / file)

    def _file(self, file: str) -> SafetensorsFile | PickledFile:
        if file not in self._open:
            pickled = self.layout.kind == "pickled"
            path = self.folder / file
            try:
                self._open[file] = PickledFile(path) if pickled else SafetensorsFile(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{self.what}, file '{file}'",
                    expected="tensors by name in torch's zip format, and nothing else"
                    if pickled
                    else "a whole safetensors file",
                    got=error,
                    fix="It is truncated, corrupt or not a plain state dict: fetch it again, or "
                    "load it with transformers and call save_pretrained."
                    if pickled
                    else "It is truncated or corrupt: fetch or write it again.",
                ) from error
        return self._open[file]

    def _read_headers(self) -> dict[str, TensorHeader]:
        tensors: dict[str, TensorHeader] = {}
        faults: list[str] = []
        for file in self.files:
            for name, (dtype, shape) in self._file(file).entries.items():
                if name in tensors:
                    faults.append(f"'{name}' in '{tensors[name].file}' and in '{file}'")
                tensors[name] = TensorHeader(name, dtype, shape, file)
        if faults:
            raise CheckpointError(
                self.what,
                expected="every tensor once",
                got=summarize_faults(faults),
                fix=f"Remove the stale files, or add '{self.index_name}'.",
            )
        return dict(sorted(tensors.items()))

    def _check_index(self, index: dict[str, str]) -> None:
        # A tied head or embedding may be stored under one of its names and indexed under both.
        tied = {n for n in index.keys() - self.tensors.keys() if n.endswith((_HEAD, *_EMBEDDINGS))}
        faults = [
            f"'{name}' is not in '{file}'"
            for name, file in sorted(index.items())
            if name not in tied and (name not in self.tensors or self.tensors[name].file != file)
        ]
        faults += [f"'{name}' is not in the index" for name in self.tensors if name not in index]
        if self.layout.kind == "pickled":  # of these vLLM reads every file, index or not
            stale = sorted(set(self.layout.files) - set(self.files))
            faults += [f"'{file}' is beside the files that it names" for file in stale]
        if faults:
            raise CheckpointError(
                f"{self.what}, {self.index_name}",
                expected="exactly the tensors that the files hold",
                got=summarize_faults(faults),
                fix="Download the checkpoint again.",
            )

    def _find_second_names(self) -> dict[str, str]:
        tied = [self.config, *(v for v in self.config.values() if isinstance(v, dict))]
        if any(part.get("tie_word_embeddings") is False for part in tied):
            return {}
        heads = [h for name, h in self.tensors.items() if name.endswith(_HEAD)]
        embeddings = [h for name, h in self.tensors.items() if name.endswith(_EMBEDDINGS)]
        second_names: dict[str, str] = {}
        for head, embedding in itertools.product(heads, embeddings):
            if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
                continue
            if torch.equal(self.read(head.name), self.read(embedding.name)):
                second_names[head.name] = embedding.name
            elif self.layout.kind == "pickled" and self.config.get("tie_word_embeddings"):
                # vLLM would tie them and drop the head, transformers would not.
                raise CheckpointError(
                    f"{self.what}, tensor '{head.name}'",
                    expected=f"'{embedding.name}' again, because config.json ties them",
                    got="another tensor",
                    fix='Set "tie_word_embeddings" to false in config.json, or remove the tensor.',
                )
        return second_names


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: It does not, or is not JSON.
    """
    try:
        value, _ = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{what}, {path.name}",
            expected="a JSON object",
            got=error,
            fix="Restore the file.",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what}, {path.name}",
            expected="a JSON object",
            got=f"a JSON {type(value).__name__}",
            fix="Restore the file.",
        )
    return value
