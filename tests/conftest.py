"""Fixtures that several test files share."""

import os
import signal
import weakref
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels. It must be chosen before anything imports triton;
    # child processes of other tests get an environment without it.
    os.environ["TRITON_INTERPRET"] = "1"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in a shell's background ignores interrupts and hands that down; tests send some.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup's
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache of plans."""
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A tiny random Llama family; read-only, because tests share it."""
    import models

    folder = tmp_path_factory.mktemp("family")
    return models.make_family(models.tiny_llama(folder / "aligned"), folder)


@pytest.fixture
def damaged(family, tmp_path):
    """A copy of the family for a test to damage."""
    import models

    return models.copy_family(family, tmp_path / "family")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two who sign vectors: ``ours`` and ``theirs``."""
    import signers

    folder = tmp_path_factory.mktemp("keys")
    return {name: signers.Key.make(folder, name) for name in ("ours", "theirs")}


@pytest.fixture
def edit_json():
    """Change one value in a JSON file: ``edit_json(path, "tensors", name, "a", value=…)``."""
    import json

    def edit(path: Path, *keys, value):
        document = json.loads(path.read_text())
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(document))

    return edit


class _Alive:
    """How many stored tensors are alive at once, counted at every read."""

    def __init__(self):
        self.most = 0
        self._references = []

    def count(self, tensor):
        self._references.append(weakref.ref(tensor))
        alive = sum(reference() is not None for reference in self._references)
        self.most = max(self.most, alive)


@pytest.fixture
def tensors_alive(monkeypatch):
    """Watches `Checkpoint.read` for the rest of the test."""
    from enchtable_vllm.checkpoint import Checkpoint

    alive, read = _Alive(), Checkpoint.read

    def counted(self, name):
        tensor = read(self, name)
        alive.count(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    return alive
