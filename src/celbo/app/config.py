"""Read options from a file: a TOML file, or the ``run.json`` of a run to repeat."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celbo.errors import UsageError, listed
from celbo.fit.words import celbo_words

__all__ = ["READING", "contents", "read_config"]

READING = {"gene_column": None, "make_unique": False, "na_as_level": False, "on_disk": False}
"""Options of reading data, with their defaults."""

_EXAMPLES = {
    "n_top_genes": 0,
    "max_epochs": 0,
    "threads": 0,
    "hidden_dims": [0],
    "decoder_dims": [0],
}
"""Values of the right type, for options whose default is None or an empty list."""


def read_config(path: Path, model: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read options from a file, and refuse unknown ones.

    Parameters
    ----------
    path
        A ``.toml`` file with options of `celbo.ExpressionVAE`, and tables ``[train]`` (of `celbo.TrainConfig`) and
        ``[reading]`` (of `READING`); or a ``run.json``.
    model, train
        The known options and their defaults.

    Returns
    -------
    dict
        Tables "model", "train" and "reading" with the options of the file, and "data" with the fingerprint of the data
        of a ``run.json``.

    Raises
    ------
    UsageError
        If the file cannot be read. If it has unknown options or values of a wrong type; the message lists them all.
    """
    fingerprint = None
    raw = contents(path)
    try:
        text = raw.decode()
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}.") from error
    if path.suffix == ".json":
        if not isinstance(document, dict) or not isinstance(document.get("options"), dict):
            raise UsageError(f"{path} has no options: give the run.json of a run, or a .toml file.")
        reading = document.get("reading", {})
        reading = {name: reading[name] for name in READING if name in reading} if isinstance(reading, dict) else {}
        data = document.get("data")
        fingerprint = data.get("sha256_values") if isinstance(data, dict) else None
        document = {**_modern(document["options"], model), "reading": reading}
    tables = {"train": document.pop("train", {}), "reading": document.pop("reading", {})}
    if wrong := [name for name, table in tables.items() if not isinstance(table, dict)]:
        raise UsageError(f"{path}: {listed(wrong)} must be a table of options.")
    tables["model"] = document
    known = {"model": model, "train": train, "reading": READING}
    faults = [
        fault
        for name, table in tables.items()
        for option, value in table.items()
        if (fault := _fault(option if name == "model" else f"{name}.{option}", option, value, known[name]))
    ]
    if faults:
        raise UsageError(f"{path}: {'; '.join(faults)}.")
    return {**tables, "data": {"sha256_values": fingerprint}}


def contents(path: Path) -> bytes:
    """Read a file of options; raise a `UsageError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _modern(options: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read options that an older version recorded as today's options."""
    from celbo.fit.older import modern_options

    return modern_options(options, defaults) if isinstance(options.get("remedies", []), list) else options


def _fault(name: str, option: str, value: Any, known: Mapping[str, Any]) -> str | None:
    """Describe what is wrong with an option or its value, or return None."""
    if option not in known:
        close = [word for word in celbo_words(option) if word in known] or difflib.get_close_matches(option, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {listed(known, 40)}"
        return f"unknown option {name!r} ({hint})"
    if (value is None and known[option] is None) or (value == "auto" and option == "latent_dim"):
        return None  # run.json has null for options without a value
    default = _EXAMPLES.get(option, "" if known[option] is None else known[option])
    if isinstance(default, list | tuple):
        item, kind = (0, "whole numbers") if 0 in default else ("", "texts")
        is_right = isinstance(value, list) and all(_is_like(item, element) for element in value)
        kind = f"a list of {kind}"
    else:
        is_right = _is_like(default, value)
        kind = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[type(default)]
    return None if is_right else f"{name} must be {kind}, not {value!r}"


def _is_like(example: object, value: object) -> bool:
    """Return whether a value has the type of an example. A whole number is a number, but true is not."""
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(example, bool) and isinstance(value, bool)
    return isinstance(value, int | float if isinstance(example, float) else type(example))
