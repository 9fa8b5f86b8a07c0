"""Reading a safetensors checkpoint, sharded or not, one tensor at a time.

Everything that headers and indexes can tell is checked when the checkpoint is opened, over
all files and at once, so that a fault is not met after twenty minutes of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from enchtable_vllm.checkpoint.files import is_there, read_json
from enchtable_vllm.checkpoint.safetensors_file import SafetensorsFile
from enchtable_vllm.errors import CheckpointError, QuantizedCheckpointError, summarize_faults

#: safetensors' dtype names, as torch's.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
            ``{stem}.safetensors.index.json``. ``model`` also admits any other safetensors
            files of the folder when there is no index, as vLLM does.
        what: How an error message calls it.

    Raises:
        CheckpointError: No safetensors, a shard missing or truncated, a tensor twice or
            missing, a header that is not one.
    """

    def __init__(self, folder: Path, *, stem: str = "model", what: str = "checkpoint") -> None:
        self.folder = folder
        self.what = f"{what} '{folder}'"
        self._open: dict[str, SafetensorsFile] = {}
        self.index_name = f"{stem}.safetensors.index.json"
        index = self._read_index()
        self.files = sorted(set(index.values())) if index else self._find_files(stem)
        self.tensors: Mapping[str, TensorHeader] = self._read_headers()
        if index:
            self._check_index(index)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``; empty when there is none."""
        path = self.folder / "config.json"
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
            yield file, list(self._file(file).entries)

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

    def read_bytes(self, name: str, at: int, count: int) -> bytes:
        """A part of a tensor's bytes; less than ``count`` at its end.

        Raises:
            CheckpointError: As `read`.
        """
        try:
            return self._file(self.tensors[name].file).read_bytes(name, at, count)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

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
            QuantizedCheckpointError: Its config names a quantisation method.
        """
        config = self.config
        settings = config.get("quantization_config") or config.get("compression_config")
        text_config = config.get("text_config")
        if not settings and isinstance(text_config, dict):
            settings = text_config.get("quantization_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise QuantizedCheckpointError(
                f"{self.what}, config.json",
                expected="bf16, fp16 or fp32 weights",
                got=f"quantization method '{method}'",
                fix="Merge into the unquantised checkpoint with 'enchtable merge', then quantise "
                "the result; or serve the unquantised checkpoint with vLLM's '--quantization'.",
            )

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

    def _find_files(self, stem: str) -> list[str]:
        if stem != "model":
            files = [f"{stem}.safetensors"] if self._has(f"{stem}.safetensors") else []
        else:
            files = sorted(name for name in self._listing() if name.endswith(".safetensors"))
        if not files:
            other = sorted(name for name in self._listing() if name.endswith(".bin"))
            raise CheckpointError(
                self.what,
                expected=f"'{stem}.safetensors' or '{self.index_name}'",
                got=f"pickled weights ('{other[0]}', ...)" if other else "no such file",
                fix="Convert it to safetensors first: load it with transformers and call "
                "save_pretrained."
                if other
                else "Check the path.",
            )
        return files

    def _listing(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir()]
        except OSError as error:
            raise CheckpointError(
                self.what, expected="a readable folder", got=error, fix="Check the path."
            ) from error

    def _file(self, file: str) -> SafetensorsFile:
        if file not in self._open:
            try:
                self._open[file] = SafetensorsFile(self.folder / file)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{self.what}, file '{file}'",
                    expected="a whole safetensors file",
                    got=error,
                    fix="It is truncated or corrupt: fetch or write it again.",
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
        faults = [
            f"'{name}' is not in '{file}'"
            for name, file in sorted(index.items())
            if name not in self.tensors or self.tensors[name].file != file
        ]
        faults += [f"'{name}' is not in the index" for name in self.tensors if name not in index]
        if faults:
            raise CheckpointError(
                f"{self.what}, {self.index_name}",
                expected="exactly the tensors that the files hold",
                got=summarize_faults(faults),
                fix="Download the checkpoint again.",
            )


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
