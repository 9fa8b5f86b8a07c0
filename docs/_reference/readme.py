"""Parts of the README that are pages of the site too; its links are put right."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent.parent / "README.md"


def first_screen() -> str:
    """From the title to the first heading."""
    text = README.read_text()
    return _placed(text[: text.index("\n## ") + 1])


def limits() -> str:
    """What is supported, what is refused, and what is not done."""
    return "\n".join(_placed(_section(title)) for title in ("Supported, and refused", "Limits"))


def _section(title: str) -> str:
    found = re.search(rf"^## {title}\n.*?(?=\n## |\nApache-2.0)", README.read_text(), re.M | re.S)
    assert found, f"README.md has no section '{title}'"
    return re.sub(r"<!--.*?-->\n", "", found[0].rstrip() + "\n")


def _placed(text: str) -> str:
    """Links of the repository's root, as a page in docs/ has them."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((?=kernels/|deploy/|benchmarks/|CONTRIBUTING)", "](../", text)
    return text.rstrip() + "\n"
