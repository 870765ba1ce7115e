"""Let one process at a time write into a run's folder, and keep other programs' files there."""

import errno
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from celbo import checkpoint
from celbo.errors import StorageError, UsageError

__all__ = ["WRITTEN", "claimed_folder"]

WRITTEN = (
    "model",
    "embedding.h5ad",
    "metrics.json",
    "history.jsonl",
    "run.json",
    "diagnosis.json",
    "cure.json",
    "choice.json",
    "latent.png",
    "report.html",
)
"""Names of the files and folders that a run may write into its folder."""

_LOCK = ".celbo-lock"
_MARKER = ".celbo-lock-marker"
"""File that stands for the lock on file systems that cannot lock files."""
_CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_SECONDS_TO_WAIT = 0.2
"""A lock that is being released, or a marker of a dead process, is free after the first or second try."""


@contextmanager
def claimed_folder(
    path: Path, data: Path | None = None, *, otherwise: str = "name another folder with -o"
) -> Iterator[Path]:
    """Make a run's folder, check before training that it can be written to, and lock it.

    The operating system frees the lock when its process ends, even if that process is killed.

    Parameters
    ----------
    path
        The folder.
    data
        The file that the run reads. The run must not overwrite it.
    otherwise
        What to do if the folder cannot be written to, for the message.

    Raises
    ------
    UsageError
        If the path is a file, if the run would overwrite the data, or if the folder has files of another program.
    StorageError
        If the folder cannot be made or written to, or another process writes there.
    """
    _check_folder(path, data)
    with ExitStack() as undo:
        try:
            if not path.exists():
                undo.callback(_remove_if_empty, path)
            path.mkdir(parents=True, exist_ok=True)
            undo.enter_context(_locked(path, otherwise))
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{path} cannot be written to: {reason}. {otherwise.capitalize()}.") from error
        yield path


def _check_folder(path: Path, data: Path | None) -> None:
    """Check that a run may write into a folder without a loss to anybody."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a folder to write to.")
    if any(checkpoint.is_model_folder(folder) for folder in (path.resolve(), *path.resolve().parents)):
        raise UsageError(f"{path} is a model folder, or in one; name another folder with -o.")
    if data is not None:
        written = {(path / name).resolve() for name in WRITTEN}
        if data.resolve() in written or path.resolve().is_relative_to(data.resolve()):
            raise UsageError(f"{data} would be overwritten by this run; name another folder with -o.")
    if (path / "model").exists():
        checkpoint.refuse_to_replace(path / "model")
    names = [name for name in WRITTEN if (path / name).exists()]
    is_ours = _is_record(path / "run.json") if "run.json" in names else "model" in names
    if names and not is_ours:
        raise UsageError(f"{path} has {', '.join(names)} that celbo did not write; name another folder with -o.")


def _is_record(path: Path) -> bool:
    """Return whether a file is the record of a celbo run, and not another program's file of the same name."""
    try:
        return "celbo" in json.loads(path.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _locked(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold the lock of a folder. A `StorageError` names the process that holds it already."""
    path = folder / _LOCK
    lock = _acquire(folder, otherwise)
    try:
        if sys.platform != "win32":  # where no other process could read it
            path.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: after it, another process may hold a lock of this name
        lock.release()


def _acquire(folder: Path, otherwise: str) -> BaseFileLock:
    """Lock a folder, with a marker file where the file system has no locks."""
    path, marker = folder / _LOCK, folder / _MARKER
    lock: BaseFileLock = FileLock(path, timeout=_SECONDS_TO_WAIT, fallback_to_soft=False)
    try:
        lock.acquire()
        return lock
    except Timeout:
        raise StorageError(f"{_in_use(folder, path)}, or {otherwise}.") from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        reason = error.strerror
    warnings.warn(
        f"{folder} is on a file system that cannot lock files ({reason}). The file {_MARKER} marks the folder as in "
        "use instead. If a run is killed on another computer, delete that file.",
        stacklevel=2,
    )
    lock = SoftFileLock(marker, timeout=_SECONDS_TO_WAIT)
    try:
        lock.acquire()
        return lock
    except Timeout:
        raise StorageError(
            f"{_in_use(folder, marker)}, or {otherwise}. If you are sure that no process writes there, delete {marker}."
        ) from None


def _in_use(folder: Path, lock: Path) -> str:
    """Say which process writes into a folder; its number and host are in the lock file."""
    try:
        pid, host = lock.read_text(encoding="utf-8").split("\n")[:2]
        owner = f"process {int(pid)} on {host}"
    except (OSError, ValueError):
        owner = "another process"
    return f"{folder} is being written by {owner}. Wait for it"
