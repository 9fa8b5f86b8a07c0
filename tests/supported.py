"""README's table of what is supported and refused, out of the tests that prove each of it.

    python tests/supported.py [--check]

A test says what it proves: ``@pytest.mark.supports("Qwen2 (biases)")``. This collects every
test, those that take minutes too, and writes their words between the two comments in README.md;
what only such a test proves has a mark. ``--check`` only says whether they are there already.
"""

import re
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- made by 'make supported' out of the tests -->\n"
END = "<!-- end -->\n"
SLOW = "\\*"


class Collector:
    """A pytest plugin: label → whether `make test` proves it, for each marker."""

    def __init__(self):
        self.labels = {"supports": {}, "refuses": {}}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for marker in item.iter_markers():
                if marker.name in self.labels:
                    found, label = self.labels[marker.name], str(marker.args[0])
                    fast = item.get_closest_marker("slow") is None
                    found[label] = found.get(label, False) or fast


def table():
    """The lines between the two comments."""
    collector = Collector()
    arguments = ["--collect-only", "-qq", "-m", "not gpu", str(Path(__file__).parent)]
    if pytest.main(arguments, plugins=[collector]) != pytest.ExitCode.OK:
        raise SystemExit("the tests cannot be collected")
    return lines(collector.labels)


def lines(labels):
    """The table of the labels, and what the mark means where there is one."""
    heads = {"supports": "supported, each proved by a test", "refuses": "refused, each by name"}
    marked = {
        kind: [f"{label}{'' if found[label] else SLOW}" for label in sorted(found, key=str.lower)]
        for kind, found in labels.items()
    }
    rows = [f"| {heads[kind]} | {'; '.join(found)} |\n" for kind, found in marked.items()]
    made = "| | |\n| --- | --- |\n" + "".join(rows)
    if SLOW in made:
        made += f"\n{SLOW} by a test that takes minutes: `make test-slow`, not `make test`.\n"
    return made


if __name__ == "__main__":
    made, text = table(), README.read_text()
    new = re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + made + END, text, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("README.md is not what the tests say: run 'make supported'")
    else:
        README.write_text(new)
