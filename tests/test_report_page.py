"""The report's page as text: what names cannot do, its policy, its size, its charts."""

import re

import pytest
from plans import dense, make_plan, mixture
from reports import HOSTILE, Page, facts

from enchtable_vllm.report import report_page
from enchtable_vllm.report.charts import number, span
from enchtable_vllm.report.heatmap import MOST_CELLS, heat_map, layout


def test_names_from_files_cannot_do_anything():
    """Into every place that a file's text can reach."""
    plan = make_plan(
        [f"model.layers.0.{HOSTILE}.weight", HOSTILE, f"{HOSTILE}.layers.1.q.weight"],
        kept={HOSTILE + "k": HOSTILE}, unused={HOSTILE + "u": HOSTILE},
        task=HOSTILE, base=HOSTILE, vector=HOSTILE,
    )  # fmt: skip
    text = report_page(facts(plan))
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags
    assert (tags.count("script"), tags.count("style"), tags.count("h1")) == (1, 1, 1)
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert not set("\u202e\u2066\u0007") & set(text)
    assert page.text.count("\\u202e") > 10  # spelled out, not lost
    assert len(re.findall(r"<bdi>[^<]*\u05d0", text)) > 5  # kept, and kept apart
    assert "onerror=alert(1)&gt;" in text


def test_a_policy_forbids_everything_but_what_is_inside():
    text = report_page(facts(make_plan(dense(2))))
    policy = re.search(r'Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"\b(src|href)=\"(?!#|data:)", text)
    assert "url(" not in text
    assert " style=" not in text  # which the policy would not apply
    page = Page(text)
    assert page.links == {f"#{anchor}" for anchor in page.ids if f"#{anchor}" in page.links}
    assert len(page.links) == 8


@pytest.mark.parametrize(
    ("plan", "least"),
    [
        (make_plan(dense(80)), 560),
        (make_plan(mixture(94, experts=24)), 94 * 8),
        (make_plan(dense(32, ("experts.up", "experts.down")), stack=128), 64),
    ],
    ids=["70B", "experts", "stacks"],
)
def test_large_plans_stay_usable(plan, least):
    found = facts(plan)
    text = report_page(found)
    assert len(text.encode()) < 2_000_000
    assert text.count("data-row") >= 4 * least  # each measure of each cell
    assert not layout(found.grid).left_out
    assert "not drawn" not in text


def test_what_has_no_room_is_said():
    names = [f"stack{n % 5}.{n}.module{n % 97}.weight" for n in range(4000)]
    found = facts(make_plan(names))
    grid = layout(found.grid)
    assert len(grid.cells) <= MOST_CELLS
    assert grid.left_out == 4000 - len(grid.cells) > 0
    text = report_page(found)
    assert f"{grid.left_out:,} further cells are not drawn" in text
    assert text.count("The first 128 of 800 are shown.") == 5  # layers, of each stack
    assert "The first 60 of 97 are shown." in text
    assert len(text.encode()) < 2_000_000


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.25, "0.100 to 0.250"),
        (0.99981, 1.0, "0.9998 to 1"),
        (0.5, 0.5, "0.500 to 0.500"),
        (0.00012, 1234.5, "0.00012 to 1.23e+03"),
    ],
)
def test_two_numbers_are_told_apart(low, high, words):
    assert span(low, high) == words


def test_colours_show_differences_and_no_noise():
    """From least to most over all steps; over one where the values are nearly the same."""
    plan = make_plan(dense(20))
    grid = layout(facts(plan).grid)
    drawn = heat_map(grid, "interference", "Interference", "")
    medians = {key: cell.interference.median for key, cell in grid.cells.items()}
    for extreme, step in ((min, "q0"), (max, "q7")):
        module, layer = extreme(medians, key=medians.get)
        says = f"layer {layer}, {module}: {number(medians[module, layer])}"
        assert re.search(rf'class="{step}"[^>]*><title>{re.escape(says)}<', drawn)
    shares = plan.tensors | {
        name: tensor.model_copy(update={"retained_share": 0.999 + n % 2 / 1000})
        for n, (name, tensor) in enumerate(plan.merged.items())
    }
    grid = layout(facts(plan.model_copy(update={"tensors": shares})).grid)
    drawn = heat_map(grid, "retained_share", "Retained share", "")
    assert set(re.findall(r'class="(q\d)"', drawn)) == {"q0"}
    assert "nearly the same" in drawn


def test_the_same_plan_gives_the_same_page():
    assert report_page(facts(make_plan(dense(2)))) == report_page(facts(make_plan(dense(2))))


def test_a_plan_without_layers_or_shares_has_a_page():
    found = facts(make_plan(["head.weight"], retained=False))
    text = report_page(found)
    assert "No tensor that is merged belongs to a layer." in text
    assert found.to_json()["grid"][0]["retained_share"] is None
