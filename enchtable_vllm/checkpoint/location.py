"""Where a model, a vector or a plan is: a local folder, or a Hub repository at a commit."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from enchtable_vllm.errors import CheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: ``organisation/name``.
REPO_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"

#: Weights in safetensors, and the small files around them.
MODEL_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
)
#: Asked for only where a repository has no safetensors, as vLLM does.
PICKLED_PATTERNS = ("*.bin",)


_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def nothing_downloaded() -> Iterator[None]:
    """Within this, a Hub repository is found where it has been downloaded, or not at all."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


@dataclass(frozen=True)
class Location:
    """A resolved folder and where it came from.

    Attributes:
        path: The local folder.
        repo_id: The Hub repository, or None for a local folder.
        commit: The Hub commit (40 hex digits), or None.
    """

    path: Path
    repo_id: str | None = None
    commit: str | None = None

    @property
    def home(self) -> Path:
        """Where its files may lie: the folder; of a Hub cache's snapshot, also its blobs."""
        folder = self.path.resolve()
        return folder.parent.parent if self.repo_id is not None else folder

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit}" if self.repo_id else str(self.path)


def locate(
    reference: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_patterns: tuple[str, ...] = MODEL_PATTERNS,
    what: str = "model",
) -> Location:
    """Turn a folder, ``org/name`` or ``org/name@revision`` into a local folder.

    Args:
        reference: What the user wrote.
        revision: Branch, tag or commit; the same as ``@revision``.
        cache_dir: The Hub cache; huggingface_hub's own by default.
        allow_patterns: Which files to download.
        what: The thing's name in an error message.

    Raises:
        CheckpointError: There is no such folder and it cannot be downloaded.
    """
    try:
        path = Path(reference).expanduser()
        if path.is_dir():
            return local(path)
    except PermissionError as error:
        raise CheckpointError(
            f"{what} '{reference}'",
            expected="a folder that can be read",
            got=error,
            fix="Check its permissions, and those of the folders it lies in.",
        ) from error
    except (RuntimeError, OSError, ValueError):  # no such home, a path too long, a NUL in it
        pass
    repo_id, _, at = str(reference).partition("@")
    if not re.match(REPO_ID, repo_id):
        raise CheckpointError(
            f"{what} '{reference}'",
            expected="an existing folder or a Hub id such as 'org/name' or 'org/name@revision'",
            got="neither",
            fix="Check the path; a relative one starts at the current folder.",
        )
    return on_hub(
        repo_id,
        at or revision,
        cache_dir=cache_dir,
        allow_patterns=allow_patterns,
        what=what,
    )


def local(folder: Path) -> Location:
    """A folder on this machine; inside a Hub cache, with the repository it came from."""
    folder = folder.resolve()
    return Location(folder, *_cached_repo(folder))


def on_hub(
    repo_id: str,
    revision: str | None,
    *,
    cache_dir: str | Path | None = None,
    allow_patterns: tuple[str, ...] = MODEL_PATTERNS,
    what: str = "model",
) -> Location:
    """A Hub repository, never a folder that happens to have its name.

    Raises:
        CheckpointError: It cannot be downloaded.
    """
    try:
        download = functools.partial(
            snapshot_download,
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=not _downloads.get(),
        )
        folder = download(allow_patterns=list(allow_patterns))
        if allow_patterns is MODEL_PATTERNS and not any(Path(folder).glob("*.safetensors")):
            folder = download(allow_patterns=[*allow_patterns, *PICKLED_PATTERNS])
    except Exception as error:  # what a network does to a download is in no list
        if not _downloads.get():
            raise CheckpointError(
                f"{what} '{repo_id}@{revision or 'main'}'",
                expected="an existing folder, or a Hub repository that has been downloaded",
                got="neither",
                fix="Check the path, or download it first: this check does not. "
                f"'hf download {repo_id}' does.",
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{what} '{repo_id}@{revision or 'main'}'",
            expected="an existing folder or a Hub repository that can be downloaded",
            got=f"{type(error).__name__}: {reason}",
            fix="Check the id, the revision, HF_TOKEN and the network, or give a local folder.",
        ) from error
    path = Path(folder)
    commit = path.name if _COMMIT.fullmatch(path.name) else None
    return Location(path, repo_id, commit)


def _cached_repo(path: Path) -> tuple[str | None, str | None]:
    """(repository, commit) of a folder that lies in a Hub cache: vLLM hands those over as paths."""
    if path.parent.name != "snapshots" or not _COMMIT.fullmatch(path.name):
        return None, None
    kind, *parts = path.parent.parent.name.split("--")
    return ("/".join(parts), path.name) if kind == "models" and len(parts) == 2 else (None, None)
