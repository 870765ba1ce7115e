"""Genes that were not measured in some levels of a column, as in samples that were joined with other genes."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from celbo.data.conditions import as_text, column_of, level_positions, text_or_none
from celbo.errors import listed

__all__ = [
    "Absent",
    "CellsWithGene",
    "LackingLevel",
    "absent_genes",
    "columns_to_watch",
    "describe_lacking_levels",
    "find_lacking_levels",
    "levels_too_small",
    "n_missing_values",
    "why_not_watched",
]

_MOST_LEVELS = 100
"""A column with more levels is not looked at."""
_MOST_COLUMNS = 8
"""Columns that are looked at beside the conditions, the first of obs; each costs time and memory."""
_CHANCE = 1e-4
"""Probability that any gene of a level is called absent by chance."""
_FEWEST_GENES = 5
_SHARE_OF_CONDITION, _SHARE_OF_OTHER = 0.01, 0.05
"""Share of the genes that must be absent in a level. Cell types and donors lack a few genes (at most 0.4 % for the
batches and 2.2 % for the cell types of twelve sets of real cells), so columns that may be cell types need more."""


_LIKELY, _FEWEST_LIKELY, _SHARE_OF_LIKELY = 3.0, 20, 0.2
"""Cells of a small level in which a gene is expected, the number of such genes, and the share of them without a count
from which the level lacks genes. For 15 to 60 cells of twelve sets the share was at most 5 % for random cells and 12 %
for cells of one type."""
_LISTED = 4
"""Levels that lack genes are listed up to this number."""


@dataclass(frozen=True)
class Absent:
    """Genes that were not measured in cells of some levels of a column of obs."""

    column: str
    genes: tuple[tuple[str, tuple[str, ...]], ...]
    """Pairs of each level of fit and the genes that its cells lack; these may be none."""

    @property
    def levels(self) -> tuple[str, ...]:
        """Return the levels of fit."""
        return tuple(level for level, _ in self.genes)

    def codes(self, obs: pd.DataFrame) -> NDArray[np.intp]:
        """Return the number of each cell's level in `levels`; -1 for a level that fit did not see, ``(cells,)``."""
        if self.column not in obs.columns:
            return np.full(len(obs), -1, np.intp)
        return level_positions(self.levels, as_text(column_of(obs, self.column)))

    def masks(self, genes: Sequence[str]) -> NDArray[np.bool_]:
        """Return which genes are absent in each level, ``(levels + 1, genes)``; the last row has none.

        Examples
        --------
        >>> Absent("sample", (("s1", ("b",)),)).masks(["a", "b"])
        array([[False,  True],
               [False, False]])
        """
        lacking = [np.isin(genes, of_level) for _, of_level in self.genes]
        return np.array([*lacking, np.zeros(len(genes), bool)])


class LackingLevel(NamedTuple):
    """A level of a column whose cells have no count of many genes that other cells have."""

    column: str
    level: str
    n_cells: int
    n_sure: int
    """Number of genes without a count that chance cannot explain."""
    lacking: NDArray[np.bool_]
    """Which genes the level lacks, ``(genes,)``."""


class CellsWithGene:
    """Number of cells that have a count of each gene, by level of columns of obs; added block by block."""

    def __init__(self, obs: pd.DataFrame, columns: Sequence[str], n_genes: int):
        self._start = 0
        self._codes, self.levels = {}, dict[str, list[str]]()
        self.detected = dict[str, NDArray[np.int64]]()
        """By column, ``(levels, genes)``."""
        for name in columns:
            column = column_of(obs, name)
            codes, levels = pd.factorize(text_or_none(column), sort=True)
            self._codes[name], self.levels[name] = codes, [str(level) for level in levels]
            self.detected[name] = np.zeros((len(levels), n_genes), np.int64)

    def add(self, block: sp.csr_matrix) -> None:
        """Add the next rows."""
        stop = self._start + block.shape[0]
        detected = sp.csr_matrix((block.data > 0, block.indices, block.indptr), shape=block.shape, dtype=np.int64)
        for name, codes in self._codes.items():
            of_rows = codes[self._start : stop]
            rows = np.flatnonzero(of_rows >= 0)
            shape = (len(self.levels[name]), block.shape[0])
            of_level = sp.csr_matrix((np.ones(len(rows), np.int64), (of_rows[rows], rows)), shape=shape)
            self.detected[name] += (of_level @ detected).toarray()
        self._start = stop

    def expected(self, name: str, number: int, library: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute in how many cells of a level each gene is expected, if it is as common there as elsewhere."""
        n, depth, detected = self.sizes(name), self.sizes(name, library), self.detected[name]
        n_others = n.sum() - n[number]
        if not n_others or not n[number]:
            return np.zeros(detected.shape[1])
        share = (detected.sum(0) - detected[number]) / n_others
        mean_depth, depth_of_others = depth[number] / n[number], (depth.sum() - depth[number]) / n_others
        expected: NDArray[np.float64] = n[number] * share * min(1.0, mean_depth / max(depth_of_others, 1e-12))
        return expected

    def sizes(self, name: str, weights: NDArray[np.float64] | None = None) -> NDArray[Any]:
        """Return the number of cells of each level, or the sum of their weights, ``(levels,)``."""
        codes = self._codes[name]
        known = codes >= 0
        return np.bincount(codes[known], None if weights is None else weights[known], len(self.levels[name]))


def columns_to_watch(obs: pd.DataFrame, first: Sequence[str]) -> list[str]:
    """Choose columns of obs that may be samples: these first, then others with 2 to 100 levels.

    Examples
    --------
    >>> obs = pd.DataFrame({"sample": ["a", "b"], "depth": [1.0, 2.5], "one": ["x", "x"]})
    >>> columns_to_watch(obs, [])
    ['sample']
    """
    chosen = [name for name in dict.fromkeys(first) if name in obs.columns and why_not_watched(obs, name) == ""]
    others = [name for name in obs.columns if name not in chosen and why_not_watched(obs, name) == ""]
    return [*chosen, *others[:_MOST_COLUMNS]]


def why_not_watched(obs: pd.DataFrame, name: str) -> str:
    """Say why a column cannot be a column of samples; return an empty text if it can.

    Examples
    --------
    >>> why_not_watched(pd.DataFrame({"depth": [1.0, 2.5]}), "depth")
    'it holds floating-point numbers'
    """
    column = obs[name]
    if isinstance(column, pd.DataFrame):
        return "it occurs several times"
    if pd.api.types.is_float_dtype(column):
        return "it holds floating-point numbers"
    try:
        n_levels = column.nunique()
    except TypeError:  # lists, for example
        return "its values are no names"
    if n_levels < 2:
        return "it has a single level"
    return f"it has {n_levels:,} levels, more than {_MOST_LEVELS}" if n_levels > _MOST_LEVELS else ""


def find_lacking_levels(
    cells: CellsWithGene, library: NDArray[np.float64], conditions: Sequence[str]
) -> Mapping[str, list[LackingLevel]]:
    """Find the levels of each column whose cells lack genes.

    A gene of level L is expected in ``m = n_L p min(1, d_L / d)`` cells: p is the share of the other cells that have
    it, d_L and d are the mean library sizes of the level and of the other cells. By chance no cell has it with
    probability ``exp(-m)``. There are two rules, for large and for small levels.

    - A gene without a count is surely absent if that probability is below 1e-4 / genes. A level lacks genes if at least
      five of those that could be surely absent are: a share r of 1 % or more (5 % if the column is no condition).
    - A level lacks genes if 20 genes or more have ``m > 3`` and a fifth of these have no count. By chance it would be
      at most a twentieth. ``r`` is the rest.

    Then the level also lacks other genes without a count, where absence is more probable than chance:
    ``r > (1 - r) exp(-m)``.

    Parameters
    ----------
    cells
        What was counted.
    library
        Library size of each cell, ``(cells,)``.
    conditions
        Columns of which a smaller share is enough: 1 % of the genes, and 5 % of any other column.

    Returns
    -------
    dict
        By column, the levels that lack genes.

    Examples
    --------
    >>> x = sp.csr_matrix(np.ones((100, 10)))
    >>> x[:50, :5] = 0
    >>> x.eliminate_zeros()
    >>> cells = CellsWithGene(pd.DataFrame({"sample": ["a", "b"] * 50}).sort_values("sample"), ["sample"], 10)
    >>> cells.add(x)
    >>> [(one.level, one.n_sure) for one in find_lacking_levels(cells, np.full(100, 10.0), ["sample"])["sample"]]
    [('a', 5)]
    """
    found = {}
    for name, detected in cells.detected.items():
        least = _SHARE_OF_CONDITION if name in conditions else _SHARE_OF_OTHER
        lacking_levels = []
        for number, level in enumerate(cells.levels[name]):
            expected, is_zero = cells.expected(name, number, library), detected[number] == 0
            rate, n_sure = _rate_absent(expected, is_zero, least)
            if rate > 0:
                lacking = is_zero & (rate > (1 - rate) * np.exp(-expected)) & (expected > 0)
                lacking_levels.append(LackingLevel(name, level, int(cells.sizes(name)[number]), n_sure, lacking))
        found[name] = lacking_levels
    return found


def _rate_absent(expected: NDArray[np.float64], is_zero: NDArray[np.bool_], least: float) -> tuple[float, int]:
    """Share of the genes that a level lacks, and the number on which that rests; 0 if chance may explain it."""
    can_be_sure = expected > np.log(len(expected) / _CHANCE)
    n_sure = int((is_zero & can_be_sure).sum())
    if n_sure >= max(_FEWEST_GENES, least * can_be_sure.sum()):
        return min(n_sure / can_be_sure.sum(), 1 - 1e-12), n_sure
    is_likely = expected > _LIKELY
    n_zero = int((is_zero & is_likely).sum())
    if is_likely.sum() < _FEWEST_LIKELY or n_zero < _SHARE_OF_LIKELY * is_likely.sum():
        return 0.0, 0
    by_chance = np.exp(-_LIKELY)
    return min((n_zero / is_likely.sum() - by_chance) / (1 - by_chance), 1 - 1e-12), n_zero


def levels_too_small(cells: CellsWithGene, library: NDArray[np.float64], column: str) -> list[str]:
    """Return the levels of a column that have too few counts to tell which genes they lack."""
    return [
        level
        for number, level in enumerate(cells.levels[column])
        if (cells.expected(column, number, library) > _LIKELY).sum() < _FEWEST_LIKELY
    ]


def absent_genes(
    lacking_levels: Sequence[LackingLevel], levels: Sequence[str], var_names: pd.Index, genes: Sequence[str]
) -> Absent:
    """Name the genes of a model that each of these levels of one column lacks."""
    lacking = {one.level: set(var_names[one.lacking]) for one in lacking_levels}
    pairs = [(level, tuple(gene for gene in genes if gene in lacking.get(level, ()))) for level in levels]
    return Absent(lacking_levels[0].column, tuple(pairs))


def n_missing_values(lacking_levels: Sequence[LackingLevel]) -> int:
    """Count the values, cells times genes, that are missing because these levels lack genes."""
    return sum(one.n_cells * int(one.lacking.sum()) for one in lacking_levels)


def describe_lacking_levels(lacking_levels: Sequence[LackingLevel], var_names: pd.Index) -> str:
    """Say which levels of a column lack how many genes, and what to do."""
    column = lacking_levels[0].column
    lacking_levels = sorted(lacking_levels, key=lambda one: -one.n_sure)
    levels = [
        f"{int(one.lacking.sum()):,} of {len(var_names):,} in {one.level!r} ({one.n_cells:,} cells)"
        for one in lacking_levels[:_LISTED]
    ]
    rest = f" and in {len(lacking_levels) - _LISTED:,} more levels" if len(lacking_levels) > _LISTED else ""
    return (
        f"genes without a count in a whole level of {column!r}, although other cells have them: {', '.join(levels)}"
        f"{rest}; for example {listed(var_names[lacking_levels[0].lacking], 3)}. If they were not measured there "
        "(samples joined with join='outer'), the model would learn that as an effect. Leave them out of these cells "
        f"with mask_absent={column!r} (--mask-absent {shlex.quote(column)}), or join the samples with join='inner'."
    )
