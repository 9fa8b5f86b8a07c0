"""Self-contained HTML: nothing fetched, every text escaped.

What is shown comes from servers, files and models: it must not be able to do anything on the
reader's machine, so the page forbids itself everything but its own style and script, each by
its digest, and pictures that it holds itself.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from enchtable_vllm.errors import printable

_LONGEST_LABEL = 72


class Html(str):
    """A text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Anything, as text; what would steer a reader's eye (control, bidi) is spelled out."""
    return value if isinstance(value, Html) else Html(escape(printable(value)))


def label(value: object, longest: int = _LONGEST_LABEL) -> Html:
    """A name from a file: apart from the direction of the words around it, shortened inside."""
    shown = printable(value)
    if len(shown) > longest:
        half = (longest - 1) // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    return Html(f"<bdi>{escape(shown)}</bdi>")


def page(title: str, parts: Iterable[Html], *, style: str = "", script: str = "") -> str:
    """A whole document.

    Args:
        title: Of the window and of the page.
        parts: What follows, in order.
        style: Further CSS, of the project's own.
        script: Of the project's own; the page must be whole without it.
    """
    style = (files(__package__) / "style.css").read_text(encoding="utf-8") + style
    sources = {
        "default-src": "'none'",
        "style-src": _digest(style),
        "script-src": _digest(script) if script else "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    policy = "; ".join(f"{kind} {source}" for kind, source in sources.items())
    body = "\n".join(parts)
    run = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for one
        f"<title>{text(title)}</title><style>{style}</style></head>\n"
        f"<body><main><h1>{text(title)}</h1>\n{body}\n</main>\n{run}</body></html>\n"
    )


def heading(title: str, anchor: str = "") -> Html:
    """Of a section; with an anchor, to be linked to."""
    mark = f' id="{anchor}"' if anchor else ""
    return Html(f"<h2{mark}>{text(title)}</h2>")


def paragraph(words: object, kind: str = "") -> Html:
    """Text; of the kind ``note`` or ``warning``, if any."""
    mark = f' class="{kind}"' if kind else ""
    return Html(f"<p{mark}>{text(words)}</p>")


def cell(main: object, small: object = "") -> Html:
    """A number, and in small what belongs to it."""
    more = f"<br><small>{text(small)}</small>" if small else ""
    return Html(f"{text(main)}{more}")


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str = "", kind: str = ""
) -> Html:
    """The first column names the row.

    Args:
        head: The columns' names; all empty where the rows say it all.
        rows: Texts, numbers or markup.
        caption: What it is, for whoever comes upon it alone.
        kind: Its class: ``sortable``, for a page whose script sorts.
    """
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in head) if any(head) else ""
    top = f"<thead><tr>{names}</tr></thead>" if names else ""
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td class="n">{text(value)}</td>' for value in others)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    mark = f' class="{kind}"' if kind else ""
    return Html(
        f'<div class="scroll"><table{mark}>{title}{top}<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _digest(content: str) -> str:
    """As a content security policy names what may be inline."""
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
