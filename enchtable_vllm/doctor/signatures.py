"""Required signatures: whether they can be checked here, and which vectors of a root have them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from enchtable_vllm.doctor.finding import Finding
from enchtable_vllm.errors import EnchTableError

if TYPE_CHECKING:
    from enchtable_vllm.signing import Requirement

_NAME = "required signature"


def check_signatures(asked: str, root: Path | None) -> list[Finding]:
    """As a server with this ``require_signature`` would see it.

    Args:
        asked: A public key's path, or the loader's object as JSON.
        root: A folder of vectors, if their signatures are to be checked too.
    """
    try:
        from enchtable_vllm.signing import parse_requirement
    except ModuleNotFoundError as error:
        return [Finding(_NAME, "skip", f"cannot be checked here: {error}")]
    try:
        requirement = parse_requirement(asked)
        if not requirement.files:  # a check downloads nothing
            return [_would_fetch()]
        findings = [_check_requirement(requirement)]
    except EnchTableError as error:
        return [Finding.refused(_NAME, error)]
    folders = sorted(root.iterdir()) if root is not None and root.is_dir() else []
    vectors = [folder for folder in folders if folder.is_dir()]
    return findings + [_check_vector(folder, requirement) for folder in vectors]


def _would_fetch() -> Finding:
    return Finding(
        _NAME,
        "warn",
        "Sigstore's public instance; no signature was checked",
        "without 'trust_config' each rank fetches its trust root, at each start and swap",
        "Give 'trust_config', a file: then nothing is fetched, and signatures are checked here.",
    )


def _check_requirement(requirement: Requirement) -> Finding:
    """The files that it names: read, as the loader reads them, and written by nobody else."""
    from enchtable_vllm.signing.library import verifier

    who = verifier(requirement).accepts
    open_to_others = [path for path in requirement.files if _writable_by_others(path)]
    if open_to_others:
        return Finding(
            _NAME,
            "fail",
            f"accepts {who}",
            f"'{open_to_others[0]}' can be written to by others than its owner",
            f"Whoever writes there decides who may sign: chmod go-w '{open_to_others[0]}'.",
        )
    return Finding(_NAME, "ok", f"accepts {who}")


def _check_vector(folder: Path, requirement: Requirement) -> Finding:
    """What the loader reads of it, but for tensors: signature, manifest, and every plan."""
    from enchtable_vllm.checkpoint import local
    from enchtable_vllm.signing import open_signed

    name = f"signature of vector '{folder.name}'"
    try:
        _, signature = open_signed(local(folder), requirement)
        assert signature is not None  # because one is required
        plans = list(_plans(folder))
        for path in plans:
            signature.vouch_plan(path, path.read_bytes())
    except EnchTableError as error:
        return Finding.refused(name, error)
    except OSError as error:
        return Finding(name, "fail", "cannot be read", f"{error}", "Check its permissions.")
    return Finding(name, "ok", f"{signature.signed_by}; {len(plans)} plan(s)")


def _plans(folder: Path) -> Iterator[Path]:
    from enchtable_vllm.plan.vector_root import PLANS_FOLDER

    yield from sorted((folder / PLANS_FOLDER).glob("[!.]*.json"))


def _writable_by_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
