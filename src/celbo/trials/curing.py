"""Cure a collapsed model: diagnose, apply the first remedy that fits, fit again, compare, until it is healthy."""

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from celbo.data.read import read_adata
from celbo.errors import DivergedError, UsageError, listed
from celbo.estimator import ExpressionVAE
from celbo.fit.cells import open_cells
from celbo.fit.fitted import split_again
from celbo.fit.remedies import REMEDIES, combine
from celbo.fit.train import Track
from celbo.kernels.threads import threads
from celbo.minibatch import Rows
from celbo.model.importance import log_prob
from celbo.streams import Stream, random_stream
from celbo.trials.comparing import fit_whole
from celbo.trust.advice import Advice, Diagnosis

__all__ = ["Step", "cure", "is_healthy"]

_CELLS_TO_COMPARE = 300
_SAMPLES = 200
_BACK = 0.5
"""A remedy helps if the ablation rises by more than this, nats per cell, or if one more dimension is in use."""


@dataclass(frozen=True)
class Step:
    """One model that was tried."""

    remedies: tuple[str, ...]
    verdict: str
    collapsed: bool
    active_units: int
    ablation: float
    """Reconstruction lost without z, nats per held-out cell."""
    log_p: float
    """Refined log p(x) of held-out cells, mean, nats."""
    difference: float | None
    """Log p(x) less that of the model before it, paired; None for the first."""
    se: float | None
    """Its standard error."""
    kept: bool
    """Whether the search continued with this model."""
    said: str
    """Why it was kept or not."""


def is_healthy(diagnosis: Diagnosis) -> bool:
    """Return whether the decoder uses z, and z uses all its dimensions, or as many as the data show."""
    expected = [finding for finding in diagnosis.findings if finding.name == "expected dimensions"]
    return not diagnosis.collapsed and all(finding.verdict == "good" for finding in expected)


def cure(
    model: ExpressionVAE,
    adata: AnnData | str | Path,
    *,
    tolerance: float = 1.0,
    tries: int = 3,
    progress: bool = True,
    track: Track | None = None,
) -> tuple[ExpressionVAE, list[Step]]:
    """Apply remedies to a fitted model, one after another, until it is healthy.

    A healthy model may still have known causes of collapse; each of them gets a try too.

    Each try fits a new model with one more remedy, from the same seed. The model is kept if z says more than before,
    and if the refined log p(x) of held-out cells fell by at most ``tolerance`` since the first model. The trail also
    has the models that were not kept. An interrupt (Ctrl-C) ends the whole search with a `KeyboardInterrupt`; the given
    model stays as it is.

    Parameters
    ----------
    model
        Model fitted to these cells. It stays as it is.
    adata
        The cells.
    tolerance
        Nats per cell of held-out log p(x) that all remedies together may cost.
    tries
        Largest number of models to fit.
    progress, track
        As in `celbo.ExpressionVAE.fit`, for each fit.

    Returns
    -------
    tuple
        The best model (this one, if nothing helped), and the trail: a `Step` for each model.

    Examples
    --------
    >>> import celbo
    >>> adata = celbo.simulate_cells(n_cells=500, n_genes=100, median_library=1000, seed=0)
    >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=30)).fit(adata)
    >>> cured, trail = celbo.cure(model, adata)
    >>> [step.kept for step in trail]
    [True]
    """
    if tries < 1 or not tolerance >= 0:
        raise UsageError(
            f"tries={tries}, tolerance={tolerance}; give at least 1 try, and a tolerance of 0 nats or more."
        )
    adata = read_adata(adata, layer=model.layer)
    split = split_again(model.fitted_, open_cells(model.fitted_, adata))
    if split is None:
        raise UsageError(
            "these are not the cells the model was fitted to, in their order, or it keeps no reference to tell by "
            "(keep_reference); cure needs to know which cells were held out. Fit it again with these cells."
        )
    new_levels = {
        f"{condition.name}={level}"
        for condition in model.schema_.conditions
        if condition.levels is not None
        for level in np.delete(condition.levels, condition.codes(adata.obs[condition.name]).astype(int))
    }
    if new_levels:
        raise UsageError(
            f"the model knows levels that these cells do not have ({listed(sorted(new_levels))}), and would forget "
            "them: cure the model they were mapped to, then map again."
        )
    if model.fitted_.split is None:  # a loaded model does not keep it
        model = copy(model)
        model.fitted_ = replace(model.fitted_, split=split)
    held_out = split.validation if len(split.validation) >= 2 else split.train
    rows = np.sort(random_stream(model.train.seed, Stream.CURE).permutation(held_out)[:_CELLS_TO_COMPARE])
    diagnosis, log_p = model.diagnose(adata), _log_p(model, adata, rows)
    first, warnings_of_kept = log_p, list[warnings.WarningMessage]()
    trail = [_step(model, diagnosis, log_p, None, True, "as it was fitted")]
    tried: set[str] = set()
    if is_healthy(diagnosis):
        return model, trail
    while len(trail) <= tries:
        remaining = [advice for advice in diagnosis.remedies if advice.remedy and advice.remedy not in tried]
        if is_healthy(diagnosis):  # known causes of collapse are removed all the same
            remaining = [advice for advice in remaining if advice.is_cause]
        if not remaining:
            break
        advice = remaining[0]
        tried.add(advice.remedy)
        changed = _with_remedies(model, _joined(model.remedies, advice))
        try:
            with warnings.catch_warnings(record=True) as its_warnings:
                warnings.simplefilter("always")
                fit_whole(changed, adata, progress=progress, track=track)
        except (UsageError, DivergedError) as error:
            reason = f"not kept: {str(error).splitlines()[0]}"
            trail.append(replace(trail[-1], remedies=tuple(changed.remedies), kept=False, said=reason))
            continue
        its_diagnosis, its_log_p = changed.diagnose(adata), _log_p(changed, adata, rows)
        total = float((its_log_p - first).mean())
        kept, reason = _is_better(its_diagnosis, diagnosis, its_log_p - log_p, total, tolerance)
        trail.append(_step(changed, its_diagnosis, its_log_p, log_p, kept, reason))
        if kept:
            model, diagnosis, log_p, warnings_of_kept = changed, its_diagnosis, its_log_p, its_warnings
    for warning in warnings_of_kept:  # models that were given up do not warn
        warnings.warn(warning.message, warning.category, stacklevel=2)
    return model, trail


def _with_remedies(model: ExpressionVAE, remedies: Sequence[str]) -> ExpressionVAE:
    """Return a model with these remedies that is not fitted; options that they set go back to their defaults."""
    defaults = {option.name: option.default for option in fields(model) if option.init}
    overridden = {name: defaults[name] for name in combine(remedies).options if name in defaults}
    return ExpressionVAE(**{**model.get_params(), "remedies": remedies, **overridden})


def _joined(remedies: Sequence[str], advice: Advice) -> tuple[str, ...]:
    """Add a remedy; it replaces one that changes the same part."""
    part = REMEDIES[advice.remedy.partition(":")[0]].part
    return (*(other for other in remedies if REMEDIES[other.partition(":")[0]].part != part), advice.remedy)


def _log_p(model: ExpressionVAE, adata: AnnData, rows: Rows) -> NDArray[np.float64]:
    source = open_cells(model.fitted_, adata).source
    with threads(model.train.threads):
        return log_prob(model.vae_, source, rows, n_samples=_SAMPLES, seed=model.train.seed).log_p


def _is_better(
    after: Diagnosis, before: Diagnosis, difference: NDArray[np.float64], total: float, tolerance: float
) -> tuple[bool, str]:
    mean = float(difference.mean())
    more = _ablation(after) - _ablation(before)
    says_more = (before.collapsed and not after.collapsed) or more > _BACK or after.active_units > before.active_units
    price = f"log p(x) of held-out cells changes by {mean:+.2f} nats"
    if not says_more:
        return False, f"not kept: z says no more than before; {price}"
    if total < -tolerance:
        since = "" if total == mean else f" ({total:+.2f} since the first model)"
        return False, f"not kept: z says more, but {price}{since}, beyond the tolerance of {tolerance:g}"
    return True, f"kept: z says more; {price}"


def _ablation(diagnosis: Diagnosis) -> float:
    return float(diagnosis.finding("latent ablation").value[0]["nats"])


def _step(
    model: ExpressionVAE,
    diagnosis: Diagnosis,
    log_p: NDArray[np.float64],
    before: NDArray[np.float64] | None,
    kept: bool,
    reason: str,
) -> Step:
    difference: Any = None if before is None else log_p - before
    return Step(
        remedies=tuple(model.remedies),
        verdict=diagnosis.verdict,
        collapsed=diagnosis.collapsed,
        active_units=diagnosis.active_units,
        ablation=_ablation(diagnosis),
        log_p=float(log_p.mean()),
        difference=None if difference is None else float(difference.mean()),
        se=None if difference is None else float(difference.std(ddof=1) / np.sqrt(len(difference))),
        kept=kept,
        said=reason,
    )
