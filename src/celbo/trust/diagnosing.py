"""Diagnose a fitted model on cells: choose the cells, gather the evidence, and draw conclusions."""

from typing import Any

from celbo.data.conditions import column_of
from celbo.errors import DataError, UsageError, check_seed, listed
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted, cells_to_measure
from celbo.kernels.threads import threads
from celbo.trust import advice, evidence
from celbo.trust.advice import Diagnosis

__all__ = ["diagnose", "doubts_of_fit"]


def diagnose(fitted: Fitted, cells: Cells, *, groupby: str | None = None, seed: int = 0) -> Diagnosis:
    """Look for posterior collapse and related faults; see `celbo.ExpressionVAE.diagnose`."""
    check_seed(seed)
    if groupby is not None and groupby not in cells.obs.columns:
        raise UsageError(f"groupby={groupby!r} is no column of obs; it has {listed(cells.obs.columns)}.")
    types = None if groupby is None else column_of(cells.obs, groupby).astype(str).to_numpy()
    rows, training = cells_to_measure(fitted, cells)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} cells are too few to diagnose a model on; give at least 2.")
    schema, codes = fitted.schema, cells.codes
    conditions = {
        condition.name: (columns, codes[rows, number] if condition.levels is None else codes[rows, number].astype(int))
        for number, (condition, columns) in enumerate(zip(schema.conditions, schema.context_columns, strict=True))
    }
    with threads(fitted.threads):
        gathered = evidence.gather(
            fitted.vae,
            cells.source,
            rows,
            training,
            fitted.likelihood,
            objective=fitted.objective,
            conditions=conditions,
            settings=settings_of(fitted),
            types=None if types is None else types[rows],
            seed=seed,
        )
    return advice.diagnose(gathered)


def doubts_of_fit(fitted: Fitted, cells: Cells) -> list[str]:
    """Say what must be known about a model that was just fitted; empty if there is nothing."""
    split = fitted.split
    assert split is not None
    with threads(fitted.threads):
        return evidence.doubts_of_fit(
            fitted.vae,
            cells.source,
            split.validation if len(split.validation) >= 2 else split.train,
            split.train,
            fitted.likelihood,
            objective=fitted.objective,
            conditions=fitted.schema.conditions,
            columns=fitted.schema.context_columns,
            settings=settings_of(fitted),
            seed=fitted.seed,
        )


def settings_of(fitted: Fitted) -> dict[str, Any]:
    """Collect what advice depends on."""
    built = fitted.architecture
    hidden, decoder = built.hidden_dims, built.decoder_dims
    return {
        "likelihood": fitted.likelihood.name,
        "objective": fitted.objective.name,
        "warmup_fraction": fitted.config.warmup_fraction,
        "remedies": list(fitted.remedies),
        "nuisance": [condition.name for condition in fitted.schema.conditions if condition.nuisance],
        "beta": fitted.recipe.beta,
        "kl_weight": fitted.history[-1].kl_weight,
        "n_hidden": (len(hidden), len(hidden if decoder is None else decoder)),
        "dispersion": built.dispersion,
        "norm": built.norm,
        "norm_mu": built.norm_mu,
        "prior": built.prior,
    }
