"""The HTTP interface, as the server's own OpenAPI page describes it."""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from typing import Any

from markup import code
from markup import table as markdown_table

from enchtable_vllm.serving.http.admin import HEADER


@functools.cache
def openapi() -> dict[str, Any]:
    """Of the routes of a server that has an admin token."""
    from fastapi import FastAPI

    from enchtable_vllm.serving.http.plugin import EnchTableEndpoints

    os.environ["ENCHTABLE_ADMIN_TOKEN"] = "of no server: it lets the routes exist"
    app = FastAPI(title="enchtable-vllm", version=version("enchtable-vllm"))
    EnchTableEndpoints().attach_router(app)
    return app.openapi()


def table() -> str:
    """Method, path, who may, and what for."""
    rows = []
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            route = code(f"{method.upper()} {path}")
            rows.append([route, _token(path, operation), operation["summary"]])
    return markdown_table(["route", "token", "what it does"], rows)


def _token(path: str, operation: dict[str, Any]) -> str:
    """Which one: vLLM's API key covers what is under ``/v1``."""
    if any(p["name"] == HEADER for p in operation.get("parameters", ())):
        return "admin"
    return "API key" if path.startswith("/v1/") else "none"
