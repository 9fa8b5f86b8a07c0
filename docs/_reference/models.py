"""A table of a pydantic model's keys: types from its schema, words from its docstring.

A key that the docstring does not describe is an error, so that none can be added in silence.
"""

from __future__ import annotations

import json
from typing import Any

import docstring_parser
from markup import code, of_docstring
from markup import table as markdown_table
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def table(model: type[BaseModel], *, defaults: bool = False) -> str:
    """Every key of a model.

    Args:
        model: Its docstrings, and those of its bases, have sections ``Attributes:``.
        defaults: Whether what an absent key means is a column.
    """
    words = _described(model)
    schema = model.model_json_schema()
    rows = []
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in fields:
        if name not in words:
            raise SystemExit(f"{model.__name__}: its docstring does not describe '{name}'")
        kind = _kind(schema["properties"][name], schema.get("$defs", {}))
        row = [code(name), kind + ("" if defaults or field.is_required() else ", optional")]
        rows.append([*row, *([_default(field)] if defaults else []), words[name]])
    head = ["key", "value", *(["default"] if defaults else []), "meaning"]
    return markdown_table(head, rows)


def _described(model: type[BaseModel]) -> dict[str, str]:
    words: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not (kind.__doc__ and issubclass(kind, BaseModel) and kind is not BaseModel):
            continue
        for entry in docstring_parser.google.parse(kind.__doc__).params:
            for name in entry.arg_name.split(", "):  # 'a, b: What both are.'
                words[name] = of_docstring(entry.description or "")
    return words


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return code(value if isinstance(value, str) else json.dumps(value))


def _kind(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return _kind(known[schema["$ref"].rpartition("/")[2]], known)
    if "anyOf" in schema:
        kinds = [_kind(s, known) for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(kinds)
    if "oneOf" in schema:  # told apart by a key of theirs
        return " or ".join(dict.fromkeys(_kind(one, known) for one in schema["oneOf"]))
    if "enum" in schema:
        return ", ".join(code(value) for value in schema["enum"])
    if "const" in schema:
        return code(schema["const"])
    kind = schema.get("type", "any")
    if kind == "array":
        of = schema.get("items") or {}
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}"
        return f"list of: {_kind(of, known)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name → {_kind(schema['additionalProperties'], known)}"
    names = {"string": "text", "integer": "whole number", "boolean": "`true` or `false`"}
    return str(names.get(kind, kind)) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and low == high:
        return f" {low:g}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " " + ", ".join(found) if found else ""
