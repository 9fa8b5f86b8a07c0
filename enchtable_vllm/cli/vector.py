"""``enchtable vector``: build, inspect, sign, verify."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.checkpoint import locate, short
from enchtable_vllm.checkpoint.safetensors_file import stored_bytes
from enchtable_vllm.cli.options import DeviceOption, JobsOption, JsonOption, check_device
from enchtable_vllm.cli.output import out, print_json, progress_bar, say, warn
from enchtable_vllm.cli.sign import RequireSignatureOption, sign, signed_by
from enchtable_vllm.errors import ConfigError, SafetyVectorError
from enchtable_vllm.files import read_json
from enchtable_vllm.vector import SafetyVector, Scope, add_factors, build_vector
from enchtable_vllm.vector.build import StoredDtype
from enchtable_vllm.vector.factor_files import factor_bytes, verify_factors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Build, inspect, sign and verify safety vectors.",
)
app.command()(sign)

VectorArgument = Annotated[str, typer.Argument(help="Folder, or Hub id\\[@revision].")]
RankFraction = Annotated[float, typer.Option(help="γ of the plans that will use the factors.")]
ShardGigabytes = Annotated[float, typer.Option(help="Larger files are sharded.", min=1e-6)]


@app.command()
def build(
    aligned: Annotated[str, typer.Option(help="The safe model: folder or Hub id\\[@revision].")],
    surrogate: Annotated[str, typer.Option(help="The model distilled from it to be unsafe.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The vector's folder.")],
    scope: Annotated[Scope, typer.Option(help="Which parameters.")] = "attention",
    dtype: Annotated[
        StoredDtype, typer.Option(help="How deltas are stored; int8 has a scale for each 64.")
    ] = "bf16",
    recipe: Annotated[
        Path | None, typer.Option(help="A JSON object to record: how the surrogate was made.")
    ] = None,
    factors: Annotated[
        bool, typer.Option("--factors", help="Cache what a plan needs of it; see 'factor'.")
    ] = False,
    rank_fraction: RankFraction = 0.5,
    max_shard_gb: ShardGigabytes = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a safety vector: aligned − surrogate.

    Give fp32 checkpoints: two 16-bit ones differ only where a change was large enough to
    survive rounding.
    """
    shard_bytes = _shard_bytes(max_shard_gb)
    with progress_bar("Building") as progress:
        report = build_vector(
            locate(aligned, what="aligned model"),
            locate(surrogate, what="surrogate"),
            output,
            scope=scope,
            dtype=dtype,
            recipe=_read_recipe(recipe),
            max_shard_bytes=shard_bytes,
            factors=rank_fraction if factors else None,
            overwrite=overwrite,
            progress=progress,
        )
    for warning in report.warnings:
        warn(warning)
    vector = SafetyVector.open(output)
    if as_json:
        print_json({**_summary(vector), "unchanged": list(report.unchanged)})
        return
    _print_summary(vector)
    if report.unchanged:
        say(f"{len(report.unchanged)} tensors in scope are identical in both: left out")
    say("Handle it like the surrogate: subtracted from the aligned model it gives that model back.")


@app.command(name="factor")
def add(
    vector: Annotated[Path, typer.Argument(help="The vector's folder.", exists=True)],
    rank_fraction: RankFraction = 0.5,
    device: DeviceOption = "cpu",
    jobs: JobsOption = None,
    max_shard_gb: ShardGigabytes = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Cache what a plan needs of a vector beside it: about half of a plan's work.

    The vector itself, its fingerprint and the plans made with it stay what they are.
    """
    with progress_bar("Factoring") as progress:
        add_factors(
            SafetyVector.open(vector),
            rank_fraction=rank_fraction,
            device=check_device(device),
            jobs=jobs,
            max_shard_bytes=_shard_bytes(max_shard_gb),
            progress=progress,
        )
    opened = SafetyVector.open(vector)
    if as_json:
        print_json(_summary(opened))
    else:
        _print_summary(opened)


def _shard_bytes(gigabytes: float) -> int:
    if math.isnan(gigabytes):  # which no bound of the option's catches
        raise ConfigError("--max-shard-gb", expected="a number", got=gigabytes, fix="Give one.")
    return int(gigabytes * 1e9)


@app.command()
def inspect(vector: VectorArgument, as_json: JsonOption = False) -> None:
    """Print what a vector says of itself; headers are checked, contents are not."""
    opened = SafetyVector.open(vector)
    if as_json:
        print_json(_summary(opened) | {"manifest": opened.manifest.model_dump(mode="json")})
        return
    _print_summary(opened)
    table = Table("tensor", "shape", "dtype", "norm", "digest", box=None)
    for name, tensor in opened.tensors.items():
        shape = "×".join(map(str, tensor.shape))
        table.add_row(escape(name), shape, tensor.dtype, f"{tensor.norm:.4g}", short(tensor.digest))
    out.print(table)


@app.command()
def verify(
    vector: VectorArgument,
    require_signature: RequireSignatureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte against the manifest's digests, and every norm and value.

    With --require-signature first every file, the plans too, against its signature.
    """
    signature = signed_by(vector, require_signature)
    opened = SafetyVector.open(vector)
    names = list(opened.tensors)
    with progress_bar("Verifying") as progress:
        for done, name in enumerate(names, 1):
            opened.dense(name)
            progress(name, done, len(names))
    total = math.hypot(*(tensor.norm for tensor in opened.tensors.values()))
    if not math.isclose(opened.manifest.norm, total, rel_tol=1e-6):
        raise SafetyVectorError(
            f"{opened.what}, total",
            expected=f"norm {opened.manifest.norm}",
            got=total,
            fix="The manifest was edited: fetch or build the vector again.",
        )
    verify_factors(opened)
    if as_json:
        signer = {} if signature is None else {"signed_by": signature[0]}
        print_json(_summary(opened) | {"verified": True} | signer)
    else:
        if signature is not None:
            say(f"{signature[1]} files verified, signed: {signature[0]}")
        say(f"{len(names)} tensors verified: {opened.name} {opened.fingerprint}")


def _read_recipe(path: Path | None) -> dict[str, object] | None:
    if path is None:
        return None
    try:
        value, _ = read_json(path)
    except (OSError, ValueError) as error:
        value = error
    if not isinstance(value, dict):
        raise ConfigError(
            f"--recipe '{path}'", expected="a file with a JSON object", got=value, fix="Check it."
        )
    return value


def _summary(vector: SafetyVector) -> dict[str, object]:
    manifest = vector.manifest
    return {
        "name": vector.name,
        "location": str(vector.location),
        "fingerprint": vector.fingerprint,
        "aligned": manifest.aligned.model_dump(mode="json"),
        "surrogate": manifest.surrogate.model_dump(mode="json"),
        "architecture": manifest.architecture,
        "scope": manifest.scope,
        "tensors": len(manifest.tensors),
        "bytes": sum(
            stored_bytes(held.dtype, held.shape) or 0
            for name, tensor in manifest.tensors.items()
            for held in tensor.stored(name)
        ),
        "norm": manifest.norm,
        "zero_share": manifest.zero_share,
        "factors": None
        if manifest.factors is None
        else {"rank_fraction": manifest.factors.rank_fraction, "bytes": factor_bytes(vector)},
    }


def _print_summary(vector: SafetyVector) -> None:
    summary, manifest = _summary(vector), vector.manifest
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("safety vector", escape(str(summary["location"])))
    table.add_row("fingerprint", vector.fingerprint)
    for role, model in (("aligned model", manifest.aligned), ("surrogate", manifest.surrogate)):
        table.add_row(role, f"{escape(model.id)} {short(model.fingerprint)}")
    table.add_row("architecture", escape(manifest.architecture))
    table.add_row("scope", manifest.scope)
    table.add_row("tensors", f"{summary['tensors']} ({summary['bytes']:,} bytes)")
    table.add_row("norm", f"{manifest.norm:.6g}")
    table.add_row("exact zeros", f"{manifest.zero_share:.2%}")
    if manifest.factors is not None:
        gamma, size = manifest.factors.rank_fraction, factor_bytes(vector)
        table.add_row("cached factors", f"for rank fraction {gamma:g} ({size:,} bytes)")
    out.print(table)
