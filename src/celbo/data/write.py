"""Write an AnnData to an ``.h5ad`` file, such that a full disk is an `OSError` like that of any other file."""

import io
from pathlib import Path
from typing import Any

import h5py
from anndata import AnnData
from anndata.io import write_elem

__all__ = ["write_cells"]


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


def write_cells(cells: AnnData, path: Path) -> None:
    """Write cells without ``raw`` as ``.h5ad``.

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
        finally:
            if file.failure is not None:  # other errors only follow from it
                raise file.failure
