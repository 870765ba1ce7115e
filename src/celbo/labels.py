"""What is told of the labels of cells, and of which cells nothing is."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["NONE_OF_THESE", "predictions"]

NONE_OF_THESE = "none of these"
"""What is predicted of a cell that lies where no labelled cell does."""
_NEAREST = 10
_UNLIKELY = 0.01
"""Share of labelled cells that lie as far from the other labelled ones, below which a cell is none of these."""
_FEWEST_LABELLED = 100
"""Labelled cells below which nothing is called none of these: such a share could not be told."""


def predictions(
    probabilities: NDArray[np.float32],
    mu_z: NDArray[np.float32],
    labelled: NDArray[np.float32],
    labels: NDArray[np.int32],
    levels: tuple[str, ...],
    index: pd.Index,
) -> pd.DataFrame:
    """Labels of cells, how sure, and whether they lie among labelled cells at all.

    Parameters
    ----------
    probabilities
        ``(cells, labels)``.
    mu_z
        ``(cells, latent_dim)``.
    labelled
        mu_z of the labelled cells of fit; how far they are from each other says what is usual.
    labels
        Their labels, by number.
    levels
        Names of the labels.
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        By cell: ``label`` ("none of these" where ``p_known`` is below .01), ``probability`` of the likeliest one,
        ``p_known``: share of labelled cells at least as far from the others (distance to the 10th nearest, in units of
        the median of the label's cells, since types are dense and loose; NaN where there are fewer than 100); then a
        column of probabilities for each label.
    """
    best, p_known = probabilities.argmax(1), np.full(len(mu_z), np.nan)
    if len(labelled) >= _FEWEST_LABELLED:
        tree = cKDTree(labelled)
        apart = tree.query(labelled, [_NEAREST + 1])[0][:, 0]  # the nearest is the cell itself
        median = np.full(len(levels), np.median(apart))
        for label in np.unique(labels):
            median[label] = np.median(apart[labels == label])
        median = np.maximum(median, np.finfo(np.float32).tiny)
        usual = np.sort(apart / median[labels])
        farther = len(usual) - np.searchsorted(usual, tree.query(mu_z, [_NEAREST])[0][:, 0] / median[best])
        p_known = (1 + farther) / (1 + len(usual))
    label = np.where(p_known < _UNLIKELY, NONE_OF_THESE, np.asarray(levels, object)[best])
    columns = {"label": label, "probability": probabilities.max(1), "p_known": p_known}
    return pd.DataFrame({**columns, **dict(zip(levels, probabilities.T, strict=True))}, index=index)
