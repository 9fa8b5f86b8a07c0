"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from enchtable_vllm.errors import ConfigError

JobsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tensors worked on at once. Default: one for each core, at most 8.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Where the linear algebra runs: cpu, cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def check_device(name: str) -> str:
    """A device that torch can use here.

    Raises:
        ConfigError: It cannot.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "--device",
            expected="a device of this machine",
            got=f"'{name}': {str(error).splitlines()[0]}",
            fix="Use 'cpu', or 'cuda' where torch sees a GPU.",
        ) from error
    return name
