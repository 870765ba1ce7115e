"""Choose the genes to model: those that vary most, compared with genes of the same mean."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from celbo.data.schema import Schema
from celbo.data.sources import sum_of_genes
from celbo.data.stored import Stored
from celbo.errors import DataError, UsageError

__all__ = ["choose_genes", "select_genes"]

_SPANS = (0.3, 0.5, 0.8)
"""Shares of the genes in each local fit of the variance, in the order in which they are tried."""
_LEAST_POINTS = 10
"""A local fit needs at least this many different means; with fewer the compiled loess may crash."""
_LEAST_CELLS = 3
"""Batches with fewer cells are left out, because they cannot estimate a variance."""

Blocks = Callable[[], Iterable[sp.csr_matrix]]


def choose_genes(schema: Schema, stored: Stored, obs: pd.DataFrame, n_top_genes: int) -> Schema:
    """Keep the most variable genes of a schema; return a schema with at most that many genes unchanged.

    Genes are chosen within the levels of the first categorical nuisance, or of the first categorical condition if
    there is no such nuisance.

    Parameters
    ----------
    schema, stored, obs
        Schema, values and table of the cells.
    n_top_genes
        Number of genes to choose.
    """
    if n_top_genes >= len(schema.genes):
        return schema
    categorical = [condition for condition in schema.conditions if condition.levels is not None]
    categorical.sort(key=lambda condition: not condition.nuisance)
    levels = categorical[0].codes(obs[categorical[0].name]).astype(int) if categorical else None
    positions = select_genes(stored.blocks, n_top_genes, levels)
    if schema.size_factor is not None:  # the library now sums the chosen genes only
        chosen, whole = (sum_of_genes(stored, genes).sum() for genes in (positions, np.arange(len(schema.genes))))
        schema = replace(schema, library_scale=schema.library_scale * float(chosen / whole))
    within = f" within levels of {categorical[0].name!r}" if categorical else ""
    before = "" if schema.selection is None else f"{schema.selection}; of these "
    chosen = f"{len(positions):,} of {len(schema.genes):,}, the most variable{within} (seurat_v3)"
    return schema.with_genes(positions, before + chosen)


def select_genes(blocks: Blocks, n_top_genes: int, levels: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
    r"""Choose the most variable genes, within batches (Stuart 2019, Cell 177:1888; "seurat_v3" in scanpy).

    In each batch, loess (degree 2) regresses log variance on log mean. Counts are standardised by the mean :math:`m_g`
    and the fitted standard deviation :math:`s_g`, and clipped at :math:`\sqrt n`. Genes are ranked by the variance of
    :math:`\min(x_{ig}, m_g + s_g \sqrt n)` over :math:`s_g^2`. With several batches, genes are ordered by their median
    rank over the batches that choose them, then by the number of these batches.

    Parameters
    ----------
    blocks
        Function that yields the counts, ``(cells, genes)``, in consecutive blocks of rows; called twice.
    n_top_genes
        Number of genes to choose.
    levels
        Position of each cell's batch, ``(cells,)``; None for one batch of all cells.

    Returns
    -------
    numpy.ndarray
        Positions of the chosen genes, increasing.

    Raises
    ------
    UsageError
        If ``n_top_genes`` is below 1.
    DataError
        If no gene varies within any batch.

    Examples
    --------
    >>> x = np.random.default_rng(0).poisson(5.0, (200, 100))
    >>> x[:, 7] = np.where(np.arange(200) % 2, 10, 0)  # as many on average, but not evenly
    >>> select_genes(lambda: [sp.csr_matrix(x)], 1)
    array([7])
    """
    if n_top_genes < 1:
        raise UsageError(f"n_top_genes={n_top_genes}; choose at least one gene.")
    n_cells, mean, variance = _moments(blocks, levels)
    used = np.flatnonzero(n_cells >= min(_LEAST_CELLS, n_cells.max()))
    if not (variance[used] > 0).any():
        raise DataError("no gene varies within any batch, so that celbo cannot choose genes; fit all genes.")
    sd = np.stack([_fitted_sd(mean[batch], variance[batch]) for batch in range(len(n_cells))])
    clip = sd * np.sqrt(n_cells)[:, None] + mean
    total, squares = _clipped_sums(blocks, clip, levels)
    n = n_cells[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (n * mean**2 + squares - 2 * total * mean) / ((n - 1) * sd**2)
    return np.sort(_top(np.nan_to_num(scores[used]), n_top_genes))


def _moments(
    blocks: Blocks, levels: NDArray[np.intp] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Count cells by batch, and compute mean and variance by batch and gene; float64 sums whole numbers exactly."""
    n, total, squares = np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1))
    for batch_of_row, block in _with_batches(blocks, levels):
        x = block.astype(np.float64)
        of_batch = _indicator(batch_of_row, levels)
        n = n + np.asarray(of_batch.sum(1)).ravel()
        total = total + (of_batch @ x).toarray()
        squares = squares + (of_batch @ x.multiply(x)).toarray()
    mean = total / np.maximum(n, 1)[:, None]
    return n.astype(np.int64), mean, np.maximum(squares - mean * total, 0) / np.maximum(n - 1, 1)[:, None]


def _clipped_sums(
    blocks: Blocks, clip: NDArray[np.float64], levels: NDArray[np.intp] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum clipped counts and their squares, by batch and gene."""
    total, squares = np.zeros_like(clip), np.zeros_like(clip)
    for batch_of_row, block in _with_batches(blocks, levels):
        x = block.astype(np.float64)
        x.data = np.minimum(x.data, clip[np.repeat(batch_of_row, np.diff(x.indptr)), x.indices])
        of_batch = _indicator(batch_of_row, levels)
        total += (of_batch @ x).toarray()
        squares += (of_batch @ x.multiply(x)).toarray()
    return total, squares


def _with_batches(blocks: Blocks, levels: NDArray[np.intp] | None) -> Iterable[tuple[NDArray[np.intp], sp.csr_matrix]]:
    start = 0
    for block in blocks():
        stop = start + block.shape[0]
        yield (np.zeros(stop - start, np.intp) if levels is None else levels[start:stop]), block
        start = stop


def _indicator(batch_of_row: NDArray[np.intp], levels: NDArray[np.intp] | None) -> sp.csr_matrix:
    """Return ``(batches, rows)``, 1 if a row belongs to a batch; a product with it sums by batch."""
    n_rows, n_batches = len(batch_of_row), 1 if levels is None else int(levels.max()) + 1
    return sp.csr_matrix((np.ones(n_rows), (batch_of_row, np.arange(n_rows))), shape=(n_batches, n_rows))


def _fitted_sd(mean: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected standard deviation at each gene's mean; 1 for genes that do not vary."""
    sd, varies = np.ones_like(mean), variance > 0
    if not varies.any():
        return sd
    sd[varies] = np.sqrt(10 ** _smoothed(np.log10(mean[varies]), np.log10(variance[varies])))
    return sd


def _smoothed(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth y by local quadratic fits on x, or by a straight line if x has too few different values."""
    from skmisc.loess import loess  # compiled; only choosing genes needs it

    for span in _SPANS:
        if span * len(np.unique(x)) < _LEAST_POINTS:
            continue
        curve = loess(x, y, span=span, degree=2)
        with suppress(ValueError):  # near singularities
            curve.fit()
            if np.isfinite(curve.outputs.fitted_values).all():
                return curve.outputs.fitted_values
    if np.ptp(x) == 0:
        return np.full_like(y, y.mean())
    slope, intercept = np.polyfit(x, y, 1)
    return slope * x + intercept


def _top(scores: NDArray[np.float64], n_top_genes: int) -> NDArray[np.intp]:
    """Return the top genes by median rank over the batches that choose them, then by the number of these batches."""
    # The default sort and float32 ranks break ties as scanpy does.
    order = np.argsort(np.argsort(-scores, axis=1), axis=1).astype(np.float32)
    n_batches_chosen = (order < n_top_genes).sum(0)
    order[order >= n_top_genes] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # genes that no batch chooses
        rank = np.nanmedian(order, axis=0)
    return np.lexsort((-n_batches_chosen, np.where(np.isnan(rank), np.inf, rank)))[:n_top_genes]
