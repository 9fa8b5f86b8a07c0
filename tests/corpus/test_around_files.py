"""What happens to files while they are read or written: each ends in a refusal, not in a mess."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from corpus import consumers, seeds
from corpus.damage import Damage
from models import copy_family
from users import nobody
from vllm_runs import environment

from enchtable_vllm.checkpoint import Checkpoint, FileTransaction, FolderTransaction, Location
from enchtable_vllm.errors import CheckpointError, ConfigError
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector

WRITERS = [c for c in consumers.CONSUMERS if c.name in (
    "build", "merge", "serve with base", "command: build", "command: build with factors",
    "command: plan", "command: plan with masks", "command: merge",
)]  # fmt: skip


@pytest.fixture
def family(small, tmp_path):
    return copy_family(small.family, tmp_path / "family")


def merge(family, out, **options):
    vector, resolved = SafetyVector.open(family.vector), resolve_plan(*read_plan(family.plan))
    return merge_checkpoint(Location(family.task), vector, resolved, out, **options)


# --- files that change while they are read -------------------------------------------------------


def test_a_file_that_is_replaced_is_read_on_as_it_was(family):
    """As a package manager or a download replaces files: the old one lives while it is open."""
    vector = SafetyVector.open(family.vector)
    expected = vector.read(seeds.Q).values
    seeds.edit_tensors(family.base, lambda tensors: tensors)
    seeds.weights(family.base).replace(seeds.weights(family.vector))
    assert torch.equal(vector.read(seeds.Q).values, expected)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [overwrite, truncate])
@pytest.mark.parametrize("artefact", ["task", "vector"])
def test_a_file_that_is_written_to_while_a_merge_streams(family, tmp_path, artefact, change):
    """A mapping would end the process (SIGBUS) or mix two versions."""

    def interfere(name, done, total):
        if done == 1:
            change(seeds.weights(getattr(family, artefact)))

    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="written to while it was read"):
        merge(family, tmp_path / "out" / "m", progress=interfere)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_header_read_twice_is_the_same(family):
    checkpoint = Checkpoint(family.task)
    truncate(seeds.weights(family.task))
    with pytest.raises(CheckpointError, match="written to while it was read"):
        checkpoint.read(max(checkpoint.tensors))


def swap(path):
    other = path.with_name("other")
    shutil.copyfile(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite, truncate, swap, Path.unlink])
def test_a_checkpoint_that_is_not_the_one_that_was_checked(family, change):
    """vLLM reads the files again, by name, after they were fingerprinted."""
    checkpoint = Checkpoint(family.task)
    checkpoint.refuse_changed()
    change(seeds.weights(family.task))
    with pytest.raises(CheckpointError, match=r"another 'model\.safetensors'"):
        checkpoint.refuse_changed()


# --- places that cannot be read or written -------------------------------------------------------


@pytest.fixture
def open_folder():
    """A folder that everybody may enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


#: What nobody may read: which artefact that is, where, and in which form of a family.
UNREADABLE = {
    "manifest": ("vector", seeds.manifest),
    "delta": ("vector", lambda f: seeds.weights(f.vector)),
    "vector": ("vector", lambda f: f.vector),
    "plan": ("plan", lambda f: f.plan),
    "weights": ("task", lambda f: seeds.weights(f.task)),
    "config": ("task", lambda f: f.task / "config.json"),
    "base": ("base", lambda f: f.base),
    "aligned": ("aligned", lambda f: seeds.weights(f.aligned)),
    "surrogate": ("surrogate", lambda f: f.surrogate),
    "masks": ("masks", lambda f: f.plan.with_suffix(".masks"), "masked"),
    "bits": ("masks", lambda f: f.plan.with_suffix(".masks") / "keep_bits.safetensors", "masked"),
    "factors": ("factors", lambda f: f.vector / "safety_vector_factors.safetensors", "factored"),
    "pickle": ("task", lambda f: seeds.weights(f.task), "pickled"),
    "everything": ("task", lambda f: f.task.parent),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_no_permission_to_read(good, open_folder, what):
    artefact, path_of, form = (*UNREADABLE[what], "plain")[:3]
    family = copy_family(good[form].family, open_folder / "family")
    path = path_of(family)
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o777)
    path.chmod(0)
    damage = Damage(artefact, what, print, "Permission denied")
    with nobody():
        consumers.check_refused(good[form], family, damage, open_folder / "out")


@pytest.mark.parametrize("consumer", WRITERS, ids=lambda c: c.name)
def test_no_permission_to_write(small, open_folder, consumer):
    family = copy_family(small.family, open_folder / "family")
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o555)
    with nobody():
        message, _ = consumers.refusal(lambda: consumer.run(family, open_folder / "out"))
    assert message is not None
    assert "Permission denied" in message
    assert consumers.well_formed(message)
    assert list((open_folder / "out").iterdir()) == []


@contextmanager
def no_room(size):
    """No file of this process may grow beyond a size: the system refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 2048])
@pytest.mark.parametrize("consumer", WRITERS, ids=lambda c: c.name)
def test_no_room_to_write(family, tmp_path, consumer, size):
    out = tmp_path / "out"
    out.mkdir()
    with no_room(size):
        message, _ = consumers.refusal(lambda: consumer.run(family, out))
    assert message is not None
    assert "File too large" in message
    assert consumers.well_formed(message)
    assert consumers.left(out) == []


def test_a_full_disk(family, tmp_path):
    """A real one, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        with pytest.raises(ConfigError, match=r"No space left.*make room"):
            merge(family, disk / "m")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- outputs -------------------------------------------------------------------------------------


def test_two_processes_that_write_one_output(family, tmp_path):
    """The lock is on a file, so a second opening of it in this process is a second process."""
    out = tmp_path / "m"
    with FolderTransaction(out), pytest.raises(ConfigError, match="another one that is at it"):
        merge(family, out)
    assert not (tmp_path / ".m.lock").exists()
    path = tmp_path / "p.json"
    names = ("--task-model", family.task, "--base-model", family.base)
    plan = ("plan", *names, "--safety-vector", family.vector, "-o", path)
    with FileTransaction(path) as partial:
        message, _ = consumers.refusal(lambda: consumers.command(*plan))
        assert "another one that is at it" in message
        partial.write_text("ours")
    assert path.read_text() == "ours"


def test_a_file_system_without_locks(family, tmp_path, monkeypatch):
    """As some clusters' are: outputs are written all the same."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("enchtable_vllm.checkpoint.transaction.fcntl.flock", refuse)
    merge(family, tmp_path / "outputs" / "m")
    assert [p.name for p in (tmp_path / "outputs").iterdir()] == ["m"]


def test_an_output_that_appears_meanwhile_is_left_alone(family, tmp_path):
    out = tmp_path / "m"

    def interfere(name, done, total):
        if done == 1:
            out.mkdir()
            (out / "precious").write_text("x")

    with pytest.raises(ConfigError, match="in use"):
        merge(family, out, progress=interfere)
    assert [p.name for p in tmp_path.iterdir() if p != family.task.parent] == ["m"]
    assert (out / "precious").read_text() == "x"


def test_what_a_killed_run_left_is_removed(family, tmp_path):
    """Its half-written folder; and, killed between two renames, what it was to replace."""
    out = tmp_path / "outputs" / "m"
    partial, replaced = out.with_name(".m.partial"), out.with_name(".m.replaced")
    for folder in (partial, replaced):
        folder.mkdir(parents=True)
        (folder / "old").write_text("x")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge(family, out)  # what it replaced is there again
    assert [p.name for p in out.parent.iterdir()] == ["m"]
    assert (out / "old").read_text() == "x"
    merge(family, out, overwrite=True)
    assert [p.name for p in out.parent.iterdir()] == ["m"]
    assert not (out / "old").exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("gone")])
def test_a_plan_replaces_nothing_but_a_file(tmp_path, make):
    path = tmp_path / "p"
    make(path)
    with pytest.raises(ConfigError, match="something else that is there"):
        FileTransaction(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_plan_replaces_no_file_of_an_input(family, name):
    before = consumers.files(family.task.parent)
    names = ("--task-model", family.task, "--base-model", family.base)
    plan = ("plan", *names, "--safety-vector", family.vector, "-o", family.task / name)
    message, _ = consumers.refusal(lambda: consumers.command(*plan))
    assert "a file of an input" in message
    assert consumers.files(family.task.parent) == before


def test_a_merge_copies_nothing_from_outside_the_model(family, tmp_path):
    """A link in a model's folder may lead to a secret, and a merged model may be published."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    (family.task / "notes.txt").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"'notes.txt'.*a link to"):
        merge(family, tmp_path / "out" / "m")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_hub_cache_is_made_of_links(small, tmp_path):
    """Snapshots link to blobs: the one place where a link out of the folder is as it should be."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--vector"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    shutil.copytree(small.family.vector, snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    vector = SafetyVector.open(snapshot)
    assert {n: vector.read(n).values.shape for n in vector.tensors}


# --- signals -------------------------------------------------------------------------------------

#: Runs commands one after the other, each stopped by a signal that arrives when a tensor is on
#: its way; the last one is killed.
STOPPED = """
import os, signal, sys
from contextlib import suppress
from enchtable_vllm import cli
from enchtable_vllm.checkpoint import writer
from enchtable_vllm.plan import measure

def stop_after(module, name):
    real = getattr(module, name)
    def then_stop(*arguments):
        result = real(*arguments)
        with suppress(IndexError):  # once: several threads come here
            os.kill(os.getpid(), chosen.pop())
        return result
    setattr(module, name, then_stop)

stop_after(writer.ShardWriter, "write")
stop_after(measure.Measurement, "_terms")
for line in sys.stdin:
    signal_name, *arguments = line.rstrip("\\n").split("\\t")
    chosen = [getattr(signal, signal_name)]
    sys.argv = ["enchtable", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        print(signal_name, arguments[0], end.code, flush=True)
"""


def test_stopped_in_the_middle(family, tmp_path):
    """Build, plan, merge, factor, and a plan with masks; stopped, nothing is left but what a plan
    resumes from; killed, the next run tidies up."""
    out = tmp_path / "out"
    out.mkdir()
    ends = ["--aligned", family.aligned, "--surrogate", family.surrogate]
    names = ["--task-model", family.task, "--safety-vector", family.vector]
    commands = [
        ["vector", "build", *ends, "-o", out / "v"],
        ["plan", *names, "--base-model", family.base, "-o", out / "p.json"],
        ["merge", *names, "--plan", family.plan, "-o", out / "m"],
        ["vector", "factor", family.vector],
        ["vector", "build", *ends, "-o", out / "f", "--factors"],
        ["plan", *names, "--base-model", family.base, "-o", out / "m.json", "--density", "0.5"],
    ]
    inputs = consumers.files(family.task.parent)
    runs = [(s, c) for s in ("SIGINT", "SIGTERM") for c in commands]
    runs += [("SIGHUP", commands[2]), ("SIGKILL", commands[2])]
    lines = ["\t".join([s, *map(str, c)]) for s, c in runs]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    expected = [f"{s} {c[0]} {128 + getattr(signal, s)}" for s, c in runs[:-1]]
    assert done.stdout.splitlines() == expected, done.stderr
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.count("stopped by SIGTERM") == 6
    assert consumers.files(family.task.parent) == inputs
    left = [".m.json.journal", ".m.lock", ".m.partial", ".p.json.journal"]
    assert sorted(p.name for p in out.iterdir()) == left
    merge(family, out / "m")
    assert sorted(p.name for p in out.iterdir()) == [".m.json.journal", ".p.json.journal", "m"]
