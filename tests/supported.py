"""README's table of what is supported and refused, out of the tests that prove each of it.

    python tests/supported.py [--check]

A test says what it proves: ``@pytest.mark.supports("Qwen2 (biases)")``. This collects every
test, those that take minutes too, and writes their words between the two comments in README.md;
``--check`` only says whether they are there already.
"""

import re
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- made by 'make supported' out of the tests -->\n"
END = "<!-- end -->\n"


class Collector:
    """A pytest plugin: label → nothing, in the order of the tests, for each marker."""

    def __init__(self):
        self.labels = {"supports": {}, "refuses": {}}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for marker in item.iter_markers():
                if marker.name in self.labels:
                    self.labels[marker.name].setdefault(str(marker.args[0]))


def table():
    """The lines between the two comments."""
    collector = Collector()
    arguments = ["--collect-only", "-qq", "-m", "not gpu", str(Path(__file__).parent)]
    if pytest.main(arguments, plugins=[collector]) != pytest.ExitCode.OK:
        raise SystemExit("the tests cannot be collected")
    heads = {"supports": "supported, each proved by a test", "refuses": "refused, each by name"}
    rows = [
        f"| {heads[kind]} | {'; '.join(sorted(found, key=str.lower))} |\n"
        for kind, found in collector.labels.items()
    ]
    return "| | |\n| --- | --- |\n" + "".join(rows)


if __name__ == "__main__":
    made, text = table(), README.read_text()
    new = re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + made + END, text, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("README.md is not what the tests say: run 'make supported'")
    else:
        README.write_text(new)
