"""Write an AnnData, whole or in blocks of cells, such that a full disk is an `OSError` like that of any other file."""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from anndata import AnnData
from anndata.io import write_elem
from numpy.typing import NDArray

__all__ = ["holds_only", "write_cells", "write_in_blocks"]

_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
"""Attributes by which anndata recognises a dense matrix."""
_CHUNK = 1 << 20
"""Approximate number of values in a chunk of a zarr array."""


class _File(io.FileIO):
    """A file that HDF5 writes to, which keeps the first failure and then takes everything.

    HDF5 cannot close a file whose last writes fail, and crashes when the program ends.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, as HDF5 expects; `io.FileIO` may write a part of it."""
        rest = memoryview(data).cast("B")
        n_bytes = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = self.failure or error
        return n_bytes

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


def write_cells(cells: AnnData, path: Path, blocks: Iterable[NDArray[np.float32]] | None = None) -> None:
    """Write cells without ``raw`` as ``.h5ad``; X comes from ``blocks`` if they are given.

    Raises
    ------
    OSError
        If the file cannot be written. A part of it may be there.

    Examples
    --------
    >>> import tempfile, anndata, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_cells(AnnData(np.eye(2)), Path(folder) / "cells.h5ad")
    ...     anndata.read_h5ad(Path(folder) / "cells.h5ad").shape
    (2, 2)
    """
    cells.strings_to_categoricals()
    with _File(path, "w+") as file:
        try:
            with h5py.File(file, "w") as store:
                write_elem(store, "/", cells)
                if blocks is not None:
                    _fill(store.create_dataset("X", cells.shape, np.float32), blocks)
        finally:
            if file.failure is not None:  # other errors only follow from it
                raise file.failure


def write_in_blocks(cells: AnnData, blocks: Iterable[NDArray[np.float32]], path: Path, *, as_zarr: bool) -> None:
    """Write cells without X, and then X block by block, so that all of X is never in memory.

    Parameters
    ----------
    cells
        The cells: everything but X.
    blocks
        X, as blocks of consecutive cells, ``(cells of the block, genes)``.
    path
        Where to write; nothing may be there.
    as_zarr
        Whether to write a zarr folder; else an HDF5 file.

    Examples
    --------
    >>> import tempfile, anndata
    >>> path = Path(tempfile.mkdtemp()) / "cells.h5ad"
    >>> write_in_blocks(AnnData(shape=(3, 2)), [np.ones((2, 2)), np.zeros((1, 2))], path, as_zarr=False)
    >>> anndata.read_h5ad(path).X.tolist()
    [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if not as_zarr:
        write_cells(cells, path, blocks)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2")
        cells.write_zarr(path)
    n_genes = max(1, cells.n_vars)
    chunks = (min(max(1, _CHUNK // n_genes), max(1, cells.n_obs)), n_genes)
    store = zarr.open_group(path, mode="r+", use_consolidated=False)
    _fill(store.create_array("X", shape=cells.shape, chunks=chunks, dtype="f4"), blocks)
    zarr.consolidate_metadata(store.store)  # anndata did this before X was there


def _fill(x: Any, blocks: Iterable[NDArray[np.float32]]) -> None:
    x.attrs.update(_ARRAY)
    start = 0
    for block in blocks:
        x[start : start + len(block)] = block
        start += len(block)
    if start != x.shape[0]:
        raise ValueError(f"the blocks have {start:,} rows; the matrix has {x.shape[0]:,}")


def holds_only(path: Path, key: str) -> bool:
    """Return whether this is an AnnData on disk with this key of uns and no other, and nothing in obsm or layers."""
    try:
        if path.is_dir():
            return _has_only(zarr.open_group(path, mode="r"), key)
        with h5py.File(path, "r") as file:
            return _has_only(file, key)
    except Exception:  # noqa: BLE001 - celbo did not write a file that HDF5 or zarr cannot read
        return False


def _has_only(store: Any, key: str) -> bool:
    """Look into a store. Other programs put what they add to the cells into these places."""
    has = {name: set(store[name]) for name in ("uns", "obsm", "layers", "obsp", "varm") if name in store}
    return has.pop("uns", None) == {key} and not any(has.values()) and "X" in store
