"""A run's folder belongs to one process at a time, and is not taken for one where other files have the names."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
"""What a run writes into its folder."""
_LOCK = ".celbo-lock"


@contextmanager
def claimed_folder(path: Path, data: Path | None = None) -> Iterator[Path]:
    """Make a run's folder, find out before training that it can be written to, and keep others from writing there.

    A lock file names the process that writes. One left on this host by a process that is gone is taken over.

    Parameters
    ----------
    path
        The folder.
    data
        What is read meanwhile, which nothing may overwrite.

    Raises
    ------
    UsageError
        If the path is a file, or the data are what the run would write.
    StorageError
        If the folder cannot be made or written to, or another process writes there.
    """
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
    there = [name for name in WRITTEN if (path / name).exists()]
    is_ours = _is_record(path / "run.json") if "run.json" in there else "model" in there
    if there and not is_ours:
        raise UsageError(f"{path} has {', '.join(there)} that celbo did not write; name another folder with -o.")
    lock, was_made = path / _LOCK, not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _take_lock(lock)
    except OSError as error:
        raise StorageError(f"{path} cannot be written to: {error.strerror}. Name another folder with -o.") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            lock.unlink()
        if was_made:
            with suppress(OSError):  # which is raised if there is something in it, as there should be
                path.rmdir()
        _HELD.discard(lock.resolve())


def _is_record(path: Path) -> bool:
    """Whether this is the record of a run of celbo's, and not another program's file of that name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "celbo" in found["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


_HELD: set[Path] = set()
"""Locks of this process."""


def _take_lock(lock: Path) -> None:
    """Make the lock file, or a `StorageError` that says whose it is."""
    for _ in range(2):  # once more, if the lock's owner is gone
        with suppress(FileExistsError), lock.open("x") as file:
            json.dump({"pid": os.getpid(), "host": platform.node()}, file)
            _HELD.add(lock.resolve())
            return
        try:
            owner = json.loads(lock.read_text())
            pid, host = int(owner["pid"]), str(owner["host"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, host = None, None
        if pid is not None and host == platform.node() and not _holds(pid, lock):
            lock.unlink(missing_ok=True)
            continue
        whose = "another process" if pid is None else f"process {pid} on {host}"
        raise StorageError(
            f"{lock.parent} is being written by {whose}. Wait for it, or name another folder with -o. If nobody "
            f"writes there for certain, delete {lock}."
        )
    raise StorageError(f"{lock.parent} is being written by another process. Name another folder with -o.")


def _holds(pid: int, lock: Path) -> bool:
    """Whether this process holds the lock; in a container a killed one often had the same number as its successor."""
    return lock.resolve() in _HELD if pid == os.getpid() else _runs(pid)


def _runs(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    if sys.platform == "win32":  # no way to ask without harm
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
