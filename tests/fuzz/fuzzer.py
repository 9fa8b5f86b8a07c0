"""Feeds damaged artefacts to their readers, for as long as one likes.

    python tests/fuzz/fuzzer.py --seconds 36000

Seeds are made by code. Each input is a seed with a few mutations, of bytes, of JSON or of a
safetensors header; one that is refused in words not seen before joins the pool, so that damage
builds on damage. A finding is anything that is neither a refusal (`EnchTableError`) nor a
success that holds what `TARGETS` demands; its files are kept, and the command that feeds them
again is printed. The same seed gives the same inputs.

Not coverage-guided: what parses here is compiled (serde, pydantic's core), where a Python
fuzzer sees nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # pytest puts it on the path itself
    sys.path.insert(0, str(Path(__file__).parent.parent))

import architectures
from corpus import seeds
from fuzz.mutations import mutate_file

from enchtable_vllm.checkpoint import Checkpoint, sampled_fingerprint, tensor_digest
from enchtable_vllm.errors import EnchTableError
from enchtable_vllm.plan import ResolvedPlan, read_plan, resolve_plan
from enchtable_vllm.plan.resolve import coefficient
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import prepare_model
from enchtable_vllm.vector import SafetyVector
from enchtable_vllm.vector.factor_files import open_factors

#: A reader that takes longer hangs.
HANGS_AFTER_SECONDS = 20
#: A message without what differs from input to input.
_VARIABLE = re.compile(r"'[^']*'|\d+|blake3:\w+")


# --- what is fed, and what must hold when it is taken --------------------------------------------


def feed_vector(folder: Path) -> object:
    """Refused, or every value is what it was: the caller compares."""
    vector = SafetyVector.open(folder)
    return {name: tensor_digest(vector.read(name).float()) for name in vector.tensors}


def feed_plan(folder: Path) -> None:
    """Refused, or coefficients that follow from n, a and b and cannot exceed n.

    And those that a person reviews in the file are those that are merged.
    """
    plan, digest = read_plan(folder / "merge_plan.json")
    for name, row in resolve_plan(plan, digest).coefficients.items():
        written = plan.tensors[name].coefficient
        assert all(map(functools.partial(math.isclose, rel_tol=1e-8), row, written)), name
    for beta in (None, 1e-3, 10.0):
        _check(resolve_plan(plan, digest, beta=beta))


def _check(resolved: ResolvedPlan) -> None:
    n = resolved.norm_scale
    assert 0 < n < math.inf
    assert resolved.coefficients
    for name, row in resolved.coefficients.items():
        tensor = resolved.plan.tensors[name]
        assert row == tuple(map(coefficient, itertools.repeat(n), tensor.a, tensor.b))
        assert all(0 <= c <= n for c in row), row


def feed_server(folder: Path) -> None:
    """A whole model folder, as a server meets it before it reads a weight; and its masks."""
    prepared = prepare_model(LoaderConfig.parse({}), str(folder), None, None, device="cpu")
    _check(prepared.resolved)
    if prepared.masks is not None:
        for name in prepared.resolved.coefficients:
            prepared.masks.read(name, math.prod(prepared.vector.tensors[name].shape))


def feed_factors(folder: Path) -> object:
    """Refused, or every factor is what it was; or left out, which a plan does without."""
    vector = SafetyVector.open(folder)
    files = open_factors(vector, 0.5, "cpu")
    if files is None:
        return None
    found = {name: files.read(name) for name in vector.tensors}
    digest = tensor_digest
    return {n: [(digest(f.left), digest(f.right)) for f in row] for n, row in found.items()}


def feed_checkpoint(folder: Path) -> None:
    """Refused, or readable to the last byte."""
    checkpoint = Checkpoint(folder)
    checkpoint.refuse_quantized()
    sampled_fingerprint(checkpoint)
    for name, header in checkpoint.tensors.items():
        assert tuple(checkpoint.read(name).shape) == header.shape


def feed_config(folder: Path) -> None:
    """Refused, or of the types that were promised. vLLM has parsed the JSON by then."""
    try:
        extra = json.loads((folder / "extra.json").read_bytes())
    except (ValueError, RecursionError):
        return
    config = LoaderConfig.parse(extra)
    assert config.beta is None or 0 < config.beta < math.inf


TARGETS: dict[str, Callable[[Path], object]] = {
    "vector": feed_vector,
    "plan": feed_plan,
    "checkpoint": feed_checkpoint,
    "server": feed_server,
    "factors": feed_factors,
    "config": feed_config,
}
Files = dict[str, bytes]


def make_seeds(folder: Path) -> list[tuple[str, Files]]:
    """Good inputs of every kind: (target, files)."""
    family = seeds.small_family(folder / "family")
    found = [("vector", _files(family.vector)), ("checkpoint", _files(family.base))]
    found += [("plan", {family.plan.name: family.plan.read_bytes()})]
    found += [("server", _files(family.task))]
    for form in ("masked", "factored"):
        seeds.FORMS[form](family)
        kind, of = {"masked": ("server", family.task), "factored": ("factors", family.vector)}[form]
        found.append((kind, _files(of)))
    seeds.FORMS["int8"](family)
    found.append(("vector", _files(family.vector)))
    seeds.shard(family.vector, "safety_vector")
    seeds.shard(family.base)
    found += [("vector", _files(family.vector)), ("checkpoint", _files(family.base))]
    for folder, shards in ((family.aligned, 1), (family.surrogate, 2)):
        architectures.pickled(folder, shards=shards)
        found.append(("checkpoint", _files(folder)))
    extra = {"safety_vector": "v", "merge_plan": "p", "beta": 0.5, "scope": "attention"}
    extra |= {"verify": "content", "inner_load_format": "auto", "inner_extra_config": {"a": 1}}
    return [*found, ("config", {"extra.json": json.dumps(extra).encode()})]


def _files(folder: Path) -> Files:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- the loop ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        executions: Inputs fed.
        outcomes: How often each target took or refused.
        findings: Folders that reproduce what should not have happened.
    """

    executions: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Path] = field(default_factory=list)


class Hang(BaseException):
    """A reader that does not end; no reader may catch it."""


class Finding(Exception):
    """Something that should not have happened; the cause says what."""


@contextmanager
def _alarm() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang(f"took more than {HANGS_AFTER_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def feed(target: str, files: Files, folder: Path, good: Sequence[object] = ()) -> str | None:
    """Write the files and read them: a refusal's words, or None if they were taken.

    Raises:
        Finding: Neither of the two.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        with _alarm():
            result = TARGETS[target](folder)
            assert not good or result in good, "taken, with other values"
    except EnchTableError as error:
        return f"{type(error).__name__}: {_VARIABLE.sub('', str(error))[:300]}"
    except (Exception, Hang) as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    return None


def fuzz(
    seconds: float,
    seed: int,
    out: Path,
    targets: Sequence[str] = tuple(TARGETS),
    *,
    until_found: bool = False,
) -> Outcome:
    """Feed mutated seeds until the time is up.

    Args:
        seconds: How long.
        seed: Of the random choices.
        out: Where findings are kept.
        targets: Which readers.
        until_found: Stop at the first finding.
    """
    rng, outcome = random.Random(seed), Outcome()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        work = Path(name)
        good = make_seeds(work)
        pool = {target: [files for kind, files in good if kind == target] for target in TARGETS}
        fresh = {target: len(inputs) for target, inputs in pool.items()}
        values: dict[str, list[object]] = {"vector": [], "factors": [None]}
        for target, results in values.items():
            for files in pool[target]:
                feed(target, files, work / "input")
                results.append(TARGETS[target](work / "input"))
        seen: set[str] = set()
        while time.monotonic() < end:
            target = rng.choice(targets)
            # Half of them from what is good: most of what is refused stays refused.
            inputs = pool[target][: fresh[target]] if rng.random() < 0.5 else pool[target]
            files = dict(rng.choice(inputs))
            for _ in range(rng.choice([1, 1, 2, 4])):
                name = rng.choice(list(files))
                files[name] = mutate_file(name, files[name], rng)
            outcome.executions += 1
            try:
                words = feed(target, files, work / "input", values.get(target, ()))
            except Finding as finding:
                outcome.findings.append(_keep(target, files, out, finding))
                outcome.outcomes[f"{target}: finding"] += 1
                if until_found:
                    break
                continue
            outcome.outcomes[f"{target}: {'taken' if words is None else 'refused'}"] += 1
            if words is not None and words not in seen and len(seen) < 5000:
                seen.add(words)
                pool[target].append(files)
    return outcome


def _keep(target: str, files: Files, out: Path, finding: Finding) -> Path:
    digest = hashlib.sha256(repr((target, sorted(files.items()))).encode()).hexdigest()[:12]
    folder = out / f"{target}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    traceback.print_exception(finding)
    print(f"\nfeed it again: python tests/fuzz/fuzzer.py --again {folder}\n", flush=True)
    return folder


def main() -> int:
    """Fuzz, or feed a finding again; 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Feed damaged artefacts to their readers.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="for findings")
    parser.add_argument("--again", type=Path, help="a finding's folder")
    options = parser.parse_args()
    if options.again is not None:
        target = options.again.name.split("-")[0]
        print(TARGETS[target](options.again))
        return 0
    outcome = fuzz(options.seconds, options.seed, options.out, options.target or tuple(TARGETS))
    print(f"{outcome.executions} executions, {len(outcome.findings)} findings")
    for kind, count in sorted(outcome.outcomes.items()):
        print(f"  {kind}: {count}")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
