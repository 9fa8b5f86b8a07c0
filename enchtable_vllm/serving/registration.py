"""The entry point that vLLM calls in every process it starts.

It runs during argument parsing too, and an exception here would take down every ``vllm``
command. So it registers a name and no more: the loader is imported when a model is loaded
with ``--load-format enchtable``, and if that import fails, the failure is reported there.
"""

from __future__ import annotations

from typing import Any

LOAD_FORMAT = "enchtable"


def register() -> None:
    """Make ``--load-format enchtable`` known. Safe to call twice, and in a spawned process."""
    from enchtable_vllm.serving import compat, last_word

    last_word.install()
    if compat.is_registered(LOAD_FORMAT):
        return

    class EnchTableModelLoader(compat.BaseModelLoader):  # type: ignore[misc]  # vllm is untyped here
        """Stands in for the loader until one is made."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from enchtable_vllm.serving.loader import EnchTableModelLoader as Loader

            return Loader(*args, **kwargs)

    compat.register(LOAD_FORMAT, EnchTableModelLoader)
