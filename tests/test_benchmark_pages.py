"""Tables and plots are what the newest rows say, and nobody types them."""

import dataclasses
import re

import pytest
from docs_text import PAGES, ROOT, blocks
from typer.main import get_command

from benchmarks import commands, kernels_steps, swap
from benchmarks.architectures import LLAMA_1B
from benchmarks.harness import plot, row, tables
from benchmarks.harness.results import Results
from benchmarks.harness.rows import append, append_records
from benchmarks.kernels_cases import variants
from benchmarks.safety_transfer import pages as transfer
from benchmarks.safety_transfer.recipes import ABLATIONS
from benchmarks.scale_model import RANKS, Constants, Costs
from enchtable_vllm.errors import ConfigError

MARK = re.compile(r"^<!-- bench:([\w-]+) -->$", re.MULTILINE)


def write(folder, name, rows):
    made = {"device": "a machine, 2 cores", "git_sha": "abc1234", "utc": "2026-01-02T03:04:05"}
    typed = f"python -m benchmarks run {name}"
    append(
        [dataclasses.replace(one, command=typed, **made) for one in rows], folder / f"{name}.csv"
    )


@pytest.fixture
def results(tmp_path):
    """Rows of the forms that the benchmarks give, with figures that nobody measured."""
    plans = [
        row("plan", provider, f"{shape} decaying", "fp32", [seconds] * 3)
        for shape, factor in (("576x576", 1), ("2048x2048", 40))
        for provider, seconds in (
            ("authors' algorithm", factor * 1.0), ("cold", factor * 0.5), ("cached", factor * 0.25),
        )
    ]  # fmt: skip
    models = [dataclasses.replace(one, shape="model of 10 layers, 576 wide") for one in plans[:3]]
    write(tmp_path, "plan", [*plans, *models])
    for name, providers in (
        ("plan-cuda", ("authors' algorithm", "cold")),
        ("load-cuda", ("safetensors", "enchtable bf16")),
    ):
        write(tmp_path, name, [row("op", one, "s", "bf16", [1.0] * 3) for one in providers])
    loads = []
    for shape in (
        "SmolLM2-135M-Instruct, cold, 2 threads",
        "Llama-3.2-1B, random, warm, 2 threads",
    ):
        for provider, seconds in (
            ("auto", 1.0),
            ("enchtable bf16", 1.5),
            ("merge to disk, then auto", 4.0),
        ):
            loads.append(row("load_weights", provider, shape, "bf16", [seconds] * 3))
            loads.append(
                row("load_weights", provider, shape, "bf16", [2**30] * 3, metric="peak", unit="B")
            )
    for provider in ("auto", "enchtable bf16"):
        of = ("api_ready", provider, "SmolLM2-135M-Instruct, 1 rank", "bf16")
        loads += [row(*of, [20.0] * 3), row(*of, [2**30], metric="peak of a rank", unit="B")]
    write(tmp_path, "load", loads)
    swaps = [
        row("swap", provider, "SmolLM2-135M-Instruct, attention", "bf16", [seconds], metric=metric)
        for provider, metric, seconds in (
            ("enchtable", "standing still", 0.1), ("enchtable", "staging", 0.5),
            ("restart", "standing still", 25.0), ("enchtable", "wait of a stream", 0.3),
            ("restart", "wait of a stream", 26.0),
        )
    ]  # fmt: skip
    requests = [
        row("requests", provider, f"SmolLM2-135M-Instruct, attention, {during}", "", [count],
            metric=metric, unit="")
        for provider, during, answered, lost in (
            ("enchtable", "20 swaps", 1200, 0), ("restart", "1 restart", 90, 110),
        )
        for metric, count in (("answered", answered), ("lost", lost))
    ]  # fmt: skip
    write(tmp_path, "swap", [*swaps, *requests])
    served = [
        row("serve", provider, "SmolLM2-135M-Instruct, 4 clients, 2 starts", "bf16", [1.0] * 8,
            metric=metric)
        for provider in ("unmerged", "merged")
        for metric in ("TPOT, p50", "TPOT, p99")
    ]  # fmt: skip
    write(tmp_path, "serving", served)
    answers = [
        row("answer", provider, "SmolLM2-135M-Instruct", "bf16", [seconds] * 8, metric="TPOT")
        for provider, seconds in (("task model", 1.0), ("merged", 1.0), ("LoRA, rank 16", 1.5))
    ]
    held = row("adapter", "LoRA, rank 16", "SmolLM2-135M-Instruct", "bf16", [0.1],
               metric="captured energy", unit="")  # fmt: skip
    write(tmp_path, "alternatives", [*answers, held])
    for name, peer in (("kernels", "memcpy"), ("kernels-cuda", "copy")):
        adds = [
            row("fused_add", provider, f"{size} MiB, {variant}", variant.dtype, [seconds] * 3)
            for size in (1, 64, 256)
            for variant in variants()
            for provider, seconds in (
                (peer, 1.0),
                ("fused_add", 1.25),
                ("torch reference", 9.0),
                ("torch eager", 5.0),
            )
        ]
        steps = [
            row("step", cores, "2^20 elements, bf16 + bf16", "bf16", [1e-3] * 3, metric=step)
            for cores in ("one core", "each of 2")
            for step in kernels_steps.STEPS
        ]
        compiled = [
            row("compiled", "sm_90", variant, variant.dtype, [value], metric=metric)
            for variant in variants()
            for metric, value in (("registers", 40), ("spills", 0), ("occupancy", 0.75))
        ]
        write(tmp_path, name, [*adds, *compiled, *steps])
    transferred = [
        {"model": model, "seed": 0, "split": split, "set": of, "beta": beta, "metric": metric,
         "value": 0.5, "low": 0.4, "high": 0.6, "n": 400, "device": "a machine, 2 cores",
         "utc": "2026-01-02T03:04:05", "git_sha": "abc1234", "command": "make bench-transfer",
         "recipe": "r1"}
        for model, split, of, beta in (
            ("aligned", "test", "all", None), ("task", "test", "all", None),
            ("merged", "test", "all", 0.5), ("ffn", "test", "all", 0.3),
            ("public-task", "test", "gsm8k", None), ("public-merged", "test", "gsm8k", 0.5),
            ("sweep-main", "validation", "all", None), ("sweep-main", "validation", "all", 0.5),
        )
        for metric in (transfer.METRICS if of == "all" else ["utility"])
    ]  # fmt: skip
    transferred.append(
        {**transferred[6], "set": "", "metric": "retained_share", "value": 0.99, "low": "",
         "high": "", "n": ""}
    )  # fmt: skip
    append_records(transferred, list(transferred[0]), tmp_path / "safety_transfer.csv")
    return Results(tmp_path)


def test_the_pages_are_what_the_newest_rows_say():
    """Whoever edits a generated table fails here; so does who forgets 'make tables'."""
    assert [path for path, _ in tables.stale()] == []
    assert [path for path, _ in plot.stale()] == []


def test_every_block_has_a_page_and_every_mark_a_block():
    marks = [name for page in PAGES for name in MARK.findall(page.read_text())]
    assert set(marks) == set(tables.blocks())
    assert len(set(marks)) == len(marks) - 1  # index.md begins as README does


@pytest.mark.parametrize("name", sorted(tables.blocks()))
def test_every_table_names_what_made_it(results, name):
    made = str(tables.blocks()[name](results))
    assert made.endswith("\n")
    assert "Not measured" not in made
    if not name.endswith("-plot") and name not in ("scale-assumptions", "scale-storage"):
        typed = r"\((`(python -m benchmarks run [\w-]+|make bench-transfer)`(, )?)+"
        assert re.search(typed + r" on a machine, 2 cores, 2026-01-02, at abc1234\)", made)
    if name in ("plan-growth", "scale-machine", "scale-fleet", "scale-breaks"):
        assert "odelled" in made
    lines = [line.count("|") for line in made.splitlines() if line.startswith("|")]
    assert len(set(lines)) <= 1, made


@pytest.mark.parametrize("name", sorted(tables.blocks()))
def test_what_nobody_measured_has_no_figures(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n")
    found = dict(tables.stale(Results(tmp_path), among=[page]))
    if name != "scale-assumptions":
        assert "*Not measured yet: no rows of" in found[page]


def test_writing_twice_changes_nothing_and_an_edit_is_seen(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- bench:plan -->\nold\n<!-- /bench:plan -->\n\nAfter.\n")
    ((path, text),) = tables.stale(results, among=[page])
    path.write_text(text)
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    line = "| 576x576 decaying | 1 s | 500 ms | 2× (2–2) | 250 ms | 4× (4–4) | ≥ 1.7×; ≥ 3.5× |"
    assert line in text
    assert list(tables.stale(results, among=[page])) == []
    page.write_text(text.replace("500 ms", "50 ms"))
    assert list(tables.stale(results, among=[page])) == [(page, text)]


def test_a_page_says_which_target_was_missed(results):
    lines = str(tables.blocks()["load"](results)).splitlines()
    (ours,) = [line for line in lines if "warm" in line and "enchtable bf16" in line]
    assert ours.endswith("| ≤ 1.1×: **missed**; ≤ 1.98 GiB |")
    assert all(line.endswith("|  |") for line in lines if "| auto |" in line or "to disk" in line)
    assert lines[-1].endswith(" Targets missed: 1 of 3.")


def test_lost_requests_are_shown_of_how_many(results):
    lines = str(tables.blocks()["swap"](results)).splitlines()
    assert "| requests lost: 20 swaps | enchtable | 0 of 1,200 |  |  |" in lines
    assert "| requests lost: 1 restart | restart | 110 of 200 |  |  |" in lines


def test_a_swaps_target_stands_beside_it(results):
    table = str(tables.blocks()["swap"](results))
    (line,) = [line for line in table.splitlines() if line.startswith("| swap: standing still | e")]
    assert line.endswith("| ≤ 150 ms |")
    assert "Targets missed: 0 of 1." in table
    rows = [
        dataclasses.replace(one, p50=0.3)
        if (one.metric, one.provider) == ("standing still", "enchtable")
        else one
        for one in Results(results.folder).published("swap")
    ]
    write(results.folder, "swap", rows)
    table = str(tables.blocks()["swap"](Results(results.folder)))
    assert "| ≤ 150 ms: **missed** |" in table
    assert list(swap.bounds(rows)) == ["paused 300 ms: promised ≤ 150 ms"]


def test_what_the_compiler_made_is_in_columns(results):
    head, _, line, *_ = str(tables.blocks()["kernels-registers"](results)).splitlines()
    assert head == "| weights + delta | sm_90, registers | sm_90, spills | sm_90, occupancy |"
    assert line == "| bf16 + bf16 | 40 | 0 | 75% |"


def test_a_gpu_table_shows_the_size_from_which_on_a_share_is_promised(results):
    head, _, line, *_ = str(tables.blocks()["kernels-cuda"](results)).splitlines()
    assert "| 64 MiB |" in head
    assert line.startswith("| bf16 + bf16 | 80% |  | 80% | 80% |")
    assert line.endswith("| ≥ 90%: **missed** |")


def test_a_block_that_nothing_makes_is_refused(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:nothing -->\n<!-- /bench:nothing -->\n")
    with pytest.raises(ConfigError, match="bench:nothing"):
        list(tables.stale(results, among=[page]))


def test_plots_are_drawn_once_and_drawn_anew_when_a_figure_changes(results, tmp_path):
    drawn = dict(plot.stale(results, folder=tmp_path))
    assert len(drawn) == len(plot.plots())
    for path, text in drawn.items():
        assert "<svg" in text
        assert "python -m benchmarks run" in text
        path.write_text(text)
    assert list(plot.stale(results, folder=tmp_path)) == []
    changed = Results(results.folder).published("plan")
    write(results.folder, "plan", [dataclasses.replace(one, p50=2 * one.p50) for one in changed])
    assert [path.name for path, _ in plot.stale(results, folder=tmp_path)] == [
        "bench-plan-growth.svg"
    ]


def test_scale_is_derived_from_what_was_measured(results):
    known = Constants.of(results)
    assert known.cores == 2
    assert known.cold.besides == pytest.approx(known.cached.besides)
    costs = Costs(LLAMA_1B, known)
    assert costs.load_seconds * RANKS == pytest.approx(1.0)  # of the very model that was measured
    # Three steps of 1 ms for 2^20 elements, by each of two cores at once.
    assert costs.added_seconds == pytest.approx(1.5e-3 * costs.vector_bytes / 2**21)
    assert costs.staged_bytes == 2 * RANKS * costs.vector_bytes
    assert costs.checks(1) == sum(range(1, 1001))
    assert costs.checks(999) == 1 + 1000
    assert costs.rollout_seconds(1) > 10 * costs.rollout_seconds(50)


def test_what_pages_say_to_type_is_a_command():
    typed = [line for page in PAGES for line in blocks(page) if line.startswith("python -m bench")]
    assert len(typed) > 5
    for line in typed:
        name, *words = line.split()[3:]
        command = get_command(commands.app).commands[name]
        command.make_context(name, words)


def test_the_make_targets_run_the_harness():
    makefile = (ROOT / "Makefile").read_text()
    lines = re.findall(r"python -m benchmarks (\w+ .*?);?(?: \\)?$", makefile, re.MULTILINE)
    assert len(lines) > 4
    for line in lines:
        name, *words = re.sub(r"\$\(if \$\(\w+\),(.*?)\)(?= |$)", r"\1", line).split()
        get_command(commands.app).commands[name].make_context(name, words)


def test_an_ablation_is_held_against_the_vector_as_it_is(results):
    words = set(transfer.ABLATED)
    ablations = {variant.name for variant in ABLATIONS}
    assert words == ablations | {"merged", "stochastic", "stochastic-published"}
    lines = str(transfer.TABLES["transfer-ablations"](results)).splitlines()
    assert lines[2].startswith(
        "| the vector as it is, tuned among more β | 0.5 | 50.0% (40.0–60.0)"
    )
    assert lines[3].startswith("| scope: feed-forward | 0.3 | 50.0% (40.0–60.0) |")
    lines = str(transfer.TABLES["transfer-betas"](results)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| none", "| 0.5"]


def test_the_transfer_of_several_seeds_is_a_mean_and_its_bounds(results):
    path = results.folder / "safety_transfer.csv"
    lines = path.read_text().splitlines()
    second = [line.replace(",0,test,", ",1,test,").replace(",0.5,0.4,", ",0.7,0.4,")
              for line in lines[1:]]  # fmt: skip
    older = [line.replace("2026-01-02", "2026-01-01").replace(",0.5,0.4,", ",0.9,0.4,")
             for line in lines[1:]]  # fmt: skip
    few = [line.replace("task,0,test,all", "safedecoding,0,test,all").replace(",400,", ",200,")
           for line in lines if line.startswith("task,")]  # fmt: skip
    path.write_text("\n".join([lines[0], *older, *lines[1:], *second, *few]) + "\n")
    table = str(transfer.TABLES["transfer"](results))
    assert "| fine-tune | 60.0% (50.0–70.0) |" in table
    assert "| merged, β 0.5, as tuned | 60.0% (50.0–70.0) |" in table
    assert "| 0.990 |" in table
    assert (
        "| fine-tune with SafeDecoding (1 of 2 seeds) | 50.0% (40.0–60.0) of 200 |" in table
    )  # whose interval is not that of several seeds
    assert "90.0%" not in table
    assert "| does not refuse AdvBench (400) | 60.0% (50.0–70.0) |" in str(
        transfer.TABLES["transfer-brief"](results)
    )


def test_the_transfer_of_seeds_run_one_by_one_is_of_one_recipe(results):
    path = results.folder / "safety_transfer.csv"
    lines = path.read_text().splitlines()

    def run(date, seed, value, recipe="r1"):
        return [
            line.replace("2026-01-02", date).replace(",0,test,", f",{seed},test,")
            .replace(",0.5,0.4,", f",{value},0.4,").replace(",r1", f",{recipe}")
            for line in lines[1:]
        ]  # fmt: skip

    def fine_tune(*runs):
        path.write_text("\n".join([lines[0], *(line for run in runs for line in run)]) + "\n")
        return str(transfer.TABLES["transfer"](results)).splitlines()[3]

    first, second = run("2026-01-02", 0, 0.5), run("2026-01-03", 1, 0.7)
    assert fine_tune(first, second).startswith("| fine-tune | 60.0% (50.0–70.0) |")
    again = run("2026-01-04", 0, 0.6)
    assert fine_tune(first, second, again).startswith("| fine-tune | 65.0% (60.0–70.0) |")
    other = run("2026-01-04", 0, 0.6, recipe="r2")
    assert fine_tune(first, second, other).startswith("| fine-tune | 60.0% (40.0–60.0) |")
