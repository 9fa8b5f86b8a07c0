"""What a loader's configuration may hold, and where its paths may lead."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
