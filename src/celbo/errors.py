"""Errors that celbo raises, and the exit code of the command line for each.

A message says what was found (where, how many), what was expected, and what to do about it::

    CelboError            1   base class of all errors; raised directly for a fault of celbo itself
    ├── UsageError        2   an option does not exist or does not fit the others
    │   └── NotFittedError    the model must be fitted first
    ├── DataError         3   counts, genes or conditions cannot be used
    ├── ModelFileError    4   a model folder is missing, damaged, forged, or written by a newer celbo
    ├── DivergedError     5   training diverged
    └── StorageError      6   the disk is full, permission is missing, or another process is writing

A signal ends a command with 128 + its number, and a lack of memory with 137; see `celbo.app.terminal`.
"""

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import TypeVar

__all__ = [
    "CelboError",
    "DataError",
    "DivergedError",
    "ModelFileError",
    "NotFittedError",
    "StorageError",
    "UsageError",
    "check_count",
    "check_names",
    "check_seed",
    "chosen_row",
    "columns_there_are",
    "listed",
    "warn",
]


Row = TypeVar("Row")


class CelboError(Exception):
    """A failure that celbo can explain; its message is written for the user."""

    exit_code = 1


class UsageError(CelboError):
    """An option does not exist or does not fit the others."""

    exit_code = 2


class NotFittedError(UsageError, AttributeError):
    """The model must be fitted before this call."""


class DataError(CelboError):
    """Counts, genes or conditions cannot be used."""

    exit_code = 3


class ModelFileError(CelboError):
    """A model folder is missing, damaged, forged, or written by a newer celbo."""

    exit_code = 4


class DivergedError(CelboError):
    """Training produced numbers that are not finite and could not recover."""

    exit_code = 5


class StorageError(CelboError):
    """A disk is full, permission is missing, or another process is using the folder."""

    exit_code = 6


def warn(message: str) -> None:
    """Warn the person who called celbo: the warning names the innermost line outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "celbo":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def chosen_row(option: str, name: object, table: Mapping[str, Row]) -> Row:
    """Return the row of a table that an option names, or raise a `UsageError` that lists the names.

    Examples
    --------
    >>> chosen_row("likelihood", "normal", {"gaussian": 1, "nb": 2})
    Traceback (most recent call last):
    celbo.errors.UsageError: likelihood is 'normal'; choose one of gaussian, nb.
    """
    if not isinstance(name, str) or name not in table:
        raise UsageError(f"{option} is {name!r}; choose one of {', '.join(table)}.")
    return table[name]


def check_count(name: str, value: object, least: int) -> None:
    """Raise a `UsageError` unless ``value`` is a whole number of at least ``least``.

    Examples
    --------
    >>> check_count("n_samples", 2.5, 1)
    Traceback (most recent call last):
    celbo.errors.UsageError: n_samples=2.5; give a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise UsageError(f"{name}={value!r}; give a whole number of at least {least}.")


def check_seed(seed: object) -> int:
    """Return a seed as a number of Python; raise a `UsageError` unless it is whole and from 0 to 2**63 - 1.

    Examples
    --------
    >>> check_seed(-1)
    Traceback (most recent call last):
    celbo.errors.UsageError: seed=-1; a seed is a whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise UsageError(f"seed={seed!r}; a seed is a whole number from 0 to 2**63 - 1.")
    return int(seed)


def check_names(options: Mapping[str, object]) -> None:
    """Raise a `UsageError` for options that are not lists of names, such as None or a dict, or names that are no text.

    Examples
    --------
    >>> check_names({"conditions": ["batch"], "remedies": None})
    Traceback (most recent call last):
    ...
    celbo.errors.UsageError: remedies=None; give a list of names, or [] for none.
    """
    for name, value in options.items():
        if isinstance(value, Mapping) or not isinstance(value, Iterable) or isinstance(value, Iterator):
            raise UsageError(f"{name}={value!r}; give a list of names, or [] for none.")
        if others := [one for one in value if not isinstance(one, str)]:
            raise UsageError(
                f"{name} has {others[0]!r}, which is no text; names are text. If a column has such a name, rename it: "
                "adata.obs.columns = adata.obs.columns.astype(str)."
            )


def columns_there_are(names: Iterable[object], columns: Iterable[object], given: Iterable[object] = ()) -> str:
    """Say in a message about columns that do not exist which columns there are, and which are probably meant.

    Columns that are ``given`` already are not meant.

    Examples
    --------
    >>> columns_there_are(["donr"], ["donor", "batch"])
    "it has 'donor', 'batch'. Did you mean 'donor'?"
    >>> columns_there_are(["donor,batch"], ["donor", "batch"])
    "it has 'donor', 'batch'. 'donor,batch' joins names: give one column or, for options that take several, a list ..."
    """
    known = [str(column) for column in columns]
    has = f"it has {listed(known) or 'no column'}."
    named = {str(one) for one in given}
    folded = {column.casefold(): column for column in reversed(known) if column not in named}
    meant = []
    for name in map(str, names):
        parts = [part.strip() for part in name.split(",")]
        if len(parts) > 1 and set(parts) <= set(known):
            return (
                f"{has} {name!r} joins names: give one column or, for options that take several, a list {parts} (on "
                "the command line the option once for each)."
            )
        meant += [folded[similar] for similar in difflib.get_close_matches(name.casefold(), folded, 1)]
    return f"{has} Did you mean {listed(dict.fromkeys(meant))}?" if meant else has


def listed(names: Iterable[object], most: int = 8) -> str:
    """Join names in quotes for a message, at most ``most`` of them.

    Examples
    --------
    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    quoted = [repr(str(name)) for name in names]
    return ", ".join(quoted[:most]) + (f" and {len(quoted) - most:,} more" if len(quoted) > most else "")
