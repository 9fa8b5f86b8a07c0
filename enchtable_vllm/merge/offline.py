"""``enchtable merge``: an ordinary checkpoint, for whoever does not run vLLM.

Files, their order and their headers stay as they are; so do config, tokenizer, chat template
and whatever else lies in the folder. Only the bytes of merged tensors differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    Location,
    ShardWriter,
    sampled_fingerprint,
)
from enchtable_vllm.merge.report import MergeReport
from enchtable_vllm.merge.stream import MergeStream
from enchtable_vllm.plan import PLAN_FILE, ResolvedPlan
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector import SafetyVector

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


def merge_checkpoint(
    task_location: Location,
    vector: SafetyVector,
    resolved: ResolvedPlan,
    out: Path,
    *,
    device: torch.device | None = None,
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
    done = 0

    def on_tensor(name: str) -> None:
        nonlocal done
        done += 1
        progress(name, done, len(task.tensors))

    stream = MergeStream(
        resolved, vector, what=task.what, device=device, digest_merged=True, on_tensor=on_tensor
    )
    with FolderTransaction(out, overwrite=overwrite) as folder:
        _copy_everything_else(task, folder)
        merged = stream.merge(_stored(task))
        for file, names in task.names_by_file():
            headers = [task.tensors[name] for name in names]
            with ShardWriter(folder / file, headers, task.metadata(file)) as writer:
                for name in names:
                    streamed, tensor = next(merged)
                    assert streamed == name
                    writer.write(name, tensor)
        assert next(merged, None) is None  # ends the stream: its checks run before the rename
    assert stream.report is not None
    return stream.report


def _stored(task: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for _, names in task.names_by_file():
        for name in names:
            yield name, task.read(name)


def _copy_everything_else(task: Checkpoint, folder: Path) -> None:
    """Everything but weights; a plan beside them was made for the unmerged model: it stays."""
    for source in sorted(task.folder.iterdir()):
        if source.is_file() and source.suffix not in _WEIGHTS and source.name != PLAN_FILE:
            shutil.copyfile(source, folder / source.name)
