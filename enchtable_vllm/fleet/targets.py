"""Targets: one URL each, written out, read from a file, or resolved from a name.

A target is whatever answers at one URL: one server process, or several API servers and
data-parallel engines behind one port, which swap together.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet.credentials import is_loopback

#: Called with a host and a port: the addresses behind that name.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_NAMES = {"dns": "http", "dns+https": "https"}


@dataclass(frozen=True, order=True)
class Target:
    """One server.

    Attributes:
        url: Without a path's last slash; with a path only where a gateway wants one.
        server_name: What its certificate must be for, where the URL has an address instead.
    """

    url: str
    server_name: str | None = None

    @property
    def sends_openly(self) -> bool:
        """Whether a token sent there could be read on the way."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def read_targets(sources: Iterable[str]) -> list[str]:
    """The targets as they were named: URLs, names to resolve, and the lines of files.

    Args:
        sources: Each a URL, a ``dns://`` name, or a file with one of these on each line; there,
            blank lines and what follows a ``#`` are left out.

    Returns:
        In their order, each once.

    Raises:
        ConfigError: A file cannot be read, or something is no target.
    """
    named: list[str] = []
    for source in sources:
        named += [source] if "://" in source else _lines(Path(source))
    return list(dict.fromkeys(map(_canonical, named)))


async def resolve_targets(named: Iterable[str], resolver: Resolver | None = None) -> list[Target]:
    """One target for each URL, and for each address behind a ``dns://`` name.

    Args:
        named: What `read_targets` returned.
        resolver: Asks the system by default.

    Returns:
        Each once; those of one name sorted by address, so that every run has the same order.

    Raises:
        ConfigError: A name does not resolve.
    """
    targets: list[Target] = []
    for name in named:
        parts = urlsplit(name)
        if parts.scheme not in _NAMES:
            targets.append(Target(name))
            continue
        host, port = parts.hostname or "", parts.port or 0
        try:
            addresses = await (resolver or _ask_system)(host, port)
        except OSError as error:
            raise _unresolved(name, error) from error
        if not addresses:
            raise _unresolved(name, "no address")
        scheme = _NAMES[parts.scheme]
        server_name = host if scheme == "https" else None
        for address in sorted(map(ipaddress.ip_address, addresses), key=lambda a: (a.version, a)):
            shown = f"[{address}]" if address.version == 6 else f"{address}"
            targets.append(Target(f"{scheme}://{shown}:{port}", server_name))
    return list(dict.fromkeys(targets))


async def _ask_system(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"targets '{path}'",
            expected="a URL, or a text file with one on each line",
            got=error,
            fix="A URL begins with http://, https:// or dns://.",
        ) from error
    found = [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]
    if not found:
        raise ConfigError(
            f"targets '{path}'",
            expected="at least one URL",
            got="none",
            fix="Write one on each line.",
        )
    return found


def _canonical(name: str) -> str:
    """One spelling, so that no target is there twice."""
    parts = _split(name)
    if parts.scheme in _NAMES:
        if parts.port is None or parts.path.strip("/"):
            raise _no_target(name, "a host and a port, no path, after dns://")
        return f"{parts.scheme}://{parts.hostname}:{parts.port}"
    host = parts.hostname or ""
    shown = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port is not None else ""
    path = parts.path.rstrip("/").removesuffix("/v1")  # what OpenAI's clients call the base URL
    return f"{parts.scheme}://{shown}{port}{path}"


def _split(name: str) -> SplitResult:
    try:
        parts = urlsplit(name)
        _ = parts.port  # parsed on access
    except ValueError:
        raise _no_target(name, "a URL") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"target at '{parts.hostname}'",  # the rest is a secret
            expected="no user or password in a URL: command lines and journals are readable",
            got="one",
            fix="Take it out; tokens come from files or the environment.",
        )
    if parts.scheme not in ("http", "https", *_NAMES) or not parts.hostname:
        raise _no_target(name, "http://, https://, dns:// or dns+https:// and a host")
    if parts.query or parts.fragment or any(c.isspace() for c in name):
        raise _no_target(name, "no query, fragment or space")
    return parts


def _no_target(name: str, expected: str) -> ConfigError:
    return ConfigError(
        f"target '{name}'", expected=expected, got="something else", fix="Check its spelling."
    )


def _unresolved(name: str, got: object) -> ConfigError:
    return ConfigError(
        f"target '{name}'",
        expected="a name with at least one A or AAAA record",
        got=got,
        fix="Is the service headless (clusterIP: None), and does a pod of it run?",
    )
