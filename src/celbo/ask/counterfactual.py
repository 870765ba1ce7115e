"""Counterfactuals: what cells would look like if conditions were different."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import t as student_t

from celbo.ask.decoding import Draws, carried_effects, decode_under, draw_counts
from celbo.ask.labels import label_codes
from celbo.ask.scoring import doubts_of_values
from celbo.ask.support import known_cells, n_like, other_levels, support, supported_positions
from celbo.ask.unlike import warn_of_unlike
from celbo.data.normalise import log_normalise
from celbo.data.schema import Schema
from celbo.errors import UsageError, check_count, check_seed, listed, warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import nested_conditions
from celbo.kernels.threads import threads
from celbo.model.inference import false_share
from celbo.streams import Stream, random_stream

__all__ = ["LEAST_CHANGE", "Counterfactual", "changed_genes", "counterfactual", "refuse_single_levels"]

LEAST_CHANGE = 0.25
"""A gene counts as changed from this log2 ratio of means on; for a gaussian, this difference in standard deviations."""
_SURE = 0.05
"""Largest fdr of the genes that are counted as changed."""
_ROUNDING = 1e-5
"""Relative change of a mean that 32-bit arithmetic can make."""
_HARDLY_CHANGED = 1e-3
"""Smallest share of all counts that another condition moves if the decoder uses it."""


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactual:
    """Cells as they would be under other conditions."""

    mean: NDArray[np.float32]
    """What is expected of each cell, over the posterior of z, ``(cells, genes)``: at its own library size. Of nb counts
    ``mu' (theta + x) / (theta + mu)``, scaled to the library, which keeps what is the cell's own, and of cells that are
    not supported the mean of that and of the same with ``mu e``; else the mean of p(x | z, c')."""
    lower: NDArray[np.float32]
    """5 % quantile of that mean over draws of z, ``(cells, genes)``. It is about z, and of cells that are not supported
    about the two answers: not the noise of counts, nor what another model would say."""
    upper: NDArray[np.float32]
    """95 % quantile."""
    support: pd.DataFrame
    """By cell: ``share`` of the known cells around it that have the conditions asked for (a mean over the cells without
    them that are nearest to it), ``distance`` to known cells that have them (1 is the farthest that is usual among
    these), and ``verdict``: "supported", "edge" or "extrapolation". It speaks of coverage, not of correctness. A cell
    without a count is "empty", and has NaN. ``unlike``: whether the cell itself is unlike the cells of fit
    (`celbo.ask.unlike.unlike`; left out if the model cannot tell)."""
    genes: pd.DataFrame
    """By gene: mean over cells ``before`` and ``after``, ``log2_fold_change`` (of a gaussian: ``difference``) and its
    90 % interval (draws of z and models, and the error that so many cells leave), ``probability``: share of the draws
    in which it changes by `LEAST_CHANGE` or more, and ``fdr``: the share of false ones among this gene and those that
    are surer, as far as the draws tell; NaN, both, of genes that the cells lack."""
    draws: "list[Draws]"
    """What `sample` draws from, by model."""
    obs: pd.DataFrame
    """Of the cells, with the conditions asked for."""
    layer: str | None = None
    """Where the model reads values from, other than X."""

    def __repr__(self) -> str:
        """How many cells and genes, how many of each verdict, and how many genes surely change."""
        verdicts = ", ".join(f"{n:,} {verdict}" for verdict, n in self.support["verdict"].value_counts().items())
        changed = int((self.genes["fdr"] <= _SURE).sum())
        return (
            f"{len(self.obs):,} cells ({verdicts}) x {len(self.genes):,} genes, {changed:,} changed (fdr <= {_SURE:g})"
        )

    def sample(self, seed: int = 0) -> AnnData:
        """Draw counts of each cell, with the likelihood's own noise, and z (of nb counts u, too) from its posterior.

        With several models, those of one of them: the next with the next seed. Of cells that are not supported, rates
        are the geometric mean of the two answers.

        Returns
        -------
        anndata.AnnData
            Counts over the model's genes, which it can read itself; obs as of the cells, conditions as asked for.
        """
        seed = check_seed(seed)
        counts = draw_counts(self.draws[seed % len(self.draws)], np.arange(len(self.obs)), seed)
        layers = {} if self.layer is None else {self.layer: counts.copy()}
        adata = AnnData(X=counts, obs=self.obs.copy(), layers=layers)
        adata.var_names = self.genes.index
        return adata

    def group_mean(self, *, n_cells: int | None = None, n_draws: int = 100, seed: int = 0) -> pd.DataFrame:
        """Predict the mean of ``log(1 + 10,000 x / library)`` over a number of real cells, by gene.

        Each draw resamples the n cells with replacement, draws their counts, and then draws the group from them. So
        its variance is ``s**2 (1 / n + 1 / n_cells)``: that of both samples. The interval covers the difference between
        models only if several models were given (see `one_more_draw`).

        Parameters
        ----------
        n_cells
            Number of cells in the group; None for the number of these cells.
        n_draws
            Number of draws, at least 4 for each model. Each model and each of the two answers has the same number.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            By gene: ``mean`` and its 90 % interval, ``lower`` and ``upper``.

        Raises
        ------
        UsageError
            If the model is not of counts, there is no cell to take the mean of, or too few draws.
        """
        n_models = len(self.draws)
        if self.draws[0].vae.values != "counts":
            raise UsageError("a group mean is of log-normalised counts, and this model is of other values.")
        seed = check_seed(seed)
        if n_cells is not None:
            check_count("n_cells", n_cells, 1)
        check_count("n_draws", n_draws, 4 * n_models)
        n, rng, means = len(self.obs), random_stream(seed, Stream.GROUP_MEAN), []
        for number in range(n_draws // (2 * n_models) * 2 * n_models):
            again = np.sort(rng.integers(n, size=n))  # cells that might have been asked about
            draws, weight = self.draws[number // 2 % n_models], float(number % 2)
            counts = draw_counts(draws, again, (seed * int(n_draws) + number) % 2**63, weight).astype(np.float64)
            rows = rng.integers(n, size=n if n_cells is None else n_cells)
            log_normalised = log_normalise(counts, np.asarray(counts.sum(1)))
            means.append(np.asarray(log_normalised[rows].mean(0)).ravel())
        mean, half = one_more_draw(np.array(means).reshape(-1, n_models, 2, len(self.genes)))
        columns = {"mean": mean, "lower": np.maximum(mean - half, 0), "upper": mean + half}
        return pd.DataFrame(columns, index=self.genes.index)


def counterfactual(
    fitted: Fitted,
    cells: Cells,
    given: Mapping[str, Any],
    *,
    others: Sequence[Fitted] = (),
    n_samples: int = 50,
    seed: int = 0,
) -> Counterfactual:
    """Decode cells under other conditions; see `celbo.ExpressionVAE.counterfactual`."""
    _check_question(fitted, given, others, n_samples)
    seed = check_seed(seed)
    schema, models = fitted.schema, [fitted, *others]
    contexts = cells.contexts(given)
    _warn_before(fitted, given)
    with threads(fitted.threads):
        known = [known_cells(model.needed_reference(), schema, model.vae.classifier, given) for model in models]
        is_unlike = warn_of_unlike(fitted, cells)
        mu_z = cells.encoded.mu_z
        levels = other_levels(schema, fitted.vae.classifier, given, cells.codes, mu_z, label_codes(schema, cells.obs))
        standing = support(mu_z, levels, known[0], cells.obs.index)
        standing.loc[cells.empty] = (np.nan, np.nan, "empty")
        if is_unlike is not None:
            standing["unlike"] = is_unlike
        unsupported = (standing["verdict"] != "supported").to_numpy()
        carried = [
            carried_effects(cells.seen_by(model) if model is not fitted else cells, contexts, unsupported, positions)
            for model, positions in zip(models, (supported_positions(part, seed=seed) for part in known), strict=True)
        ]
        decoded = decode_under(
            [model.vae for model in models],
            cells.source,
            contexts,
            carried,
            n_samples=n_samples,
            seed=seed,
            has_width=fitted.objective.samples_z,
        )
    if np.abs(decoded.after - decoded.before).sum() < _HARDLY_CHANGED * np.abs(decoded.before).sum():
        warn(
            f"decoding under {dict(given)} hardly changes these cells: either they have these conditions already, "
            "or the decoder ignores them; model.diagnose(adata) says which."
        )
    genes = changed_genes(
        decoded.before,
        decoded.after,
        decoded.noise,
        n_like(mu_z, known[0]),
        pd.Index(schema.genes),
        cells.source.measured_in_any,
        is_ratio=fitted.likelihood.values != "real",
        seed=seed,
    )
    return Counterfactual(
        mean=decoded.mean,
        lower=decoded.lower,
        upper=decoded.upper,
        support=standing,
        genes=genes,
        draws=decoded.draws,
        obs=cells.obs.assign(**given),
        layer=schema.layer,
    )


def refuse_single_levels(schema: Schema, asked_for: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise a `UsageError` for conditions that had a single level in fit, and so are not in the schema."""
    known = [condition.name for condition in schema.conditions]
    if single := [name for name in given if name in asked_for and name not in known]:
        raise UsageError(f"{listed(single)} had a single level in fit and was left out: nothing can be asked about it.")


def _check_question(fitted: Fitted, given: Mapping[str, Any], others: Sequence[Fitted], n_samples: int) -> None:
    """Raise a `UsageError` for a counterfactual that cannot be answered."""
    if not given:
        raise UsageError("given names no condition; give the conditions to change, as {'treatment': 'treated'}.")
    for part in ("genes", "conditions", "values", "layer", "size_factor"):
        if any(getattr(other.schema, part) != getattr(fitted.schema, part) for other in others):
            raise UsageError(f"others have other {part} than this model; fit them to the same cells, the same way.")
    if any(other.objective.samples_z != fitted.objective.samples_z for other in others):
        raise UsageError("others have another objective than this model; fit them the same way.")
    if len({id(model) for model in (fitted, *others)}) <= len(others):
        raise UsageError("others name a model twice, or this one; give models of other seeds, each once.")
    if any(other.reference is None for other in others):
        raise UsageError(
            "one of others keeps no reference cells, and support is measured with them. Fit it again, and save it with "
            "them (keep_reference=True; --keep-reference)."
        )
    check_count("n_samples", n_samples, 2)


def _warn_before(fitted: Fitted, given: Mapping[str, Any]) -> None:
    """Warn about values beyond those of fit, and about conditions whose effect cannot be separated."""
    for doubt in doubts_of_values(fitted.schema, given):
        warn(doubt)
    for name in nested_conditions(fitted.needed_reference().conditions, fitted.schema, given):
        rest = listed(condition.name for condition in fitted.schema.conditions if condition.name != name)
        warn(
            f"condition {name!r} is nested in the others ({rest}): its effect cannot be separated from theirs, and "
            "what is decoded under another level may come from either."
        )


def one_more_draw(draws: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where a draw from one more model is to be expected, nine times in ten: ``mean +- t sqrt(W + B + A)``.

    ``W = (1 + 1/n) w``, w the variance among draws of a model and answer, n draws in all; ``B = (1 + 1/M) b``, b the
    variance of the M models' means; ``A = (1 + 1/2) a``, a the variance of the means of the two answers, less the part
    that comes from the draws. t is the 95 % quantile of Student's distribution with
    ``(W + B)**2 / (W**2 / (n - 2 M) + B**2 / (M - 1))`` degrees of freedom (Satterthwaite 1946, doi 10.2307/3002019):
    few models say little about how much a further one differs. The interval covers 88 to 90 % with three models or
    more, and 83 % with two models that differ much.

    Parameters
    ----------
    draws
        ``(draws, models, answers, genes)``: two draws at least, two answers.

    Returns
    -------
    tuple
        The mean over all, and the half-width of the 90 % interval, ``(genes,)`` each.
    """
    n_each, n_models, n_answers, _ = draws.shape
    n, w = n_each * n_models * n_answers, draws.var(0, ddof=1).mean((0, 1))
    within = (1 + 1 / n) * w
    between, error = np.zeros_like(w), np.square(within) / (n - n_models * n_answers)
    if n_models > 1:
        of_models = draws.mean((0, 2)).var(0, ddof=1)
        between = (1 + 1 / n_models) * np.maximum(of_models - w / (n_each * n_answers), 0)
        error += np.square(between) / (n_models - 1)
    of_answers = draws.mean((0, 1)).var(0, ddof=1)
    answers = (1 + 1 / n_answers) * np.maximum(of_answers - w / (n_each * n_models), 0)
    total = within + between
    t = student_t.ppf(0.95, np.square(total) / np.maximum(error, 1e-300))
    return draws.mean((0, 1, 2)), np.where(total + answers > 0, t * np.sqrt(total + answers), 0)


def changed_genes(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    noise: NDArray[np.float64],
    n_cells: tuple[int, int],
    index: pd.Index,
    measured: NDArray[np.bool_],
    *,
    is_ratio: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over cells under both conditions, by gene, and how they differ; see `Counterfactual.genes`.

    Each draw gets a normal error, because the means were learned from a finite number of cells. Its variance is that of
    the log ratio of two means of ``n_cells`` counts,
    ``var_before / (n_before before**2) + var_after / (n_after after**2)``; for a difference it is
    ``var_before / n_before + var_after / n_after``.

    Parameters
    ----------
    before, after
        Means over cells, ``(n_samples, genes)``, of the same draws of z.
    noise
        Variances of a count before and after, ``(2, genes)``.
    n_cells
        Number of similar training cells without the conditions, and with them; see `n_like`.
    index
        Names of the genes.
    measured
        Which genes the cells have, ``(genes,)``; the others get means only.
    is_ratio
        Whether the change is the log2 ratio of means; else it is their difference, and `LEAST_CHANGE` is in standard
        deviations of a value before.
    seed
        Seed of the errors.
    """
    variances = noise / np.maximum(n_cells, 1)[:, None]
    if is_ratio:
        smallest, name, least = np.finfo(np.float32).tiny, "log2_fold_change", LEAST_CHANGE
        change = np.log2(np.maximum(after, smallest)) - np.log2(np.maximum(before, smallest))
        means = np.maximum(np.stack([before.mean(0), after.mean(0)]).astype(np.float64), 1e-12)
        error = np.sqrt((variances / means**2).sum(0)) / np.log(2)
    else:
        name, least, change = "difference", LEAST_CHANGE * np.sqrt(noise[0]), after - before
        error = np.sqrt(variances.sum(0))
    moved = np.abs(after - before).max(0) > _ROUNDING * np.abs(before).max(0)
    drawn = change + moved * error * random_stream(seed, Stream.CHANGED_GENES).standard_normal(change.shape)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    probability = np.where(measured, (np.abs(drawn) >= least).mean(0), np.nan)
    fdr = np.where(measured, false_share(np.nan_to_num(probability)), np.nan)
    columns = {"before": before.mean(0), "after": after.mean(0), name: change.mean(0)}
    columns |= {"lower": low, "upper": high, "probability": probability, "fdr": fdr}
    return pd.DataFrame(columns, index=index)
