"""Unusual cells: readings of each cell, compared with held-out cells of the same depth and batch.

Each reading is standardised by a smooth mean and standard deviation given log library size and batch. It then becomes
the share of held-out cells with a reading as high; in the tail a generalised Pareto distribution gives this share
(Pickands 1975). Three readings are joined, ``score = -sum log share`` (Fisher 1925). The readings of a cell are not
independent, so the score itself is compared with the scores of held-out cells. The fourth reading only helps to name
what is unusual about the cell.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, genpareto
from sklearn.linear_model import Ridge
from sklearn.preprocessing import SplineTransformer

from celbo.ask.readings import read_cells
from celbo.ask.scoring import refuse_autoencoder
from celbo.errors import UsageError, check_seed
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import READINGS, Reference

__all__ = ["batches", "joined", "outliers", "p_values", "standardised", "unusual"]

_JOINED = ("unlikely", "distance", "ambient")
_FEWEST_HELD_OUT = 30
"""Held-out cells that are needed to calibrate anything."""
_FOLDS = 5
_FEWEST_OF_BATCH = 20
"""Held-out cells of a batch that has a mean of its own."""
_TAIL = 0.1
"""Share of the held-out scores that the tail is fitted to."""
_HEAVIEST = 0.5
"""Largest shape parameter of the tail."""
_UNUSUAL, _SHALLOW = 0.1, 0.005
"""Largest q-value of an unusual cell, and the quantile of library sizes below which a cell is shallow."""
_KINDS = {"unlikely": "unexplained", "distance": "unseen type", "mixture": "doublet-like", "ambient": "ambient-like"}

_Standardise = Callable[[NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]], NDArray[np.float64]]


def outliers(fitted: Fitted, cells: Cells, *, seed: int = 0) -> pd.DataFrame:
    """Tell how unusual each cell is; see `celbo.ExpressionVAE.outliers`."""
    seed = check_seed(seed)
    refuse_autoencoder(fitted)
    reference = fitted.needed_reference()
    known = reference.was_read
    if known.sum() < _FEWEST_HELD_OUT:
        raise UsageError(
            f"{known.sum()} cells were held out of fitting and read; at least {_FEWEST_HELD_OUT} are needed to tell "
            "what is usual. Fit again with more cells or a larger validation_fraction."
        )
    read = read_cells(fitted, cells, cells.rows, seed=seed)
    table = unusual(
        reference.readings[known],
        read.readings,
        library=(reference.library[known], read.library),
        batch=batches(fitted, reference, known, cells),
        index=cells.obs.index,
        empty=cells.empty,
        without=() if cells.measured.all() else ("unlikely",),
    )
    return table.assign(top_genes=np.where(cells.empty, "", read.genes))


def batches(
    fitted: Fitted, reference: Reference, known: NDArray[np.bool_], cells: Cells
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Number the combinations of levels, and of genes that cells lack: of these reference cells, and of the cells."""
    is_level = [condition.levels is not None for condition in fitted.schema.conditions]
    of_known = np.column_stack([reference.conditions[known][:, is_level], reference.absent_level[known]])
    of_cells = np.column_stack([cells.codes[:, is_level], cells.source.absent_level])
    batch = np.unique(np.vstack([of_known, of_cells]), axis=0, return_inverse=True)[1].reshape(-1)
    return batch[: known.sum()], batch[known.sum() :]


def unusual(
    held_out: NDArray[np.float64],
    asked: NDArray[np.float64],
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
    held_out, asked
        Readings of the held-out cells, and of the cells in question, ``(cells, 4)``.
    library, batch
        Library sizes, and the number of each cell's batch, of the same two sets of cells.
    index
        Names of the cells in question.
    empty
        Which of these cells have no count; they get NaN.
    without
        Readings that do not count because they are of other genes; NaN in the table.

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
    >>> of_cells = {"library": (depth[:500], depth[500:]), "batch": (batch[:500], batch[500:]), "index": names}
    >>> unusual(usual, cells, **of_cells).kind.to_dict()
    {'usual': 'usual', 'two cells': 'doublet-like'}
    """
    usual, readings = standardised(held_out, asked, library=library, batch=batch)
    names = READINGS[: readings.shape[1]]
    counts = np.array([name not in without for name in names])
    counted = [name for name in names if name not in without]
    readings[:, ~counts] = np.nan
    score = joined(usual[:, counts], readings[:, counts], counted)
    p_value = p_values(joined(usual[:, counts], usual[:, counts], counted), score)
    has_counts = np.ones(len(p_value), bool) if empty is None else ~empty
    q_value = np.full(len(p_value), np.nan)
    if has_counts.any():
        q_value[has_counts] = false_discovery_control(p_value[has_counts])
    most = _shares(usual[:, counts], readings[:, counts]).argmin(1)
    kind = np.array([_KINDS[name] for name in counted], object)[most]
    kind[q_value > _UNUSUAL] = "usual"
    kind[np.asarray(library[1]) < np.quantile(library[0], _SHALLOW)] = "low-depth"
    table = {"log_p": -asked[:, 0], "score": score, "p_value": p_value, "q_value": q_value, "kind": kind}
    table |= dict(zip(names, readings.T, strict=True))
    frame = pd.DataFrame(table, index=index)
    frame.loc[~has_counts, frame.columns != "kind"] = np.nan
    frame.loc[~has_counts, "kind"] = "empty"
    return frame


def joined(
    usual: NDArray[np.float64], readings: NDArray[np.float64], names: Sequence[str] = READINGS
) -> NDArray[np.float64]:
    """Join standardised readings of cells, given the readings of usual cells: ``-sum log share``, ``(cells,)``."""
    columns = [number for number, name in enumerate(names[: usual.shape[1]]) if name in _JOINED]
    score: NDArray[np.float64] = -np.log(_shares(usual[:, columns], readings[:, columns])).sum(1)
    return score


def _shares(usual: NDArray[np.float64], readings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of usual cells with a reading as high, by reading, ``(cells, readings)``."""
    return np.stack([p_values(usual[:, number], readings[:, number]) for number in range(usual.shape[1])], axis=1)


def standardised(
    held_out: NDArray[np.float64],
    asked: NDArray[np.float64],
    *,
    library: tuple[NDArray[np.float32], NDArray[np.float32]],
    batch: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standardise readings given log library size and batch; parameters are those of `unusual`.

    Returns
    -------
    tuple
        Readings of the held-out cells, each compared with the other held-out cells, and of the cells in question.
    """
    usual, standard = np.empty_like(held_out), np.empty_like(asked)
    folds: NDArray[np.intp] = np.arange(len(held_out)) % _FOLDS
    depth_held_out, depth_asked = (np.log1p(np.asarray(sizes, np.float64)) for sizes in library)
    for number in range(held_out.shape[1]):
        for fold in range(_FOLDS):  # cross-fitted: a cell is not compared with itself
            others, own = folds != fold, folds == fold
            standardise = _smooth(depth_held_out[others], batch[0][others], held_out[others, number])
            usual[own, number] = standardise(depth_held_out[own], batch[0][own], held_out[own, number])
        standardise = _smooth(depth_held_out, batch[0], held_out[:, number])
        standard[:, number] = standardise(depth_asked, batch[1], asked[:, number])
    return usual, standard


def _smooth(log_library: NDArray[np.float64], batch: NDArray[np.intp], values: NDArray[np.float64]) -> _Standardise:
    """Fit mean and sd of a reading; return a function that standardises values given depth and batch."""
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
        standard: NDArray[np.float64] = (values - mean.predict(columns)) / np.exp(log_sd.predict(columns)) / scale
        return standard

    return standardise


def p_values(usual: NDArray[np.float64], scores: NDArray[np.float64], *, tail: float = _TAIL) -> NDArray[np.float64]:
    """Compute the share of usual scores that are as high, ``(1 + n_higher) / (1 + n)``, with a fitted tail.

    Parameters
    ----------
    usual
        Scores of held-out cells.
    scores
        Scores of the cells in question.

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
    share: NDArray[np.float64] = (1 + n_higher) / (1 + len(usual))
    start = np.quantile(usual, 1 - _TAIL)
    beyond = usual[usual > start] - start
    if len(beyond) >= _FOLDS:
        shape, _, scale = genpareto.fit(beyond, floc=0)
        shape = min(max(shape, 0.0), _HEAVIEST)
        # The cell itself counts, as above: it is as likely to be the highest as any usual cell (Vovk 2005).
        tail = (1 + len(beyond)) / (1 + len(usual)) * genpareto.sf(scores - start, shape, scale=scale)
        share = np.where(scores > start, np.maximum(tail, np.finfo(float).tiny), share)
    return share
