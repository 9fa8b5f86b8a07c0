"""What a server refuses before it reads a weight: configuration, plan, vector, task model."""

import json
import os
import shutil
import subprocess
import sys

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import Checkpoint, locate
from enchtable_vllm.errors import (
    ConfigError,
    EnchTableError,
    MergePlanError,
    MismatchError,
    SafetyVectorError,
)
from enchtable_vllm.merge import Ahead
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.merging import Merging
from enchtable_vllm.serving.prepare import prepare_model, refuse_other_names, stored_format
from enchtable_vllm.vector import build_vector


def prepared(task, **keys):
    return prepare_model(LoaderConfig.parse(keys), str(task), None, None, device="cpu")


def test_the_shortest_form(family):
    """The folder carries plan and vector: no key is needed."""
    found = prepared(family.task)
    assert len(found.resolved.coefficients) == 8
    assert found.resolved.beta == 0.5


def test_every_way_to_name_the_plan_and_the_vector(damaged, tmp_path):
    plan = shutil.move(damaged.plan, tmp_path / "other.json")
    vector = shutil.move(damaged.vector, tmp_path / "elsewhere")
    found = prepared(damaged.task, merge_plan=str(plan), safety_vector=str(vector))
    assert len(found.resolved.coefficients) == 8
    (tmp_path / "p").mkdir()
    shutil.move(plan, tmp_path / "p" / "merge_plan.json")
    prepared(damaged.task, merge_plan=str(tmp_path / "p"), safety_vector=str(vector))
    with pytest.raises(SafetyVectorError, match="safety-vector"):
        prepared(damaged.task, merge_plan=str(tmp_path / "p"))


def test_vector_at_a_hub_commit(damaged, tmp_path, edit_json, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--vector" / "snapshots" / commit
    shutil.move(damaged.vector, snapshot)
    location = {"repo_id": "org/vector", "commit": commit}
    edit_json(damaged.plan, "safety_vector", "location", value=location)
    config = LoaderConfig.parse({})
    found = prepare_model(config, str(damaged.task), None, str(tmp_path / "hub"), device="cpu")
    assert found.vector.name == "org/vector"


def test_beta_and_scope_at_load(family):
    assert prepared(family.task, beta=1.5).resolved.beta == 1.5
    assert prepared(family.task, scope="attention").resolved.scope == "attention"
    with pytest.raises(ConfigError, match="scope"):
        prepared(family.task, scope="ffn")


def test_base_model_computes_the_plan_once_for_all_ranks(family, tmp_path):
    """Two processes at once, one computation, the same plan as computed ahead."""
    bare = tmp_path / "task"
    shutil.copytree(family.task, bare, ignore=shutil.ignore_patterns("merge_plan.json", "safety*"))
    code = (
        "import sys, enchtable_vllm.plan.cache as c, enchtable_vllm.plan.compute as m;"
        "real = c.compute_plan;\n"
        "def counted(*a, **k):\n"
        "    open(sys.argv[4], 'a').write('x'); return real(*a, **k)\n"
        "c.compute_plan = counted\n"
        "from enchtable_vllm.serving.config import LoaderConfig\n"
        "from enchtable_vllm.serving.prepare import prepare_model\n"
        "config = LoaderConfig.parse({'base_model': sys.argv[2], 'safety_vector': sys.argv[3]})\n"
        "print(prepare_model(config, sys.argv[1], None, None, device='cpu').resolved.digest)\n"
    )
    arguments = [str(p) for p in (bare, family.base, family.vector, tmp_path / "count")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    digests = {rank.communicate()[0] for rank in ranks}
    assert all(rank.returncode == 0 for rank in ranks)
    assert len(digests) == 1
    assert (tmp_path / "count").read_text() == "x"
    ahead = models.plan_for(family.task, family.base, family.vector)
    keys = {"base_model": str(family.base), "safety_vector": str(family.vector)}
    found = prepared(bare, **keys)
    assert found.resolved.plan.merged == ahead.merged
    assert f"{found.resolved.digest}\n" in digests
    # Another beta needs no other plan.
    assert prepared(bare, **keys, beta=2.0).resolved.digest == found.resolved.digest


def no_plan(family):
    family.plan.unlink()
    return MergePlanError, "Make a plan"


def no_location(family):
    plan = models.plan_for(family.task, family.base, family.vector)
    reference = plan.safety_vector.model_copy(update={"location": None})
    text = plan.model_copy(update={"safety_vector": reference}).to_json()
    family.plan.write_text(text)
    return MergePlanError, "Name the vector"


def wrong_task_model(family):
    save_changed(family.task, "model.layers.0.mlp.up_proj.weight")
    return MismatchError, "the task model that the plan was made for"


def another_vector(family):
    shutil.rmtree(family.vector)
    build_vector(locate(family.aligned), locate(family.surrogate), family.vector, dtype="fp32")
    return MismatchError, "the vector that the plan was made for"


def save_changed(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        no_plan, no_location, wrong_task_model, another_vector,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_faults_that_headers_show_are_refused(damaged, damage):
    prepared(damaged.task)
    kind, message = damage(damaged)
    with pytest.raises(kind, match=message) as raised:
        prepared(damaged.task)
    assert_form(raised.value)


def assert_form(error):
    """What, where: expected X, got Y. Do Z."""
    text = str(error)
    assert isinstance(error, EnchTableError)
    assert text == f"{error.subject}: expected {error.expected}, got {error.got}. {error.fix}"
    assert error.fix.endswith((".", ")"))


def test_wrong_base_model_is_refused(family, tmp_path):
    other = models.tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match="unrelated"):
        prepared(family.task, base_model=str(other), safety_vector=str(family.vector))


def test_a_hand_written_plan_cannot_name_foreign_tensors(damaged, edit_json):
    name = "model.norm.weight"
    q = "model.layers.0.self_attn.q_proj.weight"
    entry = json.loads(damaged.plan.read_text())["tensors"][q]
    edit_json(damaged.plan, "tensors", name, value=entry)
    with pytest.raises(EnchTableError):
        prepared(damaged.task)


def test_a_damaged_cached_plan_is_computed_again(family, tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path / "cache"))
    keys = {"base_model": str(family.base), "safety_vector": str(family.vector)}
    first = prepared(family.task, **keys).resolved.digest
    (path,) = (tmp_path / "cache").glob("**/*.json")
    path.write_bytes(path.read_bytes()[:100])
    assert prepared(family.task, **keys).resolved.digest == first


def test_a_cache_that_cannot_be_written_is_refused_by_name(family, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="ENCHTABLE_CACHE"):
        prepared(family.task, base_model=str(family.base), safety_vector=str(family.vector))


def test_registering_never_takes_other_commands_down():
    """Whatever goes wrong while registering is a warning, not an exception."""
    code = (
        "import sys, logging; logging.basicConfig()\n"
        "sys.modules['enchtable_vllm.serving.compat'] = None\n"
        "from enchtable_vllm.serving.registration import register\n"
        "register()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--load-format enchtable is not available" in done.stderr


def test_importing_the_plugin_brings_in_neither_torch_nor_vllm():
    code = (
        "import sys, enchtable_vllm.serving.registration;"
        "print(sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_a_model_that_would_pass_over_what_was_checked_is_refused(family):
    """vLLM takes Mistral's config where both are there, and with it names of its own."""
    checkpoint = Checkpoint(family.task, what="task model")
    refuse_other_names(checkpoint, ["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match="--config-format hf"):
        refuse_other_names(checkpoint, ["PixtralForConditionalGeneration"])


def test_a_reader_of_every_file_is_refused_beside_files_that_were_not_checked(family, tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    tensors = load_file(family.task / "model.safetensors")
    save_file(tensors, folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_format(Checkpoint(folder), "runai_streamer") == "runai_streamer"
    save_file(tensors, folder / "stale.safetensors")
    assert stored_format(Checkpoint(folder), "auto") == "hf"
    with pytest.raises(ConfigError, match=r"stale\.safetensors"):
        stored_format(Checkpoint(folder), "runai_streamer")


def test_tensors_are_made_ahead_in_the_order_of_the_files(family, tmp_path, monkeypatch):
    """Of a sharded model vLLM reads one file after the other, not one layer after the other."""
    names = sorted(load_file(family.task / "model.safetensors"))
    folder = tmp_path / "task"
    shutil.copytree(family.task, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = prepared(folder)
    asked = []

    class Recorded(Ahead):
        def __init__(self, make, sizes, *args, **options):
            asked.extend(sizes)
            super().__init__(make, sizes, *args, **options)

    monkeypatch.setattr("enchtable_vllm.serving.merging.Ahead", Recorded)
    Merging(found, torch.device("cpu"), reads_stored=True, verify_content=False).close()
    merged = [name for name in names if name in found.resolved.coefficients]
    assert asked == sorted(merged, key=lambda name: (where[name], name))
    assert asked != merged
