"""What the documentation says to type."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """The lines to type: of each fenced block without a language, continuation lines joined."""
    text = page.read_text()
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\n {4}", " ", block).splitlines()


def commands(page):
    """Each ``enchtable`` command, without that word: under another launcher too."""
    for line in blocks(page):
        found = re.match(r"(?:enchtable|accelerate launch .*-m enchtable_vllm\.cli) (.*)", line)
        if found:
            yield found[1]


def mentions(page):
    """Commands in running text, as far as they are given."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`enchtable ([a-z][^`]*)`", text)


def is_synopsis(command):
    """Whether brackets, bars or dots stand for something else."""
    return bool(re.search(r"[\[|]|\.\.\.", command))
