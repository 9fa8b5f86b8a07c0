"""One tensor, merged as it is read from its file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import Q, inputs

from enchtable_vllm.checkpoint import Checkpoint
from enchtable_vllm.errors import CheckpointError, MismatchError, SafetyVectorError
from enchtable_vllm.merge import TensorMerge
from enchtable_vllm.vector import SafetyVector


def change_one_byte(path, name):
    """Of a tensor, in the middle of it."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    start, end = json.loads(path.read_bytes()[8 : 8 + size])[name]["data_offsets"]
    with path.open("r+b") as file:
        file.seek(8 + size + (start + end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("verify_content", [False, True])
def test_what_is_read_in_pieces_is_checked_as_what_is_read_whole(damaged, verify_content):
    """A byte of either file, and files that were written to after they were opened."""
    vector, resolved = inputs(damaged)
    task, name = Checkpoint(damaged.task), max(resolved.coefficients)
    merge_one = TensorMerge(resolved, vector, what="task model", verify_content=verify_content)
    assert torch.equal(
        merge_one.from_file(name, task).tensor, merge_one(name, task.read(name)).tensor
    )
    change_one_byte(damaged.vector / "safety_vector.safetensors", name)
    with pytest.raises(CheckpointError, match=f"'{name}'.*written to while it was read"):
        merge_one.from_file(name, task)
    again = TensorMerge(
        resolved, SafetyVector.open(damaged.vector), what="", verify_content=verify_content
    )
    with pytest.raises(SafetyVectorError, match=f"tensor '{name}': expected content blake3:"):
        again.from_file(name, task)
    change_one_byte(damaged.vector / "safety_vector.safetensors", name)
    again = TensorMerge(
        resolved, SafetyVector.open(damaged.vector), what="", verify_content=verify_content
    )
    change_one_byte(damaged.task / "model.safetensors", name)
    with pytest.raises(CheckpointError, match="written to while it was read"):
        again.from_file(name, task)
    if verify_content:
        with pytest.raises(MismatchError, match=f"tensor '{name}': expected content blake3:"):
            again.from_file(name, Checkpoint(damaged.task))
    else:
        again.from_file(name, Checkpoint(damaged.task))


def test_a_reshaped_tensor_is_refused_before_it_is_read_in_pieces(damaged):
    tensors = load_file(damaged.task / "model.safetensors")
    tensors[Q] = tensors[Q][:-1].contiguous()
    save_file(tensors, damaged.task / "model.safetensors")
    vector, resolved = inputs(damaged)
    merge_one = TensorMerge(resolved, vector, what="task model")
    with pytest.raises(MismatchError, match=r"q_proj.*\[256, 256\].*\[255, 256\]"):
        merge_one.from_file(Q, Checkpoint(damaged.task))
