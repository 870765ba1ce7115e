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
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from celbo.errors import CelboError, StorageError

if TYPE_CHECKING:
    from celbo.fit.train import Epoch, Plan, Track
    from celbo.minibatch import Rows

__all__ = ["guarded", "plain", "say", "shown_warnings", "stop_on_signal", "until_signal"]

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
        yield notes


_OUT_OF_MEMORY = "out of memory: use fewer cells, genes or hidden units, or a machine with more memory."

_signals: list[int] = []
"""Numbers of the signals that this process received."""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End with 128 + the signal's number, as shells expect (130 interrupted, 143 terminated)."""
    _signals.append(number)
    say("interrupted" if number == signal.SIGINT else "terminated")
    sys.exit(128 + number)


def _ignore_stop(dropped: "sys.UnraisableHookArgs") -> None:
    """Print no traceback for an exit that Python dropped because C code called it: `stop_on_signal` ends training."""
    if not (_signals and isinstance(dropped.exc_value, SystemExit)):
        sys.__unraisablehook__(dropped)


def stop_on_signal(track: "Track") -> "Track":
    """End at the next minibatch after a signal. Python drops the exception of `_stop` inside a destructor."""

    def stopping(minibatches: "Iterable[Rows]", plan: "Plan", history: "list[Epoch]") -> "Iterator[Rows]":
        return until_signal(track(minibatches, plan, history))

    return stopping


def until_signal(items: "Iterable[T]") -> "Iterator[T]":
    """Pass items on, and end the command after a signal, as `stop_on_signal` does."""
    for item in items:
        if _signals:
            sys.exit(128 + _signals[0])
        yield item


def guarded(app: Callable[[], None]) -> None:
    """Run a command line. Every failure ends in a message and an exit code, never in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _ignore_stop
    try:
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
