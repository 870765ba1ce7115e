"""Draw the report of a run from the files in its folder."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from numpy.typing import NDArray

from celbo.errors import ModelFileError, StorageError
from celbo.report.latent import layout
from celbo.report.start import start_matplotlib
from celbo.runs.answers import write_file

__all__ = ["read_summary", "summarise", "verdict_of", "write_report"]

_MOST_LEVELS = 60
"""A column of obs with more levels than this does not help as a colour of the latent picture."""
_LISTED_LEVELS = 50
"""A condition is always shown: this many of its levels, and the others together."""
_MOST_COLOURS = 6


def write_report(folder: Path) -> None:
    """Write ``latent.png`` and ``report.html`` of a run. The same files give the same bytes.

    Parameters
    ----------
    folder
        The folder of the run.

    Raises
    ------
    ModelFileError
        If a file of the run is missing or damaged.
    StorageError
        If a file may not be read or written.
    """
    summary = read_summary(folder)
    start_matplotlib(spare=folder)
    from celbo.report.figures import latent_figure, to_png  # these import matplotlib
    from celbo.report.page import render

    picture, page = to_png(latent_figure(summary)), render(summary)
    write_file(folder / "latent.png", picture)
    write_file(folder / "report.html", page)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read everything that the report of a run shows; see `celbo.report`.

    Parameters
    ----------
    folder
        The folder of the run.

    Raises
    ------
    ModelFileError
        If a file of the run is missing or damaged.
    StorageError
        If a file may not be read.
    """
    run, metrics = _read_json(folder / "run.json"), _read_json(folder / "metrics.json")
    diagnosis = _read_json(folder / "diagnosis.json") if (folder / "diagnosis.json").exists() else None
    with _part_of_run(folder / "history.jsonl") as path:
        history = [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    with _part_of_run(folder / "embedding.h5ad") as path:
        cells = _read_cells(path)
    with _part_of_run(folder / "run.json"):
        options, seed, source = run["options"], int(run["seed"]), run["data"]["name"]
        conditions = [*options.get("conditions", ()), *options.get("nuisance", ())]
        version = run["versions"]["celbo"]
    with _part_of_run(folder / "metrics.json"):
        verdict = verdict_of(metrics, diagnosis)
    return {
        "title": f"celbo: {source}",
        "celbo_version": version,
        "verdict": verdict,
        "notes": run.get("notes", []),
        "metrics": metrics,
        "diagnosis": diagnosis,
        "run": run,
        "history": history,
        "latent": summarise(cells, seed=seed, first=[name for name in conditions if name in cells.obs]),
        "recovery": run.get("recovery"),
    }


def _read_cells(path: Path) -> AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fit warned about the cells
        cells = read_h5ad(path)
    if "X_celbo" not in cells.obsm:
        raise KeyError("obsm has no 'X_celbo'")
    return cells


def _read_json(path: Path) -> dict[str, Any]:
    with _part_of_run(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _part_of_run(path: Path) -> Iterator[Path]:
    """Say which file of the run is missing or damaged."""
    try:
        yield path
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing, and the report needs it. Copy it back, or fit again.") from error
    except PermissionError as error:
        raise StorageError(f"{path} may not be read. Ask its owner for permission.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error!s:.200}"
        raise ModelFileError(f"{path} is not as celbo wrote it ({what}). Copy it back, or fit again.") from error


def verdict_of(metrics: Mapping[str, Any], diagnosis: Mapping[str, Any] | None) -> str:
    """Say in one sentence what was learned: the verdict of the diagnosis, if there is one."""
    if diagnosis is not None:
        return str(diagnosis["verdict"])
    active, total = metrics["active_units"], metrics["latent_dim"]
    if metrics["objective"] == "autoencoder":
        return f"A plain autoencoder with {total} latent dimensions: nothing ties its latent space to a prior."
    if active == 0:
        return (
            f"The latent space collapsed: none of its {total} dimensions varies between cells, "
            "so it shows a blob without separation."
        )
    unit = "dimension varies" if active == 1 else "dimensions vary"
    return f"{active} of {total} latent {unit} between cells."


def summarise(cells: AnnData, *, seed: int, first: Sequence[str] = ()) -> dict[str, Any]:
    """Lay out the latent space in a plane, with the columns of obs that can colour it, conditions first."""
    plane = layout(cells.obsm["X_celbo"], seed=seed)
    obs = cells.obs.iloc[plane.rows]
    columns = [*first, *(name for name in obs.columns if name not in first)]
    colours = {str(name): colour for name in columns if (colour := _colour(obs[name], name in first)) is not None}
    return {
        "method": plane.method,
        "xy": np.round(plane.xy, 3).tolist(),
        "n_cells_shown": len(plane.rows),
        "n_cells": cells.n_obs,
        "colours": dict(list(colours.items())[:_MOST_COLOURS]),
    }


def _colour(column: "pd.Series[Any]", is_condition: bool = False) -> dict[str, Any] | None:
    """Colours of a column for the pictures; for a condition with very many levels, of the levels with most cells."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column) and column.nunique() > 12:
        values: NDArray[np.float64] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return {"kind": "continuous", "values": [float(v) if np.isfinite(v) else None for v in values]}
    n_levels = column.nunique()
    if is_condition and n_levels > _MOST_LEVELS:
        listed = column.value_counts().index[:_LISTED_LEVELS]
        column = column.astype(object).where(column.isin(listed) | column.isna(), f"{n_levels - len(listed):,} others")
    elif not 2 <= n_levels <= _MOST_LEVELS:
        return None
    return {"kind": "categorical", "values": [None if pd.isna(value) else str(value) for value in column]}
