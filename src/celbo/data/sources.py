"""Make minibatches of cells. Counts stay sparse (CSR) until they are on the device that computes."""

from collections.abc import Callable
from functools import cached_property
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
from celbo.data.matching import align
from celbo.data.normalise import COUNTS_PER_CELL, log_normalise
from celbo.data.schema import Schema
from celbo.data.stored import Stored
from celbo.minibatch import Minibatch, Rows, csr_tensor, in_chunks

__all__ = ["CellSource", "make_source", "open_source", "sum_of_genes"]

_CELLS = 128
"""Cells whose checksums are computed together."""


class CellSource:
    """Cells of an AnnData, with genes in the model's order; in memory, or read from disk on demand.

    Parameters
    ----------
    stored
        Values of the data.
    columns
        Position of each of the model's genes in the data; -1 for a gene that the data lack.
    codes
        Conditions as `Schema.codes` gives them, ``(cells, conditions)``.
    expand
        Function that turns codes into contexts: `Schema.expand`.
    values
        One of `celbo.data.schema.VALUES`: the values in a minibatch's x.
    library
        Library sizes, ``(cells,)``; None for the sum over the model's genes.
    library_is_sum
        Whether library sizes are sums of counts, and not size factors.
    absent
        `Absent.codes` of the cells, and `Absent.masks`; None if the cells lack the same genes.
    """

    def __init__(
        self,
        stored: Stored,
        columns: NDArray[np.intp],
        codes: NDArray[np.float32],
        expand: Callable[[NDArray[np.float32]], Tensor],
        *,
        values: str,
        library: NDArray[np.float32] | None = None,
        library_is_sum: bool,
        absent: tuple[NDArray[np.intp], NDArray[np.bool_]] | None = None,
    ):
        self.n_cells, self.n_genes = stored.shape[0], len(columns)
        self.codes = codes
        self.labels: NDArray[np.int32] | None = None
        self.library_is_sum = library_is_sum
        self.scaled_to = COUNTS_PER_CELL if values == "log_normalised" else None
        self.measured = columns >= 0
        self.absent_level = np.full(self.n_cells, -1, np.intp) if absent is None else absent[0]
        """Number of the level whose genes each cell lacks, ``(cells,)``; -1 for no such level."""
        self._absent = None if absent is None else absent[1]
        self.expand = expand
        self._values = values
        self._columns = columns
        self._stored = stored
        self._x = None if stored.on_disk else align(stored.read(slice(None)), columns)
        self._weights = _weights(self.n_genes)
        self._checksums, self._is_summed = np.zeros(self.n_cells, np.int32), np.zeros(self.n_cells, bool)
        self.library = self._sums.astype(np.float32) if library is None else library

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        """Sum of each cell's values over the model's genes, ``(cells,)``."""
        return sum_of_genes(self._stored, self._columns) if self._x is None else self._x @ np.ones(self.n_genes)

    @cached_property
    def measured_in_any(self) -> NDArray[np.bool_]:
        """Return which genes were measured in at least one cell, ``(genes,)``."""
        if self._absent is None or not self.n_cells:
            return self.measured
        return self.measured & ~self._absent[np.unique(self.absent_level)].all(0)

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Return which cells have no count of the model's genes, ``(cells,)``; none if values are real numbers."""
        return np.zeros(self.n_cells, bool) if self._values == "real" else self._sums == 0

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        block = self._x[rows] if self._x is not None else self._read(rows)
        data = _model_values(block, self.library[rows], self._values)
        starts, columns, values = (torch.from_numpy(array) for array in (block.indptr, block.indices, data))
        x = csr_tensor(starts, columns, values, block.shape)
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows])
        library = torch.from_numpy(self.library[rows, None])
        return Minibatch(x, self.contexts(rows), library, self._observed(rows), labels)

    def _observed(self, rows: Rows) -> Tensor | None:
        """Return which genes were measured: None for all, ``(genes,)`` if these cells lack the same, else for each."""
        observed = self.measured
        if self._absent is not None:
            level = self.absent_level[rows]
            same = len(level) > 0 and (level == level[0]).all()
            observed = observed & ~self._absent[level[0] if same else level]
        return None if observed.all() else torch.from_numpy(observed)

    def _read(self, rows: Rows) -> sp.csr_matrix:
        """Read cells from disk, and keep their checksums, so that nothing needs to read them again for these."""
        block = align(self._stored.read(rows), self._columns)
        if not self._is_summed[rows].all():
            self._checksums[rows], self._is_summed[rows] = _checksums(block, self._weights), True
        return block

    def checksums(self, rows: Rows) -> NDArray[np.int32]:
        """Return a number for each of these cells that its values of the model's genes give, ``(cells,)``.

        It is the same for any type of number, storage and order of genes. Data on disk are read only for cells that no
        `take` has read.
        """
        if self._x is not None:
            return _checksums(self._x, self._weights, rows)
        for piece in in_chunks(rows[~self._is_summed[rows]], _CELLS):
            self._read(piece)
        return self._checksums[rows]

    def contexts(self, rows: Rows) -> Tensor:
        """Return the contexts of these cells, ``(cells, context_dim)``, without reading their values."""
        return self.expand(self.codes[rows])


def open_source(
    adata: AnnData, schema: Schema, *, unseen: str = "refuse", genes_present: float | None = None
) -> CellSource:
    """Check cells against a model's schema, align them by gene name, and make a source of them.

    Parameters
    ----------
    adata
        The cells. They stay unchanged. Genes that the schema does not name are ignored.
    schema
        Schema of the model.
    unseen, genes_present
        As `celbo.data.checks.check_query` takes them.

    Returns
    -------
    CellSource

    Raises
    ------
    DataError
        If genes, values or conditions do not fit the schema. The message lists everything that does not fit.
    """
    limits = {} if genes_present is None else {"genes_present": genes_present}
    check = check_query(adata, schema, unseen=unseen, **limits)
    check.accept()
    return make_source(check, adata, schema, unseen=unseen)


def make_source(check: Check, adata: AnnData, schema: Schema, *, unseen: str = "refuse") -> CellSource:
    """Make a source of cells that passed a check; parameters as in `open_source`."""
    assert check.stored is not None
    return CellSource(
        check.stored,
        schema.columns(check.genes),
        schema.codes(adata.obs, unseen=unseen),
        schema.expand,
        values=schema.values,
        library=_given_library(adata.obs, schema),
        library_is_sum=schema.size_factor is None and schema.values != "real",
        absent=None if schema.absent is None else (schema.absent.codes(adata.obs), schema.absent.masks(schema.genes)),
    )


def _given_library(obs: pd.DataFrame, schema: Schema) -> NDArray[np.float32] | None:
    """Return library sizes that are not sums of counts, ``(cells,)``: scaled size factors, or 1 for real numbers."""
    if schema.size_factor is not None:
        return (size_factors(obs, schema.size_factor) * schema.library_scale).astype(np.float32)
    return np.ones(len(obs), np.float32) if schema.values == "real" else None


def sum_of_genes(stored: Stored, columns: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum each cell's values at these positions, ``(cells,)``; -1 is no position."""
    wanted = np.zeros(stored.shape[1])
    wanted[columns[columns >= 0]] = 1
    return np.concatenate([block @ wanted for block in stored.blocks()])


def _weights(n_genes: int) -> NDArray[np.uint64]:
    """Return fixed odd numbers, one for each gene; numpy keeps this stream the same in all versions."""
    return np.random.PCG64(0).random_raw(n_genes) | np.uint64(1)


def _checksums(block: sp.csr_matrix, weights: NDArray[np.uint64], rows: Rows | None = None) -> NDArray[np.int32]:
    """Sum the bits of each cell's float32 values, times the weight of the gene, modulo 2**64; return the upper 32 bits.

    Whole numbers have no rounding, so the order of the genes does not matter, and a zero adds nothing.

    Examples
    --------
    >>> one, other = sp.csr_matrix([[1.0, 0, 2]]), sp.csr_matrix([[1, 0, 3]])
    >>> weights = _weights(3)
    >>> int(_checksums(one, weights)[0]) == int(_checksums(one[:, ::-1].tocsr(), weights[::-1])[0])
    True
    >>> int(_checksums(one, weights)[0]) == int(_checksums(other, weights)[0])
    False
    """
    sums = [np.zeros(0, np.uint64)]
    for piece in in_chunks(np.arange(block.shape[0]) if rows is None else rows, _CELLS):
        part = block[piece]
        bits = (part.data.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 + 0 is 0.0
        total = np.cumsum(bits * weights[part.indices], dtype=np.uint64)
        sums.append(np.diff(np.concatenate([np.zeros(1, np.uint64), total])[part.indptr]))
    return (np.concatenate(sums) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _model_values(block: sp.csr_matrix, library: NDArray[np.float32], values: str) -> NDArray[Any]:
    """Turn stored values into the values that the model sees. A zero stays a zero for all of `VALUES`."""
    if values == "detected":
        return (block.data > 0).astype(np.float32)
    if values == "log_normalised":
        of_values = np.repeat(library, np.diff(block.indptr))
        return log_normalise(block.data.astype(np.float64), of_values).astype(np.float32)  # the same for any dtype
    return block.data.astype(np.float32)
