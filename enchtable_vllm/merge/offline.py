"""``enchtable merge``: an ordinary checkpoint, for whoever does not run vLLM.

Files, their order and their headers stay as they are; so do config, tokenizer, chat template
and whatever else lies in the folder. Only the bytes of merged tensors differ. Two exceptions,
both in the report's notes: pickled weights become safetensors, and a head that repeats the
embedding it is tied to is left out, as transformers leaves it out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    Location,
    ShardWriter,
    TensorHeader,
    local,
    sampled_fingerprint,
)
from enchtable_vllm.checkpoint.writer import write_index
from enchtable_vllm.errors import CheckpointError
from enchtable_vllm.files import open_regular, refuse_link_out
from enchtable_vllm.merge.one import TensorMerge
from enchtable_vllm.merge.report import MergeReport, Rounding
from enchtable_vllm.merge.stream import MergeStream, check_rounding
from enchtable_vllm.plan import PLAN_FILE, MergeMasks, ResolvedPlan
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector import VECTOR_MANIFEST, SafetyVector

#: Weights of any framework: unmerged ones must not lie beside the merged.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz"),
    *(".h5", ".keras", ".msgpack", ".ot", ".tflite"),
)


def merge_checkpoint(
    task_location: Location,
    vector: SafetyVector,
    resolved: ResolvedPlan,
    out: Path,
    *,
    device: torch.device | None = None,
    masks: MergeMasks | None = None,
    rounding: Rounding = "nearest",
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Write the task model with the safety vector merged in. Memory: a few tensors.

    Args:
        task_location: The fine-tuned model.
        vector: The safety vector.
        resolved: The plan in force.
        out: The folder to make; it appears whole or not at all.
        device: Where to merge; the CPU by default. The bits are the same.
        masks: Of the plan, if it has any.
        rounding: See `TensorMerge`.
        overwrite: Replace ``out``.
        progress: Called with each tensor's name, how many are done, and how many there are.

    Raises:
        MismatchError, IncompleteMergeError, NonFiniteError, SafetyVectorError: As `MergeStream`.
        CheckpointError: The task model cannot be read.
    """
    task = Checkpoint(task_location.path, what="task model")
    task.refuse_quantized()
    resolved.check_vector(vector)
    resolved.check_task_model(sampled_fingerprint(task), task.what)
    resolved.check_headers(task, vector)
    done = 0

    def on_tensor(name: str) -> None:
        nonlocal done
        done += 1
        progress(name, done, len(task.tensors))

    check_rounding(rounding, resolved, task)
    merge_one = TensorMerge(
        resolved, vector, what=task.what, device=device, masks=masks, rounding=rounding
    )
    stream = MergeStream(merge_one, digest_merged=True, on_tensor=on_tensor)
    inputs = (task.folder, vector.location.path)
    with FolderTransaction(out, overwrite=overwrite, inputs=inputs) as folder:
        _copy_everything_else(task, folder)
        merged = stream.merge(_stored(task))
        shards: dict[str, list[TensorHeader]] = {}
        for file, names in task.names_by_file():
            target = _file_name(task, file)
            shards[target] = [task.tensors[name] for name in names]
            with ShardWriter(folder / target, shards[target], task.metadata(file)) as writer:
                for name in names:
                    streamed, tensor = next(merged)
                    assert streamed == name
                    writer.write(name, tensor)
        assert next(merged, None) is None  # ends the stream: its checks run before the rename
        task.refuse_changed()
        if task.layout.kind == "pickled" or task.second_names:
            write_index(folder, "model", shards)
    assert stream.report is not None
    stream.report.notes += _notes(task)
    return stream.report


def _stored(task: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for _, names in task.names_by_file():
        for name in names:
            yield name, task.read(name)


def _file_name(task: Checkpoint, file: str) -> str:
    """Where a file's tensors are written: ``pytorch_model-….bin`` goes to ``model-….safetensors``.

    A lone file takes the one name that transformers finds without an index.
    """
    if task.layout.kind != "pickled":
        return file
    if len(task.files) == 1:
        return "model.safetensors"
    return Path(file).with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)


def _notes(task: Checkpoint) -> list[str]:
    notes = [
        f"'{second}' is left out: it repeats '{first}', to which the model ties it"
        for second, first in task.second_names.items()
    ]
    if task.layout.kind == "pickled":
        notes.append(f"pickled weights ('{task.files[0]}', ...) are written as safetensors")
    return notes


def _copy_everything_else(task: Checkpoint, folder: Path) -> None:
    """Every other file, in subfolders too.

    Weights in other formats would not be merged, indexes may name them, and a plan or a vector
    beside them was made for the unmerged model: those stay behind.
    """
    rewritten = task.layout.kind == "pickled" or bool(task.second_names)
    vectors = {path.parent for path in task.folder.rglob(VECTOR_MANIFEST)}
    for source in sorted(task.folder.rglob("*")):
        inside = source.relative_to(task.folder)
        if not source.is_file() or source.suffix in _WEIGHTS or source.name == PLAN_FILE:
            continue
        if source.name.endswith(".index.json") and (rewritten or source.name != task.index_name):
            continue
        if any(part.startswith(".") for part in inside.parts) or vectors & set(source.parents):
            continue
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        with _open_own(task, source) as read, (folder / inside).open("xb") as write:
            shutil.copyfileobj(read, write)


def _open_own(task: Checkpoint, path: Path) -> BinaryIO:
    """A file of the model's; what it links to may be published with the merged model.

    Raises:
        CheckpointError: It is a link out of the folder, or cannot be read.
    """
    try:
        refuse_link_out(path, local(task.folder).home)
        return os.fdopen(open_regular(path), "rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{task.what}, file '{path.relative_to(task.folder)}'",
            expected="a readable file inside the folder",
            got=error,
            fix="Put the file itself there, or remove it.",
        ) from error
