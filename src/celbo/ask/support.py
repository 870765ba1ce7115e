"""Whether cells like these were seen under the conditions that are asked for."""

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

__all__ = ["Known", "known_cells", "n_like", "nearest", "other_levels", "support", "supported_positions"]

_NEIGHBOURS = 50
"""Known cells beside a cell that are asked how many of them are of the condition asked for."""
_LIKE = 30
"""Known cells without that condition, nearest to a cell, over which that share is averaged: cells like it."""
_NEAREST = 15
"""Of the known cells of that condition, the one whose distance is measured."""
_ENOUGH, _SELDOM = 0.4, 0.1
"""Share of neighbours of that condition, in units of what it would be by chance, from which on a cell can be supported,
and below which it is off the map."""
_FAR = 0.95
"""Quantile of the distances among cells of that condition beyond which a cell is far from them."""
_MOST_ASKED = 5000
"""Known cells that are themselves asked whether they are supported."""


class Known(NamedTuple):
    """Cells learned from, and what is asked of them."""

    mu_z: NDArray[np.float32]
    """``(cells, latent_dim)``."""
    has_it: NDArray[np.bool_]
    """Which have the conditions asked for, ``(cells,)``."""
    levels: NDArray[np.float32]
    """Levels of all other categorical conditions, and labels, ``(cells, n)``."""


def known_cells(reference: Reference, schema: Schema, classifier: Classifier | None, given: Mapping[str, Any]) -> Known:
    """The cells that a model learned from, and which of them have these conditions."""
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
    """Levels of the categorical conditions that are not asked for, and the label (told if -1), ``(cells, n)``."""
    columns = [
        codes[:, number]
        for number, condition in enumerate(schema.conditions)
        if condition.levels is not None and condition.name not in given
    ]
    if classifier is not None:
        with torch.inference_mode():
            told = classifier(torch.from_numpy(mu_z).to(classifier.temperature.device)).argmax(-1).cpu().numpy()
        columns.append(np.where(labels >= 0, labels, told))
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(codes), 1), np.float32)


def support(mu_z: NDArray[np.float32], levels: NDArray[np.float32], known: Known, index: pd.Index) -> pd.DataFrame:
    """Whether cells of the conditions asked for were seen near each cell in the latent space.

    Parameters
    ----------
    mu_z
        Of the cells, ``(cells, latent_dim)``.
    levels
        Of their other conditions and labels, ``(cells, n)``, as in `Known`.
    known
        The cells that the model learned from.
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        See `celbo.ask.counterfactual.Counterfactual.support`: "supported" where the combination of levels was seen, the
        share is at least .4 of what chance would give, the distance usual, and at least 16 cells have the conditions;
        "extrapolation" where the distance is not, and the combination was not seen or the share is less than .1 of
        that; else "edge". The share is a mean over the 30 known cells without the conditions that are nearest, for
        those are like the cell: a type never seen so has none around it, even if one cell of it has by chance.
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
    """Where known cells without the conditions lie that are themselves supported, ``(cells, latent_dim)``.

    Of 5,000 cells without the conditions, drawn with this seed, if there are more.
    """
    rows = np.random.default_rng([seed, 19]).permutation(np.flatnonzero(~known.has_it))[:_MOST_ASKED]
    verdict = support(known.mu_z[rows], known.levels[rows], known, pd.RangeIndex(len(rows)))["verdict"]
    return known.mu_z[rows[(verdict == "supported").to_numpy()]]


def nearest(tree: cKDTree, cells: NDArray[np.float32], n: int) -> NDArray[np.intp]:
    """Positions of the n nearest in the tree, or of all if it has fewer, ``(cells, n)``."""
    n = min(n, tree.n)
    return np.asarray(tree.query(cells, n)[1]).reshape(len(cells), n)


def n_like(mu_z: NDArray[np.float32], known: Known) -> tuple[int, int]:
    """How many different known cells are among the 15 nearest of a cell: of those without the conditions, and with."""
    counts = []
    for some in (known.mu_z[~known.has_it], known.mu_z[known.has_it]):
        place = min(_NEAREST, len(some))
        counts.append(len(np.unique(cKDTree(some).query(mu_z, place)[1])) if place else 0)
    return counts[0], counts[1]
