"""Which weights an answer ended with, told with the answer.

vLLM notes the version with each finished completion. It is known only then: a whole answer
carries it as a header; a stream, whose headers left long before, as a comment after its last
event, which readers of event streams skip. Where one answer has several completions, and a swap
came between their ends, it names each version once, in their order, with commas between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

HEADER = "X-Enchtable-Version"
_PATHS = ("/v1/chat/completions", "/v1/completions")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

#: Completion → version, one for each request: tasks that it starts hold the same one.
_seen: ContextVar[dict[str, str] | None] = ContextVar("enchtable_version", default=None)


def note(completion: str, version: str) -> None:
    """A completion of the request at hand has come this far with these weights."""
    seen = _seen.get()
    if seen is not None:
        seen[completion] = version


class VersionHeader:
    """ASGI middleware.

    Args:
        app: What answers.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and add the version."""
        if scope["type"] != "http" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        seen: dict[str, str] = {}
        _seen.set(seen)
        is_stream = False

        async def telling(message: dict[str, Any]) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                headers = dict(message.get("headers", ()))
                is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
                if seen and not is_stream:
                    version = (HEADER.lower().encode(), _latin(_told(seen)))
                    message = {**message, "headers": [*message.get("headers", ()), version]}
            elif is_stream and seen and not message.get("more_body", False):
                comment = b": enchtable-version " + _latin(_told(seen)) + b"\n\n"
                message = {**message, "body": message.get("body", b"") + comment}
            await send(message)

        await self._app(scope, receive, telling)


def _told(seen: dict[str, str]) -> str:
    """The versions that completions have ended with, each once."""
    return ", ".join(dict.fromkeys(seen.values()))


def _latin(version: str) -> bytes:
    """As a header may hold it: names of vectors come from folders."""
    return "".join(c if c.isprintable() else "?" for c in version).encode("latin-1", "replace")
