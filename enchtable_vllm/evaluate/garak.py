"""Attacks by garak: run in an environment of its own, and its report folded into ours.

Garak has static attacks (``dan``: prompts found in the wild; ``dra``) and ones that adapt to the
answers (``tap``, ``goat``, ``atkgen``), some of which want an attacker model of their own: see
garak's documentation. It is another program, not a library of ours, because its requirements do
not fit beside vLLM's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from enchtable_vllm.envs import without_admin_token
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.faults import EvaluationError, ReportError
from enchtable_vllm.evaluate.files import digest_of, parse_lines, private_folder, read_bytes
from enchtable_vllm.evaluate.report import Dynamic, Probe, Rate

_PREFIX = "run"
_LOG_LINES = 15
#: Of the probes, in a folder's name.
_NAME_LETTERS = 80


def folder_of(attacks: Path, probes: str, config: Path | None) -> Path:
    """For one choice of probes and settings: with others, an earlier report is not taken.

    Args:
        attacks: The folder of all of them.
        probes: As for `attack`.
        config: Likewise.
    """
    names = _names(probes)
    settings = config.read_bytes() if config is not None and config.is_file() else b""
    chosen = digest_of(repr((names, settings)).encode()).removeprefix("blake3:")
    words = "".join(c if c.isalnum() else "-" for c in ",".join(names))
    return attacks / f"{words[:_NAME_LETTERS]}-{chosen[:12]}"


def attack(
    program: Path,
    probes: str,
    url: str,
    model: str,
    api_key: str | None,
    folder: Path,
    *,
    config: Path | None = None,
    ca_file: Path | None = None,
) -> Dynamic:
    """Run garak against a server, unless a complete report is there already.

    Args:
        program: Garak, 0.17 or newer; its own environment's ``bin/garak``.
        probes: Their names, separated by commas.
        url: The server's, without ``/v1``.
        model: The model's name there.
        api_key: The server's.
        folder: For garak's report and its output, which hold what the attacks got out of the model:
            for its owner alone.
        config: Garak's own, for what its probes want besides: an attacker's model, say.
        ca_file: Certificates to trust in place of the system's.

    Raises:
        ConfigError: There is no such program, or no such config.
        EvaluationError: It ended with an error, or without a complete report.
        ReportError: Its report is damaged.
    """
    report = folder.absolute() / f"{_PREFIX}.report.jsonl"
    if report.is_file() and (found := read_garak(report)).complete:
        return found
    if config is not None and not config.is_file():
        raise ConfigError(
            f"--garak-config '{config}'",
            expected="a file of garak's settings, YAML or JSON",
            got="no such file",
            fix="See garak's documentation, and docs/evaluate.md for one with an attacker.",
        )
    private_folder(folder)
    log = folder / "garak.log"
    names = _names(probes)
    # Greedy and to the end of the answer: garak's own defaults stop at the first '#' or ';'.
    options = {"uri": f"{url}/v1/", "temperature": 0.0, "max_tokens": 256, "stop": []}
    command = [
        str(program),
        "--target_type", "openai.OpenAICompatible",
        "--target_name", model,
        "--generator_options", json.dumps({"openai": {"OpenAICompatible": options}}),
        "--spec", ",".join(f"probes.{name}" for name in names),
        "--generations", "1",
        "--report_prefix", str(report).removesuffix(".report.jsonl"),
        *(("--config", str(config.absolute())) if config is not None else ()),
    ]  # fmt: skip
    key = {"OPENAICOMPATIBLE_API_KEY": api_key or "none"}  # in no command line
    if ca_file is not None:
        key["SSL_CERT_FILE"] = str(ca_file.absolute())
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**without_admin_token(), **key},
                start_new_session=True,
            )
            try:
                code = process.wait()
            finally:  # after an interrupt, too
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    except OSError as error:
        raise ConfigError(
            f"--garak '{program}'",
            expected="garak, installed in an environment of its own",
            got=error,
            fix="Make one: python -m venv GARAK && GARAK/bin/pip install garak; then give "
            "--garak GARAK/bin/garak.",
        ) from error
    if code != 0 or not report.is_file() or not (found := read_garak(report)).complete:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise EvaluationError(
            f"garak, '{program}'",
            expected="exit code 0 and a complete report",
            got=f"exit code {code}; the end of {log}: {' | '.join(tail)}",
            fix="See that log; the answers to the other prompts are kept.",
        )
    return found


def _names(probes: str) -> list[str]:
    return [name.strip() for name in probes.split(",") if name.strip()]


def read_garak(path: Path) -> Dynamic:
    """What a ``report.jsonl`` of garak's says.

    Raises:
        ReportError: It cannot be read, or is none.
    """
    try:
        lines = parse_lines(read_bytes(path))
        version, complete, attempts, unjudged = "", False, 0, 0
        probes: list[Probe] = []
        for number, entry in lines:
            if not isinstance(entry, dict):
                raise ValueError(f"line {number}, which is no object")
            kind = entry.get("entry_type")
            if kind == "init":
                version = str(entry["garak_version"])
            elif kind == "completion":
                complete = True
            elif kind == "attempt" and entry.get("status") == 2:  # judged; 1 is the same, before
                attempts += 1
            elif kind == "eval":
                probe, nones = _probe(entry)
                probes.append(probe)
                unjudged += nones
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _bad(path, error) from error
    if not version:
        raise _bad(path, "no 'init' entry")
    return Dynamic(
        version=version,
        complete=complete,
        attempts=attempts,
        unjudged=unjudged,
        broke=_over_all(probes),
        probes=tuple(probes),
    )


def _over_all(probes: Sequence[Probe]) -> Rate:
    """Each probe once, by the detector that calls most of its answers a success."""
    worst: dict[str, Rate] = {}
    for one in probes:
        if one.probe not in worst or _success(one.broke) > _success(worst[one.probe]):
            worst[one.probe] = one.broke
    return Rate.make(sum(r.count for r in worst.values()), sum(r.of for r in worst.values()))


def _success(rate: Rate) -> float:
    """A detector that has judged nothing is below one that has called nothing a success."""
    return -1.0 if rate.share is None else rate.share


def _probe(entry: Mapping[str, Any]) -> tuple[Probe, int]:
    """One probe under one detector, and the answers that have no score."""
    passed = entry["passed"]
    judged = entry["total_evaluated"] if "total_evaluated" in entry else entry["total"]
    counts = (passed, judged, entry.get("nones", 0))
    if not all(isinstance(count, int) and count >= 0 for count in counts) or passed > judged:
        raise ValueError(f"the counts {counts} of probe {entry['probe']}")
    rate = Rate.make(judged - passed, judged)
    return Probe(probe=entry["probe"], detector=entry["detector"], broke=rate), counts[2]


def _bad(path: Path, got: object) -> ReportError:
    return ReportError(
        f"garak's report '{path}'",
        expected="lines of JSON, as garak 0.17 writes them",
        got=got,
        fix="Remove it to attack again.",
    )
