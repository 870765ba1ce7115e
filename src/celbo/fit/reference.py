"""Reference cells: where the cells of fit lie in the latent space, and which conditions they have."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celbo.data.schema import Schema
from celbo.fit.train import Split
from celbo.minibatch import Rows
from celbo.streams import Stream, random_stream

__all__ = [
    "MOST_KEPT",
    "READINGS",
    "Reference",
    "has_conditions",
    "n_readings",
    "nested_conditions",
    "reference_arrays",
    "reference_from",
    "reference_rows",
    "seen_together",
]

READINGS = ("unlikely", "distance", "mixture", "ambient")
"""Readings that show whether a cell is unusual; `celbo.ask.readings` computes them. The last two are of counts."""
MOST_KEPT = 50_000
"""Largest number of training cells whose posteriors are kept with a model."""
_NEAR_VALUE = 0.25
"""A cell has a continuous condition if its value is within this many standard deviations."""
_SELDOM = 0.1
"""Levels count as seen together if this share of the number expected by chance, or more, was seen."""
_FLAGS = ("held_out", "was_read")
"""Boolean arrays, which a file keeps as 0 and 1."""
_MOST_COLUMNS, _MOST_VALUES = 500, 20_000_000
"""Beyond this many levels of all conditions, or levels times combinations, nesting is not tested: it takes too long."""


class Reference(NamedTuple):
    """Latent positions and conditions of the cells of fit, to compare other cells with; no counts, no names."""

    mu_z: NDArray[np.float32]
    """Posterior means, ``(cells, latent_dim)``."""
    logvar_z: NDArray[np.float32]
    library: NDArray[np.float32]
    """``(cells,)``."""
    conditions: NDArray[np.float32]
    """``(cells, conditions)``: the number of a level, or a standardised value."""
    held_out: NDArray[np.bool_]
    """``(cells,)``: whether the cell was held out of training."""
    labels: NDArray[np.int32]
    """``(cells,)``: the number of the label, -1 where it is not known."""
    was_read: NDArray[np.bool_]
    """``(cells,)``: whether there are readings of the cell; of held-out ones only."""
    readings: NDArray[np.float64]
    """``(cells, 4)``: the readings of `celbo.ask.readings`, two where the values are not counts. 0 for other cells."""
    surprise: NDArray[np.float32]
    """`celbo.model.surprise.surprise` of held-out cells, ``(cells,)``; 0 for other cells, and in older files."""
    absent_level: NDArray[np.int32]
    """Number of the level whose genes the cell lacks (`celbo.data.absent`), ``(cells,)``; -1 for none."""
    checksums: NDArray[np.int32] | None = None
    """``(cells,)``: `celbo.data.sources.CellSource.checksums`, to recognise the cells; None in models of older
    versions."""


def n_readings(is_counts: bool) -> int:
    """Return how many of `READINGS` have a meaning."""
    return len(READINGS) if is_counts else 2


def reference_arrays(reference: Reference) -> dict[str, NDArray[Any]]:
    """Return the arrays as a file keeps them; a file has no bool."""
    flags = {name: getattr(reference, name).astype(np.uint8) for name in _FLAGS}
    return {name: value for name, value in {**reference._asdict(), **flags}.items() if value is not None}


def reference_from(
    arrays: Mapping[str, NDArray[Any]], latent_dim: int, n_conditions: int, n_readings: int
) -> Reference:
    """Read what `reference_arrays` returned. Other arrays are ignored, and arrays that older files lack are unknown.

    Raises
    ------
    ValueError
        If the shapes are not those of such a model.
    """
    n_cells = len(arrays["mu_z"])
    absent: dict[str, NDArray[Any] | None] = {
        "labels": np.full(n_cells, -1, np.int32),
        "was_read": np.zeros(n_cells, np.uint8),
        "readings": np.zeros((n_cells, n_readings)),
        "surprise": np.zeros(n_cells, np.float32),
        "absent_level": np.full(n_cells, -1, np.int32),
        "checksums": None,
    }
    known: dict[str, Any] = {name: arrays[name] if name in arrays else absent[name] for name in Reference._fields}
    of_latent, of_cells = (n_cells, latent_dim), (n_cells,)
    shapes = [of_latent, of_latent, of_cells, (n_cells, n_conditions), *[of_cells] * 3, (n_cells, n_readings)]
    shapes += [of_cells] * 3
    if any(value is not None and value.shape != shape for value, shape in zip(known.values(), shapes, strict=True)):
        raise ValueError("reference.safetensors does not fit the model")
    return Reference(**{**known, **{name: known[name].astype(bool) for name in _FLAGS}})


def reference_rows(split: Split, seed: int) -> Rows:
    """Choose the cells of fit that are kept as a reference, in their order: all held-out cells, and training cells."""
    chosen = random_stream(seed, Stream.REFERENCE).permutation(split.train)[:MOST_KEPT]
    return np.sort(np.concatenate([chosen, split.validation]))


def has_conditions(codes: NDArray[np.float32], schema: Schema, given: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Find the cells that have these conditions, ``(cells,)``; a continuous condition has to be near the value.

    Parameters
    ----------
    codes
        Conditions of the cells, as in `Reference`.
    schema
        Schema of the model.
    given
        Conditions and their values.
    """
    matches = np.ones(len(codes), bool)
    for number, condition in enumerate(schema.conditions):
        if condition.name in given:
            wanted = condition.code(given[condition.name])
            near = 0.5 if condition.levels is not None else _NEAR_VALUE
            matches &= np.abs(codes[:, number] - wanted) < near
    return matches


def seen_together(
    known: NDArray[np.float32], has_it: NDArray[np.bool_], asked: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Test whether fit saw cells with the same levels as each of these cells under the conditions asked for.

    Parameters
    ----------
    known
        Levels of the training cells, ``(cells, n)``: of all other categorical conditions, and labels.
    has_it
        Which training cells have the conditions asked for.
    asked
        The same levels of the cells in question.

    Returns
    -------
    ndarray
        True where more than a tenth of the number expected by chance were seen, ``(asked,)``.

    Examples
    --------
    >>> types, treated = np.array([[0], [0], [1], [1]], np.float32), np.array([True, False, False, False])
    >>> seen_together(types, treated, np.array([[0], [1], [2]], np.float32))
    array([ True, False, False])
    """
    _, group = np.unique(np.concatenate([known, asked]), axis=0, return_inverse=True)
    group = group.reshape(-1)
    of_known = group[: len(known)]
    n_groups = int(group.max(initial=-1)) + 1
    sizes = np.bincount(of_known, minlength=n_groups)
    with_it = np.bincount(of_known, weights=has_it, minlength=n_groups)
    often = with_it > _SELDOM * has_it.mean() * sizes
    return np.asarray(often[group[len(known) :]])


def nested_conditions(codes: NDArray[np.float32], schema: Schema, names: Iterable[str]) -> list[str]:
    """Find conditions whose effect cannot be separated from the effects of the others.

    Their columns add nothing to the rank of the other columns, or less than one contrast for each further level.

    Parameters
    ----------
    codes
        Conditions of the cells, as in `Reference`.
    schema
        Schema of the model.
    names
        Conditions to test.
    """
    codes = np.unique(codes, axis=0)  # cells of the same levels add nothing
    levels = [np.unique(of_cells) for of_cells in codes.T]
    is_level = [condition.levels is not None for condition in schema.conditions]
    n_columns = sum(len(those) if categorical else 1 for those, categorical in zip(levels, is_level, strict=True))
    if n_columns > _MOST_COLUMNS or n_columns * len(codes) > _MOST_VALUES:
        return []
    columns = {
        condition.name: (of_cells[:, None] == those if categorical else of_cells[:, None]).astype(float)
        for condition, of_cells, those, categorical in zip(schema.conditions, codes.T, levels, is_level, strict=True)
    }

    def rank(parts: list[NDArray[np.float64]]) -> int:
        together = np.hstack(parts)
        return int(np.linalg.matrix_rank(together.T @ together, hermitian=True))

    nested = []
    for name in names:
        others = [np.ones((len(codes), 1)), *(part for other, part in columns.items() if other != name)]
        gained = rank([*others, columns[name]]) - rank(others)
        if gained < max(1, columns[name].shape[1] - 1):
            nested.append(name)
    return nested
