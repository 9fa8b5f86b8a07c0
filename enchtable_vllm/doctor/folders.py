"""Folders: the cache that plans are kept in, and the root that a server takes vectors from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from enchtable_vllm.doctor.finding import Finding
from enchtable_vllm.doctor.permissions import check_permissions
from enchtable_vllm.envs import plans_folder
from enchtable_vllm.errors import EnchTableError


def check_cache() -> Finding:
    """Whether a computed plan can be kept: proven by writing, where the folder is or would be."""
    folder = plans_folder()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".enchtable-doctor-"):
            pass
    except OSError as error:
        return Finding(
            "cache",
            "fail",
            f"'{folder}' cannot be written to",
            f"{type(error).__name__}: {error}",
            "Set ENCHTABLE_CACHE to a folder that can, or make plans ahead with 'enchtable plan'.",
        )
    return Finding("cache", "ok", f"'{folder}' can be written to")


def check_vector_root(root: Path) -> list[Finding]:
    """Whether a server can take vectors from here, and nobody else can put one there.

    Args:
        root: Holds one folder for each vector.
    """
    name = f"vector root '{root}'"
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        cure = "Check the path and its permissions."
        return [Finding(name, "fail", "not a readable folder", f"{error}", cure)]
    findings = list(check_permissions(name, root))
    opened = [_check_vector(folder) for folder in folders]
    if not opened:
        cure = "Put each vector into a folder of its own inside it."
        findings.append(Finding(name, "warn", "empty", "it holds no folder", cure))
    elif not findings:
        findings.append(Finding(name, "ok", f"{len(opened)} folder(s), readable"))
    return findings + opened


def _check_vector(folder: Path) -> Finding:
    name = f"vector '{folder.name}'"
    try:
        from enchtable_vllm.plan.vector_root import is_vector_name
        from enchtable_vllm.vector import SafetyVector

        if not is_vector_name(folder.name):  # such as a file system's own
            return Finding(name, "skip", "passed over, by its name: no vector can have it")
        vector = SafetyVector.open(folder)
    except ModuleNotFoundError as error:
        return Finding(name, "skip", f"cannot be read here: {error}")
    except EnchTableError as error:
        return Finding.refused(name, error)
    except OSError as error:
        return Finding(name, "fail", "cannot be read", f"{error}", "Check its permissions.")
    manifest = vector.manifest
    return Finding(
        name,
        "ok",
        f"manifest and headers agree: {len(manifest.tensors)} tensors, scope {manifest.scope}, "
        f"of '{manifest.aligned.id}'",
    )
