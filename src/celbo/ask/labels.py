"""Predict cell labels, and which cells match none of the known labels."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import t as student

from celbo.ask.unlike import warn_of_unlike
from celbo.data.conditions import as_text, column_of, level_positions
from celbo.data.schema import Schema
from celbo.errors import UsageError, warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted

__all__ = ["NONE_OF_THESE", "Labelled", "label_codes", "predict", "predictions"]

NONE_OF_THESE = "none of these"
"""Prediction for a cell that lies far from all labelled cells."""
_NEAREST = 10
_UNLIKELY = 0.01
"""A cell matches no label if a cell of a known label lies as far with a probability below this."""
_FEWEST_HELD_OUT = 10
"""Held-out labelled cells that are needed to say which distances are usual."""
_ENOUGH_FOR_SHARES = round(2 / _UNLIKELY)
"""Held-out labelled cells from which shares are counted: the smallest share then is well below the threshold."""
_PRIOR_MEAN, _PRIOR_SD, _PRIOR_CELLS = 0.35, 0.3, 5
"""Usual log distances of held-out cells, from simulated and real cells; and how many cells this prior counts for."""
_TINY = float(np.finfo(np.float32).tiny)


class Labelled(NamedTuple):
    """Reference cells with a known label."""

    mu_z: NDArray[np.float32]
    """Positions, ``(cells, latent_dim)``."""
    labels: NDArray[np.int32]
    """Numbers of the labels, ``(cells,)``."""
    held_out: NDArray[np.bool_]
    """Which cells were held out of training, ``(cells,)``."""


def label_codes(schema: Schema, obs: pd.DataFrame) -> NDArray[np.int32]:
    """Numbers of the labels in obs, ``(cells,)``; -1 where the model does not know the label."""
    labels = schema.labels
    if labels is None or labels.levels is None or labels.name not in obs.columns:
        return np.full(len(obs), -1, np.int32)
    column = column_of(obs, labels.name)
    codes = level_positions(labels.levels, as_text(column))
    return np.where(column.notna(), codes, -1).astype(np.int32)


def predict(fitted: Fitted, cells: Cells) -> pd.DataFrame:
    """Predict the label of each cell; see `celbo.ExpressionVAE.predict`."""
    labels, classifier = fitted.schema.labels, fitted.vae.classifier
    if labels is None or labels.levels is None or classifier is None:
        raise UsageError("this model was fitted without labels; give labels='...' (celbo fit --labels COLUMN).")
    reference, is_unlike = fitted.needed_reference(), warn_of_unlike(fitted, cells)
    mu_z = cells.encoded.mu_z
    with torch.inference_mode():
        log_p = classifier(torch.from_numpy(mu_z).to(classifier.temperature.device))
        probabilities = log_p.exp().cpu().numpy()
    is_known = reference.labels >= 0
    known = Labelled(reference.mu_z[is_known], reference.labels[is_known], reference.held_out[is_known])
    if known.held_out.sum() < _FEWEST_HELD_OUT:
        warn(
            f"{known.held_out.sum()} cells with a label were held out of fitting. At least {_FEWEST_HELD_OUT} are "
            f"needed to say which distances are usual, so no cell is called {NONE_OF_THESE!r}. Label more cells, or "
            "fit with a larger validation_fraction."
        )
    table = predictions(probabilities, mu_z, known, labels.levels, cells.obs.index, cells.empty)
    if is_unlike is not None and "unlike" not in labels.levels:  # a label of an older version may be called that
        table.insert(3, "unlike", is_unlike)
    return table


def predictions(
    probabilities: NDArray[np.float32],
    mu_z: NDArray[np.float32],
    known: Labelled,
    levels: tuple[str, ...],
    index: pd.Index,
    empty: NDArray[np.bool_] | None = None,
) -> pd.DataFrame:
    """Make the table of labels, their probabilities, and whether a cell lies among labelled cells at all.

    Parameters
    ----------
    probabilities
        Probability of each label, ``(cells, labels)``.
    mu_z
        Positions of the cells, ``(cells, latent_dim)``.
    known
        Reference cells with a known label.
    levels
        Names of the labels.
    index
        Names of the cells.
    empty
        Which cells have no count; they get NaN.

    Returns
    -------
    pandas.DataFrame
        By cell: ``label`` ("none of these" where ``p_known`` is below .01); ``probability`` of the most probable label;
        ``p_known``, the probability that a cell of a known label lies at least as far from the labelled training
        cells; then a column of probabilities for each label. A cell without a count has NaN in all columns.

    Notes
    -----
    The distance of a cell is the distance to the 10th nearest labelled training cell (for a label with n < 11 cells, to
    the n - 1st), divided by the median of this distance among the label's own cells, because some types are dense and
    others are not. Held-out labelled cells show which distances are usual; training cells do not, because training
    pulls them together. ``p_known`` is the share of held-out labelled cells that lie as far. With fewer than 200 of
    them it is the tail of the predictive distribution of one more cell, a Student t: log distances are normal, and the
    prior counts as five cells of mean .35 and standard deviation .3 (conjugate prior; Gelman 2013, section 3.3).
    ``p_known`` is NaN where fewer than 10 labelled cells were held out.
    """
    best, p_known = probabilities.argmax(1), np.full(len(mu_z), np.nan)
    if known.held_out.sum() >= _FEWEST_HELD_OUT and not known.held_out.all():
        usual = _distances(known, len(levels), known.mu_z[known.held_out], known.labels[known.held_out])
        p_known = _at_least_as_far(usual, _distances(known, len(levels), mu_z, best))
    label = np.where(p_known < _UNLIKELY, NONE_OF_THESE, np.asarray(levels, object)[best])
    columns = {"label": label, "probability": probabilities.max(1), "p_known": p_known}
    table = pd.DataFrame({**columns, **dict(zip(levels, probabilities.T, strict=True))}, index=index)
    if empty is not None and empty.any():
        table.loc[empty] = np.nan
    return table


def _at_least_as_far(usual: NDArray[np.float64], distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that one more usual distance is as large as each of these, ``(cells,)``."""
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
    """Distance of z to the labelled training cells, ``(cells,)``, relative to the median of its label."""
    trained, own = known.mu_z[~known.held_out], known.labels[~known.held_out]
    tree, n_cells = cKDTree(trained), np.bincount(own, minlength=n_labels)
    place = np.clip(n_cells - 1, 1, _NEAREST) - 1  # in a small label the 10th nearest would belong to another one
    apart = tree.query(trained, np.arange(2, _NEAREST + 2))[0]  # the nearest is the cell itself
    median = np.full(n_labels, np.median(apart[:, 0]))  # for labels with a single cell
    for number in np.flatnonzero(n_cells > 1):
        median[number] = np.median(apart[own == number, place[number]])
    distance = tree.query(z, np.arange(1, _NEAREST + 1))[0][np.arange(len(z)), place[labels]]
    return np.maximum(distance, _TINY) / np.maximum(median[labels], _TINY)
