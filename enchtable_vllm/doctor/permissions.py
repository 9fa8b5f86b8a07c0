"""Who may change what a vector root holds, and whether this user can read it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from enchtable_vllm.doctor.finding import Finding

#: Where a system can only be asked about the real user, that one is meant.
_AS_IT_IS = os.access in os.supports_effective_ids


def check_permissions(name: str, root: Path) -> Iterator[Finding]:
    """What is wrong with them, the gravest first; nothing where all is well.

    Args:
        name: Of the findings.
        root: A folder that can be read.
    """
    unreadable: list[Path] = []
    paths = list(_below(root, unreadable))
    if unreadable:
        yield Finding(
            name,
            "fail",
            f"{len(unreadable)} path(s) that this user cannot read",
            _first(unreadable),
            "A server of this user cannot load what is there: check its permissions.",
        )
    above = [folder for folder in root.resolve().parents if _anybody_may_rename_in(folder)]
    if above:
        yield Finding(
            name,
            "fail",
            f"{len(above)} folder(s) above it that every user of this machine can write to",
            _first(above),
            f"Whoever writes there can put another root in its place: chmod o-w '{above[0]}'.",
        )
    by_all = [path for path in paths if path.stat().st_mode & stat.S_IWOTH]
    by_group = [path for path in paths if path.stat().st_mode & stat.S_IWGRP]
    if by_all:
        yield Finding(
            name,
            "fail",
            f"{len(by_all)} path(s) that every user of this machine can write to",
            _first(by_all),
            f"Whoever writes there chooses what is served: chmod -R o-w '{root}'.",
        )
    elif by_group:
        yield Finding(
            name,
            "warn",
            f"{len(by_group)} path(s) that a whole group can write to",
            f"{_first(by_group)}, group {by_group[0].stat().st_gid}",
            "Whoever is in it chooses what is served. Where that is more than this server and "
            f"who looks after it: chmod -R g-w '{root}'.",
        )
    others = [path for path in paths if path.stat().st_uid not in (0, os.geteuid())]
    if others:
        yield Finding(
            name,
            "warn",
            f"{len(others)} path(s) that belong to another user than root and this one",
            f"{_first(others)}, user {others[0].stat().st_uid}",
            "An owner can change a file whatever its mode. Where that is not who looks after this "
            f"server: chown -R root '{root}'.",
        )


def _below(root: Path, unreadable: list[Path]) -> Iterator[Path]:
    """Every path, the root itself among them; those that cannot be read are noted, too."""

    def note(error: OSError) -> None:
        unreadable.append(Path(error.filename))

    for folder, _, files in os.walk(root, onerror=note):
        for path in (Path(folder), *(Path(folder, file) for file in sorted(files))):
            # A link's own permissions mean nothing; what it leads to is what counts.
            if path.exists():
                yield path
                if not os.access(path, os.R_OK, effective_ids=_AS_IT_IS):
                    unreadable.append(path)


def _anybody_may_rename_in(folder: Path) -> bool:
    """In a sticky one, as /tmp is, only an entry's owner may."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _first(paths: Sequence[Path]) -> str:
    return f"the first: '{paths[0]}'"
