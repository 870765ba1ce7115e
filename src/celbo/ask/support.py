"""Support: whether fit saw cells like these under the conditions asked for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celbo.data.schema import Schema
from celbo.fit.reference import Reference, has_conditions, seen_together
from celbo.model.classifier import Classifier
from celbo.streams import Stream, random_stream

__all__ = ["Known", "known_cells", "n_like", "nearest", "other_levels", "support", "supported_positions"]

_NEIGHBOURS = 50
"""Neighbours of a known cell among which the share with the conditions asked for is counted."""
_LIKE = 30
"""Known cells without the conditions, nearest to a cell, over which that share is averaged: cells like it."""
_NEAREST = 15
"""The distance of a cell is that to the 15th nearest known cell with the conditions."""
_ENOUGH, _SELDOM = 0.4, 0.1
"""Shares of neighbours with the conditions, relative to chance: a supported cell has at least the first; a cell with
less than the second can be called extrapolation."""
_FAR = 0.95
"""A cell is far if its distance is beyond this quantile of the distances among cells with the conditions."""
_MOST_ASKED = 5000
"""Largest number of known cells that are themselves tested for support."""


class Known(NamedTuple):
    """Training cells, and whether they have the conditions asked for."""

    mu_z: NDArray[np.float32]
    """``(cells, latent_dim)``."""
    has_it: NDArray[np.bool_]
    """Which have the conditions asked for, ``(cells,)``."""
    levels: NDArray[np.float32]
    """Levels of all other categorical conditions, and labels, ``(cells, n)``."""


def known_cells(reference: Reference, schema: Schema, classifier: Classifier | None, given: Mapping[str, Any]) -> Known:
    """Return the training cells of a model, and which of them have these conditions."""
    trained = ~reference.held_out
    mu_z, codes = reference.mu_z[trained], reference.conditions[trained]
    levels = other_levels(schema, classifier, given, codes, mu_z, reference.labels[trained])
    return Known(mu_z, has_conditions(codes, schema, given), levels)


def other_levels(
    schema: Schema,
    classifier: Classifier | None,
    given: Mapping[str, Any],
    codes: NDArray[np.float32],
    mu_z: NDArray[np.float32],
    labels: NDArray[np.int32],
) -> NDArray[np.float32]:
    """Levels of categorical conditions that are not asked for, and the label (predicted if -1), ``(cells, n)``."""
    columns = [
        codes[:, number]
        for number, condition in enumerate(schema.conditions)
        if condition.levels is not None and condition.name not in given
    ]
    if classifier is not None:
        with torch.inference_mode():
            predicted = classifier(torch.from_numpy(mu_z).to(classifier.temperature.device)).argmax(-1).cpu().numpy()
        columns.append(np.where(labels >= 0, labels, predicted))
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(codes), 1), np.float32)


def support(mu_z: NDArray[np.float32], levels: NDArray[np.float32], known: Known, index: pd.Index) -> pd.DataFrame:
    """Test whether known cells with the conditions asked for lie near each cell in the latent space.

    Parameters
    ----------
    mu_z
        Positions of the cells, ``(cells, latent_dim)``.
    levels
        Levels of their other conditions, and labels, ``(cells, n)``, as in `Known`.
    known
        The training cells.
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        See `celbo.ask.counterfactual.Counterfactual.support`. A cell is "supported" if the combination of levels was
        seen, the share is at least .4 of the share expected by chance, the distance is usual, and at least 16 cells
        have the conditions. It is "extrapolation" if the distance is not usual, and the combination was not seen or
        the share is less than .1 of chance. Else it is "edge". The share is a mean over the 30 nearest known cells
        without the conditions, because these are like the cell: a type that was never seen with the conditions has a
        share near 0, even if one cell of it has the conditions by chance.
    """
    with_it = known.mu_z[known.has_it]
    if len(with_it) < 2:
        nothing = {"share": 0.0, "distance": np.inf, "verdict": "extrapolation"}
        return pd.DataFrame(nothing, index=index)
    place = min(_NEAREST, len(with_it))
    tree, tree_with = cKDTree(known.mu_z), cKDTree(with_it)
    like = known.mu_z if known.has_it.all() else known.mu_z[~known.has_it]
    nearby = nearest(cKDTree(like), mu_z, _LIKE)
    looked_at, where = np.unique(nearby, return_inverse=True)
    shares = known.has_it[nearest(tree, like[looked_at], _NEIGHBOURS)].mean(1)
    share = shares[where.reshape(nearby.shape)].mean(1)
    distance = tree_with.query(mu_z, [place])[0][:, 0]
    usual = np.quantile(tree_with.query(with_it, [min(place + 1, len(with_it))])[0][:, 0], _FAR)
    near, chance = distance <= usual, known.has_it.mean()
    seen = seen_together(known.levels, known.has_it, levels)
    supported = near & seen & (share >= _ENOUGH * chance) & (len(with_it) > _NEAREST)
    off = ~near & (~seen | (share < _SELDOM * chance))
    verdict = np.where(supported, "supported", np.where(off, "extrapolation", "edge"))
    return pd.DataFrame({"share": share, "distance": distance / max(usual, 1e-12), "verdict": verdict}, index=index)


def supported_positions(known: Known, *, seed: int = 0) -> NDArray[np.float32]:
    """Return positions of supported known cells without the conditions, ``(cells, latent_dim)``.

    If there are more than 5,000 known cells without the conditions, 5,000 are drawn with this seed and tested.
    """
    rows = random_stream(seed, Stream.SUPPORT).permutation(np.flatnonzero(~known.has_it))[:_MOST_ASKED]
    verdict = support(known.mu_z[rows], known.levels[rows], known, pd.RangeIndex(len(rows)))["verdict"]
    return known.mu_z[rows[(verdict == "supported").to_numpy()]]


def nearest(tree: cKDTree, cells: NDArray[np.float32], n: int) -> NDArray[np.intp]:
    """Row numbers of the n nearest points in the tree, or of all if it has fewer, ``(cells, n)``."""
    n = min(n, tree.n)
    return np.asarray(tree.query(cells, n)[1]).reshape(len(cells), n)


def n_like(mu_z: NDArray[np.float32], known: Known) -> tuple[int, int]:
    """Count the different known cells among the 15 nearest of any cell: without the conditions, and with them."""
    counts = []
    for positions in (known.mu_z[~known.has_it], known.mu_z[known.has_it]):
        place = min(_NEAREST, len(positions))
        counts.append(len(np.unique(cKDTree(positions).query(mu_z, place)[1])) if place else 0)
    return counts[0], counts[1]
