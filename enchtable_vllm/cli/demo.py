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
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Judge by 'enchtable eval' on hundreds of questions, instead of showing answers.",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where models are kept. Default: demo in ENCHTABLE_CACHE."),
    ] = None,
) -> None:
    """Train, distil, plan, merge and serve a real small model, and show what it does.

    Needs the 'demo' extra and vLLM (its CPU build will do). About ten minutes on two cores, forty
    where they have no instructions for bf16; the second time only vLLM starts, because trained
    checkpoints are kept.
    """
    if measure and (keep or port is not None):
        raise typer.BadParameter("leaves no server running", param_hint="--measure")
    try:
        from enchtable_vllm.demo.measure import measure as run_measured
        from enchtable_vllm.demo.run import run
    except ImportError as error:
        raise ConfigError(
            "the demo",
            expected="the packages of the 'demo' extra",
            got=error,
            fix="Install them: pip install 'enchtable-vllm[demo]'.",
        ) from error
    folder = cache or cache_folder() / "demo"
    if measure:
        run_measured(folder, out)
    else:
        run(folder, keep=keep, port=port, console=out)
