"""Read the parts of an AnnData that a model needs, into memory or lazily from disk, and explain damaged files."""

import errno
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from celbo.data import probe
from celbo.data.foreign import describe_file, describe_folder, describe_special, describe_store
from celbo.data.paths import existing_path
from celbo.data.stored import raise_no_layer, use_raw
from celbo.errors import CelboError, DataError, StorageError, columns_there_are, warn

__all__ = [
    "MISSING_LEVEL",
    "ORIGIN",
    "OnDisk",
    "explain_lock",
    "fill_missing_levels",
    "left_on_disk",
    "name_genes",
    "read_adata",
]

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
        If the path does not exist, is damaged, or holds no AnnData. The message says what it holds instead, and how to
        make an AnnData of it.
    StorageError
        If permission to read it is missing, or another program has it open for writing.
    """
    if isinstance(data, AnnData):
        return data
    if not isinstance(data, str | Path):
        raise DataError(
            f"expected an AnnData, or the path of an .h5ad or .zarr; found a {type(data).__name__}. Give the AnnData "
            "itself (adata, not adata.X), because genes are matched by name. anndata.AnnData(counts) makes one of a "
            "matrix or table of cells by genes; set obs_names and var_names."
        )
    path = Path(data)
    try:
        path = existing_path(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*names are not unique")  # the checks report it
            warnings.filterwarnings("ignore", message="Transforming to str index")  # names that are numbers
            return _assemble(path, _open(path), layer, on_disk)
    except (CelboError, MemoryError):
        raise
    except PermissionError as error:
        raise StorageError(f"{path} may not be read: {error.strerror}. Ask its owner for permission.") from error
    except Exception as error:
        if held := explain_lock(path, str(error)):
            raise StorageError(held) from error
        if unknown := re.search(r"IOSpec\(encoding_type='([^']*)'", str(error)):
            raise DataError(
                f"{path} has a part that is stored as {unknown[1] or 'something unknown'!r}, which anndata "
                f"{version('anndata')} cannot read. Upgrade anndata, or drop that part and write the file again."
            ) from error
        raise DataError(
            f"{path} cannot be read as an AnnData: {_first_line(error)}. Copy it again, or write it again with "
            "adata.write_h5ad."
        ) from error


def explain_lock(path: Path, error: str) -> str:
    """Explain an error of HDF5 that is about locks; return an empty text for another error.

    Examples
    --------
    >>> explain_lock(Path("cells.h5ad"), "unable to lock file, errno = 11")[:52]
    'cells.h5ad is open for writing in another program, o'
    """
    if "unable to lock file" not in error and "already open for write" not in error:
        return ""
    if (number := re.search(r"errno = (\d+)", error)) and int(number[1]) not in (errno.EAGAIN, errno.EACCES):
        return (
            f"{path} cannot be locked, because its file system has no locks: {os.strerror(int(number[1]))}. Copy the "
            "file to another disk; or set HDF5_USE_FILE_LOCKING=BEST_EFFORT, if no program writes to the file."
        )
    return (
        f"{path} is open for writing in another program, often a notebook, and may change while it is read. Close it "
        "there: adata.file.close(), or end that program. Or have that program write a copy, and name the copy."
    )


class OnDisk(NamedTuple):
    """Functions that open the values of a file and leave them on disk. They fail if the values are damaged."""

    values: dict[str | None, Callable[[], Any]]
    """Of X, by the name None, and of the layers."""
    raw: Callable[[], Any] | None
    """Of ``raw.X``; None if there is none."""


@contextmanager
def left_on_disk(path: Path) -> Iterator[OnDisk]:
    """Open a file for all its values, and close it afterwards."""
    store = _open(path)
    try:
        raw = store.get("raw/X")
        values: dict[str | None, Callable[[], Any]] = {
            name: partial(_lazy, item) for name, item in _stored_values(store).items()
        }
        yield OnDisk(values, None if raw is None else partial(_lazy, raw))
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
            known = columns_there_are([column], adata.var.columns)
            raise DataError(f"var has no column {column!r} to name genes by; {known}")
        names = adata.var[column].astype(object)
        adata.var_names = np.where(names.isna(), adata.var_names, names.astype(str))
    if make_unique:
        adata.var_names_make_unique()
    return adata


def fill_missing_levels(adata: AnnData, columns: Iterable[str], *, categorical: Collection[str] = ()) -> AnnData:
    """Replace missing values in these columns of obs by the level `MISSING_LEVEL`, in place.

    Examples
    --------
    >>> adata = AnnData(np.zeros((2, 1)), obs=pd.DataFrame({"batch": ["a", None]}, index=["c1", "c2"]))
    >>> list(fill_missing_levels(adata, ["batch"]).obs["batch"])
    ['a', '(missing)']
    """
    for column in columns:  # floating-point columns are continuous, if they are not ``categorical`` in a fitted model
        is_level = column in categorical
        if not is_level and column in adata.obs.columns and pd.api.types.is_float_dtype(adata.obs[column]):
            continue
        if column in adata.obs.columns and adata.obs[column].isna().any():
            values = adata.obs[column].astype(object)
            adata.obs[column] = values.where(values.notna(), MISSING_LEVEL).astype(str)
    return adata


def _open(path: Path) -> h5py.File | zarr.Group:
    if path.is_dir():
        try:
            return zarr.open_group(path, mode="r")
        except FileNotFoundError as error:  # there is no group of zarr
            raise DataError(describe_folder(path)) from error
    if special := describe_special(path):
        raise DataError(special)
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: 0 bytes. {_AGAIN}")
    path.open("rb").close()  # raises a PermissionError if the file is not readable
    try:
        if not h5py.is_hdf5(path):
            raise DataError(describe_file(path))
        h5py.File(path, "r").close()
    except OSError as error:
        if sizes := re.search(r"eof = (\d+).*stored_eof = (\d+)", str(error)):
            raise DataError(
                f"{path} is truncated: it has {int(sizes[1]):,} of {int(sizes[2]):,} bytes. {_AGAIN}"
            ) from error
        raise
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
        raise DataError(
            f"{path} is damaged, or this machine has too much to do: HDF5 was still reading it after {_PROBE_SECONDS} "
            "s. Try again. If it takes as long then, copy the file again from where it came."
        ) from error
    if done.returncode == probe.NO_H5PY:
        return  # the file cannot be checked
    if done.returncode < 0:
        raise DataError(f"{path} is damaged: the HDF5 library crashed reading it (signal {-done.returncode}). {_AGAIN}")
    if held := explain_lock(path, done.stderr):
        raise StorageError(held)
    if done.returncode:
        raise DataError(f"{path} is damaged: {done.stderr.strip()[:300]}. {_AGAIN}")


def _assemble(path: Path, store: Any, layer: str | None, on_disk: bool) -> AnnData:
    if store.attrs.get("encoding-type") != "anndata":
        is_old = isinstance(store, h5py.File) and "encoding-type" not in store.attrs and "mod" not in store
        if is_old and "obs" in store and "var" in store:  # the format of anndata before 0.8
            return anndata.read_h5ad(store.filename)
        raise DataError(describe_store(path, store))
    values = _stored_values(store)
    if layer not in values:
        raw = use_raw(path) if "raw/X" in store else ""
        raise_no_layer(layer, [name for name in values if name is not None], raw)
    opened = _lazy(values[layer])  # reports missing chunks
    kept = {layer: opened if on_disk else read_elem(values[layer])}
    adata = AnnData(X=kept.pop(None, None), obs=_frame(path, store, "obs"), var=_frame(path, store, "var"), layers=kept)
    adata.uns[ORIGIN] = str(path.resolve())
    if isinstance(store, h5py.File) and not on_disk:
        store.close()
    return adata


def _stored_values(store: Any) -> dict[str | None, Any]:
    """Return X, by the name None, and the layers of a store as they are stored."""
    x, layers = store.get("X"), store.get("layers")
    values: dict[str | None, Any] = {} if x is None else {None: x}
    return values | (dict(_layers(layers)) if isinstance(layers, h5py.Group | zarr.Group) else {})


def _layers(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers in a group by name. If a name has slashes, its parts are groups in each other."""
    for name in sorted(group):  # zarr lists them in any order
        item = group.get(name)
        if isinstance(item, h5py.Group | zarr.Group) and item.attrs.get("encoding-type", "dict") == "dict":
            yield from _layers(item, f"{prefix}{name}/")
        elif item is not None:
            yield f"{prefix}{name}", item


def _frame(path: Path, store: Any, name: str) -> pd.DataFrame:
    if name not in store:
        raise DataError(f"{path} is an incomplete AnnData: it has no {name}. {_AGAIN}")
    table = read_elem(store[name])
    for column in table.columns:
        table[column] = _decoded(table[column])
    return table


def _decoded(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Make text of bytes, as which some programs write text; other columns stay."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels = column.cat.categories
        return column.cat.rename_categories(levels.map(_text)) if levels.map(type).isin([bytes]).any() else column
    return column.map(_text) if column.dtype == object and column.map(type).isin([bytes]).any() else column


def _text(value: object) -> object:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
