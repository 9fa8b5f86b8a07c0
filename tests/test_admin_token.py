"""The token that a server wants before it changes what it serves."""

import logging

import pytest
from starlette.requests import Request

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.serving.http.admin import HEADER, AdminToken
from enchtable_vllm.serving.swap.errors import SwapError

TOKEN = "open-sesame-open-sesame"


def request(token=TOKEN, *, host="192.0.2.7", scheme="http"):
    headers = [] if token is None else [(HEADER.lower().encode(), token.encode())]
    scope = {"type": "http", "scheme": scheme, "headers": headers, "client": (host, 1)}
    return Request(scope | {"server": ("server", 80), "path": "/", "query_string": b""})


@pytest.fixture
def told(caplog, monkeypatch):
    """What the log was told; vLLM's loggers do not hand on to the root."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: caplog.text


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (None, "admin_token_missing"),
        ("", "admin_token_wrong"),
        (TOKEN[:-1], "admin_token_wrong"),
        (TOKEN + "é", "admin_token_wrong"),
    ],
)
def test_whoever_does_not_know_it_is_refused(sent, code, told):
    with pytest.raises(SwapError) as refused:
        AdminToken(TOKEN, None).check(request(sent, host="127.0.0.1"))
    assert refused.value.code == code
    assert TOKEN not in str(refused.value) + told()


def test_a_token_that_came_over_plain_http_from_another_machine_is_warned_of_once(told):
    token = AdminToken(TOKEN, None)
    token.check(request(host="127.0.0.1"))
    token.check(request(host="::1"))
    token.check(request(scheme="https"))
    with pytest.raises(SwapError):
        token.check(request(None))  # no token came
    assert told() == ""
    token.check(request())
    token.check(request())
    assert told().count("over plain http from '192.0.2.7'") == 1
    assert TOKEN not in told()


def test_a_token_in_a_file_may_be_rotated(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    token = AdminToken(None, path)
    token.check(request())
    path.write_text(TOKEN[::-1])
    with pytest.raises(SwapError):
        token.check(request())
    token.check(request(TOKEN[::-1]))
    path.unlink()
    with pytest.raises(SwapError) as refused:
        token.check(request(TOKEN[::-1]))
    assert refused.value.code == "not_ready"


@pytest.mark.parametrize("value", ["", "short", "x" * 15])
def test_what_is_no_secret_is_refused_at_start(value, tmp_path):
    with pytest.raises(ConfigError, match="at least 16 characters"):
        AdminToken(value, None)
    (tmp_path / "token").write_text(value)
    with pytest.raises(ConfigError, match="at least 16 characters"):
        AdminToken(None, tmp_path / "token")
