"""Compare fitted models by log p(x) of the same cells, and choose the simplest model that is as good as the best."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from celbo.data.features import choose_features, features_of_query
from celbo.data.read import read_adata
from celbo.data.schema import Schema
from celbo.data.stored import Stored, stored_values
from celbo.errors import UsageError, check_count, check_seed, listed, warn
from celbo.estimator import ExpressionVAE
from celbo.fit.cells import Cells, open_cells
from celbo.fit.fitted import split_again
from celbo.fit.train import Track, plan_run
from celbo.kernels.threads import threads
from celbo.model.importance import log_prob
from celbo.model.likelihoods import LIKELIHOODS
from celbo.streams import Stream, random_stream

__all__ = ["LATENT_DIMS", "SIMPLEST_FIRST", "Comparison", "choose", "compare", "fit_whole", "simplest"]

SIMPLEST_FIRST = ("bernoulli", "poisson", "nb", "zinb")
"""Likelihoods that ``likelihood="auto"`` chooses from; the first where no count is above 1."""
LATENT_DIMS = (2, 5, 10, 20, 30)
"""Widths that ``latent_dim="auto"`` chooses from."""
_CELLS, _SAMPLES = 500, 200
_FEW_CELLS = 30
"""Fewer cells give a warning."""
_FEW = 10
"""Log p of a cell is not reliable with fewer effective samples."""
_AS_GOOD, _HOPELESS = 2.0, 5.0
"""A model is as good up to the first number of paired standard errors below the best, and dropped beyond the second."""
_EARLY = 4
"""Models are dropped early after one in this many epochs of a planned fit."""
_DRAWS = 1000
"""Number of resamplings of the cells, from which the certainty of a choice is computed."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Result of comparing models on the same cells."""

    table: pd.DataFrame
    """By model, in the order given: mean refined ``log_p`` of a cell (nats); ``difference`` to the best one and its
    paired ``se``; ``unrefined``, what the encoder's own posterior gives; median effective samples ``ess``, and the
    share of cells with ``few`` (below 10)."""
    n_cells: int
    held_out: bool
    """Whether all cells were held out of all models."""
    chosen: str
    """The first model, in the given order, within 2 paired standard errors of the best."""
    sure: float
    """Share of resampled sets of cells in which the same model is chosen."""

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        models = [{"model": name, **row} for name, row in self.table.to_dict("index").items()]
        facts = {"n_cells": self.n_cells, "held_out": self.held_out, "chosen": self.chosen, "sure": self.sure}
        return {"models": models, **facts}

    def __str__(self) -> str:
        lines = [f"{self.chosen}: the first within 2 s.e. of the best; of resampled cells {self.sure:.0%} say so too"]
        for name, row in self.table.iterrows():
            behind = "best" if row["difference"] == 0 else f"{row['difference']:+.2f} (s.e. {row['se']:.2f})"
            doubt = "" if row["ess"] >= _FEW else f"; no result: median ESS {row['ess']:.1f}"
            lines.append(
                f"{name}: log p(x) {row['log_p']:,.2f} nats, {behind}; unrefined {row['unrefined']:,.2f}{doubt}"
            )
        whose = "held-out cells" if self.held_out else "cells, of which some may have been learned from"
        return "\n".join([*lines, f"{self.n_cells:,} {whose}"])


def compare(
    models: Mapping[str, ExpressionVAE], adata: AnnData | str | Path, *, n_samples: int = _SAMPLES, seed: int = 0
) -> Comparison:
    """Compare models by the refined log p(x) of the same cells: at most 500, held out of fitting where that is known.

    The posterior of each cell is refined for each model first (`ExpressionVAE.log_prob`), so that models are compared,
    not their encoders. Differences are paired by cell.

    Parameters
    ----------
    models
        By name, the simplest first.
    adata
        The cells. If they are those the models were fitted to, only what all of them held out is compared.
    n_samples
        Draws of z for each cell.
    seed
        Of the choice of cells, and of the draws.

    Raises
    ------
    UsageError
        If models have other genes, or values of another kind, or there are fewer than two of them or of the cells.

    Examples
    --------
    >>> import celbo
    >>> adata = celbo.simulate_cells(n_cells=300, n_genes=50, seed=0)
    >>> train = celbo.TrainConfig(max_epochs=20)
    >>> models = {name: celbo.ExpressionVAE(likelihood=name, latent_dim=2, train=train) for name in ("poisson", "nb")}
    >>> found = celbo.compare({name: model.fit(adata) for name, model in models.items()}, adata)
    >>> found.table.loc[found.chosen, "ess"] > 10
    np.True_
    """
    check_count("n_samples", n_samples, 2)
    seed = check_seed(seed)
    if not isinstance(models, Mapping):
        raise UsageError("name the models, the simplest first: celbo.compare({'nb': model_1, 'zinb': model_2}, adata).")
    if len(models) < 2:
        raise UsageError(f"{len(models)} model to compare; give at least two.")
    if len({id(model) for model in models.values()}) < len(models):
        raise UsageError("a model is compared with others; give each once.")
    first = next(iter(models.values()))
    if any(model.schema_.genes != first.schema_.genes for model in models.values()):
        raise UsageError("the models have other genes; log p(x) can be compared over the same genes only.")
    if any(model.objective == "autoencoder" for model in models.values()):
        raise UsageError("a plain autoencoder has no p(x) to compare; leave it out.")
    if any(model.schema_.absent != first.schema_.absent for model in models.values()):
        raise UsageError(
            "the models mask other genes (mask_absent); log p(x) can be compared over the same genes only."
        )
    for part in ("layer", "size_factor"):
        if any(getattr(model.schema_, part) != getattr(first.schema_, part) for model in models.values()):
            raise UsageError(f"the models read another {part}; log p(x) can be compared of the same counts only.")
    adata = read_adata(adata, layer=first.schema_.layer)
    kinds = {name: model.schema_.values for name, model in models.items()}
    if len(set(kinds.values())) > 1 and not (
        set(kinds.values()) <= {"counts", "detected"} and _is_binary(_stored(adata, first.schema_))
    ):
        listing = listed(f"{name} ({kind})" for name, kind in kinds.items())
        raise UsageError(f"the models are of values of other kinds: {listing}; their log p(x) cannot be compared.")
    opened = {name: open_cells(model.fitted_, adata) for name, model in models.items()}
    return _compare_opened(models, opened, n_samples, seed)


def _compare_opened(
    models: Mapping[str, ExpressionVAE], opened: Mapping[str, Cells], n_samples: int, seed: int
) -> Comparison:
    """Compare models on cells that were opened for each; on those that all models held out, if there are any."""
    splits = [split_again(model.fitted_, opened[name]) for name, model in models.items()]
    every = next(iter(opened.values())).rows
    held_out = reduce(np.intersect1d, [every if split is None else split.validation for split in splits])
    all_held_out = len(held_out) >= 2 and all(split is not None for split in splits)
    rows = held_out if len(held_out) >= 2 else every
    if len(rows) < 2:
        raise UsageError(f"{len(rows)} cell to compare models on; give at least 2, better {_FEW_CELLS} or more.")
    if len(rows) < _FEW_CELLS:
        why = "were held out by every model; those fitted with the same seed hold out the same" if all_held_out else ""
        warn(f"only {len(rows)} cells {why or 'to compare models on'}: a difference may be chance.")
    rows = np.sort(random_stream(seed, Stream.COMPARED_CELLS).permutation(rows)[:_CELLS])
    refined, table = {}, {}
    for name, model in models.items():
        source = opened[name].source
        with threads(model.train.threads):
            plain = log_prob(model.vae_, source, rows, n_samples=n_samples, refine_steps=0, seed=seed)
            estimates = log_prob(model.vae_, source, rows, n_samples=n_samples, seed=seed)
        refined[name] = estimates.log_p
        table[name] = {
            "log_p": estimates.log_p.mean(),
            "unrefined": plain.log_p.mean(),
            "ess": np.median(estimates.ess),
            "few": (estimates.ess < _FEW).mean(),
        }
    frame = pd.DataFrame.from_dict(table, orient="index")
    log_p = np.array([refined[name] for name in models])
    lost = log_p - log_p[log_p.mean(1).argmax()]
    frame.insert(1, "difference", lost.mean(1))
    frame.insert(2, "se", lost.std(1, ddof=1) / np.sqrt(len(rows)))
    rng, chosen = random_stream(seed, Stream.BOOTSTRAP), simplest(log_p)
    again = [simplest(log_p[:, rng.integers(len(rows), size=len(rows))]) for _ in range(_DRAWS)]
    return Comparison(frame, len(rows), all_held_out, list(models)[chosen], float(np.mean(np.equal(again, chosen))))


def simplest(log_p: NDArray[np.float64]) -> int:
    """Return the number of the first model, of ``(models, cells)``, within 2 paired standard errors of the best.

    Examples
    --------
    >>> simplest(np.array([[0.0, 0.0, 0.1], [1.0, 1.2, 1.1], [1.1, 1.1, 1.2]]))
    1
    """
    lost = log_p[log_p.mean(1).argmax()] - log_p
    se = lost.std(1, ddof=1) / np.sqrt(log_p.shape[1])
    return int(np.flatnonzero(lost.mean(1) <= _AS_GOOD * se)[0])


def choose(
    model: ExpressionVAE,
    adata: AnnData | str | Path,
    *,
    likelihood: bool = False,
    latent_dim: bool = False,
    progress: bool = True,
    track: Track | None = None,
) -> tuple[ExpressionVAE, list[Comparison]]:
    """Fit variants of a model, and keep the simplest within 2 paired standard errors of the best on held-out cells.

    All are fitted for a quarter of the planned epochs first; those that are 5 standard errors behind then are given up.
    The likelihood is chosen before the width of z. Counts are compared with counts only: a model of real numbers is not
    one to choose from, nor one of detection, unless no count is above 1.

    An interrupt (Ctrl-C) ends the whole choice with a `KeyboardInterrupt`, and nothing is kept.

    Parameters
    ----------
    model
        A model that is not fitted. All variants have its other options.
    adata
        The cells.
    likelihood
        Whether to choose among `SIMPLEST_FIRST`.
    latent_dim
        Whether to choose among `LATENT_DIMS`.
    progress, track
        As in `celbo.ExpressionVAE.fit`, for each fit.

    Returns
    -------
    tuple
        The chosen model, fitted; and a `Comparison` for each choice.

    Raises
    ------
    UsageError
        If fewer than 30 cells would be held out.
    """
    adata = read_adata(adata, layer=model.layer)
    if (likelihood or latent_dim) and (n := round(adata.n_obs * model.train.validation_fraction)) < _FEW_CELLS:
        raise UsageError(f"{n} cells would be held out, too few to choose by; give {_FEW_CELLS}, or choose yourself.")
    compared, prepare = [], _prepared_once(adata)
    watch: dict[str, Any] = {"progress": progress, "track": track}
    if likelihood:
        binary = _is_binary(_modelled(model, adata))
        names = [name for name in SIMPLEST_FIRST if binary or LIKELIHOODS[name].values == "counts"]
        model, comparison = _best(model, "likelihood", names, prepare, watch)
        compared.append(comparison)
    if latent_dim:
        widths = [width for width in LATENT_DIMS if width < min(_modelled(model, adata).shape)]
        model, comparison = _best(model, "latent_dim", widths, prepare, watch)
        compared.append(comparison)
    if not compared:
        fit_whole(model, adata, **watch)
    return model, compared


def _prepared_once(adata: AnnData) -> Callable[[ExpressionVAE], Cells]:
    """Return a function that prepares the cells for a model: once for all models that see the same kind of values."""
    prepared: dict[str, Cells] = {}

    def prepare(model: ExpressionVAE) -> Cells:
        values = LIKELIHOODS[model.likelihood].values
        if values not in prepared:
            prepared[values] = model.prepare(adata)
        return prepared[values]

    return prepare


def _best(
    model: ExpressionVAE,
    option: str,
    values: Sequence[Any],
    prepare: Callable[[ExpressionVAE], Cells],
    watch: Mapping[str, Any],
) -> tuple[ExpressionVAE, Comparison]:
    """Fit the model with each value of an option; return the simplest that is as good as the best."""
    variants = {str(value): replace(model, **{option: value}) for value in values}
    cells = {name: prepare(variant) for name, variant in variants.items()}
    if len(variants) == 1:
        raise UsageError(f"there is nothing to choose {option} from: only {values[0]!r} can be fitted to these cells.")
    n_cells = len(next(iter(cells.values())))
    n_train = n_cells - round(n_cells * model.train.validation_fraction)
    planned = plan_run(max(n_train, 1), model.train, model.recipe()).planned_epochs
    few = replace(model.train, max_epochs=max(1, planned // _EARLY))

    warnings_of = dict[str, list[warnings.WarningMessage]]()

    def fit(name: str, variant: ExpressionVAE) -> ExpressionVAE:
        with warnings.catch_warnings(record=True) as warnings_of[name]:
            warnings.simplefilter("always")
            return fit_whole(variant, cells[name], **watch)

    def warned(name: str, chosen: ExpressionVAE) -> ExpressionVAE:
        for warning in warnings_of[name]:  # models that were given up do not warn
            warnings.warn(warning.message, warning.category, stacklevel=2)
        return chosen

    def fit_and_compare(models: Mapping[str, ExpressionVAE]) -> tuple[Mapping[str, ExpressionVAE], Comparison]:
        fitted = {name: fit(name, variant) for name, variant in models.items()}
        return fitted, _compare_opened(fitted, {name: cells[name] for name in fitted}, _SAMPLES, 0)

    _, early = fit_and_compare({name: replace(variant, train=few) for name, variant in variants.items()})
    left = early.table.index[early.table["difference"] >= -_HOPELESS * early.table["se"]]
    if len(left) == 1:
        return warned(left[0], fit(left[0], variants[left[0]])), early
    fitted, late = fit_and_compare({name: variants[name] for name in left})
    return warned(late.chosen, fitted[late.chosen]), late


def _modelled(model: ExpressionVAE, adata: AnnData) -> Stored:
    """Values of the features that a model will be fitted to."""
    return stored_values(adata, model.layer).of_genes(choose_features(adata.var, model.features).positions)


def _stored(adata: AnnData, schema: Schema) -> Stored:
    """Values of the features that a fitted model may read."""
    return stored_values(adata, schema.layer).of_genes(features_of_query(adata.var, schema.features).positions)


def _is_binary(stored: Stored) -> bool:
    """Test whether no value is above 1. It reads values until one is."""
    return all(block.nnz == 0 or block.max() <= 1 for block in stored.blocks())


def fit_whole(model: ExpressionVAE, cells: AnnData | Cells, *, progress: bool, track: Track | None) -> ExpressionVAE:
    """Fit a model that is one of several; raise a `KeyboardInterrupt` if its training was interrupted."""
    model.fit(cells, progress=progress, track=track)
    if model.fitted_.stopped is not None:
        raise KeyboardInterrupt
    return model
