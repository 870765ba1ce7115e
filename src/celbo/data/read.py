"""Read the parts of an AnnData that a model needs, into memory or lazily from disk, and explain damaged files."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from celbo.data import probe
from celbo.data.paths import existing_path
from celbo.data.stored import raise_no_layer
from celbo.errors import DataError, StorageError, warn

__all__ = ["MISSING_LEVEL", "ORIGIN", "fill_missing_levels", "left_on_disk", "name_genes", "read_adata"]

ORIGIN = "celbo_read_from"
"""Key of uns that holds the path of the source file."""

MISSING_LEVEL = "(missing)"
"""Level that replaces missing values."""

_PROBE_SECONDS = 60
_AGAIN = "Copy the file again from where it came."


def read_adata(data: AnnData | str | Path, *, layer: str | None = None, on_disk: bool = False) -> AnnData:
    """Return an AnnData unchanged, or read one from a ``.h5ad`` file or ``.zarr`` folder.

    From a file, celbo reads only obs, var and the requested values: no other layers, obsm, obsp or uns. It opens the
    file for reading only.

    Parameters
    ----------
    data
        The AnnData, or its path.
    layer
        Layer with the values; None for X.
    on_disk
        Whether to leave the values on disk. This uses less memory, is slower, and keeps the file open.

    Raises
    ------
    DataError
        If the path does not exist, is damaged, or holds no AnnData.
    StorageError
        If permission to read it is missing.
    """
    if isinstance(data, AnnData):
        return data
    if not isinstance(data, str | Path):
        raise DataError(
            f"expected an AnnData, or the path of an .h5ad or .zarr; found a {type(data).__name__}. Give the AnnData "
            "itself (adata, not adata.X), because genes are matched by name. anndata.AnnData(counts) makes one of a "
            "matrix or table of cells by genes; set obs_names and var_names."
        )
    path = existing_path(data)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # the checks report it
            return _assemble(path, _open(path), layer, on_disk)
    except DataError:
        raise
    except PermissionError as error:
        raise StorageError(f"{path} may not be read: {error.strerror}. Ask its owner for permission.") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an AnnData: {_first_line(error)}. Is it complete, and an .h5ad or .zarr?"
        ) from error


@contextmanager
def left_on_disk(path: str, layer: str | None) -> Iterator[AnnData]:
    """Open a file with all layers and raw left on disk, and close it afterwards."""
    store = _open(Path(path))
    try:
        yield _assemble(Path(path), store, layer, on_disk=True)
    finally:
        if isinstance(store, h5py.File):
            store.close()


def name_genes(adata: AnnData, column: str | None = None, *, make_unique: bool = False) -> AnnData:
    """Name genes by a column of var, and number names that occur more than once, in place.

    Genes without a name in that column keep their name.

    Examples
    --------
    >>> adata = AnnData(np.zeros((1, 3)), var=pd.DataFrame({"name": ["a", "a", None]}, index=["e1", "e2", "e3"]))
    >>> list(name_genes(adata, "name", make_unique=True).var_names)
    ['a', 'a-1', 'e3']
    """
    if column is not None:
        if column not in adata.var.columns:
            known = ", ".join(map(repr, adata.var.columns)) or "no column"
            raise DataError(f"var has no column {column!r} to name genes by; it has {known}.")
        names = adata.var[column].astype(object)
        adata.var_names = np.where(names.isna(), adata.var_names, names.astype(str))
    if make_unique:
        adata.var_names_make_unique()
    return adata


def fill_missing_levels(adata: AnnData, columns: Iterable[str]) -> AnnData:
    """Replace missing values in these columns of obs by the level `MISSING_LEVEL`, in place.

    Examples
    --------
    >>> adata = AnnData(np.zeros((2, 1)), obs=pd.DataFrame({"batch": ["a", None]}, index=["c1", "c2"]))
    >>> list(fill_missing_levels(adata, ["batch"]).obs["batch"])
    ['a', '(missing)']
    """
    for column in columns:  # floating-point columns are continuous, and have no levels
        if column in adata.obs.columns and pd.api.types.is_float_dtype(adata.obs[column]):
            continue
        if column in adata.obs.columns and adata.obs[column].isna().any():
            values = adata.obs[column].astype(object)
            adata.obs[column] = values.where(values.notna(), MISSING_LEVEL).astype(str)
    return adata


def _open(path: Path) -> h5py.File | zarr.Group:
    if path.is_dir():
        return zarr.open_group(path, mode="r")
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path} is empty: 0 bytes. {_AGAIN}")
    try:
        is_hdf5 = h5py.is_hdf5(path)
        if is_hdf5:
            h5py.File(path, "r").close()
    except OSError as error:
        if sizes := re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error)):
            raise DataError(
                f"{path} is truncated: it has {int(sizes[1]):,} of {int(sizes[2]):,} bytes. {_AGAIN}"
            ) from error
        raise
    if not is_hdf5:
        path.open("rb").close()  # raises a PermissionError if the file is not readable
        raise DataError(
            f"{path} cannot be read as an AnnData: it is no HDF5 file. Give an .h5ad or a .zarr; convert text "
            "files with anndata.read_csv and write_h5ad."
        )
    _probe_in_subprocess(path)
    return h5py.File(path, "r")


def _probe_in_subprocess(path: Path) -> None:
    """Raise a `DataError` if HDF5 fails, crashes or hangs on this file; a subprocess protects this one."""
    command = [sys.executable, "-P", probe.__file__, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds the same h5py
    options: dict[str, Any] = {"env": environment, "timeout": _PROBE_SECONDS}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", **options)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path} is damaged: HDF5 was still reading it after {_PROBE_SECONDS} s. {_AGAIN}") from error
    if done.returncode == probe.NO_H5PY:
        return  # the file cannot be checked
    if done.returncode < 0:
        raise DataError(f"{path} is damaged: the HDF5 library crashed reading it (signal {-done.returncode}). {_AGAIN}")
    if done.returncode:
        raise DataError(f"{path} is damaged: {done.stderr.strip()[:300]}. {_AGAIN}")


def _assemble(path: Path, store: Any, layer: str | None, on_disk: bool) -> AnnData:
    if store.attrs.get("encoding-type") != "anndata":
        if isinstance(store, h5py.File) and "obs" in store:  # the format of anndata before 0.8
            return anndata.read_h5ad(store.filename)
        raise DataError(f"{_name(store)} holds no AnnData (it has {', '.join(map(repr, store)) or 'nothing'}).")
    values: dict[str | None, Any] = {None: store["X"]} if "X" in store else {}
    values |= {name: store["layers"][name] for name in store.get("layers", ())}
    if layer not in values:
        raise_no_layer(layer, [name for name in values if name is not None])
    if on_disk:
        kept = {name: _lazy(item) for name, item in values.items()}
    else:
        _lazy(values[layer])  # reports missing chunks
        kept = {layer: read_elem(values[layer])}
    adata = AnnData(X=kept.pop(None, None), obs=_frame(store, "obs"), var=_frame(store, "var"), layers=kept)
    if on_disk:
        adata.raw = _raw(store)
    else:
        adata.uns[ORIGIN] = str(path.resolve())
        if isinstance(store, h5py.File):
            store.close()
    return adata


def _frame(store: Any, name: str) -> pd.DataFrame:
    if name not in store:
        raise DataError(f"{_name(store)} is an incomplete AnnData: it has no {name}.")
    return read_elem(store[name])


def _raw(store: Any) -> Any:
    """Return ``raw`` with its values left on disk; only `find_counts` uses it."""
    if "raw" not in store or "X" not in store["raw"] or "var" not in store["raw"]:
        return None
    return AnnData(X=_lazy(store["raw"]["X"]), obs=_frame(store, "obs"), var=read_elem(store["raw"]["var"]))


def _lazy(item: Any) -> Any:
    """Return values without reading them; warn or raise a `DataError` if chunks are missing."""
    if isinstance(item, zarr.Array) and (missing := item.nchunks - item.nchunks_initialized):
        warn(
            f"{item.store_path}: {missing:,} of {item.nchunks:,} chunks are missing, and are read as zeros. If their "
            "counts are not all zero, the store is damaged."
        )
    if isinstance(item, h5py.Dataset | zarr.Array):
        return item
    if isinstance(item, zarr.Group):
        _check_chunks(item)
    return sparse_dataset(item)


def _check_chunks(group: zarr.Group) -> None:
    """Raise a `DataError` if a sparse matrix lacks chunks, which would be read as zeros.

    Writers leave out chunks of zeros. A sparse matrix stores no zeros, and its indices are all zero only if it has one
    gene.
    """
    n_genes = int(group.attrs["shape"][1])  # type: ignore[index, arg-type]
    for name in ("data", "indices", "indptr"):
        part: Any = group[name]
        if not group["data"].shape[0] or (name == "indices" and n_genes == 1):  # type: ignore[union-attr]
            continue
        if (n_chunks := part.nchunks_initialized) < part.nchunks:
            raise DataError(
                f"{group.store_path}/{name} is incomplete: it has {n_chunks:,} of {part.nchunks:,} chunks. {_AGAIN}"
            )


def _name(store: h5py.File | zarr.Group) -> str:
    return str(store.filename if isinstance(store, h5py.File) else store.store_path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
