"""Everything that reads an artefact: library calls, what a server does, and the command."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import models
import typer
from corpus import seeds
from corpus.damage import Damage
from models import Family
from safetensors.torch import load_file

from enchtable_vllm import cli
from enchtable_vllm.checkpoint import Location, combine_digests, locate, tensor_digest
from enchtable_vllm.errors import EnchTableError
from enchtable_vllm.merge import MergeStream, TensorMerge, merge_checkpoint
from enchtable_vllm.plan import open_masks, read_plan, resolve_plan
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.prepare import Prepared, prepare_model
from enchtable_vllm.vector import SafetyVector, build_vector


@dataclass(frozen=True)
class Consumer:
    """One reader.

    Attributes:
        name: ``library:`` or ``command:`` and what it does.
        reads: The artefacts that it reads.
        run: (family, an empty folder for outputs) → what came out, comparable; raises
            `EnchTableError` where the input is refused.
    """

    name: str
    reads: frozenset[str]
    run: Callable[[Family, Path], object]


class RefusedByCommandError(Exception):
    """The command ended with code 1; its text is standard error's."""


_made = functools.cache(lambda: typer.main.get_command(cli.app))


def command(*arguments: object) -> str:
    """`enchtable` in this process, through its real entry point; its standard output."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    argv = mock.patch.object(sys, "argv", ["enchtable", *map(str, arguments)])
    # What typer makes of the app at every start; making it takes longer than most refusals.
    app = mock.patch.object(cli, "app", _made())
    try:
        with argv, app, redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    if code == 1:
        raise RefusedByCommandError(err.getvalue())
    assert code == 0, err.getvalue()
    return out.getvalue()


def refusal(run: Callable[[], object]) -> tuple[str | None, object]:
    """(the message of a refusal or None, the result). Anything else is a crash and goes on."""
    try:
        return None, run()
    except EnchTableError as error:
        return f"{type(error).__name__}: {error}", None
    except RefusedByCommandError as error:
        return str(error), None


def read_vector(family: Family, _: Path | None = None) -> object:
    """As planning reads."""
    vector = SafetyVector.open(family.vector)
    return {name: tensor_digest(vector.dense(name)[0]) for name in vector.tensors}


def compute_plan(family: Family, _: Path) -> object:
    return models.plan_for(family.task, family.base, family.vector, beta=0.5).to_json()


def build(family: Family, out: Path) -> object:
    return build_vector(locate(family.aligned), locate(family.surrogate), out / "v").manifest


def resolve(family: Family, _: Path | None = None) -> object:
    return resolve_plan(*read_plan(family.plan)).coefficients


def merge(family: Family, out: Path) -> object:
    plan, digest = read_plan(family.plan)
    vector, resolved = SafetyVector.open(family.vector), resolve_plan(plan, digest)
    masks = open_masks(plan, family.plan)
    location = Location(family.task)
    return merge_checkpoint(location, vector, resolved, out / "m", masks=masks).merged_digest


def stream(prepared: Prepared, family: Family) -> object:
    """As the loader streams: every stored tensor through the one merged stream."""
    what, masks = prepared.task.checkpoint.what, prepared.masks
    through = MergeStream(TensorMerge(prepared.resolved, prepared.vector, what=what, masks=masks))
    stored = through.merge(seeds.stored(family.task).items())
    merged = {name: tensor_digest(tensor) for name, tensor in stored}
    assert through.report is not None
    prepared.task.checkpoint.refuse_changed()
    return combine_digests(merged)


def serve(family: Family, _: Path) -> object:
    config = LoaderConfig.parse({})
    return stream(prepare_model(config, str(family.task), None, None, device="cpu"), family)


def serve_with_base(family: Family, out: Path) -> object:
    """The plan is computed at load, and kept in a cache: an output as well."""
    keys = {"base_model": str(family.base), "safety_vector": str(family.vector), "beta": 0.5}
    with mock.patch.dict(os.environ, ENCHTABLE_CACHE=str(out / "cache")):
        prepared = prepare_model(
            LoaderConfig.parse(keys), str(family.task), None, None, device="cpu"
        )
    return stream(prepared, family)


def _plan_command(family: Family, out: Path, *options: object) -> object:
    names = ("--task-model", family.task, "--base-model", family.base)
    command("plan", *names, "--safety-vector", family.vector, "-o", out / "p.json", *options)
    return (out / "p.json").read_text()


def _masks_command(family: Family, out: Path) -> object:
    return _plan_command(family, out, "--density", "0.5", "--mask", "drop-sign-conflicts")


def _merge_command(family: Family, out: Path) -> object:
    names = ("--task-model", family.task, "--safety-vector", family.vector, "--plan", family.plan)
    command("merge", *names, "-o", out / "m")
    return {n: tensor_digest(t) for n, t in load_file(out / "m" / "model.safetensors").items()}


def _build_command(family: Family, out: Path, *options: object) -> object:
    ends = ("--aligned", family.aligned, "--surrogate", family.surrogate)
    command("vector", "build", *ends, "-o", out / "v", *options)
    return (out / "v" / "safety_vector.json").read_text()


def _factors_command(family: Family, out: Path) -> object:
    return _build_command(family, out, "--dtype", "int8", "--factors")


def _consumer(name: str, reads: str, run: Callable[[Family, Path], object]) -> Consumer:
    return Consumer(name, frozenset(reads.split()), run)


CONSUMERS = (
    _consumer("read", "vector", read_vector),
    _consumer("resolve", "plan", resolve),
    _consumer("plan", "vector factors task base", compute_plan),
    _consumer("merge", "vector plan masks task", merge),
    _consumer("serve", "vector plan masks task", serve),
    _consumer("serve with base", "vector factors task base", serve_with_base),
    _consumer("build", "aligned surrogate", build),
    _consumer(
        "command: verify",
        "vector factors",
        lambda f, _: command("vector", "verify", f.vector) and None,
    ),
    _consumer("command: plan", "vector factors task base", _plan_command),
    _consumer("command: plan with masks", "vector factors task base", _masks_command),
    _consumer("command: merge", "vector plan masks task", _merge_command),
    _consumer("command: build", "aligned surrogate", _build_command),
    _consumer("command: build with factors", "aligned surrogate", _factors_command),
)


@dataclass(frozen=True)
class Reference:
    """A good family and every consumer's result."""

    family: Family
    results: dict[str, object]


def reference(family: Family, out: Path) -> Reference:
    """Run every consumer on what is good: none may refuse."""
    results = {}
    for consumer in CONSUMERS:
        (out / consumer.name).mkdir(parents=True)
        message, results[consumer.name] = refusal(lambda c=consumer: c.run(family, out / c.name))
        assert message is None
    return Reference(family, results)


def check_refused(good: Reference, family: Family, damage: Damage, out: Path) -> None:
    """A damaged family through every consumer: a clear refusal, and nothing left behind."""
    root, refused = family.task.parent, 0
    before = files(root)
    for consumer in CONSUMERS:
        if damage.artefact not in consumer.reads:
            continue
        folder = out / consumer.name
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # for tests without root's permissions
        message, result = refusal(lambda c=consumer, o=folder: c.run(family, o))
        if consumer.name in damage.blind | damage.other:
            assert message is None, f"{consumer.name}: {message}"
            assert consumer.name in damage.other or result == good.results[consumer.name]
            continue
        assert message is not None, f"{consumer.name} took it"
        assert well_formed(message), message
        assert re.search(damage.message, message), f"{consumer.name}: {message}"
        assert left(folder) == [], consumer.name
        refused += 1
    assert refused
    assert files(root) == before


def well_formed(message: str) -> bool:
    """One line: what, where: expected X, got Y. Do Z."""
    form = r"\w+Error: .+: expected .+, got .*\. .+[.)]"
    return re.fullmatch(form, message.strip()) is not None


def left(folder: Path) -> list[Path]:
    """What lies in an output folder that should not.

    A cache may keep its locks and its whole plans, and a plan that was interrupted, by a full
    disk too, the journal that it is resumed from.
    """
    cached = {*folder.glob("cache/plans/*.lock")}
    plans = folder.glob("cache/plans/*.json")
    cached |= {p for p in plans if refusal(functools.partial(read_plan, p))[1] is not None}
    found = [p for p in folder.rglob("*") if p not in cached and p.suffix != ".journal"]
    return [p for p in found if not p.is_dir()]


def files(folder: Path) -> dict[Path, object]:
    """Every file's bytes; of what is none, or huge, its kind and size."""
    found: dict[Path, object] = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat()
        small = stat.S_ISREG(kind.st_mode) and kind.st_size < 10_000_000
        readable = small and kind.st_mode & stat.S_IROTH
        found[path] = path.read_bytes() if readable else kind.st_mode
    return found
