"""Who may change what is served: the holder of a token of its own.

Every client of the model holds the API key, and without one the whole of ``/v1`` is open. So
changing takes a second secret, and where none is configured the routes do not exist.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import secrets
from pathlib import Path

from starlette.requests import Request

from enchtable_vllm import envs
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.serving.swap.errors import SwapError

HEADER = "X-Enchtable-Admin-Token"
_LEAST_CHARACTERS = 16

# What `compat.logger` gives, without importing vLLM.
_log = logging.getLogger("vllm.enchtable.http")


class AdminToken:
    """The configured token; read again from its file for each request, so that it can be rotated.

    Args:
        value: The token itself.
        path: The file that holds it.
    """

    def __init__(self, value: str | None, path: Path | None) -> None:
        self._value = value
        self._path = path
        self._warned = False
        self._read()

    @classmethod
    def configured(cls) -> AdminToken | None:
        """From the environment; None where neither variable is set.

        Raises:
            ConfigError: It cannot be read, or is too short to be a secret.
        """
        value, path = envs.admin_token(), envs.admin_token_file()
        return cls(value, path) if value is not None or path is not None else None

    def check(self, request: Request) -> None:
        """Refuse whoever does not know it.

        Raises:
            SwapError: The header is missing or wrong.
        """
        sent = request.headers.get(HEADER)
        if sent is None:
            raise SwapError(
                "admin_token_missing",
                f"header '{HEADER}': expected the admin token, got none",
                "The API key alone may not change what is served.",
            )
        self._warn_of_plain_http(request)
        try:
            token = self._read()
        except ConfigError as error:
            raise SwapError("not_ready", str(error), error.fix) from error
        if not secrets.compare_digest(_hashed(sent), _hashed(token)):
            raise SwapError(
                "admin_token_wrong",
                f"header '{HEADER}': expected the admin token, got another",
                "See ENCHTABLE_ADMIN_TOKEN or ENCHTABLE_ADMIN_TOKEN_FILE of the server.",
            )

    def _read(self) -> str:
        token, where = self._value, "ENCHTABLE_ADMIN_TOKEN"
        if token is None:
            assert self._path is not None
            where = f"ENCHTABLE_ADMIN_TOKEN_FILE '{self._path}'"
            try:
                token = self._path.read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise ConfigError(
                    where, expected="a readable file", got=error, fix="Check path and permissions."
                ) from error
        if len(token) < _LEAST_CHARACTERS:
            raise ConfigError(
                where,
                expected=f"at least {_LEAST_CHARACTERS} characters",
                got=len(token),
                fix="Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
        return token

    def _warn_of_plain_http(self, request: Request) -> None:
        host = request.client.host if request.client else ""
        if self._warned or request.url.scheme == "https" or _is_loopback(host):
            return
        self._warned = True
        _log.warning(
            "the admin token came over plain http from '%s': whoever is in between can read it. "
            "Use TLS, here (--ssl-certfile) or in front of this server.",
            host,
        )


def _hashed(text: str) -> bytes:
    """Of one length, whatever the text's."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
