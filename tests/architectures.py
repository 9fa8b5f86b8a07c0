"""Small random checkpoints of the architectures that people serve, stored in the ways they are."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
#: By transformers' model type.
_OWN = {
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, **_EXPERTS},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "granitemoe": {"num_local_experts": 4, **_EXPERTS},
}
MISTRAL = {
    "embed_tokens": "tok_embeddings",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def tiny(model_type: str, folder: Path, *, max_shard_size: str = "5GB", **changes: object) -> Path:
    """A random fp32 model of 2 layers; biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = _SIZES | _OWN.get(model_type, {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def pickled(folder: Path, *, shards: int = 1) -> None:
    """Store a checkpoint's weights as ``.bin``, as older trainers do: with the tied head."""
    tensors = {n: t for path in _files(folder) for n, t in load_file(path).items()}
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for path in (*_files(folder), *folder.glob("*.index.json")):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {
        name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin"
        for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_added_tokens(folder: Path, added: int = 64) -> None:
    """Lengthen embedding and head, as a fine-tune with tokens of its own does."""
    (path,) = _files(folder)
    tensors = load_file(path)
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        rows = torch.randn(added, tensors[name].shape[1]).to(tensors[name].dtype) * 0.02
        tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += added
    (folder / "config.json").write_text(json.dumps(config))


def with_repeated_head(folder: Path) -> None:
    """Store a tied head a second time, as some quantisers and trainers do."""
    (path,) = _files(folder)
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def consolidated(folder: Path) -> None:
    """The same weights under Mistral's own names, in ``consolidated.safetensors``."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    stored = {}
    for path in _files(folder):
        for name, tensor in load_file(path).items():
            parts = [MISTRAL.get(part, part) for part in name.removeprefix("model.").split(".")]
            if parts[-2] in heads:  # rotary halves, interleaved there
                halves = tensor.view(heads[parts[-2]], 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            stored[".".join(parts)] = tensor.contiguous()
    save_file(stored, folder / "consolidated.safetensors", metadata={"format": "pt"})


def only_consolidated(folder: Path) -> Path:
    """Nothing but Mistral's own names."""
    others = _files(folder)
    consolidated(folder)
    for path in others:
        path.unlink()
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
