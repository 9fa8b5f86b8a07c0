"""Environment variables, all of them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``ENCHTABLE_CACHE``: where plans, journals of roll-outs and the demo's models lie.

    Default: ``enchtable`` in ``XDG_CACHE_HOME``, or ``~/.cache/enchtable``.
    """
    chosen = os.environ.get("ENCHTABLE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "enchtable"


def allows_any_vllm() -> bool:
    """``ENCHTABLE_ANY_VLLM=1``: try a vLLM below the lower bound, to find where the bound is."""
    return os.environ.get("ENCHTABLE_ANY_VLLM") == "1"


def admin_token() -> str | None:
    """``ENCHTABLE_ADMIN_TOKEN``: who knows it may swap the vector of a running server.

    Of the server: the token that it asks for. Of a client: the token that it sends.
    """
    return os.environ.get("ENCHTABLE_ADMIN_TOKEN") or None


def plans_folder() -> Path:
    """Where computed plans are kept."""
    return cache_folder() / "plans"


def admin_token_file() -> Path | None:
    """``ENCHTABLE_ADMIN_TOKEN_FILE``: a file that holds the admin token.

    A server reads it for each request, so that it can be replaced.
    """
    chosen = os.environ.get("ENCHTABLE_ADMIN_TOKEN_FILE")
    return Path(chosen).expanduser() if chosen else None


def api_key() -> str | None:
    """``VLLM_API_KEY``: what ``vllm serve`` takes its ``--api-key`` from, for clients of it.

    Not ``OPENAI_API_KEY``: where that is set it is mostly the key of another service.
    """
    return os.environ.get("VLLM_API_KEY") or None


def judge_api_key() -> str | None:
    """``ENCHTABLE_JUDGE_API_KEY``: for the server of the model that judges answers."""
    return os.environ.get("ENCHTABLE_JUDGE_API_KEY") or None


def without_admin_token() -> dict[str, str]:
    """The environment for a program that has no business with the admin token."""
    ours = ("ENCHTABLE_ADMIN_TOKEN", "ENCHTABLE_ADMIN_TOKEN_FILE")
    return {name: value for name, value in os.environ.items() if name not in ours}
