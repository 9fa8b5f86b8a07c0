"""The report's page in a real browser: screens, print, keyboard, screen reader, colours."""

import base64
import re
from itertools import pairwise

import numpy as np
import pytest
from axe_core_python.base import AXE_SCRIPT
from browser import chromium
from plans import dense, digest, make_plan
from reports import HOSTILE
from screenshots import WIDTHS, draw, pose
from selenium.webdriver import ActionChains, Keys

from enchtable_vllm.plan import resolve_plan
from enchtable_vllm.report import collect, report_page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A 70B-shaped plan that warns, with names that try everything."""
    plan = make_plan(
        [*dense(80), f"model.layers.3.{HOSTILE}.weight"], kept={HOSTILE: HOSTILE},
        unused={"lm_head.weight": "tied"}, strength=1.0, task="a" * 300, vector=HOSTILE,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(collect(resolve_plan(plan, digest()))))
    return path


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


def luminance(colour):
    """Relative, as WCAG defines it, of ``rgb(…)``."""
    linear = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    )  # fmt: skip
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


#: Of each element that shows words of its own: the words, their colour, what is behind them.
COLOURS = """
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const paint = getComputedStyle(e).backgroundColor;
    if (paint !== "rgba(0, 0, 0, 0)") return paint;
  }
};
const words = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
return [...document.body.querySelectorAll("*")]
  .filter((e) => words(e) && e.checkVisibility() && !e.closest("title"))
  .map((e) => {
    const style = getComputedStyle(e);
    return [e.textContent.slice(0, 40), e.closest("svg") ? style.fill : style.color, behind(e)];
  });
"""


@pytest.mark.parametrize("width", [1100, 390])
def test_it_is_quiet_and_fits(browser, page, scheme, width):
    browser.show(page, width=width, dark=scheme == "dark")
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    sizes = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert browser.execute_script(sizes) == [width, width]


def test_the_policy_is_in_force(browser, page):
    """Nothing gets in or out, even if a name became markup."""
    browser.show(page)
    browser.execute_script(
        "const image = document.createElement('img'); image.src = 'http://192.0.2.1/x.png';"
        "document.body.append(image); const script = document.createElement('script');"
        "script.textContent = 'window.ran = true'; document.body.append(script)"
    )
    assert browser.execute_script("return window.ran") is None
    assert "http://192.0.2.1/x.png" not in browser.requests()
    complaints = " ".join(browser.complaints())
    assert "img-src" in complaints
    assert "script-src" in complaints


def test_all_words_can_be_read(browser, page, scheme):
    """WCAG AA, 4.5 to 1, computed from what the browser paints."""
    browser.show(page, dark=scheme == "dark")
    browser.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    found = browser.execute_script(COLOURS)
    assert len(found) > 3000
    poor = {(w, a, b): contrast(a, b) for w, a, b in found if contrast(a, b) < 4.5}
    assert not poor
    paper = luminance(
        browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    )
    assert paper < 0.05 if scheme == "dark" else paper > 0.95


def test_stronger_is_higher_on_dark_and_on_light(browser, page, scheme):
    """The scale's steps stand apart, and away from the paper."""
    browser.show(page, dark=scheme == "dark")
    paint = (
        "return [...Array(8).keys()].map((n) => "
        "getComputedStyle(document.querySelector('.q' + n)).fill)"
    )
    scale = [luminance(colour) for colour in browser.execute_script(paint)]
    assert scale == sorted(scale, reverse=scheme == "light")
    for one, other in pairwise(scale):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 1.15


def test_by_keyboard(browser, page):
    """Tab stops at each heat map once; arrows move over its cells, and what they say is said."""
    browser.show(page)
    focused = "return document.activeElement.getAttribute('aria-label')"
    seen = []
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        name = browser.execute_script(focused)
        seen.append(browser.execute_script("return document.activeElement.tagName"))
        if name and name.startswith("Attenuation, 8 modules by 80 layers"):
            break
    else:
        pytest.fail(f"no tab stop on the heat map: {seen}")
    assert seen[:8] == ["A"] * 8
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"
    said = "return document.activeElement.nextElementSibling.textContent"
    assert browser.execute_script(said).startswith("layer 3, </script>")  # alone in its row
    for key, words in (
        (Keys.ARROW_RIGHT, r"layer 3, </script>.*"),
        (Keys.ARROW_DOWN, r"layer 3, mlp\.down_proj: [01]\.\d+"),
        (Keys.ARROW_RIGHT, r"layer 4, mlp\.down_proj: .*"),
        (Keys.ARROW_UP, r"layer 4, mlp\.down_proj: .*"),
        (Keys.ARROW_DOWN, r"layer 4, mlp\.gate_proj: .*"),
        (Keys.ARROW_LEFT, r"layer 3, mlp\.gate_proj: .*"),
    ):
        ActionChains(browser).send_keys(key).perform()
        assert re.fullmatch(words, browser.execute_script(said)), key
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.tagName") == "SUMMARY"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.execute_script("return document.activeElement.parentElement.open")


@pytest.mark.parametrize(
    "keys",
    [(Keys.ENTER, Keys.SPACE), (Keys.SPACE, Keys.ENTER), None],
    ids=["enter, space", "space, enter", "pointer"],
)
def test_tables_are_sorted_by_their_columns_names(browser, page, keys):
    """By the pointer, and by the keys that press whatever Tab has come to."""
    browser.show(page)
    table = "[...document.querySelectorAll('#matrices + .scroll tr')]"
    column = f"return {table}.slice(1).map((row) => parseFloat(row.cells[2].textContent))"
    button = f"{table}[0].cells[2].querySelector('button')"
    assert len(browser.execute_script(column)) == 60
    browser.execute_script(f"{table}[0].cells[1].querySelector('button').focus()")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script(f"return document.activeElement === {button}")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"
    for press, order in enumerate(("ascending", "descending")):
        if keys is None:
            browser.execute_script(f"return {button}").click()
        else:
            ActionChains(browser).send_keys(keys[press]).perform()
        values = browser.execute_script(column)
        assert values == sorted(values, reverse=order == "descending")
        assert browser.execute_script(f"return {table}[0].cells[2].ariaSort") == order
        assert browser.execute_script(f"return document.activeElement === {button}")


def test_what_a_screen_reader_is_told(browser, page):
    """Pictures and frames have names, tables have heads, and there is a way from part to part."""
    browser.show(page)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    found = browser.accessible()
    roles = {role for role, _ in found}
    assert {"main", "navigation", "heading", "table", "columnheader", "rowheader"} <= roles
    for role in ("image", "application", "link", "button", "columnheader", "rowheader"):
        assert [name for kind, name in found if kind == role], role
        assert all(name for kind, name in found if kind == role), role
    (warnings,) = [name for role, name in found if role == "region"]
    assert re.fullmatch(r"\d warnings?", warnings)
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((h) => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "how", [how if how == "light" else pytest.param(how, marks=pytest.mark.slow) for how in WIDTHS]
)
def test_axe_finds_nothing(browser, page, how):
    """Axe's rules for WCAG 2.1, A and AA, and its best practices, with all tables open."""
    pose(browser, page, how)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    browser.execute_script(AXE_SCRIPT)
    found = browser.execute_async_script("axe.run().then(arguments[0])")
    faults = {each["id"]: (each["help"], each["nodes"][0]["html"]) for each in found["violations"]}
    assert not faults
    assert len(found["passes"]) > 30
    # What lies behind a picture's words it cannot tell; `test_all_words_can_be_read` can.
    assert {each["id"] for each in found["incomplete"]} <= {"color-contrast"}
    assert all("<text" in n["html"] for each in found["incomplete"] for n in each["nodes"])


def test_whole_without_its_script(browser, page):
    """Everything is there before the script runs; it only adds ways to move in it."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.show(page)
        cells = browser.find_elements("css selector", "[data-row]")
        assert len(cells) == 4 * (560 + 1)
        tables = browser.find_elements("css selector", "details table")
        assert len(tables) >= 9
        assert browser.find_elements("css selector", "output, th button") == []
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_printed_it_is_dark_on_white_whatever_the_screen_is(browser, page):
    browser.show(page, dark=True)
    browser.prefer("dark", "print")
    found = browser.execute_script(COLOURS)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert luminance(paper) == pytest.approx(1.0)
    assert min(contrast(words, behind) for _, words, behind in found) >= 4.5
    hidden = "return getComputedStyle(document.querySelector('nav')).display"
    assert browser.execute_script(hidden) == "none"
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.7})
    pages = base64.b64decode(printed["data"]).count(b"/Type /Page\n")
    assert 2 <= pages <= 12


#: Where everything is, in pixels of the whole page: left, top, right, bottom, and what it is.
PLACES = """
const box = (e, what) => {
  const b = e.getBoundingClientRect();
  return [b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY, what];
};
const all = (selector, what, within = document) => [...within.querySelectorAll(selector)]
  .filter((e) => e.checkVisibility()).map((e) => box(e, what(e)));
const name = (e) => e.tagName + " " + e.textContent.slice(0, 50);
return {
  sections: all("h2", (e) => e.id),
  blocks: all("main > *", name),
  parts: all("figure > *", name),
  figures: all("figure", name),
  charts: all("svg", (e) => e.ariaLabel),
  words: [...document.querySelectorAll("svg")].map((svg) => all("text", name, svg)),
  painted: all("svg rect:not(.none)", (e) => getComputedStyle(e).fill),
  all: all("main *:not(svg *):not(title)", name),
};
"""


def overlaps(boxes):
    """Pairs that share more than a pixel each way."""
    a = np.array([box[:4] for box in boxes])
    low, high = np.maximum(a[:, None, :2], a[:, :2]), np.minimum(a[:, None, 2:], a[:, 2:])
    found = np.argwhere(np.triu(((high - low) > 1).all(axis=2), k=1))
    return [(boxes[i][4], boxes[j][4]) for i, j in found]


@pytest.mark.parametrize(
    ("how", "opened"),
    [*((how, False) for how in WIDTHS), ("light", True), ("print", True)],
    ids=lambda value: value if isinstance(value, str) else ("closed", "open")[value],
)
def test_everything_is_drawn_in_its_place(browser, page, tmp_path, how, opened):
    """By its picture: charts hold what they should, in its colours; nothing covers anything."""
    pose(browser, page, how)
    browser.execute_script(
        f"document.querySelectorAll('details').forEach((d) => d.open = {opened:d})"
    )
    found = browser.execute_script(PLACES)
    pixels = np.asarray(draw(browser, tmp_path / f"{how}.png"))
    assert pixels.shape[1] == WIDTHS[how]
    paper = pixels[2, 2]
    ink = (np.abs(pixels.astype(int) - paper) > 24).any(axis=2)

    def inked(box):
        left, top, right, bottom = (round(edge) for edge in box[:4])
        return ink[top:bottom, max(left, 0) : right].mean()

    tops = [box[1] for box in found["sections"]] + [len(pixels)]
    for (*_, name), (top, below) in zip(found["sections"], pairwise(tops), strict=True):
        assert inked((0, top + 40, WIDTHS[how], below)) > 0.005, name
    assert len(found["charts"]) == 4 + 4 + 1 + 1  # heat maps, histograms, by module, by layer
    for chart in found["charts"]:
        assert inked(chart) > 0.05, chart

    def shows(box, colour):
        """Somewhere across its middle: a stroke for a median may cover one spot."""
        wanted = [int(part) for part in re.findall(r"\d+", colour)]
        left, top, right, bottom = box
        across = [int(left + share * (right - left)) for share in (0.2, 0.5, 0.8)]
        return any(pixels[int((top + bottom) / 2), x].tolist() == wanted for x in across)

    wrong = [
        (place, colour)
        for *place, colour in found["painted"]
        if place[2] < WIDTHS[how] and place[3] - place[1] > 3
        if not shows(place, colour)
    ]
    assert not wrong[:5]
    for kind in ("blocks", "parts", "figures"):
        assert not overlaps(found[kind])[:5], kind
    for words in found["words"]:
        assert not overlaps(words)[:5]
    inner = found["all"] if how == "print" else found["blocks"] + found["figures"]
    assert not [box for box in inner if box[2] > WIDTHS[how] + 0.5 or box[0] < 0][:5]
