"""Every command and option, from typer's own tree of commands.

What kind of value an option takes is read from the function's annotations, because typer's words
for it change from version to version.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from markup import code, table

from enchtable_vllm import cli


def every_command() -> str:
    """A section for each."""
    return "\n".join(_section(name, command) for name, command in leaves())


def leaves() -> Iterator[tuple[str, Any]]:
    """The name of each command, and what typer made of it."""
    for name in cli.COMMANDS:
        command = cli.load(name)
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {part}", leaf) for part, leaf in inner.items())


def _section(name: str, command: Any) -> str:
    annotations = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([f"enchtable {name}", *map(_placeholder, arguments), "[OPTIONS]"])
    rows = [_row(parameter, annotations[parameter.name]) for parameter in command.params]
    return f"## enchtable {name}\n\n{command.help.strip()}\n\n`{usage}`\n\n" + table(
        ["option", "value", "default", "meaning"], rows
    )


def _placeholder(argument: Any) -> str:
    return str(argument.name).upper() + ("..." if argument.nargs == -1 else "")


def _row(parameter: Any, annotation: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        names = code(_placeholder(parameter))
    else:
        names = ", ".join(map(code, [*parameter.opts, *parameter.secondary_opts]))
    value = _value(annotation)
    again = "; may be given again" if parameter.multiple else ""
    if not parameter.help:
        raise SystemExit(f"'{names}' has no help")
    meaning = parameter.help.replace("\\[", "[")  # escaped for rich
    return [names, value + again, _default(parameter), meaning]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if parameter.secondary_opts:  # --bf16/--fp32
        return code((parameter.opts if value else parameter.secondary_opts)[0])
    if value is None or isinstance(value, bool) or not parameter.show_default:
        return ""
    return code(value)


def _value(annotation: Any) -> str:
    """``int`` → a whole number; with its bounds, where typer checks them."""
    bounds = ""
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        info = extra[-1]
        low, high = getattr(info, "min", None), getattr(info, "max", None)
        found = [f"{sign} {x:g}" for sign, x in (("≥", low), ("≤", high)) if x is not None]
        bounds = ", ".join(found)
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(map(code, get_args(annotation)))
    words = {bool: "", int: "whole number", float: "number", str: "text", Path: "path"}
    return " ".join(filter(None, (words[annotation], bounds)))
