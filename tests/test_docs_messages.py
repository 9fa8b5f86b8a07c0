"""docs/troubleshooting.md: every message that it explains is one that the code can print."""

import ast
import re

import pytest
from docs_text import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^```text\n(.*)\n```", PAGE, re.MULTILINE)
#: What differs from case to case.
ANY = ".+"
#: A template with fewer characters of its own would fit too much.
LEAST = 20


def pattern(node):
    """What the text of an expression looks like, as a regular expression."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sd]|%\\\.\d[a-z]|%g", ANY, re.escape(text))
        case ast.JoinedStr(values=parts):
            return "".join(map(pattern, parts))
        case ast.IfExp(body=one, orelse=other):
            return f"(?:{pattern(one)}|{pattern(other)})"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return pattern(left) + pattern(right)
    return ANY


def own(text):
    """How many characters of a pattern are its own."""
    return len(text.replace(ANY, "").replace("\\", ""))


def said():
    """Patterns of errors, with their class, and of all other texts."""
    for path in (ROOT / "enchtable_vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                words = {keyword.arg: pattern(keyword.value) for keyword in node.keywords}
                if {"expected", "got", "fix"} <= words.keys() and (
                    own(words["expected"] + words["fix"]) >= LEAST
                ):
                    kind = ast.unparse(node.func)
                    yield "{}: {}: expected {expected}, got {got}\\. {fix}".format(
                        kind, pattern(node.args[0]), **words
                    )
            elif isinstance(node, ast.Constant | ast.JoinedStr):
                text = pattern(node)
                if own(text) >= LEAST:
                    yield text


SAID = [re.compile(text) for text in said()]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m[:60])
def test_a_message_is_one_of_the_codes(message):
    assert any(known.fullmatch(message) for known in SAID)


def test_other_messages_are_not():
    message = next(m for m in MESSAGES if m.startswith("MismatchError"))
    for wrong in (
        message.replace("MismatchError", "ConfigError"),
        message.replace("expected the", "wanted the"),
        message + " Or so.",
    ):
        assert not any(known.fullmatch(wrong) for known in SAID)


def test_every_block_is_one_line():
    assert len(MESSAGES) == PAGE.count("```text")
