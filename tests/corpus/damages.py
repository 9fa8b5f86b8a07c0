"""What can be wrong with an input: one line for each way.

A new format adds a line or a loop here and nothing else: each damage goes through every
consumer of the artefact that it is done to (`consumers.CONSUMERS`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus.seeds import (
    LAST,
    NORM,
    Q,
    edit_header,
    edit_json,
    edit_tensors,
    forge,
    join,
    manifest,
    shard,
    split,
    weights,
)
from models import Family
from safetensors.torch import load_file, save_file

from enchtable_vllm.checkpoint.files import MAX_JSON_BYTES

#: A fingerprint of nothing.
OTHER = "blake3:" + "0" * 64
VERIFY, READ, PLAN = {"command: verify"}, {"read"}, {"plan", "serve with base", "command: plan"}
MERGE, RESOLVE = {"merge", "serve", "command: merge"}, {"resolve"}


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        artefact: What it is done to: vector, plan, task, base or aligned.
        name: For people.
        apply: Does it to a family's folder.
        message: What every refusal of it says (a regular expression, class name included).
        blind: Consumers that rightly do not see it; their result must not change.
        other: Consumers for which it is another good input.
        proves: The line of the README that it stands for.
    """

    artefact: str
    name: str
    apply: Callable[[Family], object]
    message: str
    blind: frozenset[str] = frozenset()
    other: frozenset[str] = frozenset()
    proves: str | None = None


def _damage(artefact, name, apply, message, blind=(), other=(), proves=None) -> Damage:
    return Damage(artefact, name, apply, message, frozenset(blind), frozenset(other), proves)


def folder(family: Family, artefact: str):
    return getattr(family, artefact)


# --- any checkpoint folder, a vector's too -------------------------------------------------------

CORRUPT = "CheckpointError: .*safetensors': expected a whole safetensors file.* fetch or write it"


def cut(keep: Callable[[int, int], int]):
    """Truncate; ``keep`` gets the header's end and the file's size."""

    def apply(path):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        path.write_bytes(raw[: keep(end, len(raw))])

    return apply


CUTS = {
    "empty": lambda end, size: 0,
    "in the length": lambda end, size: 7,
    "after the length": lambda end, size: 8,
    "in the header": lambda end, size: end // 2,
    "after the header": lambda end, size: end,
    "in the data": lambda end, size: (end + size) // 2,
    "by a byte": lambda end, size: size - 1,
}


def entry(header: dict, name: str | None = None) -> dict:
    """A tensor's entry in a header; the first one's by default."""
    return header[name or min(n for n in header if n != "__metadata__")]


def overlap(header):
    """The second tensor of the data takes the first one's place."""
    named = [e for n, e in header.items() if n != "__metadata__"]
    one, two = sorted(named, key=lambda e: e["data_offsets"])[:2]
    length = two["data_offsets"][1] - two["data_offsets"][0]
    two["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + length]


def twice(path):
    """One name, two entries: readers disagree on which holds."""
    header, data = split(path)
    name = min(n for n in header if n != "__metadata__")
    text = json.dumps(header)
    join(path, text[:-1] + f', "{name}": {json.dumps(header[name])}}}', data)


HEADERS = {
    "length of 2^63": lambda p: join(p, *split(p), size=2**63),
    "length beyond the file": lambda p: join(p, *split(p), size=99_999_999),
    "length above 100 MB": lambda p: join(p, *split(p), size=100_000_001),
    "length of 0": lambda p: join(p, *split(p), size=0),
    "not JSON": lambda p: join(p, b"not json ", split(p)[1]),
    "not UTF-8": lambda p: join(p, b'{"\xff": 1}', split(p)[1]),
    "a list": lambda p: join(p, "[]", split(p)[1]),
    "nested deeply": lambda p: join(p, '{"a":' + "[" * 5000 + "]" * 5000 + "}", split(p)[1]),
    "a name twice": twice,
    "offsets overlap": lambda p: edit_header(p, overlap),
    "offsets beyond the end": lambda p: edit_header(
        p, lambda h: entry(h).update(data_offsets=[0, 10**9], shape=[5 * 10**8])
    ),
    "offsets negative": lambda p: edit_header(p, lambda h: entry(h).update(data_offsets=[-4, 0])),
    "offsets backwards": lambda p: edit_header(p, lambda h: entry(h).update(data_offsets=[4, 0])),
    "offsets above 2^64": lambda p: edit_header(
        p, lambda h: entry(h).update(data_offsets=[0, 2**70])
    ),
    "a huge shape": lambda p: edit_header(p, lambda h: entry(h).update(shape=[2**62, 4])),
    "a negative shape": lambda p: edit_header(p, lambda h: entry(h).update(shape=[-2, -8])),
    "a shape of text": lambda p: edit_header(p, lambda h: entry(h).update(shape="[1]")),
    "an unknown dtype": lambda p: edit_header(p, lambda h: entry(h).update(dtype="F1")),
    "a dtype of another size": lambda p: edit_header(p, lambda h: entry(h).update(dtype="F64")),
    "an entry missing": lambda p: edit_header(p, lambda h: {n: h[n] for n in sorted(h)[2:]}),
    "bytes at the end": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
}


def replaced_by(make: Callable):
    """Something else than a file under its name."""

    def apply(path):
        path.unlink()
        make(path)

    return apply


def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's address is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


#: Something else than a file: what it is → (makes it, how a refusal calls it).
NO_FILES = {
    "a FIFO": (replaced_by(os.mkfifo), "a FIFO"),
    "a directory": (replaced_by(Path.mkdir), "a directory"),
    "a device": (
        replaced_by(lambda p: p.symlink_to("/dev/zero")),
        "a (device|link to '/dev/zero')",
    ),
    "a socket": (replaced_by(listen), "No such device or address"),
    "a link to itself": (replaced_by(lambda p: p.symlink_to(p.name)), "symbolic links|to itself"),
    "a link to nothing": (replaced_by(lambda p: p.symlink_to("gone")), "No such file"),
}


def weight_files() -> Iterator[Damage]:
    for artefact in ("vector", "task", "base", "aligned"):
        at = "safety_vector" if artefact == "vector" else "model"
        # One reader reads them all: two artefacts get everything, the others a part.
        everything = artefact in ("vector", "task")

        def on(change, artefact=artefact):
            return lambda family: change(weights(folder(family, artefact)))

        for name, keep in CUTS.items() if everything else [("by a byte", CUTS["by a byte"])]:
            proves = "a truncated file" if name == "in the data" else None
            yield _damage(artefact, f"cut {name}", on(cut(keep)), CORRUPT, proves=proves)
        for name, change in HEADERS.items() if everything else []:
            yield _damage(artefact, f"header: {name}", on(change), CORRUPT)
        for name, (change, word) in NO_FILES.items():
            yield _damage(artefact, f"weights are {name}", on(change), word)
        if everything:
            yield from indexes(artefact, at)


def indexes(artefact: str, stem: str) -> Iterator[Damage]:
    def sharded(change):
        return lambda family: change(*shard(folder(family, artefact), stem))

    def index(edit):
        return sharded(lambda one, two, index: edit_json(index, edit))

    def text(text):
        return sharded(lambda one, two, index: index.write_bytes(text))

    def both(one, two, _):
        """A tensor of the first shard in the second one too."""
        tensors = load_file(two)
        name = min(load_file(one))
        save_file({**tensors, name: load_file(one)[name]}, two)

    def somewhere(name):
        return index(lambda d: d["weight_map"].update({min(d["weight_map"]): name}))

    bad = "CheckpointError: .*index.json: expected"
    rows = {
        "a shard missing": (sharded(lambda one, two, _: one.unlink()), bad + ".*is missing"),
        "a shard cut": (sharded(lambda one, two, _: cut(CUTS["in the data"])(two)), CORRUPT),
        "a tensor in two shards": (sharded(both), "CheckpointError: .*every tensor once"),
        "a tensor not listed": (
            index(lambda d: d["weight_map"].pop(min(d["weight_map"])) and None),
            bad + ".*is not in the index",
        ),
        "a tensor that is not there": (
            index(lambda d: d["weight_map"].update(x=max(d["weight_map"].values()))),
            bad + ".*'x' is not in",
        ),
        "upwards": (somewhere("../model.safetensors"), bad + ".*not a plain file name"),
        "absolute": (somewhere("/etc/passwd"), bad + ".*not a plain file name"),
        "a NUL": (somewhere("a\0.safetensors"), bad + ".*not a plain file name"),
        "the folder itself": (somewhere(".."), "CheckpointError: .*a directory"),
        "a number": (somewhere(3), bad + ".*weight_map"),
        "a list": (text(b"[]"), bad + ".*a JSON list"),
        "empty": (text(b""), bad + " a JSON object"),
        "no map": (text(b"{}"), bad + ".*weight_map"),
        "not UTF-8": (text(b'{"weight_map": {"\xff": "x"}}'), bad + " a JSON object"),
        "a lone surrogate": (text(b'{"weight_map": {"\\ud800": "x"}}'), bad + " a JSON object"),
        "a key twice": (
            text(b'{"weight_map": {}, "weight_map": {}}'),
            bad + ".*'weight_map' twice",
        ),
        "nested deeply": (text(b'{"a":' + b"[" * 10**5), bad + ".*recursion"),
        "huge": (
            sharded(lambda one, two, index: os.truncate(index, MAX_JSON_BYTES + 1)),
            bad + ".*100,000,001 bytes, more than",
        ),
    }
    for name, (apply, message) in rows.items():
        yield _damage(artefact, f"index: {name}", apply, message)


def configs() -> Iterator[Damage]:
    """``config.json`` of task, base and aligned model."""
    bad = r"CheckpointError: .*config\.json: expected a JSON object"
    texts = {
        "not JSON": b"{",
        "a list": b"[1]",
        "a key twice": b'{"architectures": ["a"], "architectures": ["b"]}',
        "nested deeply": b'{"a":' * 10**5,
        "not UTF-8": b'{"a": "\xff"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
    }
    for artefact in ("task", "base", "aligned"):

        def on(change, artefact=artefact):
            return lambda family: change(folder(family, artefact) / "config.json")

        for name, text in texts.items():
            change = on(lambda path, text=text: path.write_bytes(text))
            yield _damage(artefact, f"config: {name}", change, bad)
        yield _damage(
            artefact, "config: huge", on(lambda p: os.truncate(p, MAX_JSON_BYTES + 1)), bad
        )
        for name, (change, word) in NO_FILES.items():
            yield _damage(artefact, f"config is {name}", on(change), f"{bad}.*({word})")
        for name, config in {
            "quantised": {"quantization_config": {"quant_method": "awq"}},
            "quantised, told elsewhere": {"text_config": {"quantization_config": {"x": 1}}},
            "quantised, told by a list": {"quantization_config": ["x"]},
            "compressed": {"compression_config": {"quant_method": "x"}},
        }.items():
            change = on(lambda path, config=config: path.write_text(json.dumps(config)))
            proves = "a quantised checkpoint" if name == "quantised" else None
            yield _damage(
                artefact, f"config: {name}", change, "QuantizedCheckpointError", proves=proves
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
        yield _damage("task", name, on("task", edit), other)
        yield _damage("aligned", name, on("aligned", edit), other)
        if edit is not rename and edit is not drop:
            yield _damage("base", name, on("base", edit), other)
        yield _damage("vector", name, on("vector", edit), "SafetyVectorError: .*agree")
    yield _damage(
        "vector",
        "an extra tensor",
        on("vector", lambda t: t | {"x": torch.ones(1)}),
        "SafetyVectorError: .*'x' is not in the manifest",
    )
    yield _damage(
        "task",
        "an extra tensor",
        on("task", lambda t: t | {"x": torch.ones(1)}),
        "MismatchError: merge plan and task model .*the task model that the plan was made for",
        other=PLAN,  # it is kept
        proves="a plan made for another model",
    )
    for value in (float("nan"), float("inf"), -float("inf")):
        yield _damage("task", f"{value}", on("task", poke(Q, value)), "NonFinite|MismatchError")
        yield _damage("base", f"{value}", on("base", poke(Q, value)), "NonFiniteError: .*finite")
        yield _damage(
            "aligned", f"{value}", on("aligned", poke(Q, value)), "NonFiniteError: .*finite"
        )
        yield _damage(
            "vector",
            f"{value}, vouched for",
            lambda family, value=value: forge(family, poke(Q, value)),
            "NonFiniteError: .*q_proj.*finite",
            proves="non-finite values" if value == float("inf") else None,
        )
    yield _damage(
        "base",
        "another model",
        on("base", lambda t: {n: -x for n, x in t.items()}),
        "MismatchError: .*unrelated",
        proves="another base",
    )
    yield _damage(
        "base", "a zero model", on("base", lambda t: {n: x * 0 for n, x in t.items()}),
        "MismatchError: ",
    )  # fmt: skip
    yield _damage(
        "base",
        "the task model itself",
        lambda family: shutil.copyfile(weights(family.task), weights(family.base)),
        "MismatchError: .*identical weights",
    )
    yield _damage(
        "aligned",
        "the surrogate itself",
        lambda family: shutil.copyfile(weights(family.surrogate), weights(family.aligned)),
        "MismatchError: .*identical tensors",
    )
    yield _damage(
        "aligned",
        "no weights",
        lambda family: weights(family.aligned).unlink(),
        "CheckpointError: .*no such file",
    )
    yield _damage(
        "vector",
        "all zero, vouched for",
        lambda family: forge(family, lambda t: {n: x * 0 for n, x in t.items()}),
        "MergePlanError: .*not zero|SafetyVectorError: .*norm|IncompleteMergeError",
        other=READ,  # zeros are bytes like others
    )


# --- the vector ----------------------------------------------------------------------------------


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


def number_variants(value):
    """What else may stand where a number stood, and may not."""
    yield "negative", -abs(value) - 1
    yield "text", str(value)
    yield "true", True
    yield "null", None
    yield "a list", [[value]]
    yield "1e999", RawNumber("1e999")
    yield "NaN", RawNumber("NaN")
    yield "Infinity", RawNumber("Infinity")


class RawNumber(str):
    """Written as it is: JSON that no writer makes."""


def set_at(document, keys, value):
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


def get_at(document, keys):
    for key in keys:
        document = document[key]
    return document


def put(path, keys, value):
    """Write a value into a JSON file, raw where it must be."""
    document = json.loads(path.read_text())
    set_at(document, keys, "\1raw\1" if isinstance(value, RawNumber) else value)
    text = json.dumps(document)
    path.write_text(text.replace('"\\u0001raw\\u0001"', str(value)))


def json_files() -> Iterator[Damage]:
    """What any JSON artefact may suffer as a file."""
    for artefact, path_of, kind in (
        ("vector", manifest, "SafetyVectorError"),
        ("plan", lambda family: family.plan, "MergePlanError"),
    ):
        bad = f"{kind}: .*expected format version 1"

        def on(change, path_of=path_of):
            return lambda family: change(path_of(family))

        texts = {
            "empty": b"",
            "a list": b"[]",
            "null": b"null",
            "half": None,
            "not UTF-8": b"\xff",
            "version only": b'{"format_version": 1}',
            "nested deeply": b'{"tensors":' + b"[" * 10**6,
            "nested objects": b'{"tensors":' * 10**5,
        }
        for name, text in texts.items():
            yield _damage(
                artefact,
                f"file: {name}",
                on(lambda p, text=text: p.write_bytes(text or p.read_bytes()[:200])),
                bad,
            )
        yield _damage(artefact, "file: huge", on(lambda p: os.truncate(p, MAX_JSON_BYTES + 1)),
                      f"{kind}: .*100,000,001 bytes, more than 100,000,000")  # fmt: skip
        yield _damage(
            artefact,
            "file: a key twice",
            on(lambda p: p.write_text(p.read_text().replace("{", '{"format_version": 1,', 1))),
            f"{kind}: .*the key 'format_version' twice",
        )
        for key, value in (("format_version", 2), ("format_version", True), ("surprise", 1)):
            change = on(lambda p, key=key, value=value: put(p, [key], value))
            yield _damage(artefact, f"file: {key} is {value}", change, f"{bad}.*{key}")
        for name, (change, word) in NO_FILES.items():
            yield _damage(artefact, f"file is {name}", on(change), f"{kind}: .*({word})")


def vector_numbers() -> Iterator[Damage]:
    places = [("norm",), ("zero_share",), ("tensors", Q, "norm"), ("tensors", Q, "shape", 0),
              ("tensors", Q, "aligned_sample", 3)]  # fmt: skip
    for keys in places:
        for name, value in number_variants(1.5):
            if keys[-1] == 3 and name == "negative":
                continue  # a weight may be
            yield _damage(
                "vector",
                f"manifest: {'.'.join(map(str, keys))} is {name}",
                lambda family, keys=keys, value=value: put(manifest(family), keys, value),
                f"SafetyVectorError: .*{re.escape(str(keys[0]))}",
            )


def vector_files() -> Iterator[Damage]:
    for place in (0, 1000, -1):
        yield _damage("vector", f"a bit flipped in {Q} at {place}", flip(Q, place),
                      "SafetyVectorError: .*Its bytes changed",
                      proves="a flipped bit in the vector" if place == 0 else None)  # fmt: skip
    yield _damage(
        "vector", "a bit flipped in its last tensor", flip(LAST, -1),
        "SafetyVectorError: .*Its bytes changed",
    )  # fmt: skip

    def edited(*keys, value, message, blind=()):
        return _damage(
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
        message="SafetyVectorError: .*Its bytes|MismatchError: .*plan was made",
    )
    yield edited("tensors", Q, "digest", value="md5:0", message="SafetyVectorError: .*digest")
    yield edited("tensors", Q, "shape", value=[16, 64], message="SafetyVectorError: .*manifest")
    yield edited("tensors", Q, "shape", value=[2**80], message="SafetyVectorError: ")
    yield edited("tensors", Q, "dtype", value="F32", message="SafetyVectorError: .*manifest")
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
    yield edited("tensors", Q, "norm", value=3.0, blind=READ | {"plan", "command: plan"},
                 message="SafetyVectorError: .*norm 3.0|MismatchError: .*norm 3.0")  # fmt: skip
    yield edited("scope", value="everything", message="SafetyVectorError: .*scope")
    yield _damage(
        "vector", "no manifest", lambda family: manifest(family).unlink(),
        "SafetyVectorError: .*vector build",
    )  # fmt: skip
    yield _damage("vector", "no tensors", lambda family: weights(family.vector).unlink(),
                  "CheckpointError: .*safety_vector")  # fmt: skip

    for name, path_of in (("manifest", manifest), ("tensors", lambda f: weights(f.vector))):

        def outside(family, path_of=path_of):
            path = path_of(family)
            shutil.move(path, family.base / "moved")
            path.symlink_to(family.base / "moved")

        yield _damage("vector", f"{name}: a link out of the folder", outside,
                      "SafetyVectorError: .*holds its files itself.*, a link to",
                      proves="links out of the folder" if name == "tensors" else None)  # fmt: skip


# --- the plan ------------------------------------------------------------------------------------

#: Told to people only: no coefficient follows from them.
FOR_PEOPLE = {"rank_fraction", "retained_share"}


def plan_numbers() -> Iterator[Damage]:
    heads = ["beta", "rank_fraction", "task_norm", "safety_norm", "norm_scale", "retained_share"]
    lists = ["a", "b", "interference", "attenuation", "coefficient"]
    places = [(key,) for key in heads]
    places += [("tensors", Q, "safety_norm"), ("tensors", Q, "retained_share")]
    places += [("tensors", Q, key, 0) for key in lists]
    for keys in places:
        where = ".".join(map(str, keys))

        def edit(family, keys=keys, scale=1.01):
            put(family.plan, keys, get_at(json.loads(family.plan.read_text()), keys) * scale)

        if not FOR_PEOPLE & set(keys):
            yield _damage("plan", f"{where} edited", edit, "MergePlanError: .*should be",
                          proves="an edited plan" if where == "beta" else None)  # fmt: skip
        for name, value in number_variants(1.5):
            if name == "negative" and "retained_share" in keys:
                continue
            if name == "null" and keys[-1] == "retained_share" and len(keys) == 3:
                continue  # as if it were not there
            yield _damage(
                "plan",
                f"{where} is {name}",
                lambda family, keys=keys, value=value: put(family.plan, keys, value),
                f"MergePlanError: .*{re.escape(str(keys[0]))}",
            )
    for key in lists:
        for name, value in (("missing", []), ("twice", [0.5, 0.5]), ("no list", 0.5)):
            yield _damage(
                "plan",
                f"{key} {name}",
                lambda family, key=key, value=value: put(family.plan, ["tensors", Q, key], value),
                "MergePlanError: ",
            )


def plan_words() -> Iterator[Damage]:
    def edited(name, *keys, value, message, blind=()):
        return _damage("plan", name, lambda f: put(f.plan, keys, value), message, blind)

    yield _damage("plan", "no plan", lambda family: family.plan.unlink(),
                  "MergePlanError: .*(enchtable plan|base_model)")  # fmt: skip
    yield edited("a tensor kept by hand", "tensors", Q, "action", value="keep",
                 message="MergePlanError: .*kept tensor")  # fmt: skip
    yield edited("an unknown action", "tensors", Q, "action", value="drop",
                 message="MergePlanError: .*action")  # fmt: skip
    yield edited("another vector", "safety_vector", "fingerprint", value=OTHER,
                 message="MismatchError: .*vector that the plan", blind=RESOLVE)  # fmt: skip
    yield edited("another task model", "task_model", "fingerprint", value=OTHER,
                 message="MismatchError: .*task model that the plan", blind=RESOLVE)  # fmt: skip
    yield edited("another base model", "base_model", "fingerprint", value="x",
                 message="MergePlanError: .*fingerprint")  # fmt: skip
    yield edited("an unknown scope", "scope", value="everything", message="MergePlanError: .*scope")
    yield edited("a scope it is not for", "scope", value="ffn",
                 message="MismatchError: .*outside scope 'ffn'", blind=RESOLVE)  # fmt: skip
    yield edited("no tensors", "tensors", value={}, message="MergePlanError: .*at least one")
    yield edited("no vector", "safety_vector", value=None, message="MergePlanError: .*safety_vec")

    def foreign(family):
        """A tensor that the vector does not hold, planned as another is."""
        edit_json(family.plan, lambda p: p["tensors"].update({NORM: p["tensors"][Q]}))

    yield _damage("plan", "a tensor that is not in the vector", foreign, "MergePlanError: .*norm")

    def forget(family):
        edit_json(family.plan, lambda plan: plan["tensors"].pop(NORM) and None)

    yield _damage("plan", "a tensor forgotten", forget, "MismatchError: .*not in the plan", RESOLVE)

    def unknown(family):
        edit_json(family.plan, lambda p: p["tensors"].update(x=p["tensors"][NORM]))

    yield _damage("plan", "a tensor of no model", unknown, "MismatchError: .*'x' is not in",
                  RESOLVE)  # fmt: skip
    commit = "0" * 40
    for where in (
        {"path": "../v"}, {"path": "/v"}, {"path": "~/v"}, {"path": "a\0b"}, {"path": "a\\b"},
        {"path": ""}, {"path": "a/../../b"}, {"path": 3}, {}, {"path": "v", "repo_id": "a/b"},
        {"repo_id": "/abs/v", "commit": commit}, {"repo_id": "../v", "commit": commit},
        {"repo_id": "a/b"}, {"repo_id": "a/b", "commit": "main"},
    ):  # fmt: skip
        yield edited(f"location {where}", "safety_vector", "location", value=where,
                     message="MergePlanError: .*safety_vector.location")  # fmt: skip

    yield edited("location of a name too long", "safety_vector", "location", "path",
                 value="a" * 300, message="SafetyVectorError: .*File name too long",
                 blind=RESOLVE | {"merge", "command: merge"})  # fmt: skip

    def linked(family):
        outside = family.task.parent / "outside"
        shutil.move(family.vector, outside)
        family.vector.symlink_to(outside)

    yield _damage("plan", "location: a link out of the folder", linked,
                  "MergePlanError: .*inside the plan's own",
                  RESOLVE | {"merge", "command: merge"})  # fmt: skip


DAMAGES: tuple[Damage, ...] = (
    *weight_files(),
    *configs(),
    *tensors(),
    *json_files(),
    *vector_numbers(),
    *vector_files(),
    *plan_numbers(),
    *plan_words(),
)


# --- the loader's configuration ------------------------------------------------------------------

_BASE = {"base_model": "b", "safety_vector": "v"}
#: (keys, what the message names): refused before anything is read.
CONFIGS: tuple[tuple[object, str], ...] = (
    ({"saftey_vector": "v"}, "saftey_vector"),
    ({"beta": -0.1}, "beta"),
    ({"beta": 0}, "beta"),
    ({"beta": -0.0}, "beta"),
    *(({"beta": x}, "beta") for x in (float("nan"), float("inf"), "0.1", True, [0.1], {}, 10**400)),
    *(({"scope": x}, "scope") for x in ("everything", "", 1, ["attention"])),
    *(({"verify": x}, "verify") for x in ("none", True, None)),
    *(({"safety_vector": x}, "safety_vector") for x in ("", 3, ["v"], {})),
    *(({"merge_plan": x}, "merge_plan") for x in ("", 3, True)),
    *(({"inner_extra_config": x}, "inner_extra_config") for x in ([], "x", {1: 2})),
    *(({"inner_load_format": x}, "inner_load_format") for x in ("enchtable", "EnchTable", "", 1)),
    ({"base_model": "b"}, "needs 'safety_vector'"),
    ({**_BASE, "merge_plan": "p"}, "not both"),
    ({**_BASE, "base_model": ""}, "base_model"),
    *((x, "object") for x in (None, [], "x", 1, [{"beta": 1}])),
)


def _path(make: Callable) -> Callable:
    def apply(folder):
        make(folder / "odd")
        return str(folder / "odd")

    return apply


#: What a path of the configuration may lead to: (makes it in a folder → what is written).
PATHS: dict[str, Callable[[Path], str]] = {
    "nothing": lambda folder: str(folder / "nothing"),
    "a FIFO": _path(os.mkfifo),
    "an empty folder": _path(Path.mkdir),
    "an empty file": _path(Path.touch),
    "a link to itself": _path(lambda path: path.symlink_to("odd")),
    "a device": lambda folder: "/dev/zero",
    "a NUL": lambda folder: "a\0b",
    "a lone surrogate": lambda folder: "a\ud800",
    "a long name": lambda folder: "a" * 300,
    "a long path": lambda folder: "a/" * 3000,
    "no home": lambda folder: "~nobody-of-this-name/x",
    "no repository": lambda folder: "org/name@not a revision",
}
