"""Draws the pictures of docs/report.md: 'make screenshots'. The browser's tests draw alike."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from browser import Browser, chromium
from PIL import Image
from plans import dense, digest, make_plan

from enchtable_vllm.plan import resolve_plan
from enchtable_vllm.report import collect, report_page

IMAGES = Path(__file__).parent.parent / "docs" / "images"
#: How wide a page is shown; print: A4 between Chromium's own margins.
WIDTHS = {"light": 1100, "dark": 1100, "print": 718}
HEIGHT = 1240


def pose(browser: Browser, page: Path, how: str) -> None:
    """Open a page as a light or dark screen shows it, or as it is printed."""
    browser.show(page, width=WIDTHS[how], dark=how == "dark")
    if how == "print":
        browser.prefer("light", "print")


def draw(browser: Browser, path: Path, top: float = 0, height: float | None = None) -> Image.Image:
    """A PNG of the page as it stands, or of a part of it; a pixel for each of CSS."""
    image = Image.open(io.BytesIO(browser.picture(height, top))).convert("RGB")
    image.quantize(96).save(path, optimize=True)
    return image


def main() -> None:
    """A plan of invented numbers in the shape of a model of 70B parameters."""
    IMAGES.mkdir(exist_ok=True)
    plan = make_plan(
        dense(80),
        kept={f"model.layers.{n}.input_layernorm.weight": "not in the safety vector"
              for n in range(80)},
        strength=0.8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        page = Path(folder) / "report.html"
        page.write_text(report_page(collect(resolve_plan(plan, digest(9)))), encoding="utf-8")
        for how in ("light", "dark"):
            pose(browser, page, how)
            draw(browser, IMAGES / f"report-{how}.png", height=HEIGHT)
        for how, name, first, after in (
            ("light", "distributions", "spread", "matrices"),
            ("print", "print", "layers", "spread"),
        ):
            pose(browser, page, how)
            top, below = (
                browser.execute_script(f"return document.getElementById('{anchor}').offsetTop")
                for anchor in (first, after)
            )
            draw(browser, IMAGES / f"report-{name}.png", top - 12, below - top)


if __name__ == "__main__":
    main()
