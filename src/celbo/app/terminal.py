"""Messages, warnings and signals at a terminal. Every failure ends in a message and an exit code."""

import errno
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from celbo.errors import CelboError, StorageError

if TYPE_CHECKING:
    from celbo.fit.train import Epoch, Plan, Track
    from celbo.minibatch import Rows

__all__ = [
    "INTERRUPTED",
    "guarded",
    "interruptible",
    "plain",
    "say",
    "shown_warnings",
    "stop_on_signal",
    "until_signal",
]

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that was interrupted."""

T = TypeVar("T")

# Disk full, quota, read-only, permission: the user can repair these, celbo cannot.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def say(text: str) -> None:
    """Print a message to stderr, without control characters. A failure to print does not stop the work."""
    with suppress(OSError):
        typer.echo(plain(text), err=True)


def plain(text: str) -> str:
    """Replace characters that could control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def shown_warnings() -> Iterator[list[str]]:
    """Print each warning once, in one line, and collect them all."""
    notes: list[str] = []

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in notes:
            say(f"warning: {message}")
        notes.append(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("ignore", ".*joblib will operate in serial mode")  # as celbo uses it
        yield notes


_OUT_OF_MEMORY = "out of memory: use fewer cells, genes or hidden units, or a machine with more memory."

_signals: list[int] = []
"""Numbers of the signals that this process received."""
_keeps_fit = False
"""Whether the first interrupt ends training alone."""


_ENDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "stopped: the terminal was closed"}
"""Signals that end a command, and what it says. Windows has no SIGHUP."""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """Note a signal, and act on it."""
    _signals.append(number)
    what_follows = ": training ends; interrupt again to stop at once" if _ends_training() else ""
    name = signal.Signals(number).name
    say(_ENDS[name] + what_follows)
    if name == "SIGHUP":  # a progress bar that ends, or Python itself, would fail to write to a closed terminal
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
    _act()


def _ends_training() -> bool:
    return _keeps_fit and _signals == [signal.SIGINT]


def _act() -> NoReturn:
    """End training alone, or the command with 128 + the signal's number (130 interrupted, 143 terminated)."""
    if _ends_training():
        raise KeyboardInterrupt
    sys.exit(128 + _signals[-1])


def _listen_to_signals() -> None:
    """End on each signal of `_ENDS`, but not on SIGHUP if nohup started the command."""
    for name in _ENDS:
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, _stop)


def _ignore_stop(dropped: "sys.UnraisableHookArgs") -> None:
    """Print no traceback for an exit that Python dropped because C code called it: `stop_on_signal` ends training."""
    if not (_signals and isinstance(dropped.exc_value, SystemExit | KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first interrupt (Ctrl-C) end training, so that the fit keeps its weights; the next ends the command.

    If the fit has no weights to keep, the first interrupt ends the command too.
    """
    global _keeps_fit
    _keeps_fit = True
    try:
        yield
    except KeyboardInterrupt:
        say("nothing of this fit is kept.")
        sys.exit(INTERRUPTED)
    finally:
        _keeps_fit = False


def stop_on_signal(track: "Track") -> "Track":
    """Act at the next minibatch after a signal. Python drops the exception of `_stop` inside a destructor."""

    def stopping(minibatches: "Iterable[Rows]", plan: "Plan", history: "list[Epoch]") -> "Iterator[Rows]":
        return until_signal(track(minibatches, plan, history))

    return stopping


def until_signal(items: "Iterable[T]") -> "Iterator[T]":
    """Pass items on, and act on a signal before the next one, as `stop_on_signal` does."""
    for item in items:
        if _signals:
            _act()
        yield item


def guarded(app: Callable[[], None]) -> None:
    """Run a command line. Every failure ends in a message and an exit code, never in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    _signals.clear()
    _listen_to_signals()
    sys.unraisablehook = _ignore_stop
    try:
        _check_current_folder()
        app()
    except CelboError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail(_OUT_OF_MEMORY, 137)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            _bug(error)
        _fail(f"{error.filename or 'a file'}: {error.strerror}.", StorageError.exit_code)
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":  # errors of torch
            _fail(_OUT_OF_MEMORY, 137)
        _bug(error)


def _check_current_folder() -> None:
    """Raise a `StorageError` if the current folder has been removed: libraries of torch cannot be loaded there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("the current folder has been removed. Change to a folder that exists (cd).") from None


def _fail(message: str, exit_code: int) -> NoReturn:
    say(f"error: {message}")
    sys.exit(exit_code)


def _bug(error: Exception) -> NoReturn:
    if os.environ.get("CELBO_DEBUG"):
        traceback.print_exc()
    _fail(
        f"{type(error).__name__}: {error}. This is a fault in celbo, not in your data or command. Please set "
        "CELBO_DEBUG=1, run the same command again, and report what it prints.",
        CelboError.exit_code,
    )
