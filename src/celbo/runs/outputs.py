"""Files that commands write: in one step or not at all, and never over what celbo did not write."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
from anndata import AnnData, read_h5ad, settings

from celbo.ask.counterfactual import Counterfactual
from celbo.errors import DataError, StorageError, UsageError

__all__ = [
    "refuse_no_counterfactual",
    "refuse_no_embedding",
    "refuse_no_sample",
    "refuse_no_table",
    "write_counterfactual",
    "write_embedding",
    "write_file",
    "write_sample",
    "write_table",
]


_TABLES = (
    "cell,label,probability,p_known,",
    "cell,log_p,se,ess,",
    "cell,log_p,score,p_value,",
    "gene,group,reference,",
)
"""How the tables of each command begin; a person's own seldom has the same first columns."""


def write_embedding(cells: AnnData, path: Path) -> None:
    """Write an embedding as ``.h5ad``, in one step or not at all; what is no embedding is not replaced."""
    refuse_no_embedding(path)
    _write_cells(cells, path)


def write_counterfactual(found: Counterfactual, cells: AnnData, path: Path, *, sample: bool, seed: int) -> None:
    """Write cells as they would be as ``.h5ad``, in one step or not at all; no other file is replaced.

    X is the mean, ``layers["lower"]`` and ``layers["upper"]`` its 90 % interval; or, with ``sample``, drawn counts.
    obs has the conditions asked for and the support (``celbo_share``, ``celbo_distance``, ``celbo_verdict``), var the
    changed genes, ``uns["celbo_counterfactual"]`` what X is: "mean" or "drawn".
    """
    refuse_no_counterfactual(path)
    if sample:
        adata = found.sample(seed)
    else:
        adata = AnnData(X=found.mean, obs=found.obs.copy(), layers={"lower": found.lower, "upper": found.upper})
        adata.var_names = found.genes.index
    adata.obs_names = cells.obs_names
    adata.uns["celbo_counterfactual"] = "drawn" if sample else "mean"
    for name, column in found.support.items():
        adata.obs[f"celbo_{name}"] = column.to_numpy()
    for name, column in found.genes.items():
        adata.var[str(name)] = column.to_numpy()
    _write_cells(adata, path)


def write_sample(cells: AnnData, path: Path) -> None:
    """Write drawn cells as ``.h5ad``, in one step or not at all; no other file is replaced."""
    refuse_no_sample(path)
    _write_cells(cells, path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, in one step or not at all; a file that is no such table is not replaced."""
    refuse_no_table(path)
    rows = table.index.name if table.index.name == "gene" else "cell"
    ours = [start for start in _TABLES if start.startswith(f"{rows},{table.columns[0]},")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_ours = not path.exists() or (path.is_file() and path.read_bytes().startswith(tuple(map(str.encode, ours))))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}. Name another place with -o.") from error
    if not is_ours:
        raise UsageError(f"{path} exists, and is no table that celbo wrote; name another file with -o.")
    write_file(path, table.to_csv(index_label=rows))


def refuse_no_table(path: Path) -> None:
    """Refuse a name that no table can be written to."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a .csv file to write.")
    if path.suffix != ".csv":
        raise UsageError(f"{path} is to be a .csv file; name it so.")


def refuse_no_embedding(path: Path) -> None:
    """Refuse a name that no embedding can be written to."""
    _refuse_other_cells(
        path, lambda found: "X_celbo" in found.obsm and not found.n_vars, "no embedding that celbo wrote"
    )


def refuse_no_counterfactual(path: Path) -> None:
    """Refuse a name that no counterfactual can be written to."""
    _refuse_other_cells(path, lambda found: "celbo_counterfactual" in found.uns, "no counterfactual that celbo wrote")


def refuse_no_sample(path: Path) -> None:
    """Refuse a name that no drawn cells can be written to."""
    _refuse_other_cells(path, lambda found: "celbo_sample" in found.uns, "no sample that celbo drew")


def _write_cells(cells: AnnData, path: Path) -> None:
    path = Path(os.path.realpath(path))  # where a link leads
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with settings.override(allow_write_nullable_strings=True):  # which all text is in pandas 3
            cells.write_h5ad(beside)
        beside.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Name another place with -o."
        ) from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"obs cannot be written to {path}: {error}. Drop that column, or make it text.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _refuse_other_cells(path: Path, is_ours: Callable[[AnnData], bool], else_it_is: str) -> None:
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name an .h5ad file to write.")
    if path.suffix != ".h5ad":
        raise UsageError(f"{path} is to be an .h5ad file; name it so.")
    if path.exists() and not _holds_cells(path, is_ours):
        raise UsageError(f"{path} is there, and is {else_it_is}; name another file with -o.")


def _holds_cells(path: Path, is_ours: Callable[[AnnData], bool]) -> bool:
    if not path.is_file():
        return False
    try:
        found = read_h5ad(path, backed="r")
    except Exception:  # noqa: BLE001 - whatever it is, it is not ours
        return False
    ours = is_ours(found)
    found.file.close()
    return ours


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step or not at all."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        # A file name that is no text in this locale keeps its bytes.
        beside.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or name another place."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
