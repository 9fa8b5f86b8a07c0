"""The site: 'make docs' builds these pages with Sphinx into site/."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

project = "enchtable-vllm"
release = version = installed("enchtable-vllm")

#: The pages, in the order of the menu. One that is not named here goes to the end, under 'More'.
MENU = {
    "Begin": ["quickstart", "concepts", "comparison", "limits"],
    "How to": [
        "distil",
        "vectors",
        "signing",
        "plan",
        "report",
        "tuning",
        "serve",
        "merge",
        "evaluate",
        "transfer",
        "fleet",
        "deploy",
        "runbook",
        "quantise",
        "doctor",
        "troubleshooting",
    ],
    "Reference": [
        "method",
        "formats",
        "configuration",
        "cli",
        "http-api",
        "metrics",
        "versions",
        "benchmarks",
        "scale",
    ],
}

extensions = ["myst_parser"]
exclude_patterns = ["_reference"]

# A link to a page, a heading or a file that is not there is a warning, and so fails the build.
nitpicky = True
myst_heading_anchors = 4
highlight_language = "none"
smartquotes = False  # it would make a dash of the two of an option

html_theme = "furo"
html_title = "enchtable-vllm"
html_copy_source = False
html_show_copyright = False  # LICENSE says it
html_show_sphinx = False
html_extra_path = ["openapi.json"]
html_static_path = ["_static"]
html_css_files = ["messages.css"]


def _add_menu(app: Any, page: str, source: list[str]) -> None:
    """The pages themselves stay plain Markdown: the menu is put below the first."""
    if page != "index":
        return
    named = {name for names in MENU.values() for name in names}
    others = sorted(app.env.found_docs - named - {"index"})
    for caption, names in (MENU | ({"More": others} if others else {})).items():
        options = f":hidden:\n:caption: {caption}\n\n"
        source[0] += f"\n```{{toctree}}\n{options}" + "\n".join(names) + "\n```\n"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_menu)
