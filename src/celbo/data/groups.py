"""Groups of cells as people name them: a column of obs, or a value for each cell."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeAlias

import pandas as pd

from celbo.data.conditions import as_text, column_of
from celbo.errors import UsageError, columns_there_are

__all__ = ["Groups", "grouping", "is_column"]

_ONE_COLUMN = (
    " These are names of columns of obs: give one name, not a list; to group by several columns, join their values in "
    "a new one."
)

Groups: TypeAlias = str | Iterable[Any]
"""The name of a column of obs, or a value for each cell: a Series, a Categorical, a list, an array or a mask."""


def grouping(option: str, given: Groups, obs: pd.DataFrame) -> "pd.Series[Any]":
    """Return the group of each cell, with the names of the cells as index.

    A Series that has the names of the cells as index is aligned by name. Other values are in the order of the cells.

    Parameters
    ----------
    option
        Name of the option that gives the groups, for messages.
    given
        The column or the values.
    obs
        Table of cells.

    Raises
    ------
    UsageError
        If there is no such column, or not one value for each cell.

    Examples
    --------
    >>> obs = pd.DataFrame({"type": ["B", "T"]}, index=["c1", "c2"])
    >>> grouping("groupby", "type", obs).tolist()
    ['B', 'T']
    >>> grouping("groupby", obs["type"] == "B", obs).tolist()
    [True, False]
    >>> grouping("groupby", pd.Series(["T", "B"], index=["c2", "c1"]), obs).tolist()
    ['B', 'T']
    """
    if not pd.api.types.is_list_like(given):
        if given not in obs.columns:
            raise UsageError(f"{option}={given!r} is no column of obs; {columns_there_are([given], obs.columns)}")
        return column_of(obs, given)  # type: ignore[arg-type]
    n_dims = getattr(given, "ndim", 1)
    if isinstance(given, Mapping | Set) or n_dims != 1:
        kind = type(given).__name__ if n_dims == 1 else f"table of {n_dims} dimensions"
        raise UsageError(f"{option} is a {kind}; give the name of a column of obs, or one value for each cell.")
    if isinstance(given, pd.Series):
        named = given if given.name is not None else given.rename(option)
        return _aligned(option, named, obs.index)
    values: Any = given if hasattr(given, "dtype") else list(given)
    if len(values) != len(obs):
        are_columns = len(values) > 0 and all(isinstance(value, str) and value in obs.columns for value in values)
        raise UsageError(
            f"{option} has {len(values):,} values for {len(obs):,} cells; give one for each cell."
            f"{_ONE_COLUMN if are_columns else ''}"
        )
    return pd.Series(values, obs.index, name=option)


def _aligned(option: str, given: "pd.Series[Any]", names: pd.Index) -> "pd.Series[Any]":
    """Return the values by the names of the cells; without names, in the order of the cells."""
    if given.index.equals(names):
        return given
    is_known = names.isin(given.index)
    if given.index.is_unique and is_known.all():
        return given.loc[names]
    if not given.index.equals(pd.RangeIndex(len(names))):
        raise UsageError(
            f"{option} is a Series of {len(given):,} values for {len(names):,} cells, and its index has the names of "
            f"{int(is_known.sum()):,} of them{'' if given.index.is_unique else ' (some twice)'}. Give a Series with "
            "the names of the cells as index, or an array in the order of the cells."
        )
    return given.set_axis(names)


def is_column(given: Groups, groups: "pd.Series[Any]", obs: pd.DataFrame) -> bool:
    """Return whether the groups are the column of obs that has their name."""
    if not pd.api.types.is_list_like(given):
        return True
    return groups.name in obs.columns and as_text(groups).equals(as_text(column_of(obs, str(groups.name))))
