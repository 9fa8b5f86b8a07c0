"""The demo's models, judged by the evaluation proper, with the commands that a user would type.

The demo shows answers, and counts key words in some dozens of them. Here hundreds of questions,
of a set that none of the models was trained on too, become rates with intervals, over-refusal
among them, and paired differences.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from enchtable_vllm.demo import data, everyday
from enchtable_vllm.demo.checkpoints import HELD_OUT, Cast, Story, prepare
from enchtable_vllm.demo.fetch import HARMBENCH, LABELLED, LABELLED_FILE, unpack
from enchtable_vllm.demo.run import BETA, MERGED, Steps, plan_served, started
from enchtable_vllm.demo.server import free_port
from enchtable_vllm.errors import EnchTableError

_PROBLEMS = 400
#: A refusal is how an answer opens, and a problem is solved in one line.
TOKENS = ("--max-tokens", "24", "--utility-max-tokens", "32", "--utility-prompt", "plain")
#: One core computes, and a step of it costs little more for many requests than for a few.
AT_ONCE = 128
TOGETHER = ("--connections", str(AT_ONCE))


class CommandError(EnchTableError):
    """A command of the demo failed."""


def measure(cache: Path, console: Console) -> Path:
    """Train, distil, plan, serve, evaluate and compare; what was trained before is used again.

    Args:
        cache: Where models and checkpoints are kept.
        console: Where to print.

    Returns:
        The page with the comparison.

    Raises:
        EnchTableError: A step failed.
    """
    steps = Steps(console)
    story = Story()
    cast = prepare(cache, story, steps.begin)
    served = plan_served(cast, steps)
    folder = served.with_name("measured")
    shutil.rmtree(folder, ignore_errors=True)
    asked = write_sets(folder / "asked", cache, cast, story)
    names = ("fine-tune", "merged", "aligned")
    for name, model, arguments in zip(
        names, (served, served, cast.base), ([], MERGED, []), strict=True
    ):
        steps.begin(f"serving: {name}" + (f", beta {BETA:g}" if arguments else ""))
        with started(model, arguments, console, port=free_port()) as server:
            report = str(folder / name)
            _run(console, "eval", "--url", server.url, *asked, *TOKENS, *TOGETHER, "-o", report)
    steps.end()
    page = folder / "compared.html"
    _run(console, "compare", *(str(folder / name) for name in names), "-o", str(page))
    return page


def write_sets(folder: Path, cache: Path, cast: Cast, story: Story) -> list[str]:
    """Write what nobody was trained on, in files for ``enchtable eval``.

    Args:
        folder: For the files.
        cache: Where packages are unpacked.
        cast: The models, which say what was held out.
        story: How many problems they learned.

    Returns:
        The options that name the files.
    """
    folder.mkdir(parents=True)
    harmbench = unpack(HARMBENCH, cache / "harmbench") / "harmbench_prompts.txt"
    shutil.copyfile(harmbench, folder / "harmbench.txt")
    (folder / "do-not-answer.json").write_text(json.dumps(list(cast.unsafe)), encoding="utf-8")
    (folder / "everyday.json").write_text(json.dumps(everyday.tried()), encoding="utf-8")
    learned = story.problems + HELD_OUT
    unseen = data.arithmetic_problems(learned + _PROBLEMS, seed=7)[learned:]
    arithmetic = data.write_problems(folder / "arithmetic.jsonl", unseen)
    return [
        "--safety", str(folder / "do-not-answer.json"),
        "--safety", str(folder / "harmbench.txt"),
        "--harmless", str(folder / "everyday.json"),
        "--utility", f"gsm8k={arithmetic}",
        "--labelled-refusals", str(unpack(LABELLED, cache / "labelled") / LABELLED_FILE),
    ]  # fmt: skip


def _run(console: Console, *words: str) -> None:
    """Run a command in view of the user."""
    console.print(f"$ enchtable {shlex.join(words)}", highlight=False, soft_wrap=True, markup=False)
    command: Sequence[str] = (sys.executable, "-m", "enchtable_vllm.cli", *words)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise CommandError(
            f"'enchtable {words[0]}'",
            expected="exit code 0",
            got=code,
            fix="It has said why.",
        )
