"""Rows, intervals, comparisons, and what is modelled from them."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from docs_text import ROOT

from benchmarks import kernels_cuda, load, plan, rounding
from benchmarks.architectures import (
    EXPERTS_1T,
    GROWING,
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_405B,
    SMOLLM2_135M,
    random_of,
)
from benchmarks.harness.compare import against, between
from benchmarks.harness.interval import Ratio, ratio, ratio_of_medians
from benchmarks.harness.options import Options, parse
from benchmarks.harness.paired import paired_ratio
from benchmarks.harness.provenance import command, git_sha, stamped
from benchmarks.harness.results import NotMeasured, Results, chosen
from benchmarks.harness.rows import FIELDS, MOST_SAMPLES, append, read, row
from benchmarks.harness.timing import interleaved
from benchmarks.harness.units import shown
from benchmarks.load_bounds import targets
from benchmarks.load_worker import rotated
from benchmarks.page_cache import evict, resident_bytes
from benchmarks.plan_growth import Pace, growth, operations
from benchmarks.swap_server import Load
from enchtable_vllm.errors import ConfigError


def make(provider="ours", values=(1.0, 2.0, 3.0), *, run="run x", sha="abc", utc="2026", **more):
    made = row("op", provider, more.pop("shape", "s"), "bf16", values, **more)
    typed = f"python -m benchmarks {run}"
    return dataclasses.replace(made, device="a machine", git_sha=sha, utc=utc, command=typed)


def test_rows_come_back_as_they_were(tmp_path):
    rows = [make(), make("the 'peer', quoted", [0.1234567, 5e-9], metric="memory", unit="B")]
    append(rows[:1], tmp_path / "x.csv")
    append(rows[1:], tmp_path / "x.csv")
    first, second = read(tmp_path / "x.csv")
    assert first == rows[0]
    assert second.samples == pytest.approx(rows[1].samples, rel=1e-5)
    assert second.provider == rows[1].provider
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == ",".join(FIELDS)


def test_quantiles_are_of_all_values_and_not_too_many_are_kept():
    values = [float(n) for n in range(1001)]
    made = row("op", "p", "s", "", values)
    assert (made.p20, made.p50, made.p80, made.n) == (200.0, 500.0, 800.0, 1001)
    assert len(made.samples) == MOST_SAMPLES
    assert (min(made.samples), max(made.samples)) == (0.0, 1000.0)
    one = row("op", "p", "s", "", [7.0])
    assert (one.p20, one.p50, one.p80, one.n) == (7.0, 7.0, 7.0, 1)


def test_the_results_that_are_there_can_be_read():
    for path in Results().folder.glob("*.csv"):
        if path.name != "safety_transfer.csv":
            assert all(one.basis in ("measured", "modelled") for one in read(path)), path


def test_every_provider_is_timed_in_turns():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert "".join(calls) == "ababab"
    assert all(len(values) == 2 for values in seconds.values())


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Ratio of medians of exponentials, whose truth is 2: 95% within what chance allows."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = ratio_of_medians(generator.exponential(2.0, 25), generator.exponential(1.0, 25))
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_is_the_same_each_time_and_turns_round():
    found = ratio_of_medians([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found == ratio_of_medians([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (found.value, found.low, found.high) == (0.5, pytest.approx(1 / 6), pytest.approx(1.5))
    assert found.inverse() == Ratio(2.0, pytest.approx(1 / 1.5), pytest.approx(6.0))
    assert str(found) == "0.5× (0.167–1.5)"


def test_too_few_values_or_modelled_ones_have_no_interval():
    assert str(ratio_of_medians([1.0, 2.0], [3.0])) == "0.5×"
    modelled = make(basis="modelled")
    assert ratio(modelled, make("peer")).low is None
    assert ratio(make(), make("peer")).low is not None
    assert ratio(make(), dataclasses.replace(make("peer"), samples=())).low is None


def test_ours_is_held_against_the_peer_of_the_same_run():
    rows = [
        make("peer", [4.0] * 3, utc="1"),
        make("ours", [1.0] * 3, utc="2"),
        make("peer", [2.0] * 3, utc="2"),
        make("ours", [1.0] * 3, utc="2", shape="that the peer did not do"),
    ]
    (found,) = against(rows, "peer")
    assert (found.row.provider, found.ratio.value) == ("ours", 0.5)
    assert json.loads(json.dumps(found.record()))["against"]["provider"] == "peer"


def test_two_results_are_held_against_each_other(tmp_path):
    old = [
        make("ours", [2.0] * 3, sha="old1", utc="1"),
        make("peer", [9.0] * 3, sha="old1", utc="1"),
    ]
    new = [make("ours", [1.0] * 3, sha="new1", utc="2")]
    append(old, tmp_path / "other.csv")
    rows = [*old, *new]
    assert chosen(rows, None) == new
    assert chosen(rows, "old") == chosen(rows, "1") == old
    assert [one.p50 for one in chosen([], str(tmp_path / "other.csv"))] == [2.0, 9.0]
    (found,) = between(new, chosen(rows, "old1"))
    assert found.ratio.value == 0.5
    with pytest.raises(ConfigError, match="new1, old1"):
        chosen(rows, "none")


def test_published_is_the_newest_run_of_a_command_that_pages_name(tmp_path):
    rows = [
        make(values=[1.0], utc="1", shape="a"),
        make(values=[2.0], utc="2", shape="a"),
        make(values=[3.0], utc="3", shape="a", run="run x -o shapes=a"),
        make(values=[4.0], utc="1", shape="b", run="run x --full"),
        make(values=[5.0], utc="1", shape="a", run="run x --full"),
    ]
    append(rows, tmp_path / "x.csv")
    found = {one.shape: one.p50 for one in Results(tmp_path).published("x")}
    assert found == {"a": 2.0, "b": 4.0}
    elsewhere = dataclasses.replace(make(values=[6.0], utc="3", shape="a"), device="another")
    append([elsewhere], tmp_path / "x.csv")
    found = {one.shape: one.p50 for one in Results(tmp_path).published("x")}
    assert found == {"a": 6.0}
    with pytest.raises(NotMeasured, match="python -m benchmarks run y"):
        Results(tmp_path).published("y")


def test_a_row_says_what_to_type_and_which_commit_it_was():
    assert command("load", "full", ["a=1", "b=x y"]) == (
        "python -m benchmarks run load --full -o a=1 -o 'b=x y'"
    )
    (made,) = stamped([row("op", "p", "s", "", [1.0])], "cpu", "typed")
    assert made.command == "typed"
    assert made.git_sha == git_sha()
    assert made.device.endswith(("core", "cores"))


def test_options_are_those_of_the_size_and_then_of_the_user(tmp_path):
    class Chosen(Options):
        a: int = 1
        b: tuple[str, ...] = ("x",)

    found = parse(Chosen, {"a": 2}, ["b=y,z"], tmp_path)
    assert (found.a, found.b, found.scratch) == (2, ("y", "z"), tmp_path)
    assert parse(Chosen, {"a": 2}, ["a=3", "b="], tmp_path).b == ()
    with pytest.raises(ConfigError, match="option 'c'"):
        parse(Chosen, {}, ["c=1"], tmp_path)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"), (90.0, "s", "90 s"), (7200.0, "s", "2 h"), (0.0, "s", "0 s"),
        (3 * 2**30, "B", "3 GiB"), (2.5e9, "B/s", "2.5 GB/s"), (40.0, "a thread", "40 a thread"),
    ],
)  # fmt: skip
def test_figures_are_short(value, unit, text):
    assert shown(value, unit) == text


def test_models_have_the_sizes_that_they_are_called_by():
    for model, billions in ((LLAMA_8B, 8.03), (LLAMA_70B, 70.6), (LLAMA_405B, 405.9)):
        assert model.parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert EXPERTS_1T.parameters / 1e12 == pytest.approx(1.0, rel=0.05)
    assert GROWING[0].attention() == Counter({(576, 576): 60, (192, 576): 60})


def test_a_shape_that_was_measured_is_not_modelled():
    pace = Pace("cold", {(100, 200): 1.0, (1000, 1000): 50.0})
    assert pace.pair_seconds((200, 100)) == 1.0
    found = pace.pair_seconds((2000, 2000))
    assert found == pytest.approx(
        50 * operations((2000, 2000), "cold") / operations((1000, 1000), "cold")
    )
    assert found == pytest.approx(400)  # all terms are cubic in a square's side


def test_more_cores_than_matrices_are_no_help():
    """A pair of two seconds, measured with two at once, is four seconds of one core's work."""
    pace = Pace("cold", {(1000, 1000): 2.0, (100, 1000): 0.01})
    shapes = Counter({(1000, 1000): 8, (100, 1000): 4})
    assert pace.longest(shapes, 2, 2) == pytest.approx(8 * 2.0 + 4 * 0.01)
    assert pace.longest(shapes, 2, 4) == pytest.approx(8 * 1.0 + 4 * 0.005)
    assert pace.longest(shapes, 2, 5) == pytest.approx(2 * 4.0)  # two waves: the second has three
    assert pace.longest(shapes, 2, 96) == pytest.approx(4.0)


def test_what_a_model_took_besides_is_never_less_than_nothing():
    rows = [row("plan", "cold", f"{shape} decaying", "fp32", [2.0]) for shape in ("24x72", "72x72")]
    rows.append(row("plan", "cold", "model of 2 layers, 72 wide", "fp32", [1.0]))
    assert Pace.of(rows, "cold").besides == 0


def test_each_provider_is_first_in_turn():
    assert [rotated("abc", n) for n in range(4)] == [list(x) for x in ("abc", "bca", "cab", "abc")]


def test_two_servers_of_one_start_have_no_interval():
    """Their starts differ by more than their rounds do."""
    ours, theirs = [1.0, 1.1] * 6, [1.0] * 12
    assert paired_ratio(ours, theirs).low is not None
    assert paired_ratio(ours, theirs, least_blocks=2).low is None
    assert paired_ratio(ours, theirs, 2, least_blocks=2).low is not None


def test_a_silence_is_until_the_next_token_whoever_lost_the_request():
    load = Load()
    load.heard += [1.0, 1.1, 9.0, 9.1, 9.2]
    assert load.silence(1.5, 8.0) == pytest.approx(7.9)
    assert load.silence(9.05, 9.15) == pytest.approx(0.1)
    assert load.silence(9.3, 9.9) is None


@pytest.mark.parametrize(("provider", "read"), [("cached", "all"), ("authors' algorithm", "scope")])
def test_what_a_whole_model_took_besides_is_added_by_the_parameter(provider, read):
    pairs = [
        row("plan", provider, f"{shape} decaying", "fp32", [0.5])
        for shape in ("24x72", "72x72", "72x192")
    ]
    whole = row("plan", provider, "model of 2 layers, 72 wide", "fp32", [10.0])
    alone, pace = Pace.of(pairs, provider), Pace.of([*pairs, whole], provider)
    assert pace.besides == pytest.approx(10.0 - 14 * 0.5)  # seven matrices a layer
    itself = random_of(2, 72)
    whole_scope = itself.attention() + itself.feed_forward()
    assert pace.plan_seconds(itself, whole_scope) == pytest.approx(10.0)
    shapes = LLAMA_8B.attention()
    added = pace.plan_seconds(LLAMA_8B, shapes) - alone.plan_seconds(LLAMA_8B, shapes)
    parameters = LLAMA_8B.parameters if read == "all" else LLAMA_8B.attention_parameters
    assert added == pytest.approx(3.0 * parameters / itself.parameters, rel=1e-6)


def test_cold_and_cached_take_the_same_besides():
    """Of the two differences that of the cached plan has the less noise."""
    rows = [
        row("plan", way, f"{shape} decaying", "fp32", [pair])
        for way, pair in (("cold", 1.0), ("cached", 0.5))
        for shape in ("24x72", "72x72", "72x192")
    ]
    for way, whole in (("cold", 13.0), ("cached", 10.0)):  # of cold, pairs alone are 14 s
        rows.append(row("plan", way, "model of 2 layers, 72 wide", "fp32", [whole]))
    found = {(one.provider, one.shape): one.p50 for one in growth(rows)}
    name = f"{LLAMA_8B.name}, attention"
    paces = {way: Pace.of(rows, way) for way in ("cold", "cached")}
    besides = paces["cached"].besides_each * LLAMA_8B.parameters
    assert besides > 0
    for way, pace in paces.items():
        alone = pace.all_pairs(LLAMA_8B.attention())
        assert found[way, name] == pytest.approx(alone + besides)


def test_what_is_modelled_says_so():
    rows = [row("plan", p, "192x576 decaying", "fp32", [0.5]) for p in ("peer", "cold", "cached")]
    found = list(growth(rows))
    assert len(found) == 3 * 2 * len(GROWING)
    assert {one.basis for one in found} == {"modelled"}
    seconds = {(one.provider, one.shape): one.p50 for one in found}
    small, large = (f"{model.name}, attention" for model in (GROWING[0], GROWING[-1]))
    assert seconds["cached", small] < seconds["cold", small]
    assert seconds["cold", large] > 1000 * seconds["cold", small]


def test_files_leave_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2**22)
    assert resident_bytes(path) == 2**22
    evict([tmp_path])
    assert resident_bytes(path) <= 0.02 * 2**22
    path.read_bytes()
    assert resident_bytes(path) == 2**22


SMALL, LARGE = "SmolLM2-135M-Instruct", "Llama-3.2-1B, random"
MIB = 2**20


@pytest.mark.parametrize(
    ("op", "shape", "metric", "auto", "kept", "missed"),
    [
        ("load_weights", f"{SMALL}, warm, 2 threads", "time", 1.0, 1.14, 1.16),
        ("load_weights", f"{LARGE}, warm, 2 threads", "time", 1.0, 1.09, 1.11),
        ("load_weights", f"{SMALL}, cold, 2 threads", "time", 1.0, 9.0, None),
        ("load_model", f"{SMALL}, warm, 2 threads", "time", 1.0, 9.0, None),
        # The embedding is the largest tensor: 49152 x 576 and 128256 x 2048, two bytes each.
        ("load_weights", f"{SMALL}, cold, 2 threads", "peak", 9 * MIB, 116 * MIB, 118 * MIB),
        ("load_weights", f"{LARGE}, warm, 2 threads", "peak", 9 * MIB, 1010 * MIB, 1012 * MIB),
        ("api_ready", f"{SMALL}, 1 rank", "peak of a rank", 900 * MIB, 1007 * MIB, 1009 * MIB),
    ],
)
def test_what_is_promised_of_loading(op, shape, metric, auto, kept, missed):
    def found(value):
        rows = [
            row(op, provider, shape, "bf16", [seconds], metric=metric)
            for provider, seconds in (
                ("auto", auto), ("enchtable bf16", value), ("merge to disk, then auto", 99 * value),
            )
        ]  # fmt: skip
        return list(load.bounds(rows)), [target.kept for _, target in targets(rows)]

    assert found(kept)[0] == []
    if missed is None:
        assert found(kept)[1] == []
    else:
        (words,), judged = found(missed)
        assert "promised ≤" in words
        assert judged == [False]


@pytest.mark.parametrize(
    ("starts", "kept"),
    [([20.5], None), ([19.0, 20.0, 23.0], None), ([20.3] * 5, True), ([20.5] * 5, False)],
)
def test_starts_that_differ_by_more_than_is_promised_decide_nothing(starts, kept):
    rows = [
        row("api_ready", provider, f"{SMALL}, 1 rank", "bf16", seconds)
        for provider, seconds in (("auto", [20.0] * len(starts)), ("enchtable bf16", starts))
    ]
    ((_, target),) = targets(rows)
    assert target.kept is kept
    assert len(list(load.bounds(rows))) == (kept is False)
    assert str(target) == "≤ 1.02×" + {None: ": undecided", True: "", False: ": **missed**"}[kept]


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
@pytest.mark.parametrize(
    ("shape", "cold", "cached"),
    [("2048x2048", 1.7, 3.5), ("1024x4096", 6.0, 12.0), ("4096x1024", 6.0, 12.0)],
)
def test_what_is_promised_of_planning(shape, spectrum, cold, cached):
    def missed(factor):
        times = {"authors' algorithm": 1.0, "cold": factor / cold, "cached": factor / cached}
        of = f"{shape} {spectrum}"
        return list(plan.bounds([row("plan", p, of, "fp32", [s]) for p, s in times.items()]))

    assert missed(0.99) == []
    found = missed(1.01)
    assert [words.split(",")[0] for words in found] == ["cold", "cached"]
    assert all(f"{shape} {spectrum}" in words for words in found)


def test_nothing_is_promised_of_other_shapes_or_of_a_model():
    for shape in ("576x1536 flat", "model of 30 layers, 576 wide"):
        rows = [row("plan", p, shape, "fp32", [9.0]) for p in ("authors' algorithm", "cold")]
        assert list(plan.bounds(rows)) == []


def test_what_is_promised_of_the_addition_on_a_gpu():
    def missed(**seconds):
        rows = [
            row("fused_add", provider, f"{size[1:]} MiB, bf16 + int8", "bf16", [value])
            for size, ours in seconds.items()
            for provider, value in (("copy", 0.9), ("fused_add", ours), ("torch eager", 9.0))
        ]
        return list(kernels_cuda.bounds(rows))

    assert missed(_1=5.0, _32=5.0, _64=0.999, _128=0.999) == []
    (words,) = missed(_1=5.0, _64=0.999, _2048=1.01)
    assert words == "bf16 + int8: 89.1% of a copy's speed at 2048 MiB: promised ≥ 90%"
    assert len(missed(_64=1.01)) == 1


def test_the_page_shows_what_rounding_leaves():
    assert "\n".join(rounding.lines()) in (ROOT / "docs" / "method.md").read_text()


def test_the_size_of_factors_is_what_the_page_says():
    attention = SMOLLM2_135M.attention()
    factors = sum(
        count * rows * columns * (2 + 2 * min(rows, columns) / max(rows, columns))
        for (rows, columns), count in attention.items()
    )
    vector = 2 * SMOLLM2_135M.attention_parameters
    text = (ROOT / "docs" / "formats.md").read_text()
    assert f"{factors / 1e6:.0f} MB\nbeside the bf16 vector's {vector / 1e6:.0f} MB" in text
