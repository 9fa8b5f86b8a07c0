"""What an answer says of the weights that it was computed with."""

import asyncio

import pytest

from enchtable_vllm.serving.http.version_header import VersionHeader, note


def answered(noted, *, stream):
    """What is sent, by an app that notes these completions' versions while it answers."""
    kind = b"text/event-stream" if stream else b"application/json"

    async def app(_, __, send):
        if stream:
            await send({"type": "http.response.start", "headers": [(b"content-type", kind)]})
        for completion, version in noted:
            note(completion, version)
        if not stream:
            await send({"type": "http.response.start", "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"x\n\n"})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions"}
    asyncio.run(VersionHeader(app)(scope, None, send))
    start, *body = sent
    told = dict(start["headers"]).get(b"x-enchtable-version")
    return told, b"".join(message["body"] for message in body)


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        ([("a", "sv-a:1")], b"sv-a:1"),
        ([("a", "sv-a:1"), ("a", "sv-b:2")], b"sv-b:2"),  # kept over a swap: where it ended
        ([("a", "sv-a:1"), ("b", "sv-a:1")], b"sv-a:1"),
        ([("a", "sv-a:1"), ("b", "sv-b:2")], b"sv-a:1, sv-b:2"),
        ([("a", "\u6f22:1")], b"?:1"),
        ([], None),
    ],
)
def test_every_version_that_a_completion_ended_with_is_told_once(noted, told):
    assert answered(noted, stream=False) == (told, b"x\n\n")
    comment = b"" if told is None else b": enchtable-version " + told + b"\n\n"
    assert answered(noted, stream=True) == (None, b"x\n\n" + comment)
