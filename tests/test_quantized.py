"""Quantised checkpoints are refused by name, wherever they say that they are."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import Checkpoint
from enchtable_vllm.errors import QuantizedCheckpointError


def refused(folder):
    with pytest.raises(
        QuantizedCheckpointError, match=r"enchtable merge.*--quantization"
    ) as caught:
        Checkpoint(folder).refuse_quantized()
    return str(caught.value)


def in_config(*keys, **settings):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for key in keys:
            inner = inner.setdefault(key, {})
        inner.update(settings)
        (folder / "config.json").write_text(json.dumps(config))

    return write


def in_file(file, **settings):
    return lambda folder: (folder / file).write_text(json.dumps(settings))


def in_tensors(suffix, dtype):
    """The first layer's down projection, packed."""

    def write(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.0.mlp.down_proj.weight"]
        tensors["model.layers.0.mlp.down_proj" + suffix] = torch.ones(8, 8).to(dtype)
        save_file(tensors, path)

    return write


SAID = {
    "config": (in_config("quantization_config", quant_method="awq"), "'awq'"),
    "text config": (
        in_config("text_config", "quantization_config", quant_method="fp8"),
        "text_config.quantization_config.*'fp8'",
    ),
    "other nested config": (
        in_config("llm_config", "quantization_config", quant_method="gptq"),
        "'gptq'",
    ),
    "compression config": (in_config("compression_config", format="pack"), "'unnamed'"),
    "a method alone": (in_config(quantization_config="int8"), "'int8'"),
    "old GPTQ": (in_file("quantize_config.json", bits=4), "quantize_config.json.*'gptq'"),
    "old AWQ": (in_file("quant_config.json", w_bit=4), "quant_config.json.*'awq'"),
    "ModelOpt": (in_file("hf_quant_config.json"), "hf_quant_config.json.*'modelopt'"),
    "INC": (in_file("quantization_config.json"), "'inc'"),
    "Mistral": (
        in_file("params.json", quantization={"qformat_weight": "fp8_e4m3"}),
        "params.json.*'fp8_e4m3'",
    ),
    "fp8 tensors": (in_tensors(".weight", torch.float8_e4m3fn), "down_proj.weight.*F8_E4M3"),
    "fp8 scales": (in_tensors(".weight_scale_inv", torch.float32), "weight_scale_inv"),
    "GPTQ or AWQ tensors": (in_tensors(".qweight", torch.int32), "qweight"),
    "compressed tensors": (in_tensors(".weight_packed", torch.int32), "weight_packed"),
    "bitsandbytes tensors": (in_tensors(".SCB", torch.float32), "SCB"),
}


@pytest.mark.parametrize(("change", "message"), SAID.values(), ids=SAID)
def test_it_is_refused_by_name(damaged, change, message):
    Checkpoint(damaged.task).refuse_quantized()
    change(damaged.task)
    assert re.search(message, refused(damaged.task), re.DOTALL)
