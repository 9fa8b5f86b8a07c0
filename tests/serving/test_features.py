"""What people serve with, and what must not be served: adapters, other readers, quantisation."""

import json
import pickle
import re
import shutil

import architectures
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_runs import ONE_PROCESS, changed, probe

OURS = {"load_format": "enchtable", "enforce_eager": True}
PLAIN = {"enforce_eager": True}
ONLINE = {"quantization": "fp8_per_channel"}


def adapter(folder, model, rank=8):
    """A LoRA adapter of the attention's query and output projections, in PEFT's format."""
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            name = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1]) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def in_config(**settings):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return write


def as_fp8(folder):
    """Float8 tensors with scales, and a config that says nothing of it."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")


def with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": pickle.Pickler}, folder / "pytorch_model.bin")


_INT4 = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
#: What is done to the task model, further loader settings → what the refusal says.
REFUSED = {
    "AWQ checkpoints": (
        in_config(
            quantization_config={
                "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True
            }
        ),
        {},
        "QuantizedCheckpointError.*config.json, quantization_config.*'awq'",
    ),
    "GPTQ checkpoints": (
        in_config(
            quantization_config={
                "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True
            }
        ),
        {},
        "QuantizedCheckpointError.*config.json, quantization_config.*'gptq'",
    ),
    "compressed-tensors checkpoints": (
        in_config(
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
            }
        ),
        {},
        "QuantizedCheckpointError.*config.json, quantization_config.*'compressed-tensors'",
    ),
    "FP8 checkpoints": (as_fp8, {}, r"QuantizedCheckpointError.*down_proj.*F8_E4M3"),
    "pickles that hold more than tensors": (
        with_code,
        {},
        "CheckpointError.*pytorch_model.bin.*tensors by name",
    ),
    "two sets of weights without an index": (
        architectures.consolidated,
        {},
        "CheckpointError.*one set of weights.*consolidated.safetensors",
    ),
    "inner formats that read other files than were checked": (
        lambda _: None,
        {"inner_load_format": "pt"},
        "ConfigError.*'inner_load_format'.*'model.safetensors', which was checked, got 'pt'",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(family, merged, tmp_path_factory):
    """All settings, after one start."""
    folder = tmp_path_factory.mktemp("features")
    lora = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "adapter": str(adapter(folder / "adapter", family.base)),
    }
    settings = {
        "offline": {"model": str(merged), **PLAIN},
        "adapter unmerged": {"model": str(family.task), **PLAIN, **lora},
        "adapter offline": {"model": str(merged), **PLAIN, **lora},
        "adapter ours": {"model": str(family.task), **OURS, **lora},
        "quantised unmerged": {"model": str(family.task), "weights_only": True, **PLAIN, **ONLINE},
        "quantised offline": {"model": str(merged), **PLAIN, **ONLINE},
        "quantised ours": {"model": str(family.task), "refuses_swaps": True, **OURS, **ONLINE},
        "streamer ours": {
            "model": str(models.in_two_files(family.task, folder / "files", "layers.0.self_attn")),
            **OURS,
            "model_loader_extra_config": {
                "inner_load_format": "runai_streamer",
                "inner_extra_config": {"concurrency": 2},
            },
        },
    }
    for label, (change, extra, _) in REFUSED.items():
        model = shutil.copytree(family.task, folder / label.split()[0])
        change(model)
        settings[label] = {
            "model": str(model),
            **OURS,
            "model_loader_extra_config": extra,
            "refused": True,
        }
    results, _ = probe(list(settings.values()), **ONE_PROCESS)
    return dict(zip(settings, results, strict=True))


@pytest.mark.supports("`--enable-lora`")
def test_with_an_adapter_base_and_adapter_answer_as_the_offline_merge_does(seen):
    ours, offline, unmerged = (
        seen[f"adapter {which}"]["first"] for which in ("ours", "offline", "unmerged")
    )
    assert ours == offline
    assert ours["adapter"]["tokens"] != ours["tokens"]  # the adapter does something
    assert ours["adapter"]["logprobs"] != unmerged["adapter"]["logprobs"]
    assert changed(unmerged, offline)


@pytest.mark.supports("online quantisation (`--quantization fp8_per_channel`)")
def test_quantised_while_loading_it_is_the_quantised_offline_merge(seen):
    ours, offline, unmerged = (
        seen[f"quantised {which}"]["first"] for which in ("ours", "offline", "unmerged")
    )
    assert ours == offline
    differ = changed(unmerged, offline)
    assert {name.rpartition(".")[2] for name in differ} == {"weight", "weight_scale"}
    assert all("self_attn" in name for name in differ)


def test_quantised_while_loading_it_is_not_swapped(seen):
    refusal = seen["quantised ours"]["refused_swap"]
    assert (refusal["ok"], refusal["code"]) == (False, "not_swappable"), refusal
    assert "fp8_per_channel" in refusal["error"]["message"]
    assert seen["quantised ours"]["afterwards"] == seen["quantised ours"]["first"]


@pytest.mark.supports("`runai_streamer` as the inner format")
def test_run_ais_streamer_serves_the_same(seen):
    assert seen["streamer ours"]["first"] == seen["offline"]["first"]


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=pytest.mark.refuses(label)) for label in REFUSED]
)
def test_refused_by_name(seen, label):
    assert re.search(REFUSED[label][2], seen[label]["refused"], re.DOTALL), seen[label]
