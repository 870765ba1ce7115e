"""Find posterior collapse and related faults: numpy arrays in, findings out. No torch, no AnnData.

Layout of every array: cells first, ``(cells, latent_dim)``; nats. Each function measures one thing and returns a
`Finding`: the value, what a healthy model shows, and what to try. `celbo.trust.advice` calls all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celbo.data.confounding import types_of_one_level
from celbo.model.information import ACTIVE, ANCHORS, mutual_information
from celbo.streams import Stream, random_stream, short_seed

__all__ = [
    "Finding",
    "active_units",
    "aggregated_gap",
    "condition_ablation",
    "condition_leakage",
    "decoder_sensitivity",
    "energy_distance",
    "enough_ablation",
    "expected_dimensions",
    "falls_short",
    "gain",
    "kl_by_dimension",
    "lasting_collapse",
    "latent_ablation",
    "latent_information",
    "listens",
    "types_kept",
]

Floats = NDArray[np.floating[Any]]

DEAD, WEAK = 0.01, 0.1
"""A dimension is called dead, or weak, if its KL is below this, nats."""
EPSILON = DELTA = 0.01
"""(epsilon, delta)-collapse: KL below epsilon in a share of at least 1 - delta of the cells (Lucas 2019)."""
LEAST_ABLATION = 1.0
"""A decoder that uses z loses at least this many nats per cell without it."""
HEALTHY_SHARE = 0.05
"""It also loses at least this share of what the model gains over gene means and library sizes."""
LITTLE_INFORMATION = 0.5
"""Below this mutual information of cells and z, nats, z says little about a cell."""
WIDE_GAP = 1.0
"""Above this difference of KL and mutual information, nats, samples from the prior are not like cells."""
LEAKS = 0.3
"""A condition leaks if z predicts it by more than this share of the way from chance to certainty."""
DECODER_LISTENS = 0.01
"""A decoder that uses a condition, or a dimension of z, loses at least this many nats per cell without it."""
IN_USE = 0.6
"""A healthy z uses at least this share of the dimensions that the data show."""
HARDLY = 0.5
"""A condition is called ignored only if the decoder loses at most this many nats per cell without it."""

KEPT = 0.8
"""A type is kept apart if its share of own neighbours in z is at least this share of that in the counts."""
_NEIGHBOURS, _ENOUGH_OF_TYPE = 10, 20


@dataclass(frozen=True)
class Finding:
    """One measurement, and what it means."""

    name: str
    value: Any
    """A number, or one for each dimension."""
    expected: str
    """What a healthy model shows."""
    verdict: str
    """"good", "watch" or "bad"."""
    meaning: str
    """One sentence with the figures."""
    try_next: str = ""
    """What to do about it; empty if nothing needs to be done."""


def active_units(mu_z: Floats) -> Finding:
    """Compute ``Var_x(E_q[z_j | x])`` of each dimension (Burda 2016, arXiv 1509.00519): active above 0.01."""
    variance = mu_z.var(0, dtype=np.float64)
    n, total = int((variance > ACTIVE).sum()), len(variance)
    dead = [int(j) for j in np.flatnonzero(variance <= ACTIVE)]
    verdict = "bad" if n == 0 else "watch" if dead else "good"
    meaning = f"{n} of {total} dimensions vary between cells (variance of mu_z above {ACTIVE})"
    meaning += f"; {_named(dead)} do not: a picture of them is a blob without separation" if dead else ""
    return Finding("active units", variance.tolist(), f"variance above {ACTIVE} in each", verdict, meaning)


def kl_by_dimension(kl: Floats) -> Finding:
    """Compute the KL of each dimension and its quantiles over cells: dead below 0.01, weak below 0.1 nats."""
    mean = kl.mean(0, dtype=np.float64)
    low, middle, high = np.quantile(kl, [0.05, 0.5, 0.95], axis=0)
    dead, weak = np.flatnonzero(mean < DEAD), np.flatnonzero((mean >= DEAD) & (mean < WEAK))
    verdict = "bad" if len(dead) == len(mean) else "watch" if len(dead) or len(weak) else "good"
    meaning = f"the KL is {mean.sum():.2f} nats per cell; dead dimensions {len(dead)}, weak {len(weak)} of {len(mean)}"
    values = [
        {"mean": float(m), "5%": float(a), "50%": float(b), "95%": float(c)}
        for m, a, b, c in zip(mean, low, middle, high, strict=True)
    ]
    return Finding("KL by dimension", values, f"above {WEAK} nats in each", verdict, meaning)


def lasting_collapse(kl: Floats) -> Finding:
    """Compute the share of cells with ``KL_j < epsilon``; from ``1 - delta`` on it is a collapse (Lucas 2019)."""
    share = (kl < EPSILON).mean(0, dtype=np.float64)
    collapsed = [int(j) for j in np.flatnonzero(share >= 1 - DELTA)]
    verdict = "bad" if len(collapsed) == len(share) else "watch" if collapsed else "good"
    meaning = f"{len(collapsed)} of {len(share)} dimensions say nothing of {1 - DELTA:.0%} of the cells or more"
    return Finding("(0.01, 0.01)-collapse", share.tolist(), f"below {1 - DELTA} in each", verdict, meaning)


def latent_information(mu_z: Floats, logvar_z: Floats, *, seed: int = 0) -> Finding:
    """Estimate `mutual_information`; within 3 nats of the log of the number of cells it is called capped."""
    n = min(len(mu_z), ANCHORS)
    value, cap = mutual_information(mu_z, logvar_z, seed=seed), math.log(n)
    capped = value > cap - 3
    meaning = f"z holds {value:.2f} nats about a cell"
    if capped:
        meaning += f", or more: among {n:,} cells nothing above {cap:.2f} can be seen, and figures near it are capped"
    verdict = "bad" if value < LITTLE_INFORMATION else "good"
    return Finding("mutual information", value, f"above {LITTLE_INFORMATION} nats", verdict, meaning)


def aggregated_gap(mu_z: Floats, logvar_z: Floats, *, seed: int = 0) -> Finding:
    """Compute ``KL(q(z) || N(0, I)) = E KL - I(x; z)``: how far all cells together are from the prior.

    If the KL is within 3 nats of the cap of `mutual_information`, the difference says nothing. Then the finding is the
    energy distance of z ~ q(z) to as many draws of N(0, I), and the largest 1-D divergence of a dimension.
    """
    kl = 0.5 * (mu_z.astype(np.float64) ** 2 + np.expm1(logvar_z.astype(np.float64)) - logvar_z)
    total, cap = float(kl.sum(1).mean()), math.log(min(len(mu_z), ANCHORS))
    advice = "before sampling new cells, a prior that follows the cells: remedy vamp_prior or mixture_prior"
    if total <= cap - 3:
        gap = total - mutual_information(mu_z, logvar_z, seed=seed)
        bad = gap > WIDE_GAP
        meaning = f"all cells together lie {gap:.2f} nats from the prior"
        meaning += ": samples from the prior are not like these cells" if bad else ""
        return Finding(
            "gap to the prior", gap, f"below {WIDE_GAP} nats", "watch" if bad else "good", meaning, advice * bad
        )
    rng = random_stream(seed, Stream.AGGREGATED_GAP)
    rows = rng.permutation(len(mu_z))[:2000]
    z = mu_z[rows] + np.exp(0.5 * logvar_z[rows]) * rng.standard_normal((len(rows), mu_z.shape[1]))
    apart = energy_distance(z, rng.standard_normal(z.shape))
    of_prior = [energy_distance(*rng.standard_normal((2, *z.shape))) for _ in range(5)]
    worst = float(_divergence_1d(z).max())
    bad = apart > 0.1 and apart > max(of_prior) * 2
    meaning = (
        f"the KL of {total:.1f} nats is too near the cap for a difference; the energy distance of all cells together "
        f"to the prior is {apart:.3f} (two samples of the prior: {np.mean(of_prior):.3f}), the worst dimension "
        f"{worst:.2f} nats from it"
    )
    return Finding("gap to the prior", apart, "below 0.1", "watch" if bad else "good", meaning, advice * bad)


def energy_distance(a: Floats, b: Floats) -> float:
    """Compute ``sqrt(2 E|a - b| - E|a - a'| - E|b - b'|)`` of two samples, each ``(n, dimensions)``.

    Examples
    --------
    >>> a = np.zeros((4, 2))
    >>> energy_distance(a, a), energy_distance(a, a + [3, 4])
    (0.0, 3.1622776601683795)
    """
    from scipy.spatial.distance import cdist

    between, within_a, within_b = cdist(a, b).mean(), cdist(a, a).mean(), cdist(b, b).mean()
    return float(np.sqrt(max(0.0, 2 * between - within_a - within_b)))


def latent_ablation(lost: Floats, elbo: Floats, gene_means: Floats) -> Finding:
    """Compute the reconstruction lost, nats per cell, when z, or one of its dimensions, is that of another cell."""
    mean, se = lost.mean(1, dtype=np.float64), _se(lost)
    enough = enough_ablation(float((elbo - gene_means).mean(dtype=np.float64)))
    verdict = "bad" if mean[0] < enough else "good"
    meaning = f"the decoder loses {mean[0]:.2f} +- {se[0]:.2f} nats per cell without z"
    ignored = [int(j) for j in np.flatnonzero(~listens(lost[1:]))]
    if verdict == "bad":
        meaning += ": it does not use z, which shows a blob dominated by the prior"
    elif ignored:
        verdict, meaning = "watch", f"{meaning}; it does not use {_named(ignored)}"
    values = [{"nats": float(m), "se": float(s)} for m, s in zip(mean, se, strict=True)]
    expected = f"above {enough:.2f} nats for all of z"
    return Finding("latent ablation", values, expected, verdict, meaning)


def enough_ablation(gained: float) -> float:
    """Compute the nats per cell that a decoder loses without z if it uses z, given the gain over gene means."""
    return max(LEAST_ABLATION, HEALTHY_SHARE * gained)


def decoder_sensitivity(sensitivity: Floats) -> Finding:
    """Judge Fisher information of the genes about z_j times the variance of mu_z_j; near 0 the decoder ignores z_j."""
    silent = [int(j) for j in np.flatnonzero(sensitivity < 0.01 * max(sensitivity.max(initial=0), 1e-12))]
    none = bool(sensitivity.max(initial=0) < WEAK)
    verdict = "bad" if none else "watch" if silent else "good"
    exceptions = f"; next to nothing moves with {_named(silent)}" if silent and not none else ""
    meaning = (
        "no dimension moves the decoded cells"
        if none
        else f"the most sensitive dimension has {sensitivity.max():.1f}{exceptions}"
    )
    return Finding("decoder sensitivity", sensitivity.tolist(), "well above 0 in each", verdict, meaning)


def gain(name: str, model: Floats, other: Floats, than: str) -> Finding:
    """Compute how many nats per cell a model is ahead of a simpler one on the same cells, with the paired s.e."""
    difference = (model - other)[None]
    mean, se = float(difference.mean(dtype=np.float64)), float(_se(difference)[0])
    verdict = "good" if mean > 2 * se else "watch"
    meaning = f"{mean:+.2f} +- {se:.2f} nats per cell beside {than}"
    if verdict == "watch":
        meaning += ": there is little to learn in these cells, or it was not learned"
    return Finding(name, mean, "above 0", verdict, meaning)


def falls_short(in_use: int, expected: int, latent_dim: int) -> bool:
    """Return whether far fewer dimensions are in use than the data show."""
    reachable = min(expected, latent_dim)
    return in_use + 1 < reachable and in_use < IN_USE * reachable


def expected_dimensions(in_use: int, expected: int, latent_dim: int) -> Finding:
    """Compare the number of dimensions in use with those that the data show above their noise (``expected``)."""
    reachable = min(expected, latent_dim)
    meaning = f"{expected} dimensions of the data stand out of their noise; {in_use} of {latent_dim} in z are in use"
    if falls_short(in_use, expected, latent_dim):
        return Finding("expected dimensions", in_use, f"{reachable}", "watch", meaning, "the remedies below")
    if expected <= in_use < latent_dim:
        return Finding("expected dimensions", in_use, f"{reachable}", "good", f"{meaning}: fine, fewer would do")
    return Finding("expected dimensions", in_use, f"{reachable}", "good", meaning)


def condition_ablation(name: str, lost: Floats, *, nuisance: bool = False) -> Finding:
    """Compute the reconstruction lost when a condition is another one; near 0, a counterfactual has no effect.

    ``lost`` is that of the cells whose level changed, ``(cells,)``. For a nuisance, near 0 means that there is nothing
    to remove, or that z carries it; `condition_leakage` says which.
    """
    if len(lost) < 2:
        meaning = f"cannot be measured: these cells hardly differ in {name!r}"
        return Finding(f"ablation of {name}", None, f"above {DECODER_LISTENS} nats", "watch", meaning)
    mean, se = float(lost.mean(dtype=np.float64)), float(_se(lost[None])[0])
    meaning = f"the decoder loses {mean:.2f} +- {se:.2f} nats per cell without condition {name!r}"
    expected = f"above {DECODER_LISTENS} nats"
    if mean > max(DECODER_LISTENS, 2 * se):
        return Finding(f"ablation of {name}", mean, expected, "good", meaning)
    if nuisance:
        return Finding(f"ablation of {name}", mean, expected, "good", f"{meaning}: it does next to nothing")
    if mean + 2 * se > HARDLY:
        return Finding(f"ablation of {name}", mean, expected, "watch", f"{meaning}: too few cells to say more")
    meaning += ": it ignores it, and asking for another level changes nothing"
    try_next = "remedy conditional_prior, or context_skip with two hidden layers"
    return Finding(f"ablation of {name}", mean, expected, "bad", meaning, try_next)


def condition_leakage(
    name: str,
    mu_z: Floats,
    levels: NDArray[Any],
    types: NDArray[Any] | None = None,
    *,
    nuisance: bool = False,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Finding:
    """Measure how well mu_z predicts a condition, within types if they are known; 0 at chance, 1 with certainty.

    The predictors are 15 nearest neighbours, over 5 folds. The score is the balanced accuracy,
    ``(accuracy - 1/L) / (1 - 1/L)``; for a continuous condition, the share of its variance that is explained. ``names``
    are those of the levels.
    """
    rows = random_stream(seed, Stream.LEAKAGE).permutation(len(mu_z))[:3000]
    groups = np.zeros(len(rows), int) if types is None else np.unique(types[rows].astype(str), return_inverse=True)[1]
    scores, sizes = [], []
    for group in np.unique(groups):
        members = rows[groups == group]
        score = _predicted(mu_z[members], levels[members], seed)
        if score is not None:
            scores.append(score)
            sizes.append(len(members))
    where = "" if types is None else " within types"
    if not scores:
        meaning = f"cannot be measured: {name!r} does not differ{where}, or in fewer than 10 cells of a level"
        named = np.asarray(names, object)[levels] if names else levels
        of_one = None if types is None else types_of_one_level(types, named)
        if of_one is not None and of_one.doubtful:
            meaning = f"cannot be measured: {of_one.sentence(name)}"
        return Finding(f"leakage of {name}", None, f"below {LEAKS / 2}", "watch", meaning)
    value = float(np.average(scores, weights=sizes))
    verdict = "bad" if value > LEAKS else "watch" if value > LEAKS / 2 else "good"
    meaning = f"z predicts {name!r}{where} {max(value, 0):.0%} of the way from chance to certainty"
    if verdict == "bad" and nuisance:
        meaning += ": it is not removed, and cells lie apart by it"
    elif verdict == "bad":
        meaning += ": z carries it, so that decoding under another level will not move the whole cell"
    look_within = (
        "" if types is not None or verdict == "good" else "look within types (groupby=...) if levels differ in them"
    )
    return Finding(f"leakage of {name}", value, f"below {LEAKS / 2}", verdict, meaning, look_within)


def types_kept(mu_z: Floats, components: Floats, types: NDArray[Any], batch: NDArray[Any], *, seed: int = 0) -> Finding:
    """Test whether known types lie as far apart in z as in the counts of one batch; removing a batch may merge them.

    The measure is the share of a cell's 10 nearest neighbours that have its type: in z among all cells, and in
    principal components among cells of its own batch. Each type has the same weight, so that rare types count.

    Parameters
    ----------
    mu_z, components
        ``(cells, latent_dim)`` and ``(cells, n)``: posterior means, and principal components of log-normalised values.
    types, batch
        ``(cells,)``.
    seed
        Of the choice of cells, 3,000 at most.
    """
    rows = random_stream(seed, Stream.TYPES_KEPT).permutation(len(mu_z))[:3000]
    names, codes, sizes = np.unique(types[rows].astype(str), return_inverse=True, return_counts=True)
    in_z = _own_neighbours(mu_z[rows], codes, np.zeros(len(rows), int))
    in_counts = _own_neighbours(components[rows], codes, batch[rows])
    value, merged = [], []
    for number in np.flatnonzero(sizes >= _ENOUGH_OF_TYPE):
        members = codes == number
        shares = [
            0.0 if np.isnan(part[members]).all() else float(np.nanmean(part[members])) for part in (in_z, in_counts)
        ]
        value.append({"type": str(names[number]), "cells": int(sizes[number]), "z": shares[0], "counts": shares[1]})
        if shares[0] < KEPT * shares[1]:
            merged.append(
                f"{names[number]} ({shares[0]:.0%} of its neighbours are of it, {shares[1]:.0%} in the counts)"
            )
    expected = f"at least {KEPT:g} of the share in the counts"
    if not value:
        meaning = f"cannot be measured: no type has {_ENOUGH_OF_TYPE} cells here"
        return Finding("types kept apart", value, expected, "watch", meaning)
    if not merged:
        meaning = f"{len(value)} types lie as far apart in z as in the counts of a batch"
        return Finding("types kept apart", value, expected, "good", meaning)
    meaning = f"z merges {', '.join(merged[:5])}"
    try_next = "more latent dimensions, or labels=... for these types; if a batch lacks them, look batch by batch"
    return Finding("types kept apart", value, expected, "bad", meaning, try_next)


def _own_neighbours(where: Floats, codes: NDArray[np.intp], batch: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the weighted share of a cell's nearest neighbours in its batch of its type; NaN in small batches."""
    from sklearn.neighbors import NearestNeighbors

    share = np.full(len(where), np.nan)
    for level in np.unique(batch):
        members = np.flatnonzero(batch == level)
        if len(members) <= _NEIGHBOURS:
            continue
        nearest = NearestNeighbors(n_neighbors=_NEIGHBOURS).fit(where[members]).kneighbors(return_distance=False)
        neighbours = members[nearest]
        weight = 1 / np.bincount(codes[members])[codes[neighbours]]
        own = (weight * (codes[neighbours] == codes[members][:, None])).sum(1)
        share[members] = own / weight.sum(1)
    return share


def listens(lost: Floats) -> NDArray[np.bool_]:
    """Return for each row whether its mean is above 0, significantly and by at least `DECODER_LISTENS`."""
    mean: NDArray[np.float64] = lost.mean(1, dtype=np.float64)
    return mean > np.maximum(DECODER_LISTENS, 2 * _se(lost))


def _se(values: Floats) -> NDArray[np.float64]:
    """Compute the standard error of the mean of each row."""
    n = values.shape[1]
    if n < 2:
        return np.zeros(len(values))
    error: NDArray[np.float64] = values.std(1, ddof=1, dtype=np.float64) / math.sqrt(n)
    return error


def _divergence_1d(z: Floats) -> NDArray[np.float64]:
    """Compute the KL of each dimension's histogram, over 40 parts of equal mass under N(0, 1), to N(0, 1); nats."""
    from scipy.stats import norm

    parts = 40
    bins = np.clip((norm.cdf(z) * parts).astype(int), 0, parts - 1)
    share = np.stack([np.bincount(column, minlength=parts) for column in bins.T]) / len(z)
    return np.sum(np.where(share > 0, share * np.log(np.maximum(share, 1e-12) * parts), 0.0), axis=1)


def _predicted(mu_z: Floats, levels: NDArray[Any], seed: int) -> float | None:
    """Score how well neighbours in z predict the level, or the value; None if there is nothing to predict."""
    from sklearn.metrics import balanced_accuracy_score, r2_score
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    if np.issubdtype(levels.dtype, np.floating):
        if len(levels) < 50 or np.ptp(levels) == 0:
            return None
        folds = KFold(5, shuffle=True, random_state=short_seed(seed))
        return float(r2_score(levels, cross_val_predict(KNeighborsRegressor(15), mu_z, levels, cv=folds)))
    names, counts = np.unique(levels.astype(str), return_counts=True)
    keep = np.isin(levels.astype(str), names[counts >= 10])
    if len(names[counts >= 10]) < 2:
        return None
    truth = levels.astype(str)[keep]
    folds = StratifiedKFold(5, shuffle=True, random_state=short_seed(seed))
    predicted = cross_val_predict(KNeighborsClassifier(15), mu_z[keep], truth, cv=folds)
    return float(balanced_accuracy_score(truth, predicted, adjusted=True))


def _named(dimensions: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(f"z_{j}" for j in dimensions[:most])
    return shown + (f" and {len(dimensions) - most} more" if len(dimensions) > most else "")
