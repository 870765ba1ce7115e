"""Find out whether levels of a condition and cell types go together, from two columns alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OneLevel", "advice_for_own_types", "types_of_one_level"]

_FEWEST_ELSEWHERE = 10
"""A type counts only if independence would put at least this many of its cells outside its most frequent level."""
_OF_EXPECTED = 0.05
"""A type occurs in one level if at most this share of these cells is there."""
_MOST_CELLS = 0.5
"""Types and levels go together if more than this share of the cells has a type that occurs in one level."""


def advice_for_own_types(nuisance: str) -> str:
    """Say what to do if the levels of a nuisance have types of their own."""
    return (
        f"add cells so that levels share types; or leave out the nuisance {nuisance!r}, or fit its levels one by one, "
        "and do not read differences between levels as differences between types"
    )


@dataclass(frozen=True)
class OneLevel:
    """Types that occur in one level of a condition only."""

    n_types: int
    """Number of types of all cells."""
    of_one: tuple[tuple[str, str], ...]
    """Type and level, for each type that occurs in one level only."""
    share: float
    """Share of the cells with such a type."""

    @property
    def doubtful(self) -> bool:
        """Whether most cells have such a type: then the effect of the condition is that of the types."""
        return self.share > _MOST_CELLS

    def sentence(self, condition: str, types: str = "the types") -> str:
        """Say which types occur in one level, and what follows."""
        (a_type, level), n = self.of_one[0], len(self.of_one)
        return (
            f"{n} of {self.n_types} types ({self.share:.0%} of the cells) occur in one level of {condition!r} only, as "
            f"{a_type!r} in {level!r}. The effect of {condition!r} cannot be told from that of {types}: a model that "
            "removes the one may remove the other"
        )


def types_of_one_level(types: NDArray[Any], levels: NDArray[Any]) -> OneLevel:
    """Find the types that occur in one level only.

    A type with ``n`` cells, most of them in level ``l``, occurs in one level only if at most 1 in 20 of the cells that
    independence would put into other levels, ``n (1 - p_l)``, is there. ``p_l`` is the share of ``l`` among all cells.
    A type for which this number is below 10 never counts: chance alone may put such a small type into one level.

    Parameters
    ----------
    types, levels
        Text, or anything that becomes text, ``(cells,)``.

    Returns
    -------
    OneLevel

    Examples
    --------
    >>> types = np.repeat(["T", "B", "NK"], [60, 60, 4])
    >>> types_of_one_level(types, np.where(types == "T", "first", "second"))
    OneLevel(n_types=3, of_one=(('B', 'second'), ('T', 'first')), share=0.967...)
    >>> types_of_one_level(types, np.tile(["first", "second"], 62)).of_one
    ()
    """
    type_names, type_codes = np.unique(np.asarray(types).astype(str), return_inverse=True)
    level_names, level_codes = np.unique(np.asarray(levels).astype(str), return_inverse=True)
    table = np.zeros((len(type_names), len(level_names)))
    np.add.at(table, (type_codes, level_codes), 1)
    n_cells = table.sum(1)
    if not len(type_names):
        return OneLevel(0, (), 0.0)
    most = table.argmax(1)
    elsewhere = n_cells - table.max(1)
    expected = n_cells * (1 - table.sum(0)[most] / table.sum())
    of_one = np.flatnonzero((expected >= _FEWEST_ELSEWHERE) & (elsewhere <= _OF_EXPECTED * expected))
    pairs = tuple((str(type_names[t]), str(level_names[most[t]])) for t in of_one)
    return OneLevel(len(type_names), pairs, float(n_cells[of_one].sum() / n_cells.sum()))
