"""Where minibatches come from: counts stay sparse (CSR) until the device that computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from celbo.data.checks import Check, check_query
from celbo.data.conditions import size_factors
from celbo.data.schema import Schema
from celbo.data.stored import Stored, stored_values
from celbo.minibatch import Minibatch, Rows, csr_tensor

__all__ = ["CellSource", "align", "make_source", "open_source", "sum_of_genes"]

_COUNTS_PER_CELL = 1e4
"""Library size to which counts are scaled before the logarithm, as is customary for single cells."""


class CellSource:
    """Cells of an AnnData, genes in the model's order; in memory, or read from disk as they are asked for.

    Parameters
    ----------
    stored
        Values of the data.
    columns
        Position of each of the model's genes in them; -1 for a gene that is not there.
    library
        Library sizes, ``(cells,)``.
    codes
        Conditions as `Schema.codes` gives them, ``(cells, conditions)``.
    expand
        Makes the context of some cells' codes; `Schema.expand`.
    values
        One of `celbo.data.schema.VALUES`: what a minibatch's x is made to be.
    library_is_sum
        Whether the library is the sum of the counts.
    """

    def __init__(
        self,
        stored: Stored,
        columns: NDArray[np.intp],
        library: NDArray[np.float32],
        codes: NDArray[np.float32],
        expand: Callable[[NDArray[np.float32]], Tensor],
        *,
        values: str,
        library_is_sum: bool,
    ):
        self.n_cells, self.n_genes = stored.shape[0], len(columns)
        self.codes = codes
        self._expand = expand
        self.labels: NDArray[np.int32] | None = None
        self.library = library
        self.library_is_sum = library_is_sum
        self.scaled_to = _COUNTS_PER_CELL if values == "log_normalised" else None
        self._observed = torch.from_numpy(columns >= 0) if (columns < 0).any() else None
        self._values = values
        self._columns = columns
        self._stored = stored
        self._x = None if stored.on_disk else align(stored.read(slice(None)), columns)

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        block = self._x[rows] if self._x is not None else align(self._stored.read(rows), self._columns)
        data = _as_seen(block, self.library[rows], self._values)
        starts, columns, values = (torch.from_numpy(part) for part in (block.indptr, block.indices, data))
        x = csr_tensor(starts, columns, values, block.shape)
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows])
        context, library = self._expand(self.codes[rows]), torch.from_numpy(self.library[rows, None])
        return Minibatch(x, context, library, self._observed, labels)


def open_source(
    adata: AnnData, schema: Schema, *, unseen: str = "refuse", genes_present: float | None = None
) -> CellSource:
    """Check cells against a model's schema, align them by gene name, and make them a source.

    Parameters
    ----------
    adata
        The cells; left as they are. Genes that the schema does not name are ignored.
    schema
        Of the model.
    unseen, genes_present
        As `celbo.data.checks.check_query` takes them.

    Returns
    -------
    CellSource

    Raises
    ------
    DataError
        If genes, values or conditions do not fit the schema; it lists everything that does not.
    """
    limits = {} if genes_present is None else {"genes_present": genes_present}
    check = check_query(adata, schema, unseen=unseen, **limits)
    check.accept()
    return make_source(check, adata, schema, unseen=unseen)


def make_source(check: Check, adata: AnnData, schema: Schema, *, unseen: str = "refuse") -> CellSource:
    """Make a source of cells that passed a check; parameters as in `open_source`."""
    assert check.stored is not None
    columns = schema.columns(adata.var_names)
    library = _library(check.stored, columns, adata.obs, schema)
    return CellSource(
        check.stored,
        columns,
        library,
        schema.codes(adata.obs, unseen=unseen),
        schema.expand,
        values=schema.values,
        library_is_sum=schema.size_factor is None and schema.values != "real",
    )


def empty_cells(adata: AnnData, schema: Schema) -> NDArray[np.bool_]:
    """Which cells have no count of the model's genes, ``(cells,)``; none where values are real numbers."""
    if schema.values == "real":
        return np.zeros(adata.n_obs, bool)
    return sum_of_genes(stored_values(adata, schema.layer), schema.columns(adata.var_names)) == 0


def align(x: sp.csr_matrix, columns: NDArray[np.intp]) -> sp.csr_matrix:
    """Put columns into the model's order, leaving out those it does not know; missing ones are empty.

    Examples
    --------
    >>> align(sp.csr_matrix([[1, 2, 3]]), np.array([2, -1, 0])).toarray()
    array([[3, 0, 1]])
    """
    if np.array_equal(columns, np.arange(x.shape[1])):
        return x
    position = np.full(x.shape[1], -1, np.int32)
    there = columns >= 0
    position[columns[there]] = np.flatnonzero(there)
    indices = position[x.indices]
    kept = indices >= 0
    n_before = np.concatenate([[0], np.cumsum(kept)])
    aligned = sp.csr_matrix((x.data[kept], indices[kept], n_before[x.indptr]), shape=(x.shape[0], len(columns)))
    aligned.sort_indices()
    return aligned


def _library(stored: Stored, columns: NDArray[np.intp], obs: pd.DataFrame, schema: Schema) -> NDArray[np.float32]:
    """Library size of each cell: the sum over the model's genes, or the scaled size factor; 1 for reals."""
    if schema.size_factor is not None:
        return (size_factors(obs, schema.size_factor) * schema.library_scale).astype(np.float32)
    if schema.values == "real":
        return np.ones(stored.shape[0], np.float32)
    return sum_of_genes(stored, columns).astype(np.float32)


def sum_of_genes(stored: Stored, columns: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum of each cell's values at these positions, ``(cells,)``; -1 is no position."""
    wanted = np.zeros(stored.shape[1])
    wanted[columns[columns >= 0]] = 1
    return np.concatenate([block @ wanted for block in stored.blocks()])


def _as_seen(block: sp.csr_matrix, library: NDArray[np.float32], values: str) -> NDArray[Any]:
    """Stored values as the model sees them; all of `VALUES` leave a zero a zero."""
    if values == "detected":
        return (block.data > 0).astype(np.float32)
    if values == "log_normalised":
        per_count = _COUNTS_PER_CELL / np.repeat(np.maximum(library, 1.0), np.diff(block.indptr))
        return np.log1p(block.data.astype(np.float64) * per_count).astype(np.float32)  # the same of any dtype
    return block.data.astype(np.float32)
