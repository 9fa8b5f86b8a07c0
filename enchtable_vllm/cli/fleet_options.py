"""What the commands share that talk to servers: tokens, certificates, durations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from enchtable_vllm.cli.output import warn
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet import Client, Credentials, Target
from enchtable_vllm.fleet.documents import Pause
from enchtable_vllm.fleet.schedule import parse_duration
from enchtable_vllm.fleet.targets import read_targets

UrlOption = Annotated[str, typer.Option("--url", help="The server: http://host:8000.")]
AdminTokenOption = Annotated[
    Path | None,
    typer.Option(
        help="File with the servers' admin token. Default: ENCHTABLE_ADMIN_TOKEN, or the file "
        "that ENCHTABLE_ADMIN_TOKEN_FILE names.",
        show_default=False,
    ),
]
ApiKeyOption = Annotated[
    Path | None,
    typer.Option(help="File with vLLM's API key. Default: VLLM_API_KEY.", show_default=False),
]
CaOption = Annotated[
    Path | None,
    typer.Option(help="Certificates (PEM) to trust in place of the system's.", show_default=False),
]


def _positive(beta: float | None) -> float | None:
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise typer.BadParameter("it must be positive and finite")
    return beta


BetaOption = Annotated[
    float | None,
    typer.Option(help="Another β than the plan's.", callback=_positive, show_default=False),
]
VectorOption = Annotated[
    str,
    typer.Option(
        help="Its name in the servers' vector root, org/name@COMMIT, @current, or @none (the "
        "task model as it was trained)."
    ),
]
RequestsOption = Annotated[
    Pause,
    typer.Option(
        "--requests", help="Running requests: keep (they go on after), wait (for them), abort."
    ),
]
TimeoutOption = Annotated[str, typer.Option(help="For staging a vector on one server.")]
PatienceOption = Annotated[
    str, typer.Option(help="How long a server may be out of reach before its state is unknown.")
]


def seconds(text: str, option: str) -> float:
    """A duration; wrong usage, exit code 2, if it is none."""
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def one_target(url: str) -> Target:
    """The target of a command for one server; wrong usage if it is none."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("it begins with http:// or https://", param_hint="--url")
    try:
        (name,) = read_targets([url])
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from error
    return Target(name)


@dataclass(frozen=True)
class Access:
    """Where tokens and certificates are, as the options say."""

    admin_token_file: Path | None = None
    api_key_file: Path | None = None
    ca_file: Path | None = None

    def connect(self, targets: Sequence[Target], *, admin: bool) -> list[Client]:
        """Clients, not open yet; warns where a token could be read on its way.

        Args:
            targets: The servers.
            admin: Whether something is to be changed.

        Raises:
            ConfigError: There is no admin token, or a file cannot be read.
        """
        credentials = Credentials.find(self.admin_token_file, self.api_key_file)
        if admin:
            credentials.require_admin()
        else:
            credentials = Credentials(api_key=credentials.api_key)
        openly = [target.url for target in targets if target.sends_openly]
        if openly and (credentials.admin or credentials.api_key):
            more = f" and {len(openly) - 1} more" if len(openly) > 1 else ""
            warn(
                f"tokens go to {openly[0]}{more} over plain http: whoever is on the way can read "
                "them and swap vectors. Use https, or a network that is yours alone."
            )
        return [Client(target, credentials, ca_file=self.ca_file) for target in targets]
