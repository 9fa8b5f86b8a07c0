"""What the report's page shows, against numbers that are found in another way."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from plans import dense, make_plan
from reports import Page, facts
from safetensors.torch import load_file

from enchtable_vllm.checkpoint import Checkpoint, sampled_fingerprint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.report import collect, report_page
from enchtable_vllm.report.charts import histogram, number, ranges, span
from enchtable_vllm.vector import SafetyVector


def tiles(text):
    """Of the summary: name → value."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))


def test_refused_tensors_are_counted_and_named_with_their_reasons():
    tied, gone = "tied to the embeddings", "not in the task model"
    unused = {"lm_head.weight": tied, "model.layers.9.q.weight": gone, "model.norm.bias": gone}
    text = report_page(facts(make_plan(dense(2), unused=unused)))
    assert tiles(text)["refused tensors"] == "3"
    ((_, rows),) = Page(text).tables["tensors"]
    refused = {why: (names[0], names[1:]) for fate, names, why in rows if fate == "refused"}
    assert refused == {tied: ("1", "lm_head.weight"), gone: ("2", "model.layers.9.q.weight")}
    for why in (tied, gone):
        (listed,) = re.findall(rf"<summary>\d refused: {why}</summary>(.*?)</details>", text)
        names = re.findall(r"<bdi>(.*?)</bdi>", listed)
        assert names == [name for name, reason in unused.items() if reason == why]
    assert "refused tensors" not in tiles(report_page(facts(make_plan(dense(2)))))


#: What the bins and quartiles of charts are found for.
VALUES = {
    "many": [n * n % 97 / 4 for n in range(500)],
    "at the edges of bins": [0, 0, 1, 2, 2, 2, 3, 23, 24],
    "two": [0.25, 0.75],
    "one": [0.5],
    "alike": [0.1] * 7,
}


def bars(drawn):
    """Of a picture: what each bar says, its place across, its width and its height."""
    sizes = r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)" class="mark">'
    found = re.findall(sizes + "<title>(.*?)</title>", drawn)
    return [(says, *map(float, place)) for *place, says in found]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_histogram_holds_each_value_once_where_it_belongs(values):
    drawn = histogram(values, "Interference", "", "matrix", "matrices")
    if min(values) == max(values):  # one bar, which has no width
        counts, edges = [len(values)], [values[0]] * 2
    else:
        counts, edges = np.histogram(values, bins=24)
    ends = pairwise(edges)
    bins = [(span(*pair), int(n)) for pair, n in zip(ends, counts, strict=True) if n]
    ((caption, rows),) = Page(drawn).tables[""]
    assert rows == [["Interference", "matrices"], *([name, str(n)] for name, n in bins)]
    assert sum(int(count) for _, count in rows[1:]) == len(values)
    assert caption.endswith(f"median {number(float(np.median(values)))}")
    shown = bars(drawn)
    assert [says for says, *_ in shown] == [
        f"{name}: {n} {'matrix' if n == 1 else 'matrices'}" for name, n in bins
    ]
    unit = max(height for *_, height in shown) / max(counts)
    assert [height for *_, height in shown] == pytest.approx([n * unit for _, n in bins], abs=0.1)


def test_quartiles_are_those_of_the_values():
    """In the table, and where the bar of the middle half begins and ends."""
    drawn = ranges(list(VALUES.items()), "Attenuation", "")
    ((_, (_, *rows)),) = Page(drawn).tables[""]
    low, high = 0.0, max(map(max, VALUES.values()))
    boxes = {says.partition(":")[0]: (x, wide) for says, x, wide, _ in bars(drawn)}
    left = boxes["many"][0] - np.percentile(VALUES["many"], 25) / high * 380
    assert [name for name, *_ in rows] == list(VALUES)
    for name, count, *five in rows:
        quarters = np.percentile(VALUES[name], [0, 25, 50, 75, 100])
        assert int(count) == len(VALUES[name])
        assert five == [number(float(quarter)) for quarter in quarters], name
        begins, _, ends = (left + (quarters[1:4] - low) / (high - low) * 380).tolist()
        assert boxes[name] == pytest.approx((begins, max(ends - begins, 3.0)), abs=0.11)


def test_each_digest_of_the_provenance_stands_at_its_role(family):
    """On the page: as plan and vector say them, and as they are found of the models anew."""
    plan, plan_digest = read_plan(family.plan)
    vector = SafetyVector.open(family.vector)
    found = collect(resolve_plan(plan, plan_digest), vector=vector)
    expected = {
        "base model": (family.base, plan.base_model.fingerprint),
        "task model": (family.task, plan.task_model.fingerprint),
        "aligned model": (family.aligned, vector.manifest.aligned.fingerprint),
        "surrogate": (family.surrogate, vector.manifest.surrogate.fingerprint),
        "safety vector": (family.vector, plan.safety_vector.fingerprint),
        "merge plan": (None, plan_digest),
    }
    ((_, (_, *rows)),) = Page(report_page(found)).tables["provenance"]
    assert len({digest for _, digest in expected.values()}) == len(rows) == 6
    for (role, words), (wanted, (folder, digest)) in zip(rows, expected.items(), strict=True):
        assert role == wanted
        assert re.findall(r"blake3:\w+", words) == [digest], role
        if role.endswith(("model", "surrogate")):
            assert sampled_fingerprint(Checkpoint(folder, what=role)) == digest, role
            assert words.startswith(folder.name), role
    assert plan_digest == f"blake3:{blake3(family.plan.read_bytes()).hexdigest()}"
    assert vector.fingerprint == plan.safety_vector.fingerprint


def doubles(folder):
    """A checkpoint's tensors, for numpy."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def test_norms_are_those_that_numpy_finds(family):
    """‖T‖, ‖S‖ and ‖c · S‖ of the stored weights themselves; the ratio; each layer's."""
    plan, plan_digest = read_plan(family.plan)
    base, task = doubles(family.base), doubles(family.task)
    aligned, surrogate = doubles(family.aligned), doubles(family.surrogate)
    deltas = {name: aligned[name] - surrogate[name] for name in plan.merged}
    norm = np.linalg.norm
    task_norm = norm([norm(task[name] - base[name]) for name in task])
    safety = norm([norm(delta) for delta in deltas.values()])
    n = plan.beta * task_norm / safety
    changes = {
        name: n * np.exp(-(t.a[0] * n + t.b[0])) * norm(deltas[name])
        for name, t in plan.merged.items()
    }
    change = norm(list(changes.values()))
    found = collect(resolve_plan(plan, plan_digest))
    norms = found.norms
    assert (norms.task, norms.safety, norms.norm_scale, norms.change) == pytest.approx(
        (task_norm, safety, n, change), rel=1e-4
    )
    tables = Page(report_page(found)).tables["norms"]
    (_, rows), (_, (_, *layers)) = tables
    shown = dict(
        zip(("T", "S", "n", "cS", "ratio"), (float(value) for _, value in rows), strict=True)
    )
    assert shown == pytest.approx(
        {"T": task_norm, "S": safety, "n": n, "cS": change, "ratio": change / task_norm}, rel=2e-3
    )
    assert 0 < shown["ratio"] < plan.beta
    for number_, *values in layers:
        own = [name for name in deltas if name.startswith(f"model.layers.{number_}.")]
        wanted = norm([norm(deltas[name]) for name in own]), norm([changes[name] for name in own])
        assert [float(value) for value in values] == pytest.approx(wanted, rel=2e-3)
    assert len(layers) == 2


def test_what_was_slow_to_plan_is_the_plans_own_word_the_slowest_first():
    """How often each algorithm ran; then the matrices that needed fp64."""
    plan = make_plan(dense(6))
    kinds = (("gram32", "deflated32"), ("gram64", "gram32"), ("svd64", "gram64"), ("zero", "zero"))
    rungs = {name: kinds[place % 4] for place, name in enumerate(sorted(plan.merged))}
    tensors = plan.tensors | {
        name: plan.tensors[name].model_copy(update={"rungs": (pair,)})
        for name, pair in rungs.items()
    }
    text = report_page(facts(plan.model_copy(update={"tensors": tensors})))
    (_, (_, *counts)), (caption, (_, *rows)) = Page(text).tables["effort"]
    assert {name: int(count) for name, count, _ in counts} == Counter(
        rung for pair in rungs.values() for rung in pair
    )
    hard = [name for kind in kinds[2:0:-1] for name, pair in rungs.items() if pair == kind]
    assert caption == f"20 of {len(hard)} that needed fp64, the slower algorithms first"
    assert rows == [[name, *rungs[name]] for name in hard[:20]]
