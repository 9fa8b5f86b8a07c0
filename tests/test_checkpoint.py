"""Reading and writing checkpoints: streaming, sharded, and refused when damaged."""

import json
import shutil

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import (
    Checkpoint,
    FolderTransaction,
    Location,
    ShardWriter,
    TensorHeader,
    locate,
    sampled_fingerprint,
    tensor_digest,
)
from enchtable_vllm.checkpoint.writer import assign_shards
from enchtable_vllm.errors import (
    CheckpointError,
    ConfigError,
    EnchTableError,
)


def write(folder, tensors, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def shard(source, folder):
    """The same checkpoint in two shards with an index."""
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for file, part in parts.items():
        write(folder, {name: tensors[name] for name in part}, file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_sharding_changes_neither_tensors_nor_fingerprint(family, tmp_path):
    whole = Checkpoint(family.task)
    sharded = Checkpoint(shard(family.task, tmp_path / "sharded"))
    assert list(whole.tensors) == list(sharded.tensors)
    for name in whole.tensors:
        assert torch.equal(whole.read(name), sharded.read(name))
    assert sampled_fingerprint(whole) == sampled_fingerprint(sharded)


def test_fingerprint_is_what_the_specification_says(tmp_path):
    """Computed again from the words: sorted (name, dtype, shape, three samples)."""
    tensors = {"b": torch.randn(3, 5000), "a": torch.arange(6, dtype=torch.bfloat16)}
    checkpoint = Checkpoint(write(tmp_path / "m", tensors))
    hasher = blake3()
    for name, dtype in (("a", "BF16"), ("b", "F32")):
        data = tensors[name].view(torch.uint8).numpy().tobytes()
        middle, end = max(0, (len(data) - 4096) // 2), max(0, len(data) - 4096)
        samples = b"".join(data[at : at + 4096] for at in (0, middle, end))
        hasher.update(json.dumps([name, dtype, list(tensors[name].shape), len(samples)]).encode())
        hasher.update(samples)
    assert sampled_fingerprint(checkpoint) == f"blake3:{hasher.hexdigest()}"


def test_fingerprint_tells_fine_tunes_and_headers_apart(family, tmp_path):
    tensors = load_file(family.base / "model.safetensors")
    reference = sampled_fingerprint(Checkpoint(family.base))
    assert sampled_fingerprint(Checkpoint(family.task)) != reference
    name = "model.norm.weight"
    renamed = {("x" if n == name else n): t for n, t in tensors.items()}
    reshaped = {n: t.reshape(1, -1) if n == name else t for n, t in tensors.items()}
    for i, other in enumerate((renamed, reshaped)):
        folder = write(tmp_path / str(i), other)
        assert sampled_fingerprint(Checkpoint(folder)) != reference


def test_digest_is_of_the_bytes():
    tensor = torch.arange(100, dtype=torch.bfloat16).view(10, 10)
    expected = blake3(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert tensor_digest(tensor) == f"blake3:{expected}"
    assert tensor_digest(tensor.mT) == tensor_digest(tensor.mT.contiguous())
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))
    assert tensor_digest(torch.empty(0)) == f"blake3:{blake3(b'').hexdigest()}"


def test_tensor_in_two_files_is_refused(damaged):
    shutil.copyfile(damaged.task / "model.safetensors", damaged.task / "copy.safetensors")
    with pytest.raises(CheckpointError, match="every tensor once"):
        Checkpoint(damaged.task)


def test_missing_weights_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"'model.safetensors'.*'pytorch_model.bin'.*no such"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"'vector.safetensors'.*no such file"):
        Checkpoint(tmp_path, stem="vector")


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("read broke off\nin a socket")])
def test_whatever_breaks_a_download_is_a_refusal(monkeypatch, error):
    """Errors of a network have many types, and at times no text."""

    def download(*_, **__):
        raise error

    monkeypatch.setattr("enchtable_vllm.checkpoint.location.snapshot_download", download)
    with pytest.raises(CheckpointError, match=type(error).__name__) as refused:
        locate("org/name")
    assert "HF_TOKEN and the network" in str(refused.value)


def test_locate(family, tmp_path):
    assert locate(family.task) == Location(family.task.resolve())
    with pytest.raises(CheckpointError, match="neither"):
        locate(tmp_path / "missing")


def test_hub_ids_at_a_revision(family, tmp_path, monkeypatch):
    """From a real Hub cache on disk, in huggingface_hub's own layout, with the network off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    shutil.copytree(family.base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = locate("org/name", cache_dir=tmp_path)
    assert (found.repo_id, found.commit) == ("org/name", commit)
    assert locate(f"org/name@{commit}", cache_dir=tmp_path) == found
    assert locate("org/name", revision=commit, cache_dir=tmp_path) == found
    # vLLM, offline, hands over the snapshot's folder instead of the id.
    assert locate(found.path).repo_id == "org/name"
    assert Checkpoint(found.path).tensors
    with pytest.raises(CheckpointError, match="Check the id, the revision"):
        locate("org/name@other", cache_dir=tmp_path)


def test_shards_are_filled_in_order():
    headers = [TensorHeader(n, "F32", (10,), "") for n in "abcde"]
    assert list(assign_shards(headers, "v", 1000)) == ["v.safetensors"]
    shards = assign_shards(headers, "v", 80)
    assert [[h.name for h in part] for part in shards.values()] == [["a", "b"], ["c", "d"], ["e"]]
    assert next(iter(shards)) == "v-00001-of-00003.safetensors"


def test_streamed_file_is_an_ordinary_safetensors_file(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3)}
    dtypes = {"a": "F32", "b": "BF16", "c": "I64"}
    headers = [TensorHeader(n, dtypes[n], tuple(t.shape), "") for n, t in tensors.items()]
    with ShardWriter(tmp_path / "x.safetensors", headers, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ConfigError, match="Nothing was left"), FolderTransaction(target) as folder:
        shutil.copyfile(tmp_path / "missing", folder / "half")
    assert list(tmp_path.iterdir()) == []
    with FolderTransaction(target) as folder:
        (folder / "whole").write_text("1")
    with pytest.raises(ConfigError, match="--overwrite"):
        FolderTransaction(target)
    with FolderTransaction(target, overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_errors_survive_pickling():
    import pickle

    error = CheckpointError("x", expected="a", got="b", fix="Do c.")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, CheckpointError)
    assert isinstance(copy, EnchTableError)
    assert str(copy) == "x: expected a, got b. Do c."


def test_a_tied_head_that_only_the_index_has_is_no_fault(family, tmp_path):
    """Converters store what is shared once, and keep both names in the index, which vLLM reads."""
    folder = shard(family.task, tmp_path / "sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.language_model.lm_head.weight"] = first
    path.write_text(json.dumps(index))
    assert list(Checkpoint(folder).tensors) == list(Checkpoint(family.task).tensors)
    index["weight_map"]["model.layers.7.self_attn.q_proj.weight"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\.7\.self_attn\.q_proj\.weight' is not in"):
        Checkpoint(folder)


def test_an_adapter_is_no_model(tmp_path):
    folder = write(tmp_path / "adapter", {"a": torch.zeros(2)}, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        Checkpoint(folder)
    (folder / "config.json").write_text("{}")  # a whole model that was trained from one
    assert list(Checkpoint(folder).tensors) == ["a"]
