"""What ``celbo fit`` writes of a run: the model, figures of it, its record, and the summary the report shows."""

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

from celbo.data.sources import empty_cells
from celbo.data.stored import stored_values
from celbo.estimator import ExpressionVAE
from celbo.model.information import ACTIVE
from celbo.report.figures import latent_figure, to_png
from celbo.report.latent import layout
from celbo.report.page import render
from celbo.runs.claims import WRITTEN
from celbo.runs.outputs import write_embedding, write_file
from celbo.trials.comparing import Comparison
from celbo.trials.curing import Step
from celbo.trust.advice import Diagnosis
from celbo.version import __version__

if sys.platform != "win32":
    import resource

__all__ = ["embedding", "fingerprint", "measure", "record_of_run", "summarise", "write_run"]

_MOST_LEVELS = 60
"""A column of obs with more levels than this is no help as a colour of the latent picture."""
_LISTED_LEVELS = 50
"""But a condition is always shown: so many of its levels, and the others as one."""
_MOST_COLOURS = 6
_FEWEST_TO_DIAGNOSE = 20
"""Held-out cells below which no diagnosis is made unasked."""
_LIBRARIES = ("anndata", "numpy", "pandas", "safetensors", "scipy", "torch")


def measure(model: ExpressionVAE, adata: AnnData, mu_z: NDArray[np.float32], seconds: float) -> dict[str, Any]:
    """Figures of a fitted model for ``metrics.json``; ELBO terms are unweighted, nats per cell.

    Parameters
    ----------
    model
        Just fitted.
    adata
        To these cells.
    mu_z
        Their posterior means.
    seconds
        That fitting took.
    """
    terms = model.elbo(adata, seed=model.train.seed)
    train, validation = terms.iloc[model.split_.train], terms.iloc[model.split_.validation]
    held_out = validation if len(validation) else None
    kl_per_dim = (train if held_out is None else held_out).filter(regex=r"^kl_\d+$").mean()
    active = mu_z.var(axis=0) > ACTIVE
    history = model.history_
    return {
        "n_cells": adata.n_obs,
        "n_genes": len(model.schema_.genes),
        "likelihood": model.likelihood,
        "objective": model.objective,
        "latent_dim": model.latent_dim,
        "epochs": len(history),
        "steps": history[-1].step,
        "seconds": seconds,
        "cells_per_second": len(model.split_.train) * len(history) / sum(epoch.seconds for epoch in history),
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


def fingerprint(adata: AnnData, layer: str | None) -> dict[str, Any]:
    """Shape and SHA-256 of the values and of the names, to tell later whether data are the same."""
    parts = [hashlib.sha256() for _ in range(3)]
    for block in stored_values(adata, layer).blocks():
        block = block.copy()  # it may be a view of the caller's values
        block.eliminate_zeros()
        for part, array in zip(parts, (np.diff(block.indptr), block.indices, block.data), strict=True):
            part.update(array.astype(np.float64).tobytes())
    values = hashlib.sha256(b"".join(part.digest() for part in parts))
    names = hashlib.sha256("\n".join([*adata.obs_names, "", *adata.var_names]).encode())
    return {
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "layer": layer,
        "sha256_values": values.hexdigest(),
        "sha256_names": names.hexdigest(),
    }


def embedding(model: ExpressionVAE, adata: AnnData, *, unseen: str = "refuse", genes_present: float = 0.8) -> AnnData:
    """Cells with their obs and ``obsm["X_celbo"]``, ``obsm["X_celbo_sd"]``; no counts.

    Where there are cells without a count of the model's genes, ``obs["celbo_empty"]`` says which. Options are those of
    `celbo.ExpressionVAE.posterior`.
    """
    mu_z, sd_z = model.posterior(adata, unseen=unseen, genes_present=genes_present)
    obs = adata.obs.copy()
    if (empty := empty_cells(adata, model.schema_)).any():
        obs["celbo_empty"] = empty
    return AnnData(obs=obs, obsm={"X_celbo": mu_z, "X_celbo_sd": sd_z})


def write_run(
    folder: Path,
    model: ExpressionVAE,
    adata: AnnData,
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

    Their names are those of `celbo.runs.claims.WRITTEN`; those of a run that was there are removed first.

    Parameters
    ----------
    folder
        Where to.
    model
        Just fitted.
    adata
        To these cells.
    seconds
        That fitting took.
    source
        Name of the data, for people.
    notes
        Warnings to repeat in the report.
    reading
        How the data were read, to repeat the run: path and options.
    recovery
        How well a simulated truth was recovered, where there is one.
    keep_reference
        Whether the model folder keeps the latent positions of the cells.
    trail
        What was tried to cure it, for ``cure.json``.
    choices
        What it was chosen among, for ``choice.json``.

    Returns
    -------
    dict
        The report's summary: everything it shows.
    """
    model.save(folder / "model", keep_reference=keep_reference)  # first: nothing below may lose it
    if (folder / "run.json").exists():  # a run that was there: if this one is interrupted now, nothing is of both
        for name in set(WRITTEN) - {"model"}:
            Path(os.path.realpath(folder / name)).unlink(missing_ok=True)
    run = {
        "options": model.options(),
        "versions": {
            "celbo": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "seed": model.train.seed,
        "reading": dict(reading or {}),
        "data": {"name": source, **fingerprint(adata, model.layer)},
        "weights_sha256": hashlib.sha256((folder / "model" / "weights.safetensors").read_bytes()).hexdigest(),
    }
    write_file(folder / "run.json", _json(run))
    cells = embedding(model, adata)
    metrics = measure(model, adata, cells.obsm["X_celbo"], seconds)
    diagnosis = _diagnose(model, adata)
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
        "latent": summarise(cells, seed=model.train.seed, first=[*model.conditions, *model.nuisance]),
        "recovery": None if recovery is None else list(recovery),
    }
    write_embedding(cells, folder / "embedding.h5ad")
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


def record_of_run(run: Path) -> dict[str, Any]:
    """The ``run.json`` of a run, or of the run whose model folder this is; empty if there is none."""
    for folder in (run, run.parent) if run.name == "model" else (run,):
        try:
            found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("reading", {}), dict):
            return found
    return {}


def summarise(cells: AnnData, *, seed: int, first: Sequence[str] = ()) -> dict[str, Any]:
    """Lay the latent space out in a plane, with the columns of obs that can colour it, conditions first."""
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
    """What the pictures show of a column; of a condition of very many levels those with most cells."""
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


def _diagnose(model: ExpressionVAE, adata: AnnData) -> Diagnosis | None:
    """None for so few cells that nothing can be said of them, and for a plain autoencoder."""
    few = min(len(model.split_.train), len(model.split_.validation) or _FEWEST_TO_DIAGNOSE) < _FEWEST_TO_DIAGNOSE
    return None if few or model.objective == "autoencoder" else model.diagnose(adata, seed=model.train.seed)


def _notes(model: ExpressionVAE) -> list[str]:
    """Say so where training was on something else than the ELBO."""
    if model.recipe().is_bound:
        return []
    return [
        f"trained with {', '.join(model.remedies)}: what was maximised is not the ELBO itself. All figures here are "
        "those of the ELBO, unweighted."
    ]


def _verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence on what was learned."""
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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _json(value: Any, indent: int | None = 1) -> str:
    """JSON, where what is not finite is null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [finite(part) for part in item]
        return None if isinstance(item, float) and not np.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"
