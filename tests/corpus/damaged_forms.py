"""What only some families have: int8 deltas, masks, cached factors, pickled weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from corpus.damage import READ, VERIFY, Damage, damage, put
from corpus.damaged_files import CUTS, NO_FILES, cut
from corpus.damaged_plans import plan_words
from corpus.damaged_vectors import vector_files
from corpus.seeds import Q, edit_tensors, forge, manifest, weights
from models import Family
from safetensors.torch import load_file, save_file

SCALE = f"{Q}.scale"


def _file(path_of: Callable[[Family], object], change: Callable) -> Callable[[Family], object]:
    return lambda family: change(path_of(family))


def _edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable:
    def change(path):
        tensors = load_file(path)
        save_file(edit(tensors) or tensors, path)

    return change


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def _shorten(name):
    return _edited(lambda tensors: tensors | {name: tensors[name][:-1].clone()})


def int8() -> Iterator[Damage]:
    """Scales that are none, and those that no training gives."""

    def scales(value):
        def edit(tensors):
            return {n: t * 0 + value if n.endswith(".scale") else t for n, t in tensors.items()}

        return lambda family: forge(family, edit)

    def silent(family):
        """Zero, and every norm says so: a vector that is consistent and does nothing."""
        scales(0.0)(family)
        put(manifest(family), ["norm"], 0.0)
        for name in json.loads(manifest(family).read_text())["tensors"]:
            put(manifest(family), ["tensors", name, "norm"], 0.0)

    yield damage("vector", "zero scales", scales(0.0), "SafetyVectorError: .*expected norm")
    yield damage("vector", "zero scales and norms", silent,
                  "MergePlanError: .*not zero|MismatchError: .*has norm 0.0 in the vector",
                  other=READ | VERIFY)  # fmt: skip
    for value in (1e30, 3e38):
        yield damage("vector", f"scales of {value}", scales(value), "expected norm|NonFinite")
    for value in (-1.0, float("nan"), float("inf")):
        yield damage("vector", f"scales of {value}", scales(value),
                      "SafetyVectorError: .*scales that are finite and not negative")  # fmt: skip
    yield damage("vector", "a scale missing",
                  lambda f: edit_tensors(f.vector, _without(SCALE)),
                  "SafetyVectorError: .*scale' is in no file")  # fmt: skip
    yield damage("vector", "too few scales",
                  lambda f: edit_tensors(f.vector, lambda t: t | {SCALE: t[SCALE][1:].clone()}),
                  "SafetyVectorError: .*scale' is F32")  # fmt: skip
    yield damage("vector", "scales that changed",
                  lambda f: edit_tensors(f.vector, lambda t: t | {SCALE: t[SCALE] * 2}),
                  "SafetyVectorError: .*Its bytes changed")  # fmt: skip
    for value in (None, "md5:0"):
        yield damage("vector", f"scale_digest is {value}",
                      lambda f, v=value: put(manifest(f), ["tensors", Q, "scale_digest"], v),
                      "SafetyVectorError: .*scale_digest")  # fmt: skip


def masked() -> Iterator[Damage]:
    """The folder beside the plan."""

    def bits(family):
        return family.plan.with_suffix(".masks") / "keep_bits.safetensors"

    def linked(path):
        outside = path.parent.parent.parent / "outside"
        shutil.move(path.parent, outside)
        path.parent.symlink_to(outside)

    whole = "CheckpointError: .*keep_bits"
    changes: dict[str, tuple[Callable, str]] = {
        "a bit flipped": (_flip, "MergePlanError: .*bytes of content"),
        "one missing": (_edited(_without(Q)), "MergePlanError: .*a mask for every merged tensor"),
        "one too short": (_shorten(Q), "MergePlanError: .*bytes of content"),
        "one of no tensor": (
            _edited(lambda t: t | {"x": t[Q].clone()}),
            "MergePlanError: .*no other",
        ),
        "no file": (lambda path: path.unlink(), whole),
        "no folder": (lambda path: shutil.rmtree(path.parent), "CheckpointError: .*masks"),
        "a link out of the folder": (linked, "MergePlanError: .*a link to"),
        **{f"cut {name}": (cut(keep), whole) for name, keep in CUTS.items()},
        **{f"the file is {name}": (make, word) for name, (make, word) in NO_FILES.items()},
    }
    for name, (change, message) in changes.items():
        yield damage("masks", name, _file(bits, change), message)
    for keys, value in ((["masks", "path"], "../x"), (["masks", "density"], 2.0),
                        (["tensors", Q, "keep_digest"], None), (["masks"], None)):  # fmt: skip
        yield damage("plan", f"{'.'.join(keys)} is {value}",
                      lambda f, k=keys, v=value: put(f.plan, k, v), "MergePlanError: ")  # fmt: skip


def factored() -> Iterator[Damage]:
    """The files beside the vector, and what its manifest says of them."""

    def factors(family):
        return family.vector / "safety_vector_factors.safetensors"

    changes: dict[str, Callable] = {
        "a bit flipped": _flip,
        "one missing": _edited(_without(f"{Q}.0.left")),
        "one too short": _shorten(f"{Q}.0.right"),
        "one of no tensor": _edited(lambda t: t | {"x": torch.ones(1)}),
        **{f"cut {name}": cut(keep) for name, keep in CUTS.items()},
        **{f"the file is {name}": make for name, (make, _) in NO_FILES.items()},
    }
    cure = "SafetyVectorError: .*safety_vector_factors.*enchtable vector factor"
    for name, change in changes.items():
        yield damage("factors", name, _file(factors, change), f"{cure}|holds its files itself")
    entry = ["factors", "tensors", Q, 0]
    for keys, value, message in (
        (["factors", "vector"], "blake3:" + "1" * 64, cure),
        (["factors", "tensors"], {}, cure),
        ([*entry, "rank"], 3, cure),
        ([*entry, "exponent"], 3, cure),
        ([*entry, "rung"], "gram32", cure),
    ):
        yield damage("factors", f"manifest: {'.'.join(map(str, keys))} is {value}",
                      lambda f, k=keys, v=value: put(manifest(f), k, v), message)  # fmt: skip
    for keys, value in (([*entry, "rank"], -1), (["factors", "device"], "x")):
        yield damage("vector", f"manifest: {'.'.join(map(str, keys))} is {value}",
                      lambda f, k=keys, v=value: put(manifest(f), k, v),
                      "SafetyVectorError: .*factors")  # fmt: skip


def pickled() -> Iterator[Damage]:
    """``.bin`` files of every model."""
    whole = r"CheckpointError: .*pytorch_model\.bin"
    for artefact in ("task", "base", "aligned", "surrogate"):

        def on(change, artefact=artefact):
            return lambda family: change(weights(getattr(family, artefact)))

        for name, keep in {
            "empty": lambda size: 0,
            "in the first entry": lambda size: 100,
            "in the middle": lambda size: size // 2,
            "in the directory": lambda size: size - 30,
            "by a byte": lambda size: size - 1,
        }.items():
            change = on(lambda path, keep=keep: os.truncate(path, keep(path.stat().st_size)))
            yield damage(artefact, f"cut {name}", change, whole)
        for name, (make, word) in NO_FILES.items():
            yield damage(artefact, f"weights are {name}", on(make), word)
        more = {"a": torch.ones(1), "epoch": 3}
        change = on(lambda path, more=more: torch.save(more, path))
        yield damage(artefact, "more than tensors", change, whole)


def forms() -> Iterator[Damage]:
    """Each form's own damages, and those of a plain family that meet other code in it."""
    own: dict[str, Iterable[Damage]] = {
        "int8": (*int8(), *vector_files()),
        "masked": (*masked(), *plan_words()),
        "factored": (*factored(), *vector_files()),
        "pickled": tuple(pickled()),
    }
    for form, damages in own.items():
        yield from (replace(each, form=form, proves=None) for each in damages)
