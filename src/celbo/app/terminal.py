"""Talk to a person at a terminal: messages, warnings, signals, and failures that end in a message and an exit code."""

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
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from celbo.errors import CelboError, StorageError

if TYPE_CHECKING:
    from celbo.fit.train import Epoch, Plan, Track
    from celbo.minibatch import Rows

__all__ = ["ending_when_told", "guarded", "plain", "say", "shown_warnings"]

# Disk full, quota, read-only, permission: what the person, not celbo, can mend.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def say(text: str) -> None:
    """Tell the person, not the pipe; names in data cannot control the terminal, nor can a full one stop the work."""
    with suppress(OSError):
        typer.echo(plain(text), err=True)


def plain(text: str) -> str:
    """The text, without what could control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def shown_warnings() -> Iterator[list[str]]:
    """Say warnings in a line each, each once, and keep them all."""
    notes: list[str] = []

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in notes:
            say(f"warning: {message}")
        notes.append(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield notes


_OUT_OF_MEMORY = "out of memory: use fewer cells, genes or hidden units, or a machine with more of it."

_signals: list[int] = []
"""Numbers of the signals received; like signals themselves, one list for the process."""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End with 128 + the signal's number, as shells expect (130 interrupted, 143 terminated)."""
    _signals.append(number)
    say("interrupted" if number == signal.SIGINT else "terminated")
    sys.exit(128 + number)


def _left_behind(found: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a `_stop` that came while C called Python, which cannot pass it on: training ends by itself."""
    if not (_signals and isinstance(found.exc_value, SystemExit)):
        sys.__unraisablehook__(found)


def ending_when_told(track: "Track") -> "Track":
    """End at the next minibatch if a signal came; Python drops what `_stop` raises while it runs a destructor."""

    def ending(minibatches: "Iterable[Rows]", plan: "Plan", history: "list[Epoch]") -> "Iterator[Rows]":
        for rows in track(minibatches, plan, history):
            if _signals:
                sys.exit(128 + _signals[0])
            yield rows

    return ending


def guarded(app: Callable[[], None]) -> None:
    """Run a command line; every failure ends in a message and its exit code, never in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _left_behind
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
        if "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":  # torch's own ways to say it
            _fail(_OUT_OF_MEMORY, 137)
        _bug(error)


def _fail(message: str, exit_code: int) -> NoReturn:
    say(f"error: {message}")
    sys.exit(exit_code)


def _bug(error: Exception) -> NoReturn:
    if os.environ.get("CELBO_DEBUG"):
        traceback.print_exc()
    _fail(
        f"{type(error).__name__}: {error}. This is a fault in celbo, not in your data or command. Please report it "
        "with what CELBO_DEBUG=1 shows when set before the same command.",
        CelboError.exit_code,
    )
