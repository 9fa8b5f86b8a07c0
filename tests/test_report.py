"""`enchtable report`: the facts, what they warn of, a merge's report, and the command."""

import json

import pytest
from plans import ATTENTION, dense, digest, make_plan, mixture
from reports import facts, merged_of, report

from enchtable_vllm.errors import MergePlanError, MismatchError
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.report import collect
from enchtable_vllm.report.cells import place
from enchtable_vllm.report.printed import Merged
from enchtable_vllm.vector import SafetyVector


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
