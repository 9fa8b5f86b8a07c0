"""Damage that an input of the fuzzer may take: of bytes, of JSON, of a safetensors header."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any, cast

NUMBERS = [0, -0.0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e-320, 1e308, 1e999, math.nan, 0.1]
WORDS = ["", "x", "../x", "/", "\0", "\ud800", "a" * 5000, "__metadata__", "1", "NaN", "F64", "I8"]
ODD = [None, True, False, [], {}, [[]], *NUMBERS, *WORDS]
SPLICES = [
    b"NaN",
    b"1e999",
    b"-",
    b"[" * 300,
    b'{"a":' * 300,
    b"\xff",
    b"\0",
    b'"',
    b"\\ud800",
    b"}",
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert somewhere."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 2, 8, 100, len(data)]))
    kind = rng.randrange(5)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + data[at:end] + data[at:]
    return data[:at] + rng.choice(SPLICES) + data[end:]


def mutate_json(value: object, rng: random.Random) -> object:
    """Change one place of a document: a value, a key, an order, a length."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(rng.choice(WORDS) if k == key else k): v for k, v in value.items()}
        if kind == 2:
            return value | {key: value[rng.choice(list(value))]}
        return value | {key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed = [mutate_json(value[at], rng)]
        return value[:at] + rng.choice([[], changed, changed, value[at:] * 2]) + value[at + 1 :]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice([-value, value * 1.001, value + 1, value * 1e300, value / 3])
    return rng.choice(ODD)


def repair_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan that was edited with care: its derived numbers follow from the others again."""
    merged = [tensor for tensor in plan["tensors"].values() if tensor.get("a")]
    plan["safety_norm"] = math.hypot(*(tensor["safety_norm"] for tensor in merged))
    n = plan["norm_scale"] = plan["beta"] * plan["task_norm"] / plan["safety_norm"]
    for tensor in merged:
        tensor["interference"] = [a * n + b for a, b in zip(tensor["a"], tensor["b"], strict=True)]
        tensor["attenuation"] = [math.exp(-x) for x in tensor["interference"]]
        tensor["coefficient"] = [n * x for x in tensor["attenuation"]]
    return plan


def mutate_file(name: str, data: bytes, rng: random.Random) -> bytes:
    """By the file's own structure, most of the time."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        if name.endswith(".json"):
            document = mutate_json(json.loads(data), rng)
            if name.endswith("merge_plan.json") and rng.random() < 0.5:
                document = repair_plan(cast(dict[str, Any], document))
            return json.dumps(document).encode()
        if name.endswith(".safetensors"):
            (size,) = struct.unpack("<Q", data[:8])
            header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), rng)).encode()
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    except (ValueError, RecursionError, ArithmeticError, LookupError, TypeError, AttributeError,
            struct.error):  # fmt: skip
        pass  # damaged already
    return mutate_bytes(data, rng)
