"""What is told of the labels of cells, and of which cells nothing is."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import t as student

__all__ = ["FEWEST_HELD_OUT_LABELLED", "NONE_OF_THESE", "Labelled", "predictions"]

NONE_OF_THESE = "none of these"
"""What is predicted of a cell that lies where no labelled cell does."""
_NEAREST = 10
_UNLIKELY = 0.01
"""Probability that a cell of a known label lies as far from the labelled ones, below which it is none of these."""
FEWEST_HELD_OUT_LABELLED = 10
"""Labelled cells kept out of training below which nothing is called none of these: what is usual could not be told."""
_ENOUGH_FOR_SHARES = round(2 / _UNLIKELY)
"""Of these, so that the least share is well below the threshold."""
_PRIOR_MEAN, _PRIOR_SD, _PRIOR_CELLS = 0.35, 0.3, 5
"""Log distances that are usual of held-out cells, from simulated and real ones; and how many cells that counts for."""
_TINY = float(np.finfo(np.float32).tiny)


class Labelled(NamedTuple):
    """Cells of fit whose label is known."""

    mu_z: NDArray[np.float32]
    """Their positions, ``(cells, latent_dim)``."""
    labels: NDArray[np.int32]
    """Numbers of their labels, ``(cells,)``."""
    held_out: NDArray[np.bool_]
    """Which were kept out of training, ``(cells,)``."""


def predictions(
    probabilities: NDArray[np.float32],
    mu_z: NDArray[np.float32],
    known: Labelled,
    levels: tuple[str, ...],
    index: pd.Index,
    empty: NDArray[np.bool_] | None = None,
) -> pd.DataFrame:
    """Labels of cells, how sure, and whether they lie among labelled cells at all.

    Parameters
    ----------
    probabilities
        Of each label, ``(cells, labels)``.
    mu_z
        Their positions, ``(cells, latent_dim)``.
    known
        Cells of fit whose label is known.
    levels
        Names of the labels.
    index
        Names of the cells.
    empty
        Which of them have no count, so that nothing can be told.

    Returns
    -------
    pandas.DataFrame
        By cell: ``label`` ("none of these" where ``p_known`` is below .01), ``probability`` of the likeliest one,
        ``p_known``: probability that a cell of a known label lies at least as far from the labelled cells that were
        trained on; then a column of probabilities for each label. A cell without a count has NaN in all of them.

    Notes
    -----
    Far is the distance to the 10th nearest (of a label with n < 11 cells, to the n - 1st), over the median of
    that among the label's own cells, since types are dense and loose. What is usual is told by the labelled cells that
    were held out, for training draws the others together: ``p_known`` is the share of these that lie as far; of fewer
    than 200, the tail of what another cell's is expected to be, a Student t: log distances are normal, and five cells
    of mean .35 and standard deviation .3, as is usual, count beside them (the conjugate prior; Gelman 2013, section
    3.3). It is NaN where fewer than 10 were held out.
    """
    best, p_known = probabilities.argmax(1), np.full(len(mu_z), np.nan)
    if known.held_out.sum() >= FEWEST_HELD_OUT_LABELLED and not known.held_out.all():
        usual = _distances(known, len(levels), known.mu_z[known.held_out], known.labels[known.held_out])
        p_known = _at_least_as_far(usual, _distances(known, len(levels), mu_z, best))
    label = np.where(p_known < _UNLIKELY, NONE_OF_THESE, np.asarray(levels, object)[best])
    columns = {"label": label, "probability": probabilities.max(1), "p_known": p_known}
    table = pd.DataFrame({**columns, **dict(zip(levels, probabilities.T, strict=True))}, index=index)
    if empty is not None and empty.any():
        table.loc[empty] = np.nan
    return table


def _at_least_as_far(usual: NDArray[np.float64], distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that another of the usual distances is as large as each of these, ``(cells,)``."""
    n = len(usual)
    if n >= _ENOUGH_FOR_SHARES:
        return (1 + n - np.searchsorted(np.sort(usual), distance)) / (1 + n)
    known, weight = np.log(usual), n + _PRIOR_CELLS
    mean = (known.sum() + _PRIOR_CELLS * _PRIOR_MEAN) / weight
    squares = np.square(known - known.mean()).sum() + _PRIOR_CELLS * _PRIOR_SD**2
    squares += n * _PRIOR_CELLS / weight * (known.mean() - _PRIOR_MEAN) ** 2
    spread = math.sqrt(squares / weight * (1 + 1 / weight))
    return student.sf((np.log(distance) - mean) / spread, weight)


def _distances(
    known: Labelled, n_labels: int, z: NDArray[np.float32], labels: NDArray[np.integer]
) -> NDArray[np.float64]:
    """How far z is from the cells trained on, ``(cells,)``, in units of what is usual among those of its label."""
    trained, own = known.mu_z[~known.held_out], known.labels[~known.held_out]
    tree, n_cells = cKDTree(trained), np.bincount(own, minlength=n_labels)
    place = np.clip(n_cells - 1, 1, _NEAREST) - 1  # of few cells the 10th nearest would be of another label
    apart = tree.query(trained, np.arange(2, _NEAREST + 2))[0]  # the nearest is the cell itself
    median = np.full(n_labels, np.median(apart[:, 0]))  # of a label that a single cell has
    for number in np.flatnonzero(n_cells > 1):
        median[number] = np.median(apart[own == number, place[number]])
    distance = tree.query(z, np.arange(1, _NEAREST + 1))[0][np.arange(len(z)), place[labels]]
    return np.maximum(distance, _TINY) / np.maximum(median[labels], _TINY)
