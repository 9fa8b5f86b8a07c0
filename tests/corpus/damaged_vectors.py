"""Well-formed weights that are not the right ones, and vectors that disagree with themselves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import torch
from corpus.damage import (
    MERGE,
    OTHER,
    PLAN,
    READ,
    VERIFY,
    Damage,
    damage,
    folder,
    number_variants,
    put,
)
from corpus.seeds import (
    LAST,
    Q,
    edit_tensors,
    forge,
    join,
    manifest,
    split,
    weights,
)


def tensors() -> Iterator[Damage]:
    """Well-formed weights that are not the right ones."""

    def on(artefact, edit):
        return lambda family: edit_tensors(folder(family, artefact), edit)

    def poke(name, value):
        return lambda tensors: tensors[name].view(-1)[5:6].fill_(value) and None

    def rename(tensors):
        return {("x" if n == Q else n): t for n, t in tensors.items()}

    def drop(tensors):
        return {n: t for n, t in tensors.items() if n != Q}

    def reshape(tensors):
        return tensors | {Q: tensors[Q].reshape(-1, 8)}

    def widen(tensors):
        return {n: t.double() for n, t in tensors.items()}

    def pack(tensors):
        return tensors | {Q: tensors[Q].to(torch.int8)}

    changes = {
        "a tensor renamed": rename,
        "a tensor missing": drop,
        "a tensor reshaped": reshape,
        "another dtype": widen,
        "integers": pack,
    }
    other = "MismatchError: "
    for name, edit in changes.items():
        yield damage("task", name, on("task", edit), other)
        yield damage("aligned", name, on("aligned", edit), other)
        if edit is not rename and edit is not drop:
            yield damage("base", name, on("base", edit), other)
        yield damage("vector", name, on("vector", edit), "SafetyVectorError: .*agree")
    yield damage(
        "vector",
        "an extra tensor",
        on("vector", lambda t: t | {"x": torch.ones(1)}),
        "SafetyVectorError: .*'x' is not in the manifest",
    )
    yield damage(
        "task",
        "an extra tensor",
        on("task", lambda t: t | {"x": torch.ones(1)}),
        "MismatchError: merge plan and task model .*the task model that the plan was made for",
        other=PLAN,  # it is kept
        proves="a plan made for another model",
    )
    for value in (float("nan"), float("inf"), -float("inf")):
        yield damage("task", f"{value}", on("task", poke(Q, value)), "NonFinite|MismatchError")
        yield damage("base", f"{value}", on("base", poke(Q, value)), "NonFiniteError: .*finite")
        yield damage(
            "aligned", f"{value}", on("aligned", poke(Q, value)), "NonFiniteError: .*finite"
        )
        yield damage(
            "vector",
            f"{value}, vouched for",
            lambda family, value=value: forge(family, poke(Q, value)),
            "NonFiniteError: .*q_proj.*finite",
            proves="non-finite values" if value == float("inf") else None,
        )
    yield damage(
        "base",
        "another model",
        on("base", lambda t: {n: -x for n, x in t.items()}),
        "MismatchError: .*unrelated",
        proves="another base",
    )
    yield damage(
        "base", "a zero model", on("base", lambda t: {n: x * 0 for n, x in t.items()}),
        "MismatchError: ",
    )  # fmt: skip
    yield damage(
        "base",
        "the task model itself",
        lambda family: shutil.copyfile(weights(family.task), weights(family.base)),
        "MismatchError: .*identical weights",
    )
    yield damage(
        "aligned",
        "the surrogate itself",
        lambda family: shutil.copyfile(weights(family.surrogate), weights(family.aligned)),
        "MismatchError: .*identical tensors",
    )
    yield damage(
        "aligned",
        "no weights",
        lambda family: weights(family.aligned).unlink(),
        "CheckpointError: .*no such file",
    )
    for name, factor in (("all zero", 0), ("huge", 1e30)):
        yield damage(
            "vector",
            f"{name}, vouched for",
            lambda family, factor=factor: forge(
                family, lambda t: {n: x * factor for n, x in t.items()}
            ),
            "SafetyVectorError: .*expected norm.*manifest",
        )


def flip(name: str, place: int):
    """Flip one bit in a tensor's data."""

    def apply(family):
        path = weights(family.vector)
        header, data = split(path)
        start, end = header[name]["data_offsets"]
        changed = bytearray(data)
        changed[(start + place) if place >= 0 else (end + place)] ^= 1
        join(path, header, bytes(changed))

    return apply


def vector_numbers() -> Iterator[Damage]:
    places = [("norm",), ("zero_share",), ("tensors", Q, "norm"), ("tensors", Q, "shape", 0),
              ("tensors", Q, "aligned_sample", 3)]  # fmt: skip
    for keys in places:
        for name, value in number_variants(1.5):
            if keys[-1] == 3 and name == "negative":
                continue  # a weight may be
            yield damage(
                "vector",
                f"manifest: {'.'.join(map(str, keys))} is {name}",
                lambda family, keys=keys, value=value: put(manifest(family), keys, value),
                f"SafetyVectorError: .*{re.escape(str(keys[0]))}",
            )


def vector_files() -> Iterator[Damage]:
    for place in (0, 1000, -1):
        yield damage("vector", f"a bit flipped in {Q} at {place}", flip(Q, place),
                      "SafetyVectorError: .*Its bytes changed",
                      proves="a flipped bit in the vector" if place == 0 else None)  # fmt: skip
    yield damage(
        "vector", "a bit flipped in its last tensor", flip(LAST, -1),
        "SafetyVectorError: .*Its bytes changed",
    )  # fmt: skip

    def edited(*keys, value, message, blind=()):
        return damage(
            "vector",
            f"manifest: {'.'.join(map(str, keys))} edited",
            lambda family: put(manifest(family), keys, value),
            message,
            blind,
        )

    entries = {"shape": [1], "dtype": "F32", "norm": 0, "digest": OTHER}
    yield edited(
        "tensors",
        Q,
        "digest",
        value=OTHER,
        message="SafetyVectorError: .*(Its bytes|factors of)|MismatchError: .*plan was made",
    )
    yield edited("tensors", Q, "digest", value="md5:0", message="SafetyVectorError: .*digest")
    yield edited("tensors", Q, "shape", value=[16, 64], message="SafetyVectorError: .*manifest")
    yield edited("tensors", Q, "shape", value=[2**80], message="SafetyVectorError: ")
    yield edited(
        "tensors", Q, "dtype", value="F32", message="SafetyVectorError: .*(manifest|scale_digest)"
    )
    yield edited("tensors", Q, "dtype", value="pickle", message="SafetyVectorError: .*dtype")
    yield edited("tensors", "x", value=entries | {"aligned_sample": [0]},
                 message="SafetyVectorError: .*'x' is in no file")  # fmt: skip
    yield edited("tensors", value={}, message="SafetyVectorError: .*not in the manifest")
    yield edited("tensors", Q, "aligned_sample", value=[0.0] * 3,
                 message="SafetyVectorError: .*aligned_sample must hold 16")  # fmt: skip
    yield edited("tensors", Q, "aligned_sample", value=[1.0] * 16,
                 message="MismatchError: .*other weights", blind=READ | VERIFY | MERGE)  # fmt: skip
    yield edited("norm", value=3.0, message="SafetyVectorError: .*norm 3.0",
                 blind=READ | PLAN | MERGE)  # fmt: skip
    yield edited("tensors", Q, "norm", value=3.0,
                 message="SafetyVectorError: .*norm 3.0|MismatchError: .*norm 3.0")  # fmt: skip
    yield edited("scope", value="everything", message="SafetyVectorError: .*scope")
    yield damage(
        "vector", "no manifest", lambda family: manifest(family).unlink(),
        "SafetyVectorError: .*vector build",
    )  # fmt: skip
    yield damage("vector", "no tensors", lambda family: weights(family.vector).unlink(),
                  "CheckpointError: .*safety_vector")  # fmt: skip

    for name, path_of in (("manifest", manifest), ("tensors", lambda f: weights(f.vector))):

        def outside(family, path_of=path_of):
            path = path_of(family)
            shutil.move(path, family.base / "moved")
            path.symlink_to(family.base / "moved")

        yield damage("vector", f"{name}: a link out of the folder", outside,
                      "SafetyVectorError: .*holds its files itself.*, a link to",
                      proves="links out of the folder" if name == "tensors" else None)  # fmt: skip
