"""Write the files of commands in one step or not at all, and never over a file that celbo did not write."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad, settings
from numpy.typing import NDArray

from celbo import checkpoint
from celbo.data.read import explain_lock
from celbo.data.write import holds_only, write_cells, write_in_blocks
from celbo.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    from celbo.ask.counterfactual import Counterfactual

__all__ = [
    "EXPRESSION",
    "check_counterfactual_path",
    "check_embedding_path",
    "check_expression_path",
    "check_sample_path",
    "check_table_path",
    "write_counterfactual",
    "write_embedding",
    "write_expression",
    "write_file",
    "write_sample",
    "write_table",
]


EXPRESSION = "celbo_expression"
"""Key of uns that marks a file of expression."""

_TABLES = {
    "predict": ("cell,label,probability,p_known,",),
    "score": ("cell,log_p,se,ess,", "cell,log_p,score,p_value,"),
    "de": ("gene,group,reference,",),
}
"""First columns of the tables of each command. A file of another program rarely begins in the same way."""

_RESERVED = {"_index": "_index_"}
"""Column that AnnData files cannot have, although converters from R make it, and the name that it gets instead."""


def write_embedding(cells: AnnData, path: Path) -> None:
    """Write an embedding as ``.h5ad``. Only another embedding may be replaced."""
    check_embedding_path(path)
    _write_cells(cells, path)


def write_counterfactual(answer: "Counterfactual", cells: AnnData, path: Path, *, sample: bool, seed: int) -> None:
    """Write cells under other conditions as ``.h5ad``. Only another counterfactual may be replaced.

    X is the mean, ``layers["lower"]`` and ``layers["upper"]`` its 90 % interval; or, with ``sample``, drawn counts.
    obs has the conditions asked for and the support (``celbo_share``, ``celbo_distance``, ``celbo_verdict``), var the
    changed genes, ``uns["celbo_counterfactual"]`` the kind of X: "mean" or "drawn".
    """
    check_counterfactual_path(path)
    if sample:
        adata = answer.sample(seed)
    else:
        adata = AnnData(X=answer.mean, obs=answer.obs.copy(), layers={"lower": answer.lower, "upper": answer.upper})
        adata.var_names = answer.genes.index
    adata.obs_names = cells.obs_names
    adata.uns["celbo_counterfactual"] = "drawn" if sample else "mean"
    for name, column in answer.support.items():
        adata.obs[f"celbo_{name}"] = column.to_numpy()
    for name, column in answer.genes.items():
        adata.var[str(name)] = column.to_numpy()
    _write_cells(adata, path)


def write_expression(cells: AnnData, blocks: Iterable[NDArray[np.float32]], path: Path) -> None:
    """Write expression as ``.h5ad`` or ``.zarr``, in blocks of cells. Only another file of expression may be replaced.

    Parameters
    ----------
    cells
        The cells without X. Their ``uns`` has nothing but the key `EXPRESSION`.
    blocks
        X, in blocks of consecutive cells.
    path
        The file, or the folder if it ends in ``.zarr``.
    """
    check_expression_path(path)

    def write(to: Path) -> None:
        needed, free = 4 * cells.n_obs * cells.n_vars, shutil.disk_usage(to.parent).free
        if path.suffix == ".h5ad" and free < needed:  # zarr compresses
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes, and its disk has {free:,} left")
        write_in_blocks(cells, blocks, to, as_zarr=path.suffix == ".zarr")

    _write_cells(cells, path, write)


def write_sample(cells: AnnData, path: Path) -> None:
    """Write drawn cells as ``.h5ad``. Only another file of drawn cells may be replaced."""
    check_sample_path(path)
    _write_cells(cells, path)


def write_table(table: pd.DataFrame, path: Path, command: str) -> None:
    """Write the table of a command as CSV. Only a table of the same command may be replaced."""
    check_table_path(path, command)
    write_file(path, table.to_csv(index_label=_TABLES[command][0].partition(",")[0]))


def check_table_path(path: Path, command: str) -> None:
    """Check that the table of a command can have this name, and that no other file has it."""
    _check_name(path, ".csv")
    try:
        is_ours = not path.exists() or path.read_text(errors="replace").startswith(_TABLES[command])
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Name another file with -o.") from error
    if not is_ours:
        raise UsageError(f"{path} exists, and is no table that celbo wrote; name another file with -o.")


def check_embedding_path(path: Path) -> None:
    """Check that an embedding can have this name, and that no other file has it."""
    _check_cells_path(path, lambda cells: "X_celbo" in cells.obsm and not cells.n_vars, "embedding that celbo wrote")


def check_counterfactual_path(path: Path) -> None:
    """Check that a counterfactual can have this name, and that no other file has it."""
    _check_cells_path(path, lambda cells: "celbo_counterfactual" in cells.uns, "counterfactual that celbo wrote")


def check_expression_path(path: Path) -> None:
    """Check that a file of expression can have this name, that no other file has it, and that no model is there."""
    path = Path(os.path.realpath(path))
    _check_name(path, ".h5ad", ".zarr", also=" The result is an AnnData; adata.to_df() makes a table of it.")
    if any(checkpoint.is_model_folder(folder) for folder in path.parents):
        raise UsageError(f"{path} is in a model folder, which would be damaged; name another place with -o.")
    if path.exists() and not holds_only(path, EXPRESSION):
        raise UsageError(
            f"{path} exists, and is no expression that celbo wrote, or has more than that; name another place with -o."
        )


def check_sample_path(path: Path) -> None:
    """Check that drawn cells can have this name, and that no other file has it."""
    _check_cells_path(path, lambda cells: "celbo_sample" in cells.uns, "sample that celbo drew")


def _check_name(path: Path, *endings: str, also: str = "") -> None:
    if path.is_dir() != (path.suffix == ".zarr") and path.exists():
        what = "a folder" if path.is_dir() else "not a folder"
        raise UsageError(f"{path} is {what}; name a file that ends in {endings[0]}.")
    if path.suffix not in endings:
        raise UsageError(f"{path} does not end in {' or '.join(endings)}; name a file that does.{also}")


def _check_cells_path(path: Path, is_ours: Callable[[AnnData], bool], kind: str) -> None:
    """Check the name, and that a file that has it satisfies ``is_ours``."""
    path = Path(os.path.realpath(path))
    _check_name(path, ".h5ad")
    if path.exists() and not _holds_cells(path, is_ours):
        raise UsageError(f"{path} exists, and is no {kind}; name another file with -o.")


def _holds_cells(path: Path, is_ours: Callable[[AnnData], bool]) -> bool:
    if not path.is_file():
        return False
    try:
        cells = read_h5ad(path, backed="r")
    except Exception as error:
        if held := explain_lock(path, str(error)):
            raise StorageError(held) from error
        return False
    try:
        return is_ours(cells)
    finally:
        cells.file.close()


def _write_cells(cells: AnnData, path: Path, write: Callable[[Path], object] | None = None) -> None:
    cells.obs, cells.var = (table.rename(columns=_RESERVED) for table in (cells.obs, cells.var))
    try:
        with settings.override(allow_write_nullable_strings=True):  # in pandas 3 all text is nullable
            _write(path, write or partial(write_cells, cells))
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"obs or var cannot be written to {path}: {reason}. Rename that column, make it text, or drop it."
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step or not at all."""
    # A file name that is no text in this locale keeps its bytes.
    raw = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    _write(path, lambda temporary: temporary.write_bytes(raw))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then rename. Follow a link, so that it stays a link."""
    path = Path(os.path.realpath(path))
    temporary, old = (
        path.with_name(f".{path.name}-{kind}{os.getpid()}-{threading.get_ident()}") for kind in ("", "old-")
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.is_dir():  # no folder can take the place of another in one step
            path.rename(old)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"{path} cannot be written: {reason}. Free some space, or name another place with -o."
        ) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink(missing_ok=True)
