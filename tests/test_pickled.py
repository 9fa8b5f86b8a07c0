"""``.bin`` checkpoints: the same tensors, plans and merges as in safetensors; nothing is run."""

import json
import pickle
import shutil
from fnmatch import fnmatch

import architectures
import models
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from vllm_runs import merged_offline

from enchtable_vllm import cli
from enchtable_vllm.checkpoint import Checkpoint, Location, on_hub, sampled_fingerprint
from enchtable_vllm.errors import CheckpointError, EnchTableError
from enchtable_vllm.serving.prepare import stored_format
from enchtable_vllm.vector import SafetyVector, build_vector


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Merged everywhere, so that a head tied to its embedding matters; in safetensors."""
    folder = tmp_path_factory.mktemp("tied")
    aligned = models.tiny_llama(folder / "aligned", tied=True, vocabulary=128)
    return models.make_family(aligned, folder, scope="all")


def stored_anew(family, folder, store):
    """The same family, base and task model stored in another way; planned for anew."""
    copy = models.copy_family(family, folder)
    for model in (copy.base, copy.task):
        store(model)
    copy.plan.write_text(models.plan_for(copy.task, copy.base, copy.vector, beta=0.5).to_json())
    return copy


STORES = {
    "one file": architectures.pickled,
    "shards": lambda folder: architectures.pickled(folder, shards=2),
    "safetensors with the head again": architectures.with_repeated_head,
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_stored_anew_it_is_the_same_model_plan_and_merge(tied, tmp_path, store):
    anew = stored_anew(tied, tmp_path / "anew", store)
    one, other = Checkpoint(tied.task), Checkpoint(anew.task)
    assert other.second_names == {"lm_head.weight": "model.embed_tokens.weight"}
    assert list(one.tensors) == list(other.tensors)
    assert sampled_fingerprint(one) == sampled_fingerprint(other)
    assert (
        json.loads(tied.plan.read_text())["tensors"]
        == (json.loads(anew.plan.read_text())["tensors"])
    )
    merged = merged_offline(anew, tmp_path / "merged")
    assert not list(merged.glob("*.bin*"))
    written = {n: t for path in merged.glob("*.safetensors") for n, t in load_file(path).items()}
    expected = load_file(merged_offline(tied, tmp_path / "reference") / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert list(Checkpoint(merged).tensors) == list(expected)
    assert (merged / "model.safetensors.index.json").exists() == (len(other.files) > 1)


def test_the_merge_says_that_it_wrote_another_format(tied, tmp_path):
    anew = stored_anew(tied, tmp_path / "anew", architectures.pickled)
    command = ["merge", "--task-model", anew.task, "--safety-vector", anew.vector]
    command += ["--plan", anew.plan, "-o", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert result.exit_code == 0
    assert "pickled weights ('pytorch_model.bin', ...) are written as safetensors" in result.output
    assert "'lm_head.weight' is left out" in result.output


def test_safetensors_come_first_as_in_vllm(damaged):
    architectures.pickled(shutil.copytree(damaged.base, damaged.base / "other"))
    shutil.move(damaged.base / "other" / "pytorch_model.bin", damaged.base)
    assert Checkpoint(damaged.base).files == ["model.safetensors"]
    (damaged.base / "model.safetensors").unlink()
    torch.save(object, damaged.base / "training_args.bin")
    assert Checkpoint(damaged.base).files == ["pytorch_model.bin"]


class _Runs:
    """Unpickled in full, it would write a file."""

    def __reduce__(self):
        return eval, ("open('it-ran', 'w')",)


_ONES = torch.ones(4, 4)
#: What may be wrong with a file → what it holds.
DAMAGES = {
    "runs code": {"a": _Runs()},
    "a Trainer's checkpoint, not a state dict": {"model": {"a": _ONES}},
    "a number": {"a": _ONES, "epoch": 3},
    "names that are not text": {1: _ONES},
    "a list": [_ONES],
    "more than is stored": {"a": torch.ones(1).expand(1 << 40)},
    "sparse": {"a": _ONES.to_sparse()},
    "no values": {"a": torch.empty(3, device="meta")},
    "complex": {"a": _ONES.to(torch.complex64)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_anything_but_tensors_by_name_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    torch.save(damage, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"file 'pytorch_model.bin'.*save_pretrained"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("keep", [0, 3, 200, -30])
def test_truncated_and_old_files_are_refused(tmp_path, keep):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"file 'pytorch_model.bin'"):
        Checkpoint(tmp_path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"file 'pytorch_model.bin'"):
        Checkpoint(tmp_path)
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch's zip format"):
        Checkpoint(tmp_path)


def test_an_index_must_name_every_file_because_vllm_reads_every_file(damaged):
    architectures.pickled(damaged.base, shards=2)
    assert len(Checkpoint(damaged.base).files) == 2
    torch.save({"a": torch.ones(3)}, damaged.base / "stale.bin")
    with pytest.raises(CheckpointError, match=r"'stale.bin' is beside the files"):
        Checkpoint(damaged.base)
    (damaged.base / "stale.bin").unlink()
    (damaged.base / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"'pytorch_model-00002-of-00002.bin' is missing"):
        Checkpoint(damaged.base)


def test_tensors_that_share_a_storage_are_read_apart(tmp_path):
    buffer = torch.arange(24.0).view(4, 6)
    stored = {"all": buffer, "row": buffer[1], "turned": buffer.mT, "part": buffer[:, 2:4]}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in stored.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).is_contiguous()


def test_a_tied_head_that_is_another_tensor_is_refused(tmp_path):
    folder = models.tiny_llama(tmp_path / "m", tied=True, vocabulary=128)
    architectures.pickled(folder)
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    stored["lm_head.weight"] = stored["lm_head.weight"] + 1
    torch.save(stored, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': expected 'model.embed_tokens"):
        Checkpoint(folder)


def test_an_untied_head_is_a_tensor_of_its_own(damaged):
    """Even one that is equal to the embedding: the config says that the two are apart."""
    architectures.with_repeated_head(damaged.base)
    assert Checkpoint(damaged.base).second_names == {}
    assert "lm_head.weight" in Checkpoint(damaged.base).tensors


@pytest.mark.parametrize(
    ("store", "chosen", "expected"),
    [
        (None, "auto", "hf"),
        (None, "Safetensors", "safetensors"),
        (None, "fastsafetensors", "fastsafetensors"),
        (None, "mistral", None),
        (None, "pt", None),
        (None, "npcache", None),
        (architectures.pickled, "auto", "hf"),
        (architectures.pickled, "safetensors", None),
        (architectures.pickled, "npcache", None),
        (architectures.only_consolidated, "auto", "mistral"),
    ],
)
def test_the_inner_format_reads_the_files_that_were_checked(damaged, store, chosen, expected):
    if store:
        store(damaged.task)
    checkpoint = Checkpoint(damaged.task)
    if expected:
        assert stored_format(checkpoint, chosen) == expected
        return
    with pytest.raises(EnchTableError, match="which was checked"):
        stored_format(checkpoint, chosen)


def test_two_sets_of_weights_without_an_index_are_refused(damaged):
    """vLLM's 'hf' reads both: the second set would overwrite what was merged into the first."""
    architectures.consolidated(damaged.task)
    with pytest.raises(CheckpointError, match=r"one set of weights.*Move the consolidated files"):
        Checkpoint(damaged.task)


def test_a_vector_of_two_pickled_models_is_the_same_vector(tied, tmp_path):
    copy = models.copy_family(tied, tmp_path / "copy")
    for model in (copy.aligned, copy.surrogate):
        architectures.pickled(model)
    build_vector(Location(copy.aligned), Location(copy.surrogate), tmp_path / "v", scope="all")
    assert (
        SafetyVector.open(tmp_path / "v").fingerprint == SafetyVector.open(tied.vector).fingerprint
    )


@pytest.mark.parametrize("safetensors", [False, True])
def test_pickles_are_downloaded_only_where_there_is_nothing_else(
    tmp_path, monkeypatch, safetensors
):
    """Against a repository that is a folder: the Hub itself is not to be had in a test."""
    files = ["config.json", "pytorch_model.bin"] + ["model.safetensors"] * safetensors

    def download(*_, allow_patterns, **__):
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("enchtable_vllm.checkpoint.location.snapshot_download", download)
    on_hub("organisation/name", None)
    present = {path.name for path in tmp_path.iterdir()}
    assert present == set(files) - ({"pytorch_model.bin"} if safetensors else set())
