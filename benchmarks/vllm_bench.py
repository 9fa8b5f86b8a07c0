"""vLLM's own benchmarks, and what they report as figures of one form.

``vllm bench serve`` runs in this process, since importing it takes longer than a round of it;
``latency`` and ``throughput`` run as the commands that they are, an engine for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import NotVerified
from benchmarks.served import ONE_PROCESS

QUANTILES = ("50", "95", "99")
#: vLLM's name → the field's.
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end to end"}
TOKENS = "output"
_UNITS = {TOKENS: "tokens/s"}

Figures = dict[str, float]


@dataclass(frozen=True)
class Ask:
    """A round of requests: random prompts, and as many tokens as are asked for.

    Attributes:
        clients: Requests at once.
        requests: In all.
        prompt_tokens, output_tokens: Of each.
    """

    clients: int
    requests: int
    prompt_tokens: int
    output_tokens: int


def unit(metric: str) -> str:
    """Of a figure."""
    return _UNITS.get(metric, "s")


def serve(url: str, model: str, ask: Ask, seed: int) -> Figures:
    """One round of ``vllm bench serve``: `figures` of what it reports.

    Args:
        url: The server's.
        model: Its model's name there: a folder, whose tokenizer is used.
        ask: What is asked.
        seed: Of the prompts. With another seed no prompt is in the server's cache.
    """
    from vllm.benchmarks.serve import main_async

    arguments = _parser().parse_args([
        "--backend", "openai", "--base-url", url, "--model", model, "--disable-tqdm",
        "--dataset-name", "random", "--random-input-len", str(ask.prompt_tokens),
        "--random-output-len", str(ask.output_tokens), "--seed", str(seed),
        "--num-prompts", str(ask.requests), "--max-concurrency", str(ask.clients),
        "--temperature", "0", "--percentile-metrics", ",".join(_LATENCIES),
        "--metric-percentiles", ",".join(QUANTILES),
    ])  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        return figures(asyncio.run(main_async(arguments)), ask)


def figures(reported: Mapping[str, Any], ask: Ask) -> Figures:
    """Metric → seconds, or tokens a second, from the JSON of ``vllm bench serve``.

    Raises:
        NotVerified: A request failed, or an answer is not as long as it was to be.
    """
    whole = (ask.requests, 0, ask.requests * ask.output_tokens)
    told = tuple(reported[key] for key in ("completed", "failed", "total_output_tokens"))
    if told != whole:
        raise NotVerified(
            "vllm bench serve: requests answered, failed, and tokens",
            expected=whole, got=told, fix="See the server's log.",
        )  # fmt: skip
    found = {
        f"{name}, p{quantile}": reported[f"p{quantile}_{key}_ms"] / 1000
        for key, name in _LATENCIES.items()
        for quantile in QUANTILES
    }
    return {**found, TOKENS: reported["output_throughput"]}


Offline = Literal["latency", "throughput"]


def offline(kind: Offline, model: Path, ask: Ask, engine: Sequence[str], scratch: Path) -> Figures:
    """``vllm bench latency`` or ``throughput``: an engine of its own, started and ended.

    Args:
        kind: Which.
        model: A folder.
        ask: A batch of as many requests as there are clients, or all requests at once.
        engine: Arguments of the engine.
        scratch: A folder.
    """
    output = scratch / "report.json"
    own = {
        "latency": ["--input-len", str(ask.prompt_tokens), "--output-len", str(ask.output_tokens),
                    "--batch-size", str(ask.clients), "--num-iters-warmup", "1", "--num-iters",
                    str(ask.requests // 2)],
        # What is random has lengths of its own there, whose defaults come before the others.
        "throughput": ["--dataset-name", "random", "--num-prompts", str(ask.requests),
                       "--random-input-len", str(ask.prompt_tokens), "--random-output-len",
                       str(ask.output_tokens)],
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", kind, "--model", str(model),
        *own[kind], *engine, "--output-json", str(output),
    ]  # fmt: skip
    plugins = "enchtable" if "enchtable" in engine else ""
    environment = {**ONE_PROCESS, "VLLM_PLUGINS": plugins, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    if done.returncode:
        got = (done.stdout + done.stderr)[-3000:]
        raise NotVerified(" ".join(command), expected="a report", got=got, fix="")
    reported = json.loads(output.read_text())
    output.unlink()
    return offline_figures(kind, reported, ask)


def offline_figures(kind: Offline, reported: Mapping[str, Any], ask: Ask) -> Figures:
    """From the JSON of ``vllm bench latency`` or ``throughput``."""
    if kind == "latency":
        return {"batch, p50": statistics.median(reported["latencies"])}
    return {TOKENS: ask.requests * ask.output_tokens / reported["elapsed_time"]}


@functools.cache
def _parser() -> Any:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser
