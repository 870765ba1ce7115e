"""The model before its first step: cells made ready for a fit, the architecture, and the closed-form start."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from celbo.data.absent import absent_genes
from celbo.data.checks import Check, check_adata
from celbo.data.conditions import UNLABELLED, as_text, column_of, known_labels, level_positions, refuse_floats
from celbo.data.confounding import advice_for_own_types, types_of_one_level
from celbo.data.groups import Groups, grouping
from celbo.data.schema import Schema
from celbo.data.sources import CellSource, make_source
from celbo.data.variable_genes import choose_genes
from celbo.errors import DataError, UsageError, check_count, check_names, columns_there_are, listed
from celbo.fit.cells import Cells
from celbo.fit.reference import nested_conditions
from celbo.fit.train import Split, TrainConfig, split_cells
from celbo.minibatch import gene_moments
from celbo.model.inference import take_filled
from celbo.model.likelihoods import Likelihood
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = [
    "DATA_OPTIONS",
    "Architecture",
    "cells_to_fit",
    "check_prepared",
    "check_to_fit",
    "make_seeded_vae",
    "make_vae",
    "split_of_fit",
    "start_vae",
]

DATA_OPTIONS = (
    *("conditions", "nuisance", "interactions", "n_top_genes", "labels", "unlabelled", "layer", "size_factor"),
    *("allow_noninteger", "features", "mask_absent", "remedies"),
)
"""Options of `celbo.ExpressionVAE` that say how cells are checked and read."""
_global_generator = threading.Lock()
_FEW_CELLS = 30
"""A fit to fewer cells gets a warning."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Options of `celbo.VAE` that do not follow from the data; remedies are in them."""

    latent_dim: int
    hidden_dims: Sequence[int]
    dispersion: str
    encode_context: bool
    norm: str
    dropout: float
    decoder_dims: Sequence[int] | None
    prior: str
    embedding_dim: int
    interactions: Sequence[str] = ()
    """Pairs of conditions: "batch:treatment"."""
    skip: bool = False
    context_skip: bool = False
    norm_mu: bool = False
    decoder_dropout: float | None = None

    @property
    def normalises_over_minibatches(self) -> bool:
        """Whether a cell's posterior depends on batch statistics, which new cells would move."""
        return self.norm == "batch" or self.norm_mu


def check_to_fit(
    adata: "AnnData",
    *,
    values: str,
    conditions: Sequence[str],
    nuisance: Sequence[str],
    interactions: Sequence[str],
    n_top_genes: int | None,
    labels: str | None,
    unlabelled: str,
    layer: str | None,
    size_factor: str | None,
    allow_noninteger: bool,
    features: str | None = None,
    mask_absent: str | None = None,
    remedies: Sequence[str] = (),
    groupby: Groups | None = None,
    fingerprint: bool = False,
) -> Check:
    """Check cells that a model is to be fitted to: values, names, conditions, labels; nothing is trained.

    Parameters are `DATA_OPTIONS` of `celbo.ExpressionVAE`, and ``values`` the kind of values of its likelihood.
    ``groupby`` is a column of cell types that is not learned. With ``fingerprint`` all values are hashed in the same
    pass.
    """
    check_names({"conditions": conditions, "nuisance": nuisance, "interactions": interactions, "remedies": remedies})
    if labels is not None and labels in (*conditions, *nuisance):
        raise UsageError(f"{labels!r} is a condition and the column of labels; z cannot carry what is given beside it.")
    if mask_absent is not None and not isinstance(mask_absent, str):
        raise UsageError(f"mask_absent={mask_absent!r}; give the name of one column of obs.")
    if n_top_genes is not None and (not isinstance(n_top_genes, int | np.integer) or n_top_genes < 1):
        raise UsageError(f"n_top_genes={n_top_genes!r}; give a whole number of at least 1, or None for all.")
    check = check_adata(
        adata,
        values=values,
        conditions=conditions,
        nuisance=nuisance,
        layer=layer,
        size_factor=size_factor,
        allow_noninteger=allow_noninteger,
        features=features,
        mask_absent=mask_absent,
        fingerprint=fingerprint,
    )
    schema = check.schema
    if n_top_genes is not None and schema is not None and schema.values == "real":
        raise UsageError(f"n_top_genes={n_top_genes} needs counts; choose genes of real numbers beforehand.")
    if schema is not None:
        schema.pairs(interactions)
        matches_levels = any(text.startswith("match_levels") for text in remedies)
        if matches_levels and all(condition.levels is None for condition in schema.conditions):
            raise UsageError("remedy 'match_levels' needs a condition or a nuisance of two levels or more.")
        if check.n_cells < _FEW_CELLS:
            cells = "1 cell" if check.n_cells == 1 else f"{check.n_cells} cells"
            check.add("few-cells", "warning", f"only {cells}: hardly anything can be learned from so few.")
        studied = [condition.name for condition in schema.conditions if not condition.nuisance]
        for name in nested_conditions(schema.codes(adata.obs), schema, studied):
            rest = listed(condition.name for condition in schema.conditions if condition.name != name)
            check.add(
                "nested",
                "warning",
                f"condition {name!r} is nested in the others ({rest}): its effect cannot be separated from theirs.",
            )
    if labels is not None:
        _check_labels(check, adata.obs, labels, unlabelled)
    _check_types(check, adata.obs, nuisance, labels, unlabelled, groupby)
    return check


def _check_types(
    check: Check,
    obs: "pd.DataFrame",
    nuisance: Sequence[str],
    labels: str | None,
    unlabelled: str,
    groupby: Groups | None,
) -> None:
    """Add a warning for each nuisance whose levels have types of their own."""
    if isinstance(groupby, str) and groupby in nuisance:
        raise UsageError(f"groupby={groupby!r} (--groupby) is a nuisance too; name a column of cell types.")
    columns = {} if labels is None or labels not in obs.columns else {labels: column_of(obs, labels)}
    if isinstance(groupby, str) and groupby not in obs.columns:
        check.add(
            "groupby",
            "error",
            f"obs has no column {groupby!r} for groupby; {columns_there_are([groupby], obs.columns)}",
        )
    elif groupby is not None:
        with check.noting("groupby"):
            types = grouping("groupby", groupby, obs)
            refuse_floats(types)
            columns[str(types.name)] = types
    if check.errors or check.schema is None:
        return
    for name, types in columns.items():
        text = as_text(types)
        is_unknown = level_positions(list(dict.fromkeys([str(unlabelled), UNLABELLED])), text) >= 0
        known = types.notna().to_numpy() & ~is_unknown
        for condition in check.schema.conditions:
            if not condition.nuisance or condition.levels is None:
                continue
            found = types_of_one_level(text[known], as_text(obs[condition.name][known]))
            if found.doubtful:
                sentence = found.sentence(condition.name, f"the types in {name!r}")
                advice = f"What to do: {advice_for_own_types(condition.name)}."
                check.add("types-of-one-level", "warning", f"nuisance {condition.name!r}: {sentence}. {advice}")


def _check_labels(check: Check, obs: "pd.DataFrame", labels: str, unlabelled: str) -> None:
    """Add what is wrong with the column of labels to the problems."""
    if not isinstance(labels, str):
        raise UsageError(f"labels={labels!r}; give the name of one column of obs.")
    if labels not in obs.columns:
        check.add(
            "labels", "error", f"obs has no column {labels!r} for labels; {columns_there_are([labels], obs.columns)}"
        )
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            known_labels(column_of(obs, labels), unlabelled)
        except DataError as error:
            check.add("labels", "error", str(error))
        except UsageError:
            if not check.errors:  # errors in the data come first
                raise
    for warning in caught:
        check.add("labels", "warning", str(warning.message))


def cells_to_fit(adata: "AnnData", check: Check, options: Mapping[str, Any]) -> Cells:
    """Choose genes, align the cells, and number their labels.

    Parameters
    ----------
    adata
        The cells, which passed the check.
    check
        What `celbo.data.checks.check_adata` found.
    options
        The options with which they were checked, as `check_to_fit` takes them.

    Raises
    ------
    DataError
        If the check found errors.
    """
    schema = check.accept()
    n_top_genes, labels = options["n_top_genes"], options["labels"]
    if n_top_genes is not None and check.stored is not None:
        schema = choose_genes(schema, check.stored, adata.obs, n_top_genes)
    if lacking_levels := check.lacking_levels.get(options["mask_absent"]):
        samples = _levels_of(adata.obs, lacking_levels[0].column)
        schema = replace(schema, absent=absent_genes(lacking_levels, samples, check.genes, schema.genes))
    source = make_source(check, adata, schema)
    if labels is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check has given these warnings
            levels, source.labels = known_labels(column_of(adata.obs, labels), options["unlabelled"])
        schema = replace(schema, labels=levels)
    return Cells(source, adata.obs, schema, fingerprint=check.fingerprint, prepared_with=_comparable(options))


def _levels_of(obs: "pd.DataFrame", name: str) -> list[str]:
    column = column_of(obs, name)
    return sorted(as_text(column[column.notna()]).unique())


def check_prepared(cells: Cells, options: Mapping[str, Any]) -> None:
    """Raise a `UsageError` if cells were not prepared for a fit with these options.

    Examples
    --------
    >>> import celbo
    >>> cells = celbo.ExpressionVAE().prepare(celbo.simulate_cells(n_cells=50, n_genes=20))
    >>> celbo.ExpressionVAE(nuisance=["batch"]).fit(cells)
    Traceback (most recent call last):
    ...
    celbo.errors.UsageError: these cells were prepared for a model with other options (nuisance); give the AnnData, ...
    """
    if cells.prepared_with is None:
        raise UsageError("these cells were opened for a question, and not prepared for a fit; give the AnnData.")
    wanted = _comparable(options)
    other = [
        "likelihood" if name == "values" else name
        for name, value in wanted.items()
        if cells.prepared_with[name] != value
    ]
    if other:
        raise UsageError(
            f"these cells were prepared for a model with other options ({', '.join(other)}); give the AnnData, or call "
            "prepare of this model."
        )


def _comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Copy options, with tuples for lists of names. Of remedies only `match_levels` is checked with the cells."""
    lists = {name: tuple(options[name]) for name in ("conditions", "nuisance", "interactions")}
    remedies = tuple(remedy for remedy in options["remedies"] if remedy.startswith("match_levels"))
    return {**options, **lists, "remedies": remedies}


def make_vae(architecture: Architecture, schema: Schema, likelihood: Likelihood) -> VAE:
    """Make a model for the genes, conditions and labels of a schema; weights come from torch's global generator."""
    options = asdict(architecture)
    interactions = schema.pairs(options.pop("interactions"))
    check_count("embedding_dim", architecture.embedding_dim, 1)
    return VAE(
        input_dim=len(schema.genes),
        likelihood=likelihood,
        context_dim=schema.context_dim,
        embedded=[
            columns
            for condition, columns in zip(schema.conditions, schema.context_columns, strict=True)
            if condition.embedded
        ],
        interactions=interactions,
        n_labels=0 if schema.labels is None else schema.labels.dim,
        **options,
    )


def make_seeded_vae(architecture: Architecture, schema: Schema, likelihood: Likelihood, seed: int) -> VAE:
    """Make a model whose weights come from a seed. The state of torch's global generator stays as it was.

    Two Python threads do not use that generator at the same time.
    """
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_vae(architecture, schema, likelihood)


def start_vae(architecture: Architecture, cells: Cells, likelihood: Likelihood, split: Split, seed: int) -> VAE:
    """Make a model and set its closed-form start: the best model that ignores z, and pseudo-cells of the prior.

    Parameters
    ----------
    architecture, likelihood
        Of the model.
    cells, split
        The cells, and which of them are trained on.
    seed
        Seed of the initial weights, and of the choice of pseudo-cells.
    """
    vae = make_seeded_vae(architecture, cells.schema, likelihood, seed)
    vae.head.initialise(vae.fc_out, gene_moments(cells.source, split.train))
    if vae.prior_size:
        rows = random_stream(seed, Stream.PSEUDO_CELLS).permutation(split.train)[: vae.prior_size]
        pseudo_cells = take_filled(vae, cells.source, rows)
        vae.start_prior(pseudo_cells.x, context_of(vae, pseudo_cells))
    return vae


def split_of_fit(source: CellSource, schema: Schema, config: TrainConfig) -> Split:
    """Split cells into held-out ones and those to learn from; at least one cell of each level is learned from."""
    levels = source.codes[:, [condition.levels is not None for condition in schema.conditions]]
    return split_cells(source.n_cells, config.validation_fraction, config.seed, levels)
