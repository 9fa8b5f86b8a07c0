"""Good artefacts, small enough to be damaged hundreds of times; and ways to take them apart."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import architectures
import models
import torch
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint import Location, locate, tensor_digest
from enchtable_vllm.plan import MaskOptions, PlanOptions, VectorLocation, compute_plan
from enchtable_vllm.plan.masks import MaskWriter
from enchtable_vllm.vector import SafetyVector, add_factors, build_vector
from enchtable_vllm.vector.format import SCALE

HIDDEN, KEYS, INNER, VOCABULARY = 32, 16, 48, 64
Q = "model.layers.0.self_attn.q_proj.weight"
LAST = "model.layers.1.self_attn.v_proj.weight"
NORM = "model.norm.weight"


def small_checkpoint(folder: Path) -> Path:
    """fp32, under Llama's names, 2 layers; a few KiB."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), NORM: (HIDDEN,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qo"}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (KEYS, HIDDEN) for p in "kv"}
        shapes |= {f"{at}.mlp.up_proj.weight": (INNER, HIDDEN)}
        shapes |= {f"{at}.input_layernorm.weight": (HIDDEN,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) * 0.05 for n, s in sorted(shapes.items())}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def small_family(folder: Path) -> models.Family:
    """Base, task, vector and plan of it."""
    return models.make_family(small_checkpoint(folder / "aligned"), folder)


def _int8(family: models.Family) -> None:
    ends = locate(family.aligned), locate(family.surrogate)
    build_vector(*ends, family.vector, dtype="int8", overwrite=True)
    family.plan.write_text(models.plan_for(family.task, family.base, family.vector).to_json())


def _masked(family: models.Family) -> None:
    with MaskWriter(family.plan) as masks:
        plan = compute_plan(
            Location(family.task),
            Location(family.base),
            SafetyVector.open(family.vector),
            PlanOptions(masks=MaskOptions(density=0.5, drop_sign_conflicts=True)),
            vector_location=VectorLocation(path=family.vector.name),
            mask_writer=masks,
        )
    family.plan.write_text(plan.to_json())


def _factored(family: models.Family) -> None:
    add_factors(SafetyVector.open(family.vector), max_shard_bytes=10**9)


def _pickled(family: models.Family) -> None:
    for folder in (family.aligned, family.surrogate, family.base, family.task):
        architectures.pickled(folder)


#: What a family may be like: what makes it so of a plain one.
FORMS = {
    "plain": lambda family: None,
    "int8": _int8,
    "masked": _masked,
    "factored": _factored,
    "pickled": _pickled,
}


def weights(folder: Path) -> Path:
    """The one weight file of a checkpoint or a vector."""
    found = (p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    (path,) = (p for p in found if not p.name.startswith("safety_vector_factors"))
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors, read without our own reader."""
    if pickles := sorted(folder.glob("*.bin")):
        return {n: t for p in pickles for n, t in torch.load(p, weights_only=True).items()}
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def manifest(family: models.Family) -> Path:
    return family.vector / "safety_vector.json"


def split(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and data."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path: Path, header: dict | bytes | str, data: bytes, size: int | None = None) -> None:
    """Write a safetensors file, whatever its header says."""
    if isinstance(header, dict):
        header = json.dumps(header)
    encoded = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + data)


def edit_header(path: Path, edit) -> None:
    """Change a header in place; the data stays."""
    header, data = split(path)
    join(path, edit(header) or header, data)


def edit_json(path: Path, edit) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(edit(document) or document))


def edit_tensors(folder: Path, edit) -> None:
    """Change tensors; the file stays well-formed."""
    tensors = load_file(weights(folder))
    tensors = edit(tensors) or tensors
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def forge(family: models.Family, edit) -> None:
    """Change deltas and everything that vouches for them: digests, and the plan's fingerprint.

    What a careful attacker, or a diverged training, hands over.
    """
    edit_tensors(family.vector, edit)
    tensors = load_file(weights(family.vector))

    def vouch(document):
        for name, tensor in tensors.items():
            key = "scale_digest" if name.endswith(SCALE) else "digest"
            document["tensors"][name.removesuffix(SCALE)][key] = tensor_digest(tensor)

    edit_json(manifest(family), vouch)
    fingerprint = SafetyVector.open(family.vector).fingerprint
    edit_json(family.plan, lambda plan: plan["safety_vector"].update(fingerprint=fingerprint))


def shard(folder: Path, stem: str = "model") -> tuple[Path, Path, Path]:
    """Cut the one weight file in two, with an index: both shards, and the index."""
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    names = sorted(tensors)
    paths = [folder / f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for path, part in zip(paths, parts, strict=True):
        save_file({n: tensors[n] for n in part}, path, metadata={"format": "pt"})
    index = folder / f"{stem}.safetensors.index.json"
    where = {n: p.name for p, part in zip(paths, parts, strict=True) for n in part}
    index.write_text(json.dumps({"weight_map": where}))
    return (*paths, index)
