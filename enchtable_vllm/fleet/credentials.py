"""Tokens: out of files and the environment, into headers, and nowhere else.

Never out of a command line, where every user of the machine can read it, and never into a log,
a journal or a message: a `Secret` does not print.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from enchtable_vllm import envs
from enchtable_vllm.errors import ConfigError

ADMIN_HEADER = "X-Enchtable-Admin-Token"


class Secret:
    """A text that only `reveal` shows.

    Args:
        text: It.
        source: Where it came from, for messages.

    Raises:
        ConfigError: It is empty, or cannot be sent in a header as it is.
    """

    def __init__(self, text: str, source: str) -> None:
        if not text or not all("!" <= c <= "~" for c in text):  # a newline would forge a header
            raise ConfigError(
                source,
                expected="a token of visible ASCII characters, without spaces",
                got="nothing" if not text else "other characters",  # and not which
                fix="Put the token there, alone, on one line.",
            )
        self._text = text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"


@dataclass(frozen=True)
class Credentials:
    """What a server asks for.

    Attributes:
        admin: The admin token, for the routes that change something.
        api_key: vLLM's own key, for everything under ``/v1``.
    """

    admin: Secret | None = None
    api_key: Secret | None = None

    @classmethod
    def find(cls, admin_token_file: Path | None = None, api_key_file: Path | None = None) -> Self:
        """From files that were named, or else from the environment (see `envs`).

        Raises:
            ConfigError: A file cannot be read, or holds no token.
        """
        admin, api_key = None, None
        if admin_token_file is not None:
            admin = _from_file(admin_token_file)
        elif (text := envs.admin_token()) is not None:
            admin = Secret(text, "ENCHTABLE_ADMIN_TOKEN")
        elif (path := envs.admin_token_file()) is not None:
            admin = _from_file(path)
        if api_key_file is not None:
            api_key = _from_file(api_key_file)
        elif (text := envs.api_key()) is not None:
            api_key = Secret(text, "VLLM_API_KEY")
        return cls(admin, api_key)

    def headers(self, path: str, *, admin: bool) -> dict[str, str]:
        """For one request: no route gets a token that it does not need."""
        headers = {}
        if self.api_key is not None and path.startswith("/v1/"):
            headers["Authorization"] = f"Bearer {self.api_key.reveal()}"
        if self.admin is not None and admin:
            headers[ADMIN_HEADER] = self.admin.reveal()
        return headers

    def require_admin(self) -> None:
        """Before the first request of a command that changes something.

        Raises:
            ConfigError: There is no admin token.
        """
        if self.admin is None:
            raise ConfigError(
                "the admin token",
                expected="ENCHTABLE_ADMIN_TOKEN, ENCHTABLE_ADMIN_TOKEN_FILE or --admin-token-file",
                got="none of them",
                fix="Give the token that the servers were started with.",
            )


def is_loopback(host: str) -> bool:
    """Whether what is sent to a host stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _from_file(path: Path) -> Secret:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"token file '{path}'",
            expected="a readable text file",
            got=type(error).__name__,  # a decoding error quotes what it read
            fix="Check the path and its permissions.",
        ) from None
    return Secret(text.strip(), f"token file '{path}'")
