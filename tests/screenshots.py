"""Draws the pictures of docs/report.md: 'make screenshots'."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from browser import chromium
from PIL import Image
from plans import dense, digest, make_plan

from enchtable_vllm.plan import resolve_plan
from enchtable_vllm.report import collect, report_page

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH, HEIGHT = 1100, 1240


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
        for scheme in ("light", "dark"):
            browser.show(page, width=WIDTH, dark=scheme == "dark")
            drawn = Image.open(io.BytesIO(browser.picture(HEIGHT)))
            small = drawn.convert("RGB").quantize(96)
            small.save(IMAGES / f"report-{scheme}.png", optimize=True)


if __name__ == "__main__":
    main()
