"""Read rows of values of an AnnData: in memory or on disk, sparse or dense, a view or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import scipy.sparse as sp
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from numpy.typing import NDArray

from celbo.data.convert import python_command, quoted
from celbo.data.matching import align
from celbo.errors import DataError

__all__ = [
    "Stored",
    "layer_names",
    "layer_values",
    "place_of",
    "raise_no_layer",
    "stored_matrix",
    "stored_values",
    "use_raw",
]

_BLOCK = 1 << 22
"""Approximate number of values in a block of rows; data on disk are read one block at a time."""

_LEAST_ROWS = 256
"""Smallest number of rows in a block. Without it, data with many genes would have tiny blocks."""


@dataclass(frozen=True)
class Stored:
    """A matrix of values, ``(cells, genes)``, from which rows are read."""

    shape: tuple[int, ...]
    on_disk: bool
    """Whether values are on disk, and must not be kept in memory."""
    read: Callable[[Any], sp.csr_matrix]
    """Function that reads rows as CSR, in the order of a slice or of positions; values keep their stored type."""

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Yield all rows, in consecutive blocks of bounded size.

        Examples
        --------
        >>> stored = stored_values(AnnData(np.eye(3, dtype=np.float32)), None)
        >>> [block.shape for block in stored.blocks()]
        [(3, 3)]
        """
        n_cells, n_genes = self.shape
        step = max(_LEAST_ROWS, _BLOCK // max(n_genes, 1))
        for start in range(0, n_cells, step):
            yield self.read(slice(start, start + step))

    def of_genes(self, positions: NDArray[np.intp] | None) -> "Stored":
        """Return the values of the genes at these positions, in this order; None for all genes.

        Examples
        --------
        >>> stored = stored_values(AnnData(np.array([[1, 2, 3]])), None)
        >>> stored.of_genes(np.array([0, 2])).read([0]).toarray()
        array([[1, 3]])
        """
        if positions is None:
            return self
        return replace(self, shape=(self.shape[0], len(positions)), read=lambda rows: align(self.read(rows), positions))


def stored_values(adata: AnnData, layer: str | None) -> Stored:
    """Make X, or a layer, readable by rows.

    Sparse and dense matrices, AnnData's on-disk datasets and dask arrays all become CSR blocks with sorted indices and
    without duplicates. Matrices stored by gene (CSC), views of files and dask arrays are loaded into memory once.

    Raises
    ------
    DataError
        If there is no such layer, or a sparse matrix contradicts itself.
    """
    if adata.isbacked and adata.is_view:  # anndata reads views of files whole
        adata = adata.to_memory()
    return stored_matrix(layer_values(adata, layer), place_of(layer))


def stored_matrix(matrix: Any, place: str) -> Stored:
    """Make any matrix of an AnnData readable by rows; ``place`` names it in messages."""
    if isinstance(matrix, CSCDataset):
        matrix = matrix.to_memory()
    elif hasattr(matrix, "compute"):
        matrix = matrix.compute()
    if matrix.dtype.kind not in "biuf":
        raise DataError(f"{place} holds values of type {matrix.dtype}; celbo takes numbers: integers or floats.")
    if not (matrix.dtype.isnative or isinstance(matrix, CSRDataset | h5py.Dataset | zarr.Array)):
        matrix = matrix.astype(matrix.dtype.newbyteorder("="))
    if isinstance(matrix, CSRDataset):
        _check_structure(np.asarray(matrix.group["indptr"][:]), matrix.group["data"].shape[0], matrix.shape, place)
        return Stored(matrix.shape, True, partial(_from_disk, matrix, place))
    if isinstance(matrix, h5py.Dataset | zarr.Array):
        return Stored(tuple(matrix.shape), True, partial(_from_disk, matrix, place))
    if sp.issparse(matrix):
        return _in_memory_sparse(matrix, place)
    dense = np.asarray(matrix)
    return Stored(tuple(dense.shape), False, lambda rows: _csr(dense[rows]))


def layer_values(adata: AnnData, layer: str | None) -> Any:
    """Return X, or a layer, as it is stored; raise a `DataError` if it does not exist."""
    if layer not in adata.layers and (layer is not None or adata.X is None):
        raise_no_layer(layer, layer_names(adata), "" if adata.raw is None else use_raw(None))
    return adata.X if layer is None else adata.layers[layer]


def layer_names(adata: AnnData) -> list[str]:
    """Return the names of the layers without None, under which newer versions of anndata list X."""
    return [name for name in adata.layers if name is not None]


def raise_no_layer(layer: str | None, layers: Sequence[str], raw: str = "") -> NoReturn:
    """Raise a `DataError` that says that the layer is missing, and lists the existing ``layers``.

    ``raw`` says how to use the values of raw, if there are any.
    """
    known = ", ".join(map(repr, layers)) or "no layers"
    if layer is None and not layers:
        advice = f"but they have raw.X. {raw}" if raw else "so there are no counts. Give a file with the counts in X."
        raise DataError(f"these data have no X and no layers, {advice}")
    if layer is None:
        raise DataError(
            f"these data have no X; their layers: {known}. celbo fit takes counts from one with --layer (layer=...); a "
            f"fitted model reads new cells from where it read the first. {raw}".strip()
        )
    advice = f" {raw}" if raw and layer in ("raw", "raw.X", "raw/X") else ""
    if layer == "X":
        advice = " If you fit values of X, leave out layer (--layer)."
    raise DataError(
        f"these data have no layer {layer!r}; they have {known}. Name one of these with --layer (layer=...). New cells "
        f"for a fitted model must have the layer that it was fitted to.{advice}"
    )


def use_raw(path: Path | None) -> str:
    """Say how to use the values of raw: in Python, and for cells of a file on the command line too.

    Examples
    --------
    >>> use_raw(None)
    'To use raw.X, take adata.raw.to_adata().'
    """
    if path is None:
        return "To use raw.X, take adata.raw.to_adata()."
    read = "read_zarr" if path.is_dir() else "read_h5ad"
    cells = f"anndata.{read}({quoted(path)}).raw.to_adata()"
    # Converters from R leave columns '_index', which anndata does not write.
    rename = 'cells.obs, cells.var = (table.rename(columns={"_index": "_index_"}) for table in (cells.obs, cells.var))'
    command = python_command("cells", f"anndata; cells = {cells}; {rename}", path, "raw")
    return f"To use raw.X, make an .h5ad file of it, and give celbo that file: {command}"


def place_of(layer: str | None) -> str:
    """Return the name of the values in messages: "X", or "layers['counts']"."""
    return "X" if layer is None else f"layers[{layer!r}]"


def _in_memory_sparse(matrix: Any, place: str) -> Stored:
    compressed = matrix if matrix.format in ("csr", "csc") else matrix.tocsr()
    _check_structure(
        compressed.indptr,
        len(compressed.data),
        compressed.shape if compressed.format == "csr" else compressed.shape[::-1],
        place,
        compressed.indices,
    )
    x = compressed.tocsr()
    if not (x.has_sorted_indices and x.has_canonical_format):
        x = _summed(x.copy() if x is matrix else x)  # the caller's array stays as it is

    def read(rows: Any) -> sp.csr_matrix:
        if not isinstance(rows, slice):
            return _csr(x[rows])
        start, stop, _ = rows.indices(x.shape[0])
        values = slice(x.indptr[start], x.indptr[stop])  # views: a block of consecutive rows costs no copy
        parts = (x.data[values], x.indices[values], x.indptr[start : stop + 1] - x.indptr[start])
        return _csr(sp.csr_matrix(parts, shape=(stop - start, x.shape[1])))

    return Stored(x.shape, False, read)


def _from_disk(matrix: Any, place: str, rows: Any) -> sp.csr_matrix:
    try:
        if isinstance(rows, slice) or not isinstance(matrix, h5py.Dataset | zarr.Array):
            block = matrix[rows]
        else:  # HDF5 requires increasing rows without repeats
            unique, inverse = np.unique(rows, return_inverse=True)
            rows_read: Any = matrix[unique] if isinstance(matrix, h5py.Dataset) else matrix.oindex[unique]
            block = rows_read[inverse]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{place} cannot be read from disk: {error}. Copy it again from where it came.") from error
    if sp.issparse(block):
        _check_structure(block.indptr, len(block.data), block.shape, place, block.indices)
    return _csr(block)


def _csr(block: Any) -> sp.csr_matrix:
    """Convert a block to CSR with sorted indices and without duplicates; copy only if needed."""
    block = block if sp.issparse(block) else np.asarray(block)
    if block.dtype in (bool, np.float16):  # scipy does not compute with these
        block = block.astype(np.float32)
    if not block.dtype.isnative:
        block = block.astype(block.dtype.newbyteorder("="))
    if not sp.issparse(block):
        return _csr_of_dense(block)
    block = sp.csr_matrix(block)
    return block if block.has_canonical_format else _summed(block)


def _summed(x: sp.csr_matrix) -> sp.csr_matrix:
    """Sort indices and sum duplicates; widen small integers first, so that sums do not overflow."""
    if x.dtype.kind in "biu" and x.dtype.itemsize < 4:
        x = x.astype(np.int64)
    x.sum_duplicates()
    return x


def _csr_of_dense(block: NDArray[Any]) -> sp.csr_matrix:
    """Convert a dense block to CSR, in a third of scipy's time and memory."""
    n_rows, n_columns = block.shape
    is_stored = block != 0
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(is_stored, axis=1))])
    columns = np.broadcast_to(np.arange(n_columns, dtype=np.int32), block.shape)
    x = sp.csr_matrix((block[is_stored], columns[is_stored], indptr), shape=(n_rows, n_columns))
    x.has_canonical_format = True
    return x


def _check_structure(
    indptr: NDArray[Any],
    n_values: int,
    shape: tuple[int, int],
    place: str,
    indices: NDArray[Any] | None = None,
) -> None:
    """Raise a `DataError` if the pointers of a compressed matrix are wrong, before code follows them."""
    n_rows, n_columns = shape
    again = "The file is damaged: write or copy it again from where it came."
    if len(indptr) != n_rows + 1 or indptr[0] != 0 or indptr[-1] > n_values:
        raise DataError(
            f"{place} is no sparse matrix: indptr has {len(indptr):,} entries from {indptr[:1]} to {indptr[-1:]} "
            f"for {n_rows:,} rows and {n_values:,} values. {again}"
        )
    if (falling := np.flatnonzero(np.diff(indptr) < 0)).size:
        raise DataError(
            f"{place} is no sparse matrix: indptr falls from {indptr[falling[0]]:,} to {indptr[falling[0] + 1]:,} at "
            f"position {falling[0]:,}, where it must never fall. {again}"
        )
    if indices is None or not len(indices):
        return
    smallest, largest = indices.min(), indices.max()
    if smallest < 0 or largest >= n_columns:
        bad = (indices < 0) | (indices >= n_columns)
        first = np.flatnonzero(bad)[0]
        raise DataError(
            f"{place} is no sparse matrix: index {indices[first]:,} at position {first:,} is not between 0 and "
            f"{n_columns - 1:,} ({bad.sum():,} of {len(indices):,} are not). {again}"
        )
