"""Write a run: the model, its figures, the record of the run, and the summary that the report shows."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from celbo.ask.scoring import elbo, posterior
from celbo.estimator import ExpressionVAE
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.saved import without_nan
from celbo.model.information import ACTIVE
from celbo.report.figures import latent_figure, to_png
from celbo.report.latent import layout
from celbo.report.page import render
from celbo.runs.answers import write_embedding, write_file
from celbo.runs.claims import WRITTEN
from celbo.trials.comparing import Comparison
from celbo.trials.curing import Step
from celbo.trust.advice import Diagnosis
from celbo.trust.diagnosing import diagnose
from celbo.version import __version__

if sys.platform != "win32":
    import resource

__all__ = ["embedding", "measure", "record_of_run", "summarise", "write_run"]

_MOST_LEVELS = 60
"""A column of obs with more levels than this does not help as a colour of the latent picture."""
_LISTED_LEVELS = 50
"""A condition is always shown: this many of its levels, and the others together."""
_MOST_COLOURS = 6
_FEWEST_TO_DIAGNOSE = 20
"""Held-out cells that are needed for a diagnosis that nobody asked for."""
_LIBRARIES = ("anndata", "numpy", "pandas", "safetensors", "scipy", "torch")


def measure(model: ExpressionVAE, cells: Cells, seconds: float) -> dict[str, Any]:
    """Compute the figures of a fitted model for ``metrics.json``; ELBO terms are unweighted, nats per cell.

    Parameters
    ----------
    model
        The model, just fitted.
    cells
        The cells of fit.
    seconds
        Duration of the fit.
    """
    history, split = model.history_, model.split_
    terms = elbo(model.fitted_, cells, seed=model.train.seed)
    train, validation = terms.iloc[split.train], terms.iloc[split.validation]
    held_out = validation if len(validation) else None
    kl_per_dim = (train if held_out is None else held_out).filter(regex=r"^kl_\d+$").mean()
    active = cells.encoded.mu_z.var(axis=0) > ACTIVE
    return {
        "n_cells": len(cells),
        "n_genes": len(model.schema_.genes),
        "likelihood": model.likelihood,
        "objective": model.objective,
        "latent_dim": model.latent_dim,
        "epochs": len(history),
        "steps": history[-1].step,
        "seconds": seconds,
        "cells_per_second": len(split.train) * len(history) / sum(epoch.seconds for epoch in history),
        "peak_memory_mb": _peak_memory_mb(),
        "elbo_train": float(train["elbo"].mean()),
        "elbo_validation": None if held_out is None else float(held_out["elbo"].mean()),
        "reconstruction_validation": None if held_out is None else float(held_out["reconstruction"].mean()),
        "kl_validation": None if held_out is None else float(held_out["kl"].mean()),
        "kl_per_dim": [float(value) for value in kl_per_dim],
        "active_units": int(active.sum()),
        "kl_weight_final": history[-1].kl_weight,
        "ablation": next((epoch.ablation for epoch in reversed(history) if epoch.ablation is not None), None),
    }


def embedding(fitted: Fitted, cells: Cells, obs: pd.DataFrame | None = None) -> AnnData:
    """Make an AnnData of obs, ``obsm["X_celbo"]`` and ``obsm["X_celbo_sd"]``, without counts.

    If cells have no count of the model's genes, ``obs["celbo_empty"]`` says which.

    Parameters
    ----------
    fitted, cells
        The model, and cells opened for it.
    obs
        Table of the cells to write, if it is not that of ``cells``.
    """
    mu_z, sd_z = posterior(fitted, cells)
    obs = (cells.obs if obs is None else obs).copy()
    if cells.empty.any():
        obs["celbo_empty"] = cells.empty
    return AnnData(obs=obs, obsm={"X_celbo": mu_z, "X_celbo_sd": sd_z})


def write_run(
    folder: Path,
    model: ExpressionVAE,
    cells: Cells,
    *,
    seconds: float,
    source: str,
    notes: Sequence[str] = (),
    reading: Mapping[str, Any] | None = None,
    recovery: Sequence[Mapping[str, Any]] | None = None,
    keep_reference: bool = True,
    trail: Sequence[Step] | None = None,
    choices: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """Write model, embedding, metrics, history, record of the run, picture and report.

    The names of the files are `celbo.runs.claims.WRITTEN`. The model is saved first, so that nothing can lose it; then
    files of an earlier run are removed. A process that is killed between the two leaves the new model beside them.

    Parameters
    ----------
    folder
        Folder to write to.
    model
        The model, just fitted.
    cells
        The cells of fit, with their fingerprint.
    seconds
        Duration of the fit.
    source
        Name of the data, for people.
    notes
        Warnings to repeat in the report.
    reading
        How the data were read, to repeat the run: path and options.
    recovery
        How well a simulated truth was recovered, if there is one.
    keep_reference
        Whether the model folder keeps the latent positions of the cells.
    trail
        The models that were tried to cure it, for ``cure.json``.
    choices
        The models among which it was chosen, for ``choice.json``.

    Returns
    -------
    dict
        The report's summary: everything that the report shows.
    """
    model.save(folder / "model", keep_reference=keep_reference)
    if (folder / "run.json").exists():  # of an earlier run
        for name in set(WRITTEN) - {"model"}:
            Path(os.path.realpath(folder / name)).unlink(missing_ok=True)
    run = _record(folder, model, cells, source, reading)
    write_file(folder / "run.json", _json(run))
    cells = cells.seen_by(model.fitted_)
    embedded = embedding(model.fitted_, cells)
    metrics = measure(model, cells, seconds)
    diagnosis = _diagnose(model, cells)
    history = [asdict(epoch) for epoch in model.history_]
    summary = {
        "title": f"celbo: {source}",
        "celbo_version": __version__,
        "verdict": _verdict(metrics) if diagnosis is None else diagnosis.verdict,
        "notes": [*dict.fromkeys(notes), *map(str, choices), *_notes(model)],
        "metrics": metrics,
        "diagnosis": None if diagnosis is None else diagnosis.to_json(),
        "run": run,
        "history": history,
        "latent": summarise(embedded, seed=model.train.seed, first=[*model.conditions, *model.nuisance]),
        "recovery": None if recovery is None else list(recovery),
    }
    write_embedding(embedded, folder / "embedding.h5ad")
    if trail is not None:
        write_file(folder / "cure.json", _json([asdict(step) for step in trail]))
    if choices:
        write_file(folder / "choice.json", _json([choice.to_json() for choice in choices]))
    write_file(folder / "metrics.json", _json(metrics))
    write_file(folder / "history.jsonl", "".join(_json(epoch, indent=None) for epoch in history))
    if diagnosis is not None:
        write_file(folder / "diagnosis.json", _json(diagnosis.to_json()))
    write_file(folder / "latent.png", to_png(latent_figure(summary)))
    write_file(folder / "report.html", render(summary))
    return summary


def _record(
    folder: Path, model: ExpressionVAE, cells: Cells, source: str, reading: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Options, versions, seed and data of a run, for ``run.json``."""
    return {
        "options": dict(model.fitted_.options),
        "versions": {
            "celbo": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "seed": model.train.seed,
        "stopped": model.fitted_.stopped,
        "reading": dict(reading or {}),
        "data": {"name": source, **(cells.fingerprint or {})},
        "weights_sha256": hashlib.sha256((folder / "model" / "weights.safetensors").read_bytes()).hexdigest(),
    }


def record_of_run(run: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run, or of the run whose model folder this is; empty if there is none."""
    for folder in (run, run.parent) if run.name == "model" else (run,):
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("reading", {}), dict):
            return record
    return {}


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


def _diagnose(model: ExpressionVAE, cells: Cells) -> Diagnosis | None:
    """Diagnose the model; None if there are too few cells, and for a plain autoencoder."""
    few = min(len(model.split_.train), len(model.split_.validation) or _FEWEST_TO_DIAGNOSE) < _FEWEST_TO_DIAGNOSE
    if few or not model.fitted_.objective.samples_z:
        return None
    return diagnose(model.fitted_, cells, seed=model.train.seed)


def _notes(model: ExpressionVAE) -> list[str]:
    """Say if training maximised something other than the ELBO."""
    if model.recipe().is_bound:
        return []
    return [
        f"trained with {', '.join(model.remedies)}: training did not maximise the ELBO itself. All figures here are "
        "of the unweighted ELBO."
    ]


def _verdict(metrics: Mapping[str, Any]) -> str:
    """Say in one sentence what was learned."""
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


def _peak_memory_mb() -> float | None:
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _json(value: Any, indent: int | None = 1) -> str:
    """Write JSON; numbers that are not finite become null."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"
