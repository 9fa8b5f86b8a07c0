"""What a swap holds in host memory: whole fused groups, within a bound."""

import threading
import time
from pathlib import Path

import live
import pytest
import torch

from enchtable_vllm.checkpoint import Checkpoint, tensor_digest
from enchtable_vllm.errors import MemoryBoundError, MismatchError
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import open_task, prepare
from enchtable_vllm.serving.room import ServedTask, refuse_another_task
from enchtable_vllm.serving.swap.host_memory import HostPages, free_bytes, refuse_too_much
from enchtable_vllm.serving.swap.staging import (
    StagingCancelled,
    StagingJob,
    block_of,
)


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    return live.make_root(family, tmp_path_factory.mktemp("staging"))


def job(root, old, new, **more):
    task = open_task(LoaderConfig(), str(root.family.task), None, None)

    def of(name):
        if name is None:
            return None
        vector, plan = str(root.path / name), str(root.plan(name))
        return prepare(LoaderConfig(safety_vector=vector, merge_plan=plan), task, device="cpu")

    settings = {
        "ranks": 1,
        "staging_gib": None,
        "verify_content": False,
        "served": torch.bfloat16,
        "cancelled": threading.Event(),
    }
    return StagingJob(task, of(old), of(new), **(settings | more))


BLOCKS = {
    "model.layers.3.self_attn.q_proj.weight": "model.layers.3.self_attn",
    "model.layers.3.mlp.experts.11.w1.weight": "model.layers.3.mlp",
    "model.layers.3.input_layernorm.weight": "model.layers.3.input_layernorm",
    "model.embed_tokens.weight": "model.embed_tokens",
    "lm_head.weight": "lm_head",
    "model.layers.3.block_sparse_moe.gate.weight": "model.layers.3.block_sparse_moe",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    assert block_of(name) == BLOCKS[name]


def test_a_vector_of_queries_stages_all_that_vllm_fuses_them_with(root):
    names = job(root, None, "sv-q").names()
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_union_of_two_scopes_is_staged(root):
    parts = {name.split(".")[3] for name in job(root, "sv-a", "sv-ffn").names()}
    assert parts == {"self_attn", "mlp"}
    assert job(root, None, None).names() == []


def test_both_sides_hold_what_a_load_gives(root):
    staged = job(root, None, "sv-b").run()
    stored = Checkpoint(root.family.task)
    assert staged.old.report is None
    for name, tensor in staged.old.tensors.items():
        assert torch.equal(tensor, stored.read(name))
    assert staged.new.tensors.keys() == staged.old.tensors.keys()
    assert staged.new.digest != staged.old.digest
    assert staged.nbytes == 2 * sum(t.nbytes for t in staged.old.tensors.values())
    again = job(root, "sv-a", "sv-b").run()
    for name, tensor in again.new.tensors.items():
        assert tensor_digest(tensor) == tensor_digest(staged.new.tensors[name])
    assert again.new.digest == staged.new.digest


def test_staging_stops_when_nobody_waits(root):
    cancelled = threading.Event()
    cancelled.set()
    started = time.monotonic()
    with pytest.raises(StagingCancelled):
        job(root, None, "sv-b", cancelled=cancelled).run()
    assert time.monotonic() - started < 5


def test_another_task_model_is_refused(root):
    one = open_task(LoaderConfig(), str(root.family.task), None, None)
    other = open_task(LoaderConfig(), str(root.family.base), None, None)
    refuse_another_task(ServedTask.of(one), one)
    with pytest.raises(MismatchError, match="replaced since the server started"):
        refuse_another_task(ServedTask.of(one), other)


def test_what_does_not_fit_is_refused_before_a_byte_is_read(root, tensors_alive):
    with pytest.raises(MemoryBoundError, match="'staging_gib'"):
        job(root, "sv-a", "sv-b", staging_gib=1e-6).run()
    assert tensors_alive.most == 0
    job(root, "sv-a", "sv-b", staging_gib=1.0).run()


def test_pages_hold_tensors_of_any_size_and_layout():
    tensors = [torch.randn(n).to(d) for n in (1, 63, 4096) for d in (torch.bfloat16, torch.float32)]
    tensors.append(torch.randn(3, 5, dtype=torch.float32).t())
    pages = HostPages(sum(HostPages.size_of(t.nbytes) for t in tensors))
    copies = [pages.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.data_ptr() % 64 == 0
        assert copy.is_contiguous()


def test_pages_are_the_systems_again_when_the_last_tensor_is_gone():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 256 * 2**20
    before = resident()
    pages = HostPages(size)
    held = pages.copy(torch.ones(size // 2, dtype=torch.uint8))
    del pages
    assert resident() - before > size // 4
    del held
    assert resident() - before < size // 4


def test_every_rank_of_the_machine_counts():
    refuse_too_much(2**29, 2, 1.0)
    with pytest.raises(MemoryBoundError, match=r"got 1\.50 GiB \(3 ranks of 0\.50\)"):
        refuse_too_much(2**29, 3, 1.0)


def test_a_container_may_have_less_than_its_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1 kB\nMemAvailable:    4194304 kB\n")
    own = tmp_path / "own"  # as /proc/self/cgroup
    own.write_text("0::/\n")
    assert free_bytes(meminfo, tmp_path / "none", own) == 4 * 2**30
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**28}\nactive_file {2**28}\n")
    assert free_bytes(meminfo, tmp_path, own) == 4 * 2**30
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    assert free_bytes(meminfo, tmp_path, own) == 2**30 + 2**29
    assert free_bytes() > 0


def test_of_groups_within_groups_the_tightest_counts(tmp_path):
    meminfo, own = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text("MemAvailable:    4194304 kB\n")
    own.write_text("0::/kubepods/pod1/c1\n")
    for folder, most in (("kubepods", 3), ("kubepods/pod1", 2), ("kubepods/pod1/c1", 5)):
        group = tmp_path / folder
        group.mkdir()
        (group / "memory.max").write_text(f"{most * 2**30}\n")
        (group / "memory.current").write_text(f"{2**30}\n")
        (group / "memory.stat").write_text("inactive_file 0\n")
    assert free_bytes(meminfo, tmp_path, own) == 2**30


@pytest.mark.parametrize("inside", ["", "docker/abc"])
def test_groups_of_version_one_count_too(tmp_path, inside):
    """Within a container the group is the root of what is mounted there, whatever it is called."""
    meminfo, own = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text("MemAvailable:    4194304 kB\n")
    own.write_text("9:cpuset:/x\n4:memory:/docker/abc\n0::/docker/abc\n")
    group = tmp_path / "memory" / inside
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{2 * 2**30}\n")
    (group / "memory.usage_in_bytes").write_text(f"{2**30}\n")
    (group / "memory.stat").write_text(
        f"inactive_file 1\ntotal_inactive_file {2**27}\ntotal_active_file {2**27}\n"
    )
    assert free_bytes(meminfo, tmp_path, own) == 2**30 + 2**28
