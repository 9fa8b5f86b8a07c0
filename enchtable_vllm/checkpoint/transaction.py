"""Outputs appear whole or not at all, whatever happens on the way.

An output is written beside its target, under a hidden name, and renamed at the end. A failure
or an interrupt removes it; what a killed run left behind is removed by the next one. A lock
file beside the target, held while writing, tells a killed run from a living one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from enchtable_vllm.errors import ConfigError

#: What file systems answer that know no locks: two writers are not told apart there.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class _Transaction:
    """What folders and files have in common.

    Args:
        target: Where the output is to appear.

    Attributes:
        path: Where it is written until then.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self._what = f"output '{target}'"
        self._lock = -1

    def _create(self) -> None:
        raise NotImplementedError

    def _commit(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._create()
            except BaseException:
                _remove(self.path)
                self._release_lock()
                raise
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as fault:
            raise self._unwritable(fault) from fault
        finally:
            _remove(self.path)
            self._release_lock()
        if isinstance(error, OSError):
            raise self._unwritable(error) from error

    def _take_lock(self) -> int:
        path = self._lock_path()
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise ConfigError(
                    self._what,
                    expected="one process at a time that writes it",
                    got="another one that is at it",
                    fix="Wait for it, or choose another output.",
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(lock)
                    raise
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(lock)):
                    return lock
            os.close(lock)  # its holder finished, and removed it, between the two calls

    def _release_lock(self) -> None:
        self._lock_path().unlink(missing_ok=True)
        os.close(self._lock)

    def _lock_path(self) -> Path:
        return self.target.with_name(f".{self.target.name}.lock")

    def _unwritable(self, error: Exception) -> ConfigError:
        return ConfigError(
            self._what,
            expected="a place with room and permission to write",
            got=error,
            fix="Nothing was left behind: make room, or choose another output, and try again.",
        )


class FolderTransaction(_Transaction):
    """A folder that appears whole or not at all.

    Use as a context manager: write into the folder that it gives; on success it is renamed to
    ``target``, on any failure it is removed.

    Args:
        target: Where the folder is to appear.
        overwrite: Replace what is there.
        inputs: Folders that are being read: ``target`` may neither be nor hold one.

    Raises:
        ConfigError: ``target`` is in use and not to be replaced, is an input, is being written
            by another process, or cannot be written.
    """

    def __init__(
        self, target: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()
    ) -> None:
        super().__init__(target)
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._overwrite = overwrite
        if any(path.resolve().is_relative_to(self.target.resolve()) for path in inputs):
            raise ConfigError(
                self._what,
                expected="a folder that holds none of the inputs",
                got="one that does",
                fix="Choose another folder.",
            )
        try:
            self._refuse_in_use()
        except OSError as error:  # no permission to look, a name too long
            raise self._unwritable(error) from error

    def _refuse_in_use(self) -> None:
        target = self.target
        is_folder = target.is_dir() and not target.is_symlink()
        if is_folder and (self._overwrite or not any(target.iterdir())):
            return
        if target.exists() or target.is_symlink():
            raise ConfigError(
                self._what,
                expected="a new or empty folder",
                got="one that is in use" if is_folder else "something else than a folder",
                fix="Choose another, or replace it with --overwrite."
                if is_folder
                else "Choose another name.",
            )

    def _create(self) -> None:
        if self._replaced.exists() and not self.target.exists():
            self._replaced.rename(self.target)  # an earlier run was killed between two renames
        _remove(self._replaced)
        _remove(self.path)
        self.path.mkdir()

    def _commit(self) -> None:
        self._refuse_in_use()  # still
        if self.target.exists():
            self.target.rename(self._replaced)
        try:
            self.path.rename(self.target)
        except BaseException:
            if self._replaced.exists():
                self._replaced.rename(self.target)
            raise
        _remove(self._replaced)


class FileTransaction(_Transaction):
    """A file that appears whole or not at all, and replaces an older one.

    Use as a context manager: write the file that it names; on success it is renamed to
    ``target``, on any failure it is removed.

    Args:
        target: Where the file is to appear.

    Raises:
        ConfigError: ``target`` is something else than a file, is being written by another
            process, or cannot be written.
    """

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        try:
            mode = self.target.lstat().st_mode
        except (OSError, ValueError):  # none there, or nothing that could be: found on entering
            return
        if not stat.S_ISREG(mode):  # renaming over /dev/null would replace the device
            raise ConfigError(
                self._what,
                expected="the name of a file",
                got="something else that is there",
                fix="Choose another name.",
            )

    def _create(self) -> None:
        _remove(self.path)
        self.path.touch(exist_ok=False)

    def _commit(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.path.rename(self.target)


class AdditionTransaction(_Transaction):
    """Files that join those of a folder: one of these, written last, says that they are there.

    Use as a context manager: write them all into the folder that it gives, under names that begin
    with the stem, and a new ``index``; on success they replace those that are there. A failure
    leaves what is there, and a kill while they are exchanged a folder whose index names none.

    Args:
        folder: That they join.
        stem: What their names begin with.
        index: The name of the file that says that they are there.
        without: Its content where they are not.

    Raises:
        ConfigError: The folder is being written to by another process, or cannot be.
    """

    def __init__(self, folder: Path, stem: str, *, index: str, without: str) -> None:
        super().__init__(folder / stem)
        self._index, self._without = index, without

    def _create(self) -> None:
        _remove(self.path)
        self.path.mkdir()
        (self.path / f".{self._index}").write_text(self._without, encoding="utf-8")

    def _commit(self) -> None:
        folder = self.target.parent
        (self.path / f".{self._index}").rename(folder / self._index)
        for old in folder.glob(f"{self.target.name}*"):
            old.unlink()
        for new in sorted(self.path.iterdir(), key=lambda path: path.name == self._index):
            new.rename(folder / new.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
