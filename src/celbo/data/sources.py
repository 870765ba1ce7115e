"""Where minibatches come from: counts stay sparse (CSR) until the device that computes."""

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from celbo.data.checks import check_counts, check_reals
from celbo.data.schema import Schema, layer_values, size_factors
from celbo.errors import DataError, StorageError
from celbo.minibatch import Minibatch, Rows

__all__ = ["MemorySource", "open_source", "read_adata"]

_COUNTS_PER_CELL = 1e4
"""Library size to which counts are scaled before the logarithm, as is customary for single cells."""


def read_adata(data: AnnData | str | Path) -> AnnData:
    """Return an AnnData as it is, or read one from a ``.h5ad`` file or ``.zarr`` folder.

    Raises
    ------
    DataError
        If the path does not exist or cannot be read as an AnnData.
    StorageError
        If it may not be read.
    """
    if isinstance(data, AnnData):
        return data.to_memory() if data.isbacked else data
    path = Path(data)
    if not path.exists():
        raise DataError(f"{path} does not exist; give an .h5ad file or a .zarr folder.")
    try:
        return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
    except PermissionError as error:
        raise StorageError(f"{path} may not be read: {error.strerror}. Ask its owner for permission.") from error
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an AnnData: {error}. Is it complete, and an .h5ad or .zarr?"
        ) from error


class MemorySource:
    """Cells kept in memory as CSR, genes in the model's order.

    Parameters
    ----------
    x
        Values as stored, ``(cells, genes)``.
    library
        Library sizes, ``(cells,)``.
    context
        Encoded conditions, ``(cells, context_dim)``.
    values
        One of `celbo.data.schema.VALUES`: what a minibatch's x is made to be.
    """

    def __init__(self, x: sp.csr_matrix, library: NDArray[np.float32], context: Tensor, values: str):
        self.n_cells, self.n_genes = x.shape
        self.context = context
        self.library = library
        self._x = x
        self._values = values

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        block = self._x[rows]
        data = _as_seen(block, self.library[rows], self._values)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            x = torch.sparse_csr_tensor(
                torch.from_numpy(block.indptr),
                torch.from_numpy(block.indices),
                torch.from_numpy(data),
                block.shape,
                check_invariants=False,
            )
        return Minibatch(x, self.context[rows], torch.from_numpy(self.library[rows, None]))


def open_source(adata: AnnData, schema: Schema) -> MemorySource:
    """Align cells to a schema by gene name, check every value, and make them a source.

    Parameters
    ----------
    adata
        The cells; left as they are. Genes that the schema does not name are ignored.
    schema
        Of the model.

    Returns
    -------
    MemorySource

    Raises
    ------
    DataError
        If genes, values or conditions do not fit the schema.
    """
    if adata.n_obs == 0:
        raise DataError("these data have no cells.")
    columns = schema.columns(adata.var_names)
    x = _csr(layer_values(adata, schema.layer))
    place = "X" if schema.layer is None else f"layers[{schema.layer!r}]"
    (check_reals if schema.values == "real" else check_counts)(x, adata, place)
    if not np.array_equal(columns, np.arange(adata.n_vars)):
        x = x[:, columns]
        x.sort_indices()
    return MemorySource(x, _library(x, adata, schema), schema.encode(adata.obs), schema.values)


def _csr(matrix: Any) -> sp.csr_matrix:
    """Make CSR of any array, without a copy where it already is; indices sorted, duplicates summed."""
    matrix = matrix if sp.issparse(matrix) else np.asarray(matrix)
    x = sp.csr_matrix(matrix.astype(np.float32) if matrix.dtype in (bool, np.float16) else matrix)
    if not x.has_canonical_format:
        x = x.copy()  # the caller's array stays as it is
        x.sum_duplicates()
    return x


def _library(x: sp.csr_matrix, adata: AnnData, schema: Schema) -> NDArray[np.float32]:
    """Library size of each cell: the sum over the model's genes, or the scaled size factor; 1 for reals."""
    if schema.size_factor is not None:
        return (size_factors(adata.obs, schema.size_factor) * schema.library_scale).astype(np.float32)
    if schema.values == "real":
        return np.ones(x.shape[0], np.float32)
    return np.asarray(x.sum(axis=1, dtype=np.float64), dtype=np.float32).ravel()


def _as_seen(block: sp.csr_matrix, library: NDArray[np.float32], values: str) -> NDArray[np.float32]:
    """Stored values as the model sees them; all of `VALUES` leave a zero a zero."""
    if values == "detected":
        return (block.data > 0).astype(np.float32)
    if values == "log_normalised":
        per_count = _COUNTS_PER_CELL / np.repeat(np.maximum(library, 1.0), np.diff(block.indptr))
        return np.log1p(block.data * per_count).astype(np.float32)
    return block.data.astype(np.float32)
