"""One damage, and the tools that make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from models import Family

#: A fingerprint of nothing.
OTHER = "blake3:" + "0" * 64
VERIFY, READ, PLAN = {"command: verify"}, {"read"}, {"plan", "serve with base", "command: plan"}
PLAN |= {"command: plan with masks"}
MERGE, RESOLVE = {"merge", "serve", "command: merge"}, {"resolve"}


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        artefact: What it is done to: vector, factors, plan, masks, task, base, aligned or
            surrogate.
        name: For people.
        apply: Does it to a family's folder.
        message: What every refusal of it says (a regular expression, class name included).
        blind: Consumers that rightly do not see it; their result must not change.
        other: Consumers for which it is another good input.
        proves: The line of the README that it stands for.
        form: Among `seeds.FORMS`: what the family is like that it is done to.
    """

    artefact: str
    name: str
    apply: Callable[[Family], object]
    message: str
    blind: frozenset[str] = frozenset()
    other: frozenset[str] = frozenset()
    proves: str | None = None
    form: str = "plain"


def damage(artefact, name, apply, message, blind=(), other=(), proves=None, form="plain") -> Damage:
    blind, other = frozenset(blind), frozenset(other)
    return Damage(artefact, name, apply, message, blind, other, proves, form)


def folder(family: Family, artefact: str):
    return getattr(family, artefact)


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
