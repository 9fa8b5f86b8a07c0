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
        from enchtable_vllm.serving import compat, last_word

        compat.register(LOAD_FORMAT, _make)
        last_word.install()
    except Exception as error:
        # Whoever serves without us must not be stopped. Whoever asks for us is told by vLLM that
        # the format is unknown, and finds the reason in this line.
        logging.getLogger("vllm.enchtable").warning(
            "--load-format %s is not available: %s: %s", LOAD_FORMAT, type(error).__name__, error
        )


def _make(load_config: Any) -> Any:
    from enchtable_vllm.serving.loader import EnchTableModelLoader

    return EnchTableModelLoader(load_config)
