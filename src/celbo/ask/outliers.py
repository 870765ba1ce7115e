"""How unusual a cell is, given its depth and batch: four readings, calibrated on cells that were held out of fitting.

Each reading is standardised by a smooth mean and standard deviation given log library size and batch, and becomes the
share of held-out cells that read as high, in the tail by a generalised Pareto distribution (Pickands 1975). Three of
them are joined, ``score = -sum log share`` (Fisher 1925), and the score is compared with those of held-out cells in
turn, for readings of a cell hang together. The fourth only helps to name what is unusual about it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, genpareto
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from sklearn.preprocessing import SplineTransformer
from torch import Tensor

from celbo.minibatch import Minibatch, Rows, Source, in_chunks
from celbo.model.filling import fill_in
from celbo.model.importance import log_prob
from celbo.model.inference import posterior
from celbo.model.vae import VAE, context_of

__all__ = [
    "FEWEST_HELD_OUT",
    "READINGS",
    "joined",
    "n_readings",
    "p_values",
    "readings",
    "standardised",
    "surprising_genes",
    "unusual",
]

READINGS = ("unlikely", "distance", "mixture", "ambient")
"""What is read of a cell: ``-log p(x)``; the log of the distance of mu_z to the 15th nearest cell learned from; how
much better than its own profile half and half of two known ones explains the counts; and how much better the mean
profile of all cells does. The last two of counts only, in nats by the root of the library."""
_JOINED = ("unlikely", "distance", "ambient")
FEWEST_HELD_OUT = 30
"""Held-out cells, without which nothing can be calibrated."""
_SAMPLES = 100
"""Of the importance weighting: the same for all cells that are compared."""
_NEAREST, _CENTRES = 15, 15
_FOLDS = 5
_FEWEST_OF_BATCH = 20
"""Held-out cells of a batch that has a mean of its own."""
_TAIL = 0.1
"""Share of the held-out scores that the tail is fitted to."""
_HEAVIEST = 0.5
"""Shape of the tail at most."""
_UNUSUAL, _SHALLOW = 0.1, 0.005
"""The q-value up to which a cell is given a kind, and the quantile of library sizes below which it is shallow."""
_KINDS = {"unlikely": "unexplained", "distance": "unseen type", "mixture": "doublet-like", "ambient": "ambient-like"}
_N_GENES = 5
_CHUNK = 256
_SMALLEST = 1e-9
_NOTHING = -1e4
"""Log share of a gene that was not measured; finite, as it is multiplied by zero counts."""

_Standardise = Callable[[NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]], NDArray[np.float64]]


def n_readings(is_counts: bool) -> int:
    """How many of `READINGS` have a meaning."""
    return len(READINGS) if is_counts else 2


def readings(
    vae: VAE,
    source: Source,
    rows: Rows,
    known: NDArray[np.float32],
    *,
    codes: NDArray[np.float32],
    expand: Callable[[NDArray[np.float32]], Tensor],
    is_counts: bool,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Read of each cell what `READINGS` says, ``(rows, 4)``; the first two only where the values are not counts.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    rows
        Which of them.
    known
        mu_z of cells that the model learned from.
    codes
        Conditions of the rows, as `celbo.data.Schema.codes` gives them.
    expand
        Makes contexts of such codes.
    is_counts
        Whether profiles are shares of counts.
    seed
        Of all draws.
    """
    found = np.empty((len(rows), n_readings(is_counts)))
    found[:, 0] = -log_prob(vae, source, rows, n_samples=_SAMPLES, refine_steps=0, seed=seed).log_p
    mu_z, _ = posterior(vae, source, rows)
    distance = cKDTree(known).query(mu_z, [min(_NEAREST, len(known))])[0][:, 0]
    found[:, 1] = np.log(np.maximum(distance, _SMALLEST))
    if is_counts:
        n_centres = min(_CENTRES, len(np.unique(known, axis=0)))
        centres = KMeans(n_centres, n_init=1, random_state=0).fit(known).cluster_centers_.astype(np.float32)
        found[:, 2:] = _better_explained(vae, source, rows, mu_z, torch.from_numpy(centres), codes, expand)
    return found


def _better_explained(
    vae: VAE,
    source: Source,
    rows: Rows,
    mu_z: NDArray[np.float32],
    centres: Tensor,
    codes: NDArray[np.float32],
    expand: Callable[[NDArray[np.float32]], Tensor],
) -> NDArray[np.float64]:
    """Multinomial log-likelihood by two profiles together, and by the mean of all, less that by the cell's own."""
    found = np.empty((len(rows), 2))
    device = next(vae.parameters()).device
    first, second = np.triu_indices(len(centres), 1) if len(centres) > 1 else np.zeros((2, 1), int)
    _, groups = np.unique(codes, axis=0, return_inverse=True) if codes.shape[1] else (0, np.zeros(len(rows), int))
    was_training = vae.training
    vae.eval()
    with torch.inference_mode():
        for group in range(groups.max(initial=-1) + 1):  # cells of the same conditions
            of_group = np.flatnonzero(groups.reshape(-1) == group)
            context = expand(codes[of_group[:1]]).to(device)
            for here in in_chunks(of_group, _CHUNK):
                cells = source.take(rows[here]).to(device)
                log_known = _log_profiles(vae, centres.to(device), context, cells.observed)
                pairs = torch.logaddexp(log_known[first], log_known[second])
                mean = torch.logsumexp(log_known, 0, keepdim=True)
                pairs, mean = (part - part.logsumexp(-1, keepdim=True) for part in (pairs, mean))
                own = _log_profiles(vae, torch.from_numpy(mu_z[here]).to(device), context, cells.observed)
                x = cells.x.to_dense()
                depth, by_own = x.sum(-1).clamp(min=1).sqrt(), (x * own).sum(-1)
                explained = torch.stack([(x @ pairs.T).amax(-1), (x @ mean.T)[:, 0]], 1)
                found[here] = ((explained - by_own[:, None]) / depth[:, None]).cpu().numpy()
    vae.train(was_training)
    return found


def _log_profiles(vae: VAE, z: Tensor, context: Tensor, observed: Tensor | None) -> Tensor:
    """Log shares among the genes that were measured, ``(n, genes)``; of others as good as nothing."""
    again = context.expand(len(z), -1) if vae.context_dim else None
    log_share = vae.decode(z, again, torch.ones(len(z), 1, device=z.device)).clamp(min=_SMALLEST).log()
    if observed is None:
        return log_share
    return torch.where(observed, log_share - log_share[:, observed].logsumexp(-1, keepdim=True), _NOTHING)


def unusual(
    held_out: NDArray[np.float64],
    found: NDArray[np.float64],
    *,
    library: tuple[NDArray[np.float32], NDArray[np.float32]],
    batch: tuple[NDArray[np.intp], NDArray[np.intp]],
    index: pd.Index,
    empty: NDArray[np.bool_] | None = None,
    without: Sequence[str] = (),
) -> pd.DataFrame:
    """Compare cells with held-out ones of their depth and batch.

    Parameters
    ----------
    held_out, found
        Readings of the held-out cells, and of the cells in question, ``(cells, 4)``.
    library, batch
        Of the same two: library sizes, and the number of each cell's batch.
    index
        Names of the cells in question.
    empty
        Which of them have no count, so that nothing can be told.
    without
        Readings that do not count, as they are of other genes; NaN in the table.

    Returns
    -------
    pandas.DataFrame
        By cell: ``log_p, score, p_value, q_value`` (Benjamini & Hochberg 1995), ``kind``, and the standardised
        readings.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> usual, cells = rng.normal(size=(500, 4)), np.array([[0.0, 0, 0, 0], [1, 2, 9, 3]])
    >>> depth, batch = np.full(502, 1000.0), np.zeros(502, int)
    >>> names = pd.Index(["usual", "two cells"])
    >>> unusual(usual, cells, library=(depth[:500], depth[500:]), batch=(batch[:500], batch[500:]), index=names).kind
    usual               usual
    two cells    doublet-like
    Name: kind, dtype: object
    """
    usual, here = standardised(held_out, found, library=library, batch=batch)
    names = READINGS[: here.shape[1]]
    counted = np.array([name not in without for name in names])
    of_counted = [name for name in names if name not in without]
    here[:, ~counted] = np.nan
    score = joined(usual[:, counted], here[:, counted], of_counted)
    p_value = p_values(joined(usual[:, counted], usual[:, counted], of_counted), score)
    told, q_value = np.ones(len(p_value), bool) if empty is None else ~empty, np.full(len(p_value), np.nan)
    if told.any():
        q_value[told] = false_discovery_control(p_value[told])
    most = _shares(usual[:, counted], here[:, counted]).argmin(1)
    kind = np.array([_KINDS[name] for name in of_counted], object)[most]
    kind[q_value > _UNUSUAL] = "usual"
    kind[np.asarray(library[1]) < np.quantile(library[0], _SHALLOW)] = "low-depth"
    table = {"log_p": -found[:, 0], "score": score, "p_value": p_value, "q_value": q_value, "kind": kind}
    table |= dict(zip(names, here.T, strict=True))
    frame = pd.DataFrame(table, index=index)
    frame.loc[~told, frame.columns != "kind"] = np.nan
    frame.loc[~told, "kind"] = "empty"
    return frame


def joined(
    usual: NDArray[np.float64], here: NDArray[np.float64], names: Sequence[str] = READINGS
) -> NDArray[np.float64]:
    """Join standardised readings of cells, given those of usual ones: ``-sum log share``, ``(cells,)``."""
    columns = [number for number, name in enumerate(names[: usual.shape[1]]) if name in _JOINED]
    found: NDArray[np.float64] = -np.log(_shares(usual[:, columns], here[:, columns])).sum(1)
    return found


def _shares(usual: NDArray[np.float64], here: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of usual cells that read as high, by reading, ``(cells, readings)``."""
    return np.stack([p_values(usual[:, number], here[:, number]) for number in range(usual.shape[1])], axis=1)


def standardised(
    held_out: NDArray[np.float64],
    found: NDArray[np.float64],
    *,
    library: tuple[NDArray[np.float32], NDArray[np.float32]],
    batch: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standardise readings given log library size and batch; parameters are those of `unusual`.

    Returns
    -------
    tuple
        Of the held-out cells, each compared with the others only, and of the cells in question.
    """
    usual, here = np.empty_like(held_out), np.empty_like(found)
    folds: NDArray[np.intp] = np.arange(len(held_out)) % _FOLDS
    of_known, of_found = (np.log1p(np.asarray(part, np.float64)) for part in library)
    for number in range(held_out.shape[1]):
        for fold in range(_FOLDS):  # cross-fitted: a cell is not compared with itself
            others, own = folds != fold, folds == fold
            at = _smooth(of_known[others], batch[0][others], held_out[others, number])
            usual[own, number] = at(of_known[own], batch[0][own], held_out[own, number])
        here[:, number] = _smooth(of_known, batch[0], held_out[:, number])(of_found, batch[1], found[:, number])
    return usual, here


def _smooth(log_library: NDArray[np.float64], batch: NDArray[np.intp], values: NDArray[np.float64]) -> _Standardise:
    """Fit mean and standard deviation of a reading; returns what standardises values at a library size and batch."""
    low, high = log_library.min(), log_library.max()
    spline = SplineTransformer(4, degree=3, knots="quantile", extrapolation="linear").fit(log_library[:, None])
    numbers, sizes = np.unique(batch, return_counts=True)
    own = numbers[sizes >= _FEWEST_OF_BATCH]

    def design(log_library: NDArray[np.float64], batch: NDArray[np.intp]) -> NDArray[np.float64]:
        depth = spline.transform(log_library.clip(low, high)[:, None])
        return np.hstack([depth, (batch[:, None] == own).astype(float)])

    columns = design(log_library, batch)
    mean = Ridge(1.0).fit(columns, values)
    residual = values - mean.predict(columns)
    least = 1e-3 * residual.std() + 1e-12
    log_sd = Ridge(10.0).fit(columns, np.log(np.abs(residual) + least))
    scale = np.std(residual / np.exp(log_sd.predict(columns))) + 1e-12

    def standardise(
        log_library: NDArray[np.float64], batch: NDArray[np.intp], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        columns = design(log_library, batch)
        found: NDArray[np.float64] = (values - mean.predict(columns)) / np.exp(log_sd.predict(columns)) / scale
        return found

    return standardise


def p_values(usual: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of usual scores that are as high, ``(1 + n_higher) / (1 + n)``; in the upper tenth as a fitted tail has it.

    Parameters
    ----------
    usual
        Scores of held-out cells.
    scores
        Of the cells in question.

    Returns
    -------
    numpy.ndarray
        In (0, 1].

    Examples
    --------
    >>> p_values(np.arange(1000.0), np.array([500.0, 2000.0])).round(4).tolist()
    [0.5005, 0.0]
    """
    usual = np.sort(usual)
    n_higher = len(usual) - np.searchsorted(usual, scores, side="left")
    found: NDArray[np.float64] = (1 + n_higher) / (1 + len(usual))
    start = np.quantile(usual, 1 - _TAIL)
    beyond = usual[usual > start] - start
    if len(beyond) >= _FOLDS:
        shape, _, scale = genpareto.fit(beyond, floc=0)
        shape = min(max(shape, 0.0), _HEAVIEST)
        # Counting the cell itself, as above: it is as likely to be the highest as any usual one (Vovk 2005).
        tail = (1 + len(beyond)) / (1 + len(usual)) * genpareto.sf(scores - start, shape, scale=scale)
        found = np.where(scores > start, np.maximum(tail, np.finfo(float).tiny), found)
    return found


def surprising_genes(
    vae: VAE, source: Source, mu_z: NDArray[np.float32], genes: NDArray[np.str_], rows: Rows
) -> list[str]:
    """Name the genes of which a cell shows another value than its own place in the latent space says.

    Those with the largest ``log p(mean_g) - log p(x_g)``, each with a + where there is more of it than expected.
    """
    names = []
    device = next(vae.parameters()).device
    with torch.inference_mode():
        for piece in in_chunks(np.arange(len(rows)), _CHUNK):
            cells: Minibatch = fill_in(vae, source.take(rows[piece]).to(device), source)
            z = torch.from_numpy(mu_z[piece]).to(device)
            p = vae.likelihood(z, context=context_of(vae, cells), library=cells.library)
            x, mean = cells.x.to_dense(), p.mean
            expected = mean.round() if getattr(p.support, "is_discrete", False) else mean
            lost = p.log_prob(expected) - p.log_prob(x)
            if cells.observed is not None:
                lost = torch.where(cells.observed, lost, 0.0)
            most = lost.topk(min(_N_GENES, lost.shape[1]), dim=-1).indices
            more = (x > mean).gather(1, most).cpu().numpy()
            for of_cell, signs in zip(most.cpu().numpy(), more, strict=True):
                names.append(" ".join(f"{genes[g]}{'+' if up else '-'}" for g, up in zip(of_cell, signs, strict=True)))
    return names
