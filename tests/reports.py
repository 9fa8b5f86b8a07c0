"""What the tests of `enchtable report` share: facts, the command, and the page as it is read."""

import json
from html.parser import HTMLParser

from plans import digest
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.checkpoint import locate
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.report import collect
from enchtable_vllm.vector import SafetyVector

#: Ends a script, a style, an attribute, a line; turns the writing direction; rings.
HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&\n\u202e\u2066\u0007\u05d0"


def facts(plan, **given):
    return collect(resolve_plan(plan, digest(9)), **given)


def report(*arguments, code=0):
    """(standard output, standard error)."""
    done = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    if code != 1:  # a refusal is an exception until `main` prints it
        assert done.exit_code == code, done.output
        return done.stdout, done.stderr
    return done.exception


class Page(HTMLParser):
    """What a browser would make of it: elements, the text between them, each section's tables.

    ``tables``: by the section's anchor, each its caption and its rows, each the cells' texts.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], set(), set(), ""
        self.tables, self._into = {"": []}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if tag == "a" else set()
        section = list(self.tables.values())[-1]
        if tag == "h2":
            self.tables[found["id"]] = []
        elif tag == "table":
            section.append(["", []])
        elif tag == "tr":
            section[-1][1].append([])
        elif tag in ("th", "td"):
            section[-1][1][-1].append("")
        self._into = tag if tag in ("th", "td", "caption") else self._into

    def handle_endtag(self, tag):
        self._into = None if tag == self._into else self._into

    def handle_data(self, data):
        self.text += data
        if self._into == "caption":
            list(self.tables.values())[-1][-1][0] += data
        elif self._into:
            list(self.tables.values())[-1][-1][1][-1][-1] += data


def merged_of(family, tmp_path, **changes):
    plan, plan_digest = read_plan(family.plan)
    resolved = resolve_plan(plan, plan_digest)
    vector = SafetyVector.open(family.vector)
    made = merge_checkpoint(locate(family.task), vector, resolved, tmp_path / "out").to_json()
    path = tmp_path / "merge.json"
    path.write_text(json.dumps(made | changes))
    return path, made
