"""Do the levels of a nuisance have the same groups of cells? From counts alone: numpy arrays in, no torch, no AnnData.

Two levels with the same cell types and a batch effect have the same groups of cells, moved by one shift. Two levels
with types of their own have other groups, which no shift brings together. So levels are compared in two steps.

1. Are cells of the other level among the nearest neighbours of a cell? If so, the two levels overlap.
2. If not, the centres of groups (k-means) are compared, each level around its own mean, in principal components of
   what varies within levels. The mismatch of one level to another is the mean distance of its centres to the nearest
   centre of the other after the best shift, in units of their spread. Two known mismatches give the scale: that to the
   other half of the same level (the same groups), and that to normal draws with the mean and covariance of the other
   level (no groups at all). Both directions count. If the groups of one level are clearly found in the other, which
   may have more, that is enough.

Levels without groups cannot be compared in the second step. If they do not overlap in the first, counts cannot tell
whether a batch effect or a type divides them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from celbo.data.confounding import advice_for_own_types
from celbo.data.normalise import COUNTS_PER_CELL, log_normalise
from celbo.streams import Stream, random_stream
from celbo.trust.findings import Finding

__all__ = ["COMPONENTS", "Overlap", "choose_levels", "level_overlap", "overlap_of"]

Floats = NDArray[np.float64]
_Halves = tuple[Floats, Floats, Floats]
"""Centres of groups, ``(groups, components)``: of two halves of a level, and of normal draws like the level."""

_FEWEST_CELLS, _MOST_LEVELS = 100, 6
"""Levels with fewer cells are left out; of the others, at most this many are compared, those with the most cells."""
_CELLS, _CELLS_OF_LEVEL = 4000, 1000
"""Most cells of all levels together, and of one level."""
_GENES, _DETECTED = 1000, 0.005
"""Most genes to compare, and their smallest mean count."""
COMPONENTS, _COMPONENTS_WITHIN = 20, 8
"""Principal components for neighbours, and for groups within levels."""
_NEIGHBOURS = 15
_OVERLAP = 0.5
"""Two levels overlap if neighbours are of the other level at least this often, as a share of what chance gives."""
_GROUPS, _CELLS_OF_GROUP = 15, 16
"""Most groups in half of a level, and mean number of cells in one at least."""
_SPLITS, _FEWEST_SPLITS = 16, 6
"""Divisions of all levels together into halves, and fewest of one level."""
_SAME, _SAME_AT_LEAST = 0.66, 0.08
"""Two levels have the same groups if their mismatches, from that of halves (0) to that of normal draws (1), are on
average at most the first number; or if they are above that of halves by at most the second."""
_WITHIN, _WITHIN_MANY = 0.42, 0.3
"""They also have if one of the mismatches is at most this, because the other level has more groups. The second number
is for three levels or more, where chance has more pairs to choose from."""
_NO_GROUPS, _CELLS_WITHOUT_GROUPS, _FAR = 0.05, 350, 0.05
"""Levels have no groups if normal draws match as well as halves, up to this difference. That is believed for at least
this median number of cells per level, and matters for levels that overlap less than this."""
_STARTS, _STEPS = 16, 3
"""Shifts that are improved, and how often."""


@dataclass(frozen=True)
class Overlap:
    """What counts say of the levels of one condition."""

    name: str
    """The condition."""
    groups: tuple[tuple[str, ...], ...]
    """Levels that have groups of cells in common, directly or through others; the largest set first."""
    grouped: bool
    """Whether levels show groups of cells that can be compared."""

    @property
    def levels(self) -> int:
        """The number of levels that were compared."""
        return sum(map(len, self.groups))

    @property
    def apart(self) -> bool:
        """Whether at least half of the levels have nothing in common with the largest set of levels."""
        return 2 * len(self.groups[0]) <= self.levels

    @property
    def doubt(self) -> str:
        """A warning, or "" if enough levels overlap."""
        if not self.apart:
            return ""
        at_most = f"; at most {len(self.groups[0])} of them overlap" if len(self.groups[0]) > 1 else ""
        found = f"nuisance {self.name!r}: the {self.levels} levels compared do not overlap in the counts{at_most}"
        why = (
            "they seem to have different groups of cells, not only a batch effect that moves all cells alike. Either "
            "levels have cell types of their own, or the effect of a level differs from type to type"
            if self.grouped
            else "the cells of a level form no groups that can be compared. Either each level is a cell type of its "
            "own, or all levels have the same type and a strong effect"
        )
        return (
            f"{found}, and {why}. The counts cannot tell which. If levels have types of their own, a model that "
            f"removes {self.name!r} also removes the differences between these types"
        )

    @property
    def advice(self) -> str:
        """What to do if levels are apart."""
        return (
            f"name a column of cell types: celbo check DATA --nuisance {self.name} --groupby COLUMN says whether "
            f"levels share types. If they do not, {advice_for_own_types(self.name)}"
        )

    @property
    def warning(self) -> str:
        """The doubt and the advice, or "" if enough levels overlap."""
        return f"{self.doubt}. To find out, {self.advice}." if self.apart else ""


def level_overlap(overlap: Overlap) -> Finding:
    """Turn an `Overlap` into a finding: "watch" if its levels are apart."""
    name, expected = f"overlap of {overlap.name}", "levels with the same groups of cells"
    value = [list(group) for group in overlap.groups]
    if overlap.apart:
        return Finding(name, value, expected, "watch", overlap.doubt, overlap.advice)
    n = len(overlap.groups[0])
    meaning = (
        f"{n} of the {overlap.levels} levels of {overlap.name!r} that were compared show no groups that others lack"
    )
    return Finding(name, value, expected, "good", meaning)


def choose_levels(codes: NDArray[np.intp], *, seed: int = 0) -> NDArray[np.intp]:
    """Choose cells in which levels are compared: as many of each level, at most 6 levels and 4,000 cells.

    Parameters
    ----------
    codes
        Number of each cell's level, ``(cells,)``; -1 for cells that must not be chosen.
    seed
        Of the choice.

    Returns
    -------
    numpy.ndarray
        Positions of the cells, sorted; empty if fewer than two levels have 100 cells.

    Examples
    --------
    >>> chosen = choose_levels(np.repeat([0, 1, 2], [3000, 150, 20]))
    >>> np.bincount(np.repeat([0, 1, 2], [3000, 150, 20])[chosen])
    array([1000,  150])
    >>> choose_levels(np.zeros(300, int))
    array([], dtype=int64)
    """
    sizes = np.bincount(codes[codes >= 0])
    levels = np.argsort(-sizes, kind="stable")[:_MOST_LEVELS]
    levels = levels[sizes[levels] >= _FEWEST_CELLS]
    if len(levels) < 2:
        return np.empty(0, np.intp)
    most = min(_CELLS_OF_LEVEL, _CELLS // len(levels))
    rng = random_stream(seed, Stream.OVERLAP)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(codes == level))[:most] for level in levels]))


def overlap_of(
    name: str,
    x: "sparse.csr_matrix",
    codes: NDArray[np.intp],
    levels: Sequence[str],
    *,
    is_counts: bool = True,
    seed: int = 0,
) -> Overlap:
    """Compare the levels of a condition; the module says how.

    Parameters
    ----------
    name
        The condition.
    x
        Counts, or other values, ``(cells, genes)``, of the cells that `choose_levels` chose.
    codes
        Number of each cell's level, ``(cells,)``.
    levels
        Names of the levels, by number.
    is_counts
        Whether to log-normalise the values.
    seed
        Of divisions into halves, and of normal draws.

    Returns
    -------
    Overlap

    Examples
    --------
    >>> import celbo
    >>> cells = celbo.simulate_cells(n_cells=1000, n_genes=300, n_types=6, seed=0)
    >>> types = cells.obs["cell_type"].cat.codes.to_numpy().astype(int)
    >>> overlap_of("batch", cells.X, types // 3, ["A", "B"]).apart
    True
    >>> batch = cells.obs["batch"].cat.codes.to_numpy().astype(int)
    >>> overlap_of("batch", cells.X, batch, ["A", "B"]).groups
    (('A', 'B'),)
    """
    present, codes = np.unique(codes, return_inverse=True)
    n, values = len(present), _values(x, is_counts=is_counts)
    mixing = _mixing(_components(values, COMPONENTS), codes)
    linked = mixing >= _OVERLAP
    grouped = True
    if _sets(linked)[0] > 1:
        for level in range(n):
            values[codes == level] -= values[codes == level].mean(0)
        scores = _components(values, _COMPONENTS_WITHIN)
        rng = random_stream(seed, Stream.OVERLAP, 1)
        splits = max(_SPLITS // n, _FEWEST_SPLITS)
        parts = [_centres(scores[codes == level], splits, rng) for level in range(n)]
        pairs = [pair for pair in combinations(range(n), 2) if not linked[pair]]
        both = [(_mismatches(parts[a], parts[b]), _mismatches(parts[b], parts[a])) for a, b in pairs]
        between, halves, normal = np.moveaxis(np.array(both), 2, 0)  # each (pairs, 2)
        excess, room = between - halves, normal - halves
        same = excess.sum(1) <= _SAME * room.sum(1)
        within = _WITHIN if n == 2 else _WITHIN_MANY
        same |= (excess <= within * room).any(1) | (excess.mean(1) <= _SAME_AT_LEAST)
        if room.mean() < _NO_GROUPS and np.median(np.bincount(codes)) >= _CELLS_WITHOUT_GROUPS:
            grouped = False
            same &= np.array([mixing[pair] >= _FAR for pair in pairs])
        for pair, is_same in zip(pairs, same, strict=True):
            linked[pair] |= is_same
    _, of_level = _sets(linked)
    names = [str(levels[level]) for level in present]
    groups = [
        tuple(name for name, its in zip(names, of_level, strict=True) if its == one) for one in np.unique(of_level)
    ]
    return Overlap(name, tuple(sorted(groups, key=lambda group: -len(group))), grouped)


def _sets(linked: NDArray[np.bool_]) -> tuple[int, NDArray[np.intp]]:
    """Count the connected sets of levels, and number each level's."""
    n, of_level = connected_components(linked, directed=False)
    return int(n), of_level


def _values(x: "sparse.csr_matrix", *, is_counts: bool) -> NDArray[np.float32]:
    """Log-normalise counts to the median library size, and keep the genes that vary most, ``(cells, genes)``.

    With a library size of 10,000 instead, a deep and a shallow level would lie apart by their depth.
    """
    x = x.tocsr()
    weight = np.ones(x.shape[1])
    if is_counts:
        library = np.maximum(np.asarray(x.sum(1)), 1)
        scaled = x.multiply(np.median(library) / library).tocsr()
        x, scale = log_normalise(x, library * (COUNTS_PER_CELL / np.median(library))), scaled
        mean = np.asarray(scale.mean(0)).ravel()
        weight = np.where(mean > _DETECTED, 1 / np.maximum(mean, _DETECTED), 0)
    else:
        scale, mean = x, np.asarray(x.mean(0)).ravel()
    variance = np.asarray(scale.multiply(scale).mean(0)).ravel() - mean**2
    genes = np.argsort(-variance * weight, kind="stable")[:_GENES]
    values: NDArray[np.float32] = x[:, genes].toarray().astype(np.float32)
    return values


def _components(values: NDArray[np.float32], n: int) -> Floats:
    from sklearn.decomposition import PCA

    n = min(n, *(side - 1 for side in values.shape))
    scores: Floats = PCA(n, svd_solver="randomized", random_state=0).fit_transform(values).astype(np.float64)
    return scores


def _mixing(where: Floats, codes: NDArray[np.intp]) -> Floats:
    """Compute how often neighbours are of the other of two levels; 1 is chance, ``(levels, levels)``."""
    from sklearn.neighbors import NearestNeighbors

    sizes = np.bincount(codes)
    nearest = NearestNeighbors(n_neighbors=_NEIGHBOURS + 1).fit(where).kneighbors(return_distance=False)
    table = np.zeros((len(sizes), len(sizes)))
    np.add.at(table, (np.repeat(codes, nearest.shape[1]), codes[nearest].ravel()), 1)
    table /= sizes[:, None] * sizes
    share = 2 * table / np.maximum(table + np.diag(table)[:, None], 1e-300)
    mixing: Floats = (share + share.T) / 2
    return mixing


def _centres(cells: Floats, splits: int, rng: np.random.Generator) -> list[_Halves]:
    """Compute centres of groups in the halves of a level, and of as many normal draws, for several divisions."""
    parts, half = [], len(cells) // 2
    for _ in range(splits):
        cells = cells[rng.permutation(len(cells))]
        normal = rng.multivariate_normal(cells.mean(0), np.atleast_2d(np.cov(cells.T)), half)
        parts.append((_k_means(cells[:half]), _k_means(cells[half : 2 * half]), _k_means(normal)))
    return parts


def _k_means(cells: Floats) -> Floats:
    from sklearn.cluster import KMeans

    k = min(_GROUPS, max(2, len(cells) // _CELLS_OF_GROUP), len(np.unique(cells, axis=0)))
    centres: Floats = KMeans(k, n_init=1, random_state=0).fit(cells).cluster_centers_
    return centres


def _mismatches(one: list[_Halves], other: list[_Halves]) -> tuple[float, float, float]:
    """Compute the mismatch of one level to the other, to its other half, and to normal draws like the other."""
    between, halves, normal = list[float](), list[float](), list[float]()
    for (a, a2, _), (b, b2, b_normal) in zip(one, other, strict=True):
        between += [_mismatch(a, b), _mismatch(a2, b2)]
        halves += [_mismatch(a, a2), _mismatch(a2, a)]
        normal += [_mismatch(a, b_normal), _mismatch(a2, b_normal)]
    return float(np.mean(between)), float(np.mean(halves)), float(np.mean(normal))


def _mismatch(a: Floats, b: Floats) -> float:
    """Compute the mean distance of centres ``a`` to the nearest of ``b``, in units of their spread, at the best shift.

    The shifts that are tried bring one centre of ``a`` onto one of ``b``. The best of them are improved by steps to the
    weighted median of the differences (iteratively reweighted means), which a few centres without partner hardly move.
    """
    spread = max(np.linalg.norm(a - a.mean(0), axis=1).mean(), 1e-12)
    shifts = np.concatenate([np.zeros((1, a.shape[1])), (b[None] - a[:, None]).reshape(-1, a.shape[1])])
    differences = ((b[None] - a[:, None]) ** 2).sum(-1)
    best = np.inf
    for step in range(_STEPS + 1):
        # |a + s - b|^2 = |a - b|^2 + |s|^2 + 2 s (a - b), for each shift, a and b
        along = (shifts @ a.T)[:, :, None] - (shifts @ b.T)[:, None]
        squares = differences + (shifts**2).sum(1)[:, None, None] + 2 * along
        nearest, distance = squares.argmin(2), np.sqrt(squares.min(2).clip(0))
        mismatch = distance.mean(1) / spread
        best = min(best, float(mismatch.min()))
        if step == 0:
            keep = np.argsort(mismatch, kind="stable")[:_STARTS]
            shifts, nearest, distance = shifts[keep], nearest[keep], distance[keep]
        weight = 1 / (distance + 0.03 * spread)
        shifts = np.einsum("sa,sap->sp", weight, b[nearest] - a) / weight.sum(1)[:, None]
    return best
