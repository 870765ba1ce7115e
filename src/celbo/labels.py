"""Labels, partly known: a classifier on z, trained with the bound; calibrated, and able to say "none of these"."""

import math

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.spatial import cKDTree
from torch import Tensor, nn

from celbo.data.conditions import Condition, as_text
from celbo.errors import DataError, listed

__all__ = ["NONE_OF_THESE", "Classifier", "calibrate", "known_labels", "label_loss", "predictions"]

NONE_OF_THESE = "none of these"
"""What is predicted of a cell that lies where no labelled cell does."""
_WEIGHT = 50.0
"""Of the label of a cell beside its counts: nats of the bound for each nat of cross-entropy (as in scANVI)."""
_NEAREST = 15
_UNLIKELY = 0.01
"""Share of labelled cells that lie as far from the other labelled ones, below which a cell is none of these."""
_FEWEST_LABELLED = 100
"""Labelled cells below which nothing is called none of these: such a share could not be told."""
_FEWEST = 20
"""Held-out labelled cells below which nothing is calibrated."""


class Classifier(nn.Module):
    """``p(y | z) = softmax((W z + b) / T)``; T is 1 until `calibrate` has seen held-out cells."""

    temperature: Tensor

    def __init__(self, latent_dim: int, n_labels: int):
        super().__init__()
        self.fc = nn.Linear(latent_dim, n_labels)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """Log-probabilities, ``(cells, labels)``, of z ``(cells, latent_dim)``."""
        return (self.fc(z) / self.temperature).log_softmax(-1)


def known_labels(column: "pd.Series[str]", unlabelled: str) -> tuple[Condition, NDArray[np.int32]]:
    """The labels there are, and each cell's number, -1 where it is not known (missing, or ``unlabelled``).

    Raises
    ------
    DataError
        If fewer than two labels are known.

    Examples
    --------
    >>> labels, codes = known_labels(pd.Series(["T", "unknown", None, "B"], name="type"), "unknown")
    >>> labels.levels, codes
    (('B', 'T'), array([ 1, -1, -1,  0], dtype=int32))
    """
    text = as_text(column)
    is_known = (column.notna() & (text != unlabelled)).to_numpy()
    levels = tuple(sorted(text[is_known].unique()))
    if len(levels) < 2:
        raise DataError(
            f"obs column {column.name!r} has {len(levels)} known labels ({listed(levels)}) in {is_known.sum():,} "
            f"cells; a classifier needs two or more. Those that are missing or read {unlabelled!r} are unknown."
        )
    codes = pd.Index(levels).get_indexer(pd.Index(text)).astype(np.int32)
    codes[~is_known] = -1
    return Condition(str(column.name), levels), codes


def label_loss(classifier: Classifier, z: Tensor, labels: Tensor) -> Tensor:
    """``-50 mean log p(y | z)`` over the labelled cells of a minibatch; 0 where there are none.

    Parameters
    ----------
    classifier
        Of the model.
    z
        Sampled, ``(cells, latent_dim)``.
    labels
        ``(cells,)``; -1 for an unknown one.
    """
    is_known = labels >= 0
    if not is_known.any():
        return z.new_zeros(())
    return _WEIGHT * nn.functional.nll_loss(classifier(z[is_known]), labels[is_known].long())


@torch.no_grad()
def calibrate(classifier: Classifier, mu_z: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    """Set the temperature under which held-out labels are likeliest (Guo 2017, arXiv 1706.04599)."""
    is_known = labels >= 0
    if is_known.sum() < _FEWEST:
        return
    logits = classifier.fc(torch.from_numpy(mu_z[is_known]).to(classifier.fc.weight.device)).double().cpu()
    truth = torch.from_numpy(labels[is_known]).long()

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), truth))

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    classifier.temperature.fill_(math.exp(float(found.x)))


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
