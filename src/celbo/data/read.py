"""Read an AnnData from a path: only the parts that a model needs, in memory or left on disk; explain damage."""

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
from celbo.data.stored import refuse_layer
from celbo.errors import DataError, StorageError, warn

__all__ = ["MISSING_LEVEL", "ORIGIN", "fill_missing_levels", "left_on_disk", "name_genes", "read_adata"]

ORIGIN = "celbo_read_from"
"""Key of uns with the path of the file that an AnnData was read from."""

MISSING_LEVEL = "(missing)"
"""Level of cells without a value, if missing values are a level."""

_PROBE_SECONDS = 60
_AGAIN = "Copy the file again from where it came."


def read_adata(data: AnnData | str | Path, *, layer: str | None = None, on_disk: bool = False) -> AnnData:
    """Return an AnnData as it is, or read one from a ``.h5ad`` file or ``.zarr`` folder.

    Of a file, obs, var and the wanted values are read, and nothing else: neither other layers nor obsm, obsp or uns.
    The file is opened for reading only.

    Parameters
    ----------
    data
        The AnnData, or its path.
    layer
        Layer whose values are wanted; None for X.
    on_disk
        Leave the values on disk: less memory, slower, and the file stays open.

    Raises
    ------
    DataError
        If the path does not exist, is damaged, or holds no AnnData.
    StorageError
        If it may not be read.
    """
    if isinstance(data, AnnData):
        return data
    if not isinstance(data, str | Path):
        raise DataError(
            f"expected an AnnData, or the path of an .h5ad or .zarr; found a {type(data).__name__}. "
            "Cells by genes become one with anndata.AnnData(counts), with names in obs_names and var_names."
        )
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give an .h5ad file or a .zarr folder.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # the checks say it better
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
    """Open all parts of a file on disk, and close it afterwards."""
    store = _open(Path(path))
    try:
        yield _assemble(Path(path), store, layer, on_disk=True)
    finally:
        if isinstance(store, h5py.File):
            store.close()


def name_genes(adata: AnnData, column: str | None = None, *, make_unique: bool = False) -> AnnData:
    """Name genes by a column of var, and number names that occur more than once, in place.

    Genes without a name there keep the one they have.

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
    """Give cells without a value in these columns of obs the level `MISSING_LEVEL`, in place.

    Examples
    --------
    >>> adata = AnnData(np.zeros((2, 1)), obs=pd.DataFrame({"batch": ["a", None]}, index=["c1", "c2"]))
    >>> list(fill_missing_levels(adata, ["batch"]).obs["batch"])
    ['a', '(missing)']
    """
    for column in columns:  # a missing number is no level
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
        path.open("rb").close()  # a file that may not be read is not a file of another kind
        raise DataError(
            f"{path} cannot be read as an AnnData: it is no HDF5 file. Give an .h5ad or a .zarr; text files "
            "become one with anndata.read_csv and write_h5ad."
        )
    _walk_in_a_process_of_its_own(path)
    return h5py.File(path, "r")


def _walk_in_a_process_of_its_own(path: Path) -> None:
    """Find out whether HDF5 survives this file; what it says of damage is raised here."""
    command = [sys.executable, "-P", probe.__file__, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # wherever h5py was found here
    options: dict[str, Any] = {"env": environment, "timeout": _PROBE_SECONDS}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", **options)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path} is damaged: HDF5 was still reading it after {_PROBE_SECONDS} s. {_AGAIN}") from error
    if done.returncode == probe.NO_H5PY:
        return  # nothing is known of the file
    if done.returncode < 0:
        raise DataError(f"{path} is damaged: the HDF5 library crashed reading it (signal {-done.returncode}). {_AGAIN}")
    if done.returncode:
        raise DataError(f"{path} is damaged: {done.stderr.strip()[:300]}. {_AGAIN}")


def _assemble(path: Path, store: Any, layer: str | None, on_disk: bool) -> AnnData:
    if store.attrs.get("encoding-type") != "anndata":
        if isinstance(store, h5py.File) and "obs" in store:  # as anndata wrote them before 0.8
            return anndata.read_h5ad(store.filename)
        raise DataError(f"{_name(store)} holds no AnnData (it has {', '.join(map(repr, store)) or 'nothing'}).")
    values: dict[str | None, Any] = {None: store["X"]} if "X" in store else {}
    values |= {name: store["layers"][name] for name in store.get("layers", ())}
    if layer not in values:
        refuse_layer(layer, [name for name in values if name is not None])
    if on_disk:
        kept = {name: _lazy(item) for name, item in values.items()}
    else:
        _lazy(values[layer])  # for what it says of missing chunks
        kept = {layer: read_elem(values[layer])}
    adata = AnnData(X=kept.pop(None, None), obs=_frame(store, "obs"), var=_frame(store, "var"), layers=kept)
    if on_disk:
        adata.raw = _raw(store)
    else:
        adata.uns[ORIGIN] = str(path.resolve())
        if isinstance(store, h5py.File):
            store.close()  # nobody waits for it
    return adata


def _frame(store: Any, name: str) -> pd.DataFrame:
    if name not in store:
        raise DataError(f"{_name(store)} is no complete AnnData: it has no {name}.")
    return read_elem(store[name])


def _raw(store: Any) -> Any:
    """Return the cells of ``raw``, left on disk; only a hint uses them."""
    if "raw" not in store or "X" not in store["raw"] or "var" not in store["raw"]:
        return None
    return AnnData(X=_lazy(store["raw"]["X"]), obs=_frame(store, "obs"), var=read_elem(store["raw"]["var"]))


def _lazy(item: Any) -> Any:
    """Return values that stay on disk."""
    if isinstance(item, zarr.Array) and (missing := item.nchunks - item.nchunks_initialized):
        warn(
            f"{item.store_path}: {missing:,} of {item.nchunks:,} chunks are not there, and are read as zeros. If the "
            "counts there are not all zero, the store is damaged."
        )
    if isinstance(item, h5py.Dataset | zarr.Array):
        return item
    if isinstance(item, zarr.Group):
        _refuse_missing_chunks(item)
    return sparse_dataset(item)


def _refuse_missing_chunks(group: zarr.Group) -> None:
    """Warn about missing chunks: they read as zeros. Writers also leave out chunks that hold only zeros.

    Of a sparse matrix's values none is zero, and indices are all zero in a matrix of one gene alone.
    """
    n_genes = int(group.attrs["shape"][1])  # type: ignore[index, arg-type]
    for name in ("data", "indices", "indptr"):
        part: Any = group[name]
        if not group["data"].shape[0] or (name == "indices" and n_genes == 1):  # type: ignore[union-attr]
            continue
        if (n_chunks := part.nchunks_initialized) < part.nchunks:
            raise DataError(
                f"{group.store_path}/{name} is not complete: it has {n_chunks:,} of {part.nchunks:,} chunks. {_AGAIN}"
            )


def _name(store: h5py.File | zarr.Group) -> str:
    return str(store.filename if isinstance(store, h5py.File) else store.store_path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
