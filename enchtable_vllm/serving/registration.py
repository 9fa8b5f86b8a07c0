"""The entry point that vLLM calls in every process it starts.

It runs during argument parsing too, and an exception here would take down every ``vllm``
command. So it registers a name and no more: the loader is imported when a model is loaded
with ``--load-format enchtable``, and if that import fails, the failure is reported there.
"""

from __future__ import annotations

import logging
from typing import Any

LOAD_FORMAT = "enchtable"
_registered = False


def register() -> None:
    """Make ``--load-format enchtable`` known. Safe to call twice, and in a spawned process."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from enchtable_vllm.serving import compat, last_word, records

        compat.register(LOAD_FORMAT, _make)
        last_word.install()
        records.install()
    except Exception as error:
        # Whoever serves without us must not be stopped. Whoever asks for us is told by vLLM that
        # the format is unknown, and finds the reason in this line.
        logging.getLogger("vllm.enchtable").warning(
            "--load-format %s is not available: %s", LOAD_FORMAT, _reason(error)
        )


def _make(load_config: Any) -> Any:
    from enchtable_vllm.errors import ConfigError
    from enchtable_vllm.serving import last_word, versions

    try:
        versions.refuse_old(versions.installed_vllm())
    except ConfigError as error:
        last_word.leave(error)
        raise
    from enchtable_vllm.serving.loader import EnchTableModelLoader

    return EnchTableModelLoader(load_config)


def _reason(error: Exception) -> Exception | str:
    """An error, or what is behind it: a vLLM that is too old lacks what is imported."""
    from enchtable_vllm.errors import ConfigError

    try:
        from enchtable_vllm.serving import versions

        versions.refuse_old(versions.installed_vllm(), cause=error)
    except ConfigError as too_old:
        return too_old
    except Exception:  # this is no place for another failure
        pass
    return f"{type(error).__name__}: {error}"


def endpoints() -> Any:
    """The endpoint plugin: an object with the routes of docs/http-api.md."""
    from enchtable_vllm.serving.http.plugin import EnchTableEndpoints

    return EnchTableEndpoints()
