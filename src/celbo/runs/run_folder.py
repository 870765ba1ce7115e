"""Write a run: the model, its figures, and the record of the run."""

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
from celbo.runs.answers import write_embedding, write_file
from celbo.runs.claims import WRITTEN
from celbo.runs.reporting import verdict_of
from celbo.trials.comparing import Comparison
from celbo.trials.curing import Step
from celbo.trust.advice import Diagnosis
from celbo.trust.diagnosing import diagnose
from celbo.version import __version__

if sys.platform != "win32":
    import resource

__all__ = ["embedding", "measure", "write_run"]

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


def embedding(
    fitted: Fitted, cells: Cells, obs: pd.DataFrame | None = None, is_unlike: NDArray[np.bool_] | None = None
) -> AnnData:
    """Make an AnnData of obs, ``obsm["X_celbo"]`` and ``obsm["X_celbo_sd"]``, without counts.

    If cells have no count of the model's genes, ``obs["celbo_empty"]`` says which.

    Parameters
    ----------
    fitted, cells
        The model, and cells opened for it.
    obs
        Table of the cells to write, if it is not that of ``cells``.
    is_unlike
        Which cells are unlike the cells of fit, for ``obs["celbo_unlike"]``.
    """
    mu_z, sd_z = posterior(fitted, cells)
    obs = (cells.obs if obs is None else obs).copy()
    if cells.empty.any():
        obs["celbo_empty"] = cells.empty
    if is_unlike is not None:
        obs["celbo_unlike"] = is_unlike
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
    """Write model, embedding, metrics, history and record of the run; `celbo.runs.reporting` writes the report.

    The names of the files are `celbo.runs.claims.WRITTEN`. In a new folder the model is saved first, so that nothing
    can lose it. An earlier run is replaced when everything has been computed: an interrupt until then leaves it whole,
    and the new model is lost; if computing fails, the model replaces it alone. A process that is killed while the model
    is being saved may leave it beside the earlier run's files.

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
        Warnings, which ``run.json`` keeps for the report.
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
        The verdict, the metrics and the recovery, as the report shows them; and ``stopped``, why training ended early.
    """
    replaces_run = (folder / "run.json").exists()
    if not replaces_run:
        model.save(folder / "model", keep_reference=keep_reference)
    cells, whole = cells.seen_by(model.fitted_), False
    try:
        metrics, diagnosis = measure(model, cells, seconds), _diagnose(model, cells)
        embedded, whole = embedding(model.fitted_, cells), True
    finally:
        if replaces_run and (whole or isinstance(sys.exception(), Exception)):
            _replace_run(folder, model, keep_reference)
    run = _record(folder, model, cells, source, reading)
    run["notes"] = [*dict.fromkeys(notes), *map(str, choices), *_notes(model)]
    run["recovery"] = None if recovery is None else list(recovery)
    write_file(folder / "run.json", _json(run))
    write_embedding(embedded, folder / "embedding.h5ad")
    if trail is not None:
        write_file(folder / "cure.json", _json([asdict(step) for step in trail]))
    if choices:
        write_file(folder / "choice.json", _json([choice.to_json() for choice in choices]))
    write_file(folder / "metrics.json", _json(metrics))
    write_file(folder / "history.jsonl", "".join(_json(asdict(epoch), indent=None) for epoch in model.history_))
    if diagnosis is not None:
        write_file(folder / "diagnosis.json", _json(diagnosis.to_json()))
    return {
        "verdict": verdict_of(metrics, None if diagnosis is None else diagnosis.to_json()),
        "metrics": metrics,
        "recovery": run["recovery"],
        "stopped": run["stopped"],
    }


def _replace_run(folder: Path, model: ExpressionVAE, keep_reference: bool) -> None:
    """Save the model, then remove the other files of the earlier run."""
    model.save(folder / "model", keep_reference=keep_reference)
    for name in [*sorted(set(WRITTEN) - {"model", "run.json"}), "run.json"]:  # which marks the folder of a run
        Path(os.path.realpath(folder / name)).unlink(missing_ok=True)


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


def _peak_memory_mb() -> float | None:
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _json(value: Any, indent: int | None = 1) -> str:
    """Write JSON; numbers that are not finite become null."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"
