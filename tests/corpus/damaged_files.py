"""Damages to files as files: weights, headers, indexes, configs, JSON."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from corpus.damage import Damage, damage, folder, put
from corpus.seeds import (
    edit_header,
    edit_json,
    join,
    manifest,
    shard,
    split,
    weights,
)
from safetensors.torch import load_file, save_file

from enchtable_vllm.files import MAX_JSON_BYTES

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
    for artefact in ("vector", "task", "base", "aligned", "surrogate"):
        at = "safety_vector" if artefact == "vector" else "model"
        # One reader reads them all: two artefacts get everything, the others a part.
        everything = artefact in ("vector", "task")

        def on(change, artefact=artefact):
            return lambda family: change(weights(folder(family, artefact)))

        for name, keep in CUTS.items() if everything else [("by a byte", CUTS["by a byte"])]:
            proves = "a truncated file" if name == "in the data" else None
            yield damage(artefact, f"cut {name}", on(cut(keep)), CORRUPT, proves=proves)
        for name, change in HEADERS.items() if everything else []:
            yield damage(artefact, f"header: {name}", on(change), CORRUPT)
        for name, (change, word) in NO_FILES.items():
            yield damage(artefact, f"weights are {name}", on(change), word)
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
        yield damage(artefact, f"index: {name}", apply, message)


def configs() -> Iterator[Damage]:
    """``config.json`` of each model."""
    bad = r"CheckpointError: .*config\.json: expected a JSON object"
    texts = {
        "not JSON": b"{",
        "a list": b"[1]",
        "a key twice": b'{"architectures": ["a"], "architectures": ["b"]}',
        "nested deeply": b'{"a":' * 10**5,
        "not UTF-8": b'{"a": "\xff"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
    }
    for artefact in ("task", "base", "aligned", "surrogate"):

        def on(change, artefact=artefact):
            return lambda family: change(folder(family, artefact) / "config.json")

        for name, text in texts.items():
            change = on(lambda path, text=text: path.write_bytes(text))
            yield damage(artefact, f"config: {name}", change, bad)
        yield damage(
            artefact, "config: huge", on(lambda p: os.truncate(p, MAX_JSON_BYTES + 1)), bad
        )
        for name, (change, word) in NO_FILES.items():
            yield damage(artefact, f"config is {name}", on(change), f"{bad}.*({word})")
        for name, config in {
            "quantised": {"quantization_config": {"quant_method": "awq"}},
            "quantised, told elsewhere": {"text_config": {"quantization_config": {"x": 1}}},
            "quantised, told by a list": {"quantization_config": ["x"]},
            "compressed": {"compression_config": {"quant_method": "x"}},
        }.items():
            change = on(lambda path, config=config: path.write_text(json.dumps(config)))
            proves = "a quantised checkpoint" if name == "quantised" else None
            yield damage(
                artefact, f"config: {name}", change, "QuantizedCheckpointError", proves=proves
            )


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
            yield damage(
                artefact,
                f"file: {name}",
                on(lambda p, text=text: p.write_bytes(text or p.read_bytes()[:200])),
                bad,
            )
        yield damage(artefact, "file: huge", on(lambda p: os.truncate(p, MAX_JSON_BYTES + 1)),
                      f"{kind}: .*100,000,001 bytes, more than 100,000,000")  # fmt: skip
        yield damage(
            artefact,
            "file: a key twice",
            on(lambda p: p.write_text(p.read_text().replace("{", '{"format_version": 1,', 1))),
            f"{kind}: .*the key 'format_version' twice",
        )
        for key, value in (("format_version", 2), ("format_version", True), ("surprise", 1)):
            change = on(lambda p, key=key, value=value: put(p, [key], value))
            yield damage(artefact, f"file: {key} is {value}", change, f"{bad}.*{key}")
        for name, (change, word) in NO_FILES.items():
            yield damage(artefact, f"file is {name}", on(change), f"{kind}: .*({word})")
