"""What is told of the labels of cells, and of which cells nothing is."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["NONE_OF_THESE", "predictions"]

NONE_OF_THESE = "none of these"
"""What is predicted of a cell that lies where no labelled cell does."""
_NEAREST = 15
_UNLIKELY = 0.01
"""Share of labelled cells that lie as far from the other labelled ones, below which a cell is none of these."""
_FEWEST_LABELLED = 100
"""Labelled cells below which nothing is called none of these: such a share could not be told."""


def predictions(
    probabilities: NDArray[np.float32],
    mu_z: NDArray[np.float32],
    labelled: NDArray[np.float32],
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
    levels
        Names of the labels.
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        By cell: ``label`` ("none of these" where ``p_known`` is below .01), ``probability`` of the likeliest one,
        ``p_known``: share of labelled cells at least as far from the others (distance to the 15th nearest; NaN where
        there are fewer than 100); then a column of probabilities for each label.
    """
    p_known = np.full(len(mu_z), np.nan)
    if len(labelled) >= _FEWEST_LABELLED:
        tree = cKDTree(labelled)
        usual = np.sort(tree.query(labelled, [_NEAREST + 1])[0][:, 0])  # the nearest is the cell itself
        farther = len(usual) - np.searchsorted(usual, tree.query(mu_z, [_NEAREST])[0][:, 0])
        p_known = (1 + farther) / (1 + len(usual))
    best = probabilities.argmax(1)
    label = np.where(p_known < _UNLIKELY, NONE_OF_THESE, np.asarray(levels, object)[best])
    columns = {"label": label, "probability": probabilities.max(1), "p_known": p_known}
    return pd.DataFrame({**columns, **dict(zip(levels, probabilities.T, strict=True))}, index=index)
