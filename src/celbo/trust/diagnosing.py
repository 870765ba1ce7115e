"""Diagnose a fitted model on cells: choose the cells, gather the evidence, and draw conclusions."""

import numpy as np

from celbo.data.groups import Groups, grouping
from celbo.errors import DataError, check_seed
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted, cells_to_measure, doubts_of_training
from celbo.kernels.threads import threads
from celbo.model.ablation import UseOfLatent, use_of_latent
from celbo.model.inference import cell_terms
from celbo.model.information import ACTIVE
from celbo.streams import Stream, random_stream
from celbo.trust.advice import Diagnosis, conclude
from celbo.trust.evidence import dispersion_of_simpler, gather, overlaps, settings_of
from celbo.trust.findings import condition_ablation, enough_ablation, falls_short
from celbo.trust.simpler import expected_dim, gene_mean_log_prob, read_sample

__all__ = ["diagnose", "doubts_of_fit"]

_CELLS_AFTER_FIT = 1000
"""Cells on which a model is measured after each fit."""


def diagnose(fitted: Fitted, cells: Cells, *, groupby: Groups | None = None, seed: int = 0) -> Diagnosis:
    """Look for posterior collapse and related faults; see `celbo.ExpressionVAE.diagnose`."""
    seed = check_seed(seed)
    types = None if groupby is None else grouping("groupby", groupby, cells.obs).astype(str).to_numpy()
    rows, training = cells_to_measure(fitted, cells)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} cells are too few to diagnose a model on; give at least 2.")
    types = None if types is None else types[rows]
    with threads(fitted.threads):
        return conclude(gather(fitted, cells, rows, training, types=types, seed=seed))


def doubts_of_fit(fitted: Fitted, cells: Cells) -> list[str]:
    """Look at 1,000 cells of a model that was just fitted; return warnings, or an empty list.

    A warning says that the decoder ignores z, or a condition that is not a nuisance, that z has far fewer dimensions
    in use than the data show, or that the levels of a nuisance do not overlap in the counts (of up to 4,000 cells). If
    training was interrupted, the warning says this alone: z comes into use in training.
    """
    if fitted.stopped is not None:
        return doubts_of_training(fitted)
    split = fitted.split
    assert split is not None
    held_out = split.validation if len(split.validation) >= 2 else split.train
    if len(held_out) < 2:
        return []
    rng = random_stream(fitted.seed, Stream.DOUBTS)
    rows, learned = (
        np.sort(rng.permutation(part)[:n])
        for part, n in ((held_out, _CELLS_AFTER_FIT), (split.train, 3 * _CELLS_AFTER_FIT))
    )
    vae, source, schema = fitted.vae, cells.source, fitted.schema
    sample = fitted.objective.samples_z
    with threads(fitted.threads):
        use = use_of_latent(vae, source, rows, of_context=schema.context_columns, sample=sample, seed=fitted.seed)
        elbo = cell_terms(vae, source, rows, seed=fitted.seed, objective=fitted.objective).elbo
        dispersion = dispersion_of_simpler(settings_of(fitted))
        gained = elbo - gene_mean_log_prob(source, rows, learned, fitted.likelihood, dispersion)
        doubts = _doubts_of_latent(fitted, cells, use, float(gained.mean()), learned)
    for condition, lost in zip(schema.conditions, use.lost[1:], strict=True):
        ablation = condition_ablation(condition.name, lost[~np.isnan(lost)])
        if ablation.verdict == "bad" and not condition.nuisance:
            doubts.append(ablation.meaning)
    doubts = [f"{doubt}; model.diagnose(adata) (celbo diagnose RUN) says why, and what to try." for doubt in doubts]
    with threads(fitted.threads):
        return doubts + [overlap.warning for overlap in overlaps(fitted, cells, seed=fitted.seed) if overlap.apart]


def _doubts_of_latent(
    fitted: Fitted, cells: Cells, use: UseOfLatent, gained: float, learned: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> list[str]:
    """Return at most one doubt: all of z is ignored, or most of its dimensions are."""
    nats, latent_dim = float(use.lost[0].mean()), fitted.vae.latent_dim
    if nats < enough_ablation(gained):
        return [
            f"posterior collapse: the decoder loses {max(0.0, nats):.2f} nats per cell without z, so that the "
            "latent space shows a blob without separation"
        ]
    active = int((use.mu_z.var(0) > ACTIVE).sum())
    if 2 * active >= latent_dim:  # the spectrum of the data takes time, and would change nothing
        return []
    expected = expected_dim(read_sample(cells.source, learned, is_counts=fitted.is_counts))
    if not falls_short(active, expected, latent_dim):
        return []
    return [
        f"posterior collapse in part: {active} of {latent_dim} latent dimensions vary between cells, "
        f"where the data show {expected} above their noise"
    ]
