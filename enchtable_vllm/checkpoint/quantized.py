"""Telling a quantised checkpoint, wherever it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from enchtable_vllm.errors import QuantizedCheckpointError

if TYPE_CHECKING:
    from enchtable_vllm.checkpoint.reader import Checkpoint

#: Files of their own: older GPTQ, older AWQ, Intel's, NVIDIA ModelOpt.
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "inc",
    "hf_quant_config.json": "modelopt",
}
_CONFIG_KEYS = ("quantization_config", "compression_config")
#: How the tensors of packed layers end, whatever the config says.
_SUFFIXES = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".qscale_weight", ".weight.absmax", ".SCB", ".gate_up_proj_blocks", ".down_proj_blocks",
)  # fmt: skip


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose numbers are packed: adding to them would be nonsense.

    Raises:
        QuantizedCheckpointError: A config names a quantisation method, or the tensors show one.
    """
    for where, method in _evidence(checkpoint):
        raise QuantizedCheckpointError(
            f"{checkpoint.what}, {where}",
            expected="bf16, fp16 or fp32 weights",
            got=f"quantization method '{method}'",
            fix="Merge into the unquantised checkpoint with 'enchtable merge', then quantise "
            "the result; or serve the unquantised checkpoint with vLLM's '--quantization'.",
        )


def _evidence(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    config = checkpoint.config
    parts = [("", config), *((f"{k}.", v) for k, v in config.items() if isinstance(v, dict))]
    for prefix, part in parts:
        for key in _CONFIG_KEYS:
            if part.get(key):
                yield f"config.json, {prefix}{key}", _method(part[key])
    for file, method in _FILES.items():
        if (checkpoint.folder / file).is_file():
            yield file, method
    mistral = checkpoint.json("params.json").get("quantization")
    if mistral:
        yield "params.json, quantization", _method(mistral)
    for name, header in checkpoint.tensors.items():
        if header.dtype.startswith("F8_"):
            yield f"tensor '{name}'", header.dtype
        elif name.endswith(_SUFFIXES):
            yield f"tensor '{name}'", "unnamed; such tensors belong to packed weights"


def _method(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return str(settings)
    return str(settings.get("quant_method") or settings.get("qformat_weight") or "unnamed")
