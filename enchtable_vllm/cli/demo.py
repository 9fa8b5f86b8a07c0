"""``enchtable demo``: the whole pipeline on a real small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from enchtable_vllm.cli.output import out
from enchtable_vllm.envs import cache_folder
from enchtable_vllm.errors import ConfigError


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the merged server running.")] = False,
    port: Annotated[
        int | None, typer.Option(help="The merged server's port; any free one by default.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where models are kept. Default: demo in ENCHTABLE_CACHE."),
    ] = None,
) -> None:
    """Train, distil, plan, merge and serve a real small model, and show what it does.

    Needs the 'demo' extra and vLLM (its CPU build will do). About ten minutes on two cores; the
    second time only vLLM starts, because trained checkpoints are kept.
    """
    try:
        from enchtable_vllm.demo.run import run
    except ImportError as error:
        raise ConfigError(
            "the demo",
            expected="the packages of the 'demo' extra",
            got=error,
            fix="Install them: pip install 'enchtable-vllm[demo]'.",
        ) from error
    run(cache or cache_folder() / "demo", keep=keep, port=port, console=out)
