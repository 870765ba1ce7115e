"""Where the cells of fit lie, and what can be asked of their conditions."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celbo.data.schema import Schema

__all__ = ["Reference", "has_conditions", "nested_conditions", "reference_arrays", "reference_from", "seen_together"]

_ABOUT = 0.25
"""Standard deviations within which a continuous condition is about what was asked for."""
_SELDOM = 0.1
"""Share of what chance would give, up to which levels count as not seen together."""
_FLAGS = ("held_out", "was_read")
"""Which are 0 or 1 in a file."""
_MOST_COLUMNS, _MOST_VALUES = 500, 20_000_000
"""Levels of all conditions together, and these times combinations of them, beyond which nesting is not looked for: it
would take too long."""


class Reference(NamedTuple):
    """Where the cells of fit lie: what later questions compare new cells with. No counts, no names."""

    mu_z: NDArray[np.float32]
    """Posterior means, ``(cells, latent_dim)``."""
    logvar_z: NDArray[np.float32]
    library: NDArray[np.float32]
    """``(cells,)``."""
    conditions: NDArray[np.float32]
    """``(cells, conditions)``: the number of a level, or a standardised value."""
    held_out: NDArray[np.bool_]
    """``(cells,)``: whether the cell was kept out of training."""
    labels: NDArray[np.int32]
    """``(cells,)``: the number of the label, -1 where it is not known."""
    was_read: NDArray[np.bool_]
    """``(cells,)``: whether there are readings of the cell; of held-out ones only."""
    readings: NDArray[np.float64]
    """``(cells, 4)``: the readings of `celbo.ask.outliers`, two where the values are not counts. 0 for other cells."""


def reference_arrays(reference: Reference) -> dict[str, NDArray[Any]]:
    """The arrays as a file keeps them, which has no bool."""
    return {**reference._asdict(), **{name: getattr(reference, name).astype(np.uint8) for name in _FLAGS}}


def reference_from(
    arrays: Mapping[str, NDArray[Any]], latent_dim: int, n_conditions: int, n_readings: int
) -> Reference:
    """What `reference_arrays` gave; other arrays are left, and those that older files lack read as unknown.

    Raises
    ------
    ValueError
        If the shapes are not those of such a model.
    """
    n_cells = len(arrays["mu_z"])
    absent: dict[str, NDArray[Any]] = {
        "labels": np.full(n_cells, -1, np.int32),
        "was_read": np.zeros(n_cells, np.uint8),
        "readings": np.zeros((n_cells, n_readings)),
    }
    known = {name: arrays[name] if name in arrays else absent[name] for name in Reference._fields}
    of_latent, of_cells = (n_cells, latent_dim), (n_cells,)
    shapes = [of_latent, of_latent, of_cells, (n_cells, n_conditions), *[of_cells] * 3, (n_cells, n_readings)]
    if [value.shape for value in known.values()] != shapes:
        raise ValueError("reference.safetensors does not fit the model")
    return Reference(**{**known, **{name: known[name].astype(bool) for name in _FLAGS}})


def has_conditions(codes: NDArray[np.float32], schema: Schema, given: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which cells have these conditions, ``(cells,)``; continuous ones about so.

    Parameters
    ----------
    codes
        Conditions of the cells, as in `Reference`.
    schema
        Of the model.
    given
        Conditions and what they are to be.
    """
    has_it = np.ones(len(codes), bool)
    for number, condition in enumerate(schema.conditions):
        if condition.name in given:
            wanted = condition.code(given[condition.name])
            near = 0.5 if condition.levels is not None else _ABOUT
            has_it &= np.abs(codes[:, number] - wanted) < near
    return has_it


def seen_together(
    known: NDArray[np.float32], has_it: NDArray[np.bool_], asked: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Whether cells with the same levels as each of these were seen with the conditions that are asked for.

    Parameters
    ----------
    known
        Levels of the cells learned from, ``(cells, n)``: of all other categorical conditions, and labels.
    has_it
        Which of them have the conditions asked for.
    asked
        The same levels of the cells asked about.

    Returns
    -------
    ndarray
        True where more than a tenth were of what chance would give, ``(asked,)``.

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
    there = np.bincount(of_known, minlength=n_groups)
    with_it = np.bincount(of_known, weights=has_it, minlength=n_groups)
    often = with_it > _SELDOM * has_it.mean() * there
    return np.asarray(often[group[len(known) :]])


def nested_conditions(codes: NDArray[np.float32], schema: Schema, names: Iterable[str]) -> list[str]:
    """Those of these conditions whose effect cannot be told from that of the others.

    Their columns add nothing to the rank of the others', or less than a contrast for each further level.

    Parameters
    ----------
    codes
        Conditions of the cells, as in `Reference`.
    schema
        Of the model.
    names
        Conditions to look at.
    """
    codes = np.unique(codes, axis=0)  # cells of the same levels tell the same
    levels = [np.unique(of_cells) for of_cells in codes.T]
    is_level = [condition.levels is not None for condition in schema.conditions]
    n_columns = sum(len(those) if each else 1 for those, each in zip(levels, is_level, strict=True))
    if n_columns > _MOST_COLUMNS or n_columns * len(codes) > _MOST_VALUES:
        return []
    columns = {
        condition.name: (of_cells[:, None] == those if each else of_cells[:, None]).astype(float)
        for condition, of_cells, those, each in zip(schema.conditions, codes.T, levels, is_level, strict=True)
    }

    def rank(parts: list[NDArray[np.float64]]) -> int:
        together = np.hstack(parts)
        return int(np.linalg.matrix_rank(together.T @ together, hermitian=True))

    found = []
    for name in names:
        others = [np.ones((len(codes), 1)), *(part for other, part in columns.items() if other != name)]
        gained = rank([*others, columns[name]]) - rank(others)
        if gained < max(1, columns[name].shape[1] - 1):
            found.append(name)
    return found
