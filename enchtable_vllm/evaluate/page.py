"""Self-contained HTML: no script, nothing fetched, every text escaped.

What is shown comes from servers, files and models: it must not be able to do anything on the
reader's machine, so the page forbids itself everything but its own style and pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1c2430; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid #dde2ea;
  vertical-align: top }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap }
td small { color: #5b6675; white-space: normal }
.note { color: #5b6675 } .warning { color: #8a4b00 }
.scroll { overflow-x: auto }
@media (prefers-color-scheme: dark) {
  body { color: #dfe5ee; background: #12161c } th, td { border-color: #2c3440 }
  td small, .note { color: #97a3b4 } .warning { color: #f0b35a }
}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """A text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Anything, as text."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def page(title: str, parts: Iterable[Html]) -> str:
    """A whole document."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def heading(title: str) -> Html:
    """Of a section."""
    return Html(f"<h2>{escape(title)}</h2>")


def paragraph(words: object, kind: str = "") -> Html:
    """Text; of the kind ``note`` or ``warning``, if any."""
    mark = f' class="{kind}"' if kind else ""
    return Html(f"<p{mark}>{text(words)}</p>")


def cell(main: object, small: object = "") -> Html:
    """A number, and in small what belongs to it."""
    more = f"<br><small>{text(small)}</small>" if small else ""
    return Html(f"{text(main)}{more}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """The first column names the row."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td class="n">{text(value)}</td>' for value in others)
        lines.append(f"<tr><td>{text(first)}</td>{cells}</tr>")
    return Html(
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )
