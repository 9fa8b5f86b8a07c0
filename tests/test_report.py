"""`enchtable report`: the facts, what they warn of, the page's text, and the command."""

import json
import re
from html.parser import HTMLParser

import pytest
from plans import ATTENTION, dense, digest, make_plan, mixture
from replies import Replies, status
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.checkpoint import locate
from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.report import collect, report_page
from enchtable_vllm.report.cells import place
from enchtable_vllm.report.charts import number, span
from enchtable_vllm.report.heatmap import MOST_CELLS, heat_map, layout
from enchtable_vllm.report.merged import Merged
from enchtable_vllm.vector import SafetyVector

#: Ends a script, a style, an attribute, a line; turns the writing direction; rings.
HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&\n\u202e\u2066\u0007\u05d0"


def facts(plan, **given):
    return collect(resolve_plan(plan, digest(9)), **given)


def report(*arguments, code=0):
    """(standard output, standard error)."""
    done = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    if code != 1:  # a refusal is an exception until `main` prints it
        assert done.exit_code == code, done.output
        return done.stdout, done.stderr
    return done.exception


class Page(HTMLParser):
    """What a browser would make of it: elements, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if tag == "a" else set()

    def handle_data(self, data):
        self.text += data


def test_a_real_plan_to_the_last_digit(family):
    """Every number is the plan's own."""
    plan, plan_digest = read_plan(family.plan)
    found = collect(resolve_plan(plan, plan_digest), vector=SafetyVector.open(family.vector))
    assert found.norms.norm_scale == plan.norm_scale
    assert found.norms.safety == pytest.approx(plan.safety_norm)
    assert len(found.grid) == len(found.matrices) == len(plan.merged) == 8
    for cell in found.grid:
        tensor = plan.tensors[f"{cell.stack}.{cell.layer}.{cell.module}.weight"]
        assert cell.interference.median == pytest.approx(tensor.interference[0])
        assert cell.attenuation.low == pytest.approx(tensor.attenuation[0])
        assert cell.coefficient.high == tensor.coefficient[0]
        assert cell.retained_share.median == tensor.retained_share
        assert cell.change_norm == pytest.approx(tensor.coefficient[0] * tensor.safety_norm)
    assert {f.what: len(f.names) for f in found.fates} == {"merged": 8, "kept": 13}
    roles = [link.role for link in found.origin]
    assert roles == [
        "base model", "task model", "aligned model", "surrogate", "safety vector", "merge plan"
    ]  # fmt: skip
    assert found.origin[-1].digest == plan_digest
    assert found.rungs == dict.fromkeys(found.rungs, 16)


def test_another_beta_and_scope_are_those_that_would_be_served():
    plan = make_plan(dense(4))
    resolved = resolve_plan(plan, digest(), beta=1.0, scope="attention")
    found = collect(resolved)
    assert len(found.matrices) == 4 * len(ATTENTION)
    for matrix in found.matrices:
        assert matrix.coefficient == resolved.coefficients[matrix.name][0]
        assert matrix.coefficient == pytest.approx(found.norms.norm_scale * matrix.attenuation)
        assert matrix.interference > plan.tensors[matrix.name].interference[0]
    assert found.expected_retained_share is None  # nobody has computed it
    assert "retained_share" not in found.overall
    assert "made for beta 0.5" in found.origin[-1].about
    assert "outside scope 'attention'" in {fate.why for fate in found.fates}


def test_experts_share_a_cell():
    for plan, matrices in (
        (make_plan(mixture(3, experts=5)), 3 * (4 + 1 + 15)),
        (make_plan(dense(3, ("mlp.experts.gate_up",)), stack=7), 21),
    ):
        found = facts(plan)
        assert len(found.matrices) == matrices == sum(cell.matrices for cell in found.grid)
        assert len(found.grid) in (3 * (4 + 1 + 3), 3)
        for cell in found.grid:
            own = [m.attenuation for m in found.matrices if place(m.name)[1:] ==
                   (cell.module, cell.layer)]  # fmt: skip
            assert (cell.attenuation.low, cell.attenuation.high) == (min(own), max(own))
    assert [m.expert for m in found.matrices[:7]] == list(range(7))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("model.layers", "self_attn.q_proj", 3)),
        ("model.layers.3.mlp.experts.7.up.weight", ("model.layers", "mlp.experts.up", 3)),
        ("transformer.h.11.attn.c_attn.bias", ("transformer.h", "attn.c_attn.bias", 11)),
        ("decoder.layers.0.fc1.weight", ("decoder.layers", "fc1", 0)),
        ("lm_head.weight", ("", "lm_head", -1)),
        ("model.layers.12345678901234567890.q.weight", ("", None, -1)),
    ],
)
def test_where_a_tensor_belongs(name, expected):
    stack, module, layer = place(name)
    assert (stack, layer) == (expected[0], expected[2])
    assert module == (expected[1] or name.removesuffix(".weight"))


def test_warnings_say_what_is_wrong():
    assert facts(make_plan(dense(4))).warnings == ()
    (warning,) = facts(make_plan(dense(4), strength=5.0)).warnings
    assert "interference takes away" in warning
    assert "smaller beta" in warning
    (weak,) = facts(make_plan(dense(20), strength=1.0)).warnings
    least = min(facts(make_plan(dense(20), strength=1.0)).matrices, key=lambda m: m.attenuation)
    assert f"'{least.name}', which keeps {least.attenuation:.1%}" in weak
    plan = make_plan(dense(2))
    name = next(iter(plan.merged))
    poor = plan.tensors | {name: plan.tensors[name].model_copy(update={"retained_share": 0.1})}
    (lost,) = facts(plan.model_copy(update={"tensors": poor})).warnings
    assert "1 of 14 tensors are expected to lose more than half" in lost


def merged_of(family, tmp_path, **changes):
    plan, plan_digest = read_plan(family.plan)
    resolved = resolve_plan(plan, plan_digest)
    vector = SafetyVector.open(family.vector)
    made = merge_checkpoint(locate(family.task), vector, resolved, tmp_path / "out").to_json()
    path = tmp_path / "merge.json"
    path.write_text(json.dumps(made | changes))
    return path, made


def test_a_merge_report_is_read_back_and_must_be_this_plans(family, tmp_path):
    path, made = merged_of(family, tmp_path)
    merged = Merged.read(path)
    assert (merged.merged, merged.merged_digest) == (8, made["merged_digest"])
    resolved = resolve_plan(*read_plan(family.plan))
    found = collect(resolved, merged=merged)
    assert found.warnings == ()
    assert found.origin[-1].digest == made["merged_digest"]
    low = merged.model_copy(update={"retained_share": 0.5})
    assert "another dtype" in collect(resolved, merged=low).warnings[0]
    with pytest.raises(MismatchError, match="merge report: expected a merge by this plan"):
        collect(resolve_plan(*read_plan(family.plan), beta=0.7), merged=merged)
    with pytest.raises(MismatchError, match="Give that merge's plan"):
        facts(make_plan(dense(2)), merged=merged)
    with pytest.raises(MismatchError, match="the vector that the plan was made for"):
        facts(make_plan(dense(2)), vector=SafetyVector.open(family.vector))


@pytest.mark.parametrize(
    "damage", [{"retained_share": "0.9"}, {"merged": -1}, {"scope": "everything"}, {"beta": 1e999}]
)
def test_a_damaged_merge_report_is_refused(damage, family, tmp_path):
    path, _ = merged_of(family, tmp_path, **damage)
    with pytest.raises(MergePlanError, match="what 'enchtable merge --json' prints"):
        Merged.read(path)


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


def test_the_command_writes_the_page_and_prints_the_same_facts(family, tmp_path):
    merge, made = merged_of(family, tmp_path)
    page = tmp_path / "report.html"
    given = ("--plan", family.plan, "--safety-vector", family.vector, "--merge-report", merge)
    out, _ = report(*given, "-o", page)
    assert f"report written to {page}" in out.replace("\n", "")
    text = page.read_text()
    assert made["merged_digest"] in text
    assert "cosine" in text
    printed = json.loads(report(*given, "--json")[0])
    assert printed["warnings"] == []
    assert len(printed["grid"]) == 8
    assert printed["merged"]["merged_digest"] == made["merged_digest"]
    assert printed["served"] is None
    attenuations = [x for t in read_plan(family.plan)[0].merged.values() for x in t.attenuation]
    overall = printed["overall"]["attenuation"]
    assert (overall["low"], overall["high"]) == pytest.approx(
        (min(attenuations), max(attenuations))
    )
    assert list(tmp_path.glob(".*")) == []


def test_exit_codes_and_what_is_refused(family, tmp_path):
    assert "--output" in report("--plan", family.plan, code=2)[1]
    assert "http://" in report("--plan", family.plan, "--json", "--server", "here", code=2)[1]
    assert report("--plan", family.plan, "--json", "--beta", "-1", code=2)
    missing = report("--plan", tmp_path / "none.json", "-o", tmp_path / "page", code=1)
    assert "Make one with 'enchtable plan'" in str(missing)
    assert not (tmp_path / "page").exists()
    before = family.plan.read_bytes()
    for taken in (family.plan, family.vector / "page.html"):
        given = ("--plan", family.plan, "--safety-vector", family.vector, "-o", taken)
        assert "another place than the inputs'" in str(report(*given, code=1))
    assert family.plan.read_bytes() == before
    (tmp_path / "folder").mkdir()
    folder = report("--plan", family.plan, "-o", tmp_path / "folder", code=1)
    assert "the name of a file" in str(folder)


def served_by(plan, plan_digest, **changes):
    """The status of a server that serves this plan, as it should."""
    return status(
        {
            "safety_vector": plan.safety_vector.name,
            "vector_digest": plan.safety_vector.fingerprint,
            "plan_digest": plan_digest,
            "beta": plan.beta,
            "scope": plan.scope,
        }
        | changes.pop("active", {}),
        task_model={"id": "t", "fingerprint": plan.task_model.fingerprint},
        **changes,
    )


METRICS = """# HELP enchtable_beta The beta in force.
enchtable_beta 0.5
enchtable_plan_seconds NaN
enchtable_attenuation_ratio_bucket{le="+Inf",module="self_attn.q_proj"} 4.0
enchtable_attenuation_ratio_count{module="self_attn.q_proj"} 4.0
enchtable_attenuation_ratio_sum{module="self_attn.q_proj"} 3.0
vllm:num_requests_running 1.0
"""


@pytest.fixture
def server(family):
    plan, plan_digest = read_plan(family.plan)
    replies = Replies()

    def says(**changes):
        replies.on("GET", "/v1/enchtable/status", served_by(plan, plan_digest, **changes))

    replies.says = says
    says()
    replies.on("GET", "/metrics", METRICS)
    return replies


def test_a_server_that_serves_this_plan(server, family, tmp_path):
    with server.serve() as url:
        _, errors = report("--plan", family.plan, "--server", url, "-o", tmp_path / "r.html")
        printed = json.loads(report("--plan", family.plan, "--server", url, "--json")[0])
    assert "warning" not in errors
    assert printed["warnings"] == []
    assert printed["served"]["status"]["said_by_a_newer_server"] is True
    assert {"name": "enchtable_beta", "labels": {}, "value": 0.5} in printed["served"]["metrics"]
    text = Page((tmp_path / "r.html").read_text()).text
    assert "What the server says" in text
    assert "enchtable_attenuation_ratio (module self_attn.q_proj)40.750" in text  # how many, mean
    assert "plan_seconds" not in text  # it has no value


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"state": "failed", "ready": False, "reason": "rank 1"}, "generation is paused: rank 1"),
        ({"ready": False}, "it is not ready"),
        ({"disagreeing": 2}, "2 of its ranks serve something else"),
        ({"as_desired": False}, "a restart would serve something else"),
        ({"active": {"safety_vector": "@none"}}, "without any safety vector"),
        ({"active": {"vector_digest": "blake3:aa"}}, "another safety vector than the plan's"),
        ({"active": {"plan_digest": "blake3:aa"}}, "by another plan: blake3:aa"),
        ({"active": {"beta": 0.7}}, "Make it again with --beta 0.7"),
        ({"active": {"scope": "all"}}, "Make it again with --scope all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_server_that_does_not(changes, warning, server, family):
    server.says(**changes)
    with server.serve() as url:
        out, errors = report("--plan", family.plan, "--server", url, "--json")
    first = json.loads(out)["warnings"][0]
    assert first.startswith(f"the server {url}: ")
    assert warning in first
    assert warning in errors


def test_a_server_of_another_model_or_without_metrics(server, family, tmp_path):
    server.on("GET", "/v1/enchtable/status", status())
    server.on("GET", "/metrics", (404, "none"))
    page = tmp_path / "r.html"
    with server.serve() as url:
        _, errors = report("--plan", family.plan, "--server", url, "-o", page)
    assert "another task model" in errors
    assert "shows no metrics" in page.read_text()


def test_a_server_that_does_not_answer_is_refused_before_anything_is_written(family, tmp_path):
    replies = Replies()
    replies.on("GET", "/v1/enchtable/status", (404, {"detail": "Not Found"}))
    with replies.serve() as url:
        refused = report("--plan", family.plan, "--server", url, "-o", tmp_path / "r", code=1)
    assert "--load-format enchtable" in str(refused)
    assert list(tmp_path.iterdir()) == []
