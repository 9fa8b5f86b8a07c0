"""Which files of a vector's folder a signature covers, and whether they are still those.

All of them, but for the signature itself and hidden names: what a download, a version control
system or an interrupted run leaves there begins with a dot, and nothing of that name is ever
read as a part of a vector.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from enchtable_vllm.errors import SignatureError, summarize_faults
from enchtable_vllm.signing.signature import HASHES, SIGN_AGAIN, SIGNATURE_FILE, VectorSignature


def covered_files(folder: Path, what: str, *, links: bool = False) -> list[str]:
    """The paths, inside the folder, of the files that a signature covers, in order.

    Args:
        folder: The vector's.
        what: The vector, for messages.
        links: Whether files may be links: those of a Hub cache's snapshot are.

    Raises:
        SignatureError: Something there is neither a folder nor a file, or cannot be read.
    """
    found: list[str] = []
    faults: list[str] = []
    for path in _visible(folder, faults):
        inside = path.relative_to(folder).as_posix()
        try:
            mode = (path.stat() if links else path.lstat()).st_mode
        except OSError as error:
            faults.append(f"'{inside}': {error}")
            continue
        if stat.S_ISLNK(mode):
            faults.append(f"'{inside}' is a link")
        elif not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            faults.append(f"'{inside}' is neither a file nor a folder")
        elif stat.S_ISREG(mode) and inside != SIGNATURE_FILE:
            found.append(inside)
    if faults:
        raise SignatureError(
            what,
            expected="a folder that holds its files itself",
            got=summarize_faults(sorted(faults)),
            fix="Put the files themselves there, and check their permissions.",
        )
    return sorted(found)


def check_folder(signature: VectorSignature, folder: Path, *, links: bool = False) -> int:
    """Check every file of a folder against its signature, to the last byte.

    Args:
        signature: As it was read from this folder.
        folder: It.
        links: As for `covered_files`.

    Returns:
        How many files it covers.

    Raises:
        SignatureError: Files were added, removed or changed since; all of them at once.
    """
    present = set(covered_files(folder, signature.what, links=links))
    signed = signature.digests
    faults = [f"'{name}' was added" for name in sorted(present - signed.keys())]
    faults += [f"'{name}' is missing" for name in sorted(signed.keys() - present)]
    for name in sorted(present & signed.keys()):
        algorithm, digest = signed[name]
        if _file_digest(folder / name, algorithm) != digest:
            faults.append(f"'{name}' was changed")
    if faults:
        raise SignatureError(
            signature.what,
            expected=f"the {len(signed)} files that were signed",
            got=summarize_faults(faults),
            fix=f"Restore the files. If they are as they should be: {SIGN_AGAIN}",
        )
    return len(signed)


def _visible(folder: Path, faults: list[str]) -> Iterator[Path]:
    """All that lies in a folder, at any depth, under no hidden name."""
    walk = os.walk(folder, onerror=lambda error: faults.append(str(error)))
    for parent, folders, files in walk:
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in (*folders, *files) if not name.startswith("."))


def _file_digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, HASHES[algorithm]).hexdigest()
