"""Levels that fit did not see: read them as the nearest known level, or map them into the model (Lotfollahi 2021)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from celbo.ask.unlike import warn_of_unlike
from celbo.data.conditions import as_text, column_of, spelling
from celbo.data.read import read_adata
from celbo.data.schema import Schema
from celbo.data.sources import open_source
from celbo.data.stored import layer_names
from celbo.errors import UsageError, listed, warn
from celbo.fit.cells import Cells, open_cells
from celbo.fit.fitted import Fitted
from celbo.fit.progress import watched
from celbo.fit.remedies import without_annealing
from celbo.fit.start import make_seeded_vae, split_of_fit
from celbo.fit.train import Track, epochs
from celbo.kernels.threads import threads
from celbo.model.inference import cell_terms
from celbo.model.vae import VAE

__all__ = ["map_query", "open_any"]

_CELLS_TO_COMPARE = 200
"""Cells of a new level that decide which known level is nearest to it."""
_FEW_CELLS = 20
"""Cells of a new level below which little can be learned about it."""
_LEVELS_TO_COMPARE = 50
"""New levels of a condition that are compared with the new levels of other conditions."""


def open_any(
    fitted: Fitted, adata: AnnData | str | Path, *, unseen: str = "refuse", genes_present: float = 0.8
) -> tuple[Fitted, Cells]:
    """Open cells that may have levels that fit did not see.

    Parameters
    ----------
    fitted
        The model.
    adata
        The cells, or their path.
    unseen, genes_present
        As `celbo.ExpressionVAE.posterior` takes them.

    Returns
    -------
    tuple
        The model to ask (a mapped one where ``unseen`` is "adapt"), and the cells opened for it.
    """
    if isinstance(adata, Cells):
        raise UsageError("cells that prepare made are for fit alone; give the AnnData.")
    adata = read_adata(adata, layer=fitted.schema.layer)
    if unseen == "adapt":
        fitted, cells = map_query(fitted, adata, genes_present=genes_present)
        warn_of_unlike(fitted, cells)
        return fitted, cells
    if unseen == "nearest":
        adata, unseen = _at_nearest_levels(fitted, adata, genes_present=genes_present), "refuse"
    return fitted, open_cells(fitted, adata, unseen=unseen, genes_present=genes_present)


def map_query(
    fitted: Fitted, adata: AnnData, *, genes_present: float = 0.8, progress: bool = True, track: Track | None = None
) -> tuple[Fitted, Cells]:
    """Learn weights for new levels of conditions; see `celbo.ExpressionVAE.map_query`.

    Returns
    -------
    tuple
        A model that knows the new levels (the same one if there are none), and the cells opened for it.
    """
    schema = fitted.schema.with_levels_of(adata.obs)
    for doubt in _doubt_new_levels(fitted.schema, schema, adata):
        warn(doubt)
    if schema == fitted.schema:
        return fitted, open_cells(fitted, adata, genes_present=genes_present)
    if fitted.architecture.normalises_over_minibatches:
        raise UsageError(
            "this model normalises over minibatches, so new cells would move the known ones. Fit it again with "
            "norm='layer' and without norm_mu."
        )
    vae = make_seeded_vae(fitted.architecture, schema, fitted.likelihood, fitted.seed)
    learned = _copy_weights(fitted.vae, vae, fitted.schema, schema)
    query = open_source(adata, schema, genes_present=genes_present)
    split = split_of_fit(query, schema, fitted.config)
    config = replace(fitted.config, warmup_fraction=0.0)
    vae.to(next(fitted.vae.parameters()).device)
    with threads(config.threads), watched(progress, track) as watch:
        steps = epochs(
            vae,
            query,
            split,
            config,
            objective=fitted.objective,
            recipe=without_annealing(fitted.recipe),
            learned=learned,
            track=watch,
        )
        history = list(steps)
    mapped = replace(fitted, schema=schema, vae=vae.eval(), history=history, stopped=None, split=None)
    return mapped, Cells(query, adata.obs, schema, mapped.vae, mapped.threads)


@torch.no_grad()
def _copy_weights(old: VAE, new: VAE, old_schema: Schema, new_schema: Schema) -> dict[str, Tensor]:
    """Copy weights into a model that knows more levels; a new level starts as the mean of the known levels.

    Parameters
    ----------
    old
        The fitted model.
    new
        A model made for the schema with more levels; changed in place.
    old_schema, new_schema
        Schemas of the two models; the second is made by `Schema.with_levels_of`.

    Returns
    -------
    dict
        By name of the parameter, which of its numbers belong to new levels: bool, of its shape.
    """
    pairs = list(zip(old_schema.conditions, new_schema.conditions, strict=True))
    dim = 0 if new.embed_context is None else new.embed_context.dim
    # The layout of `celbo.model.vae.ContextEmbedding`: one-hot levels and numbers first, then learned numbers.
    sizes = [(before.dim, after.dim) for before, after in pairs if not after.embedded]
    if new.embed_context is not None:
        sizes += [(dim, dim)] * (len(new.embed_context.levels) + len(new.embed_context.combinations))
    state, is_new = old.state_dict(), dict[str, Tensor]()
    for name, parameter in new.named_parameters():
        weight, columns = state[name], torch.zeros(parameter.shape[-1], dtype=torch.bool)
        if name.startswith("embed_context.combinations."):  # a new combination starts as the sum of its parts
            rows, others, _ = weight.shape
            is_new[name] = torch.ones_like(parameter, dtype=torch.bool)
            is_new[name][:rows, :others] = False
            state[name] = torch.zeros_like(parameter)
            state[name][:rows, :others] = weight
            continue
        if name.startswith("embed_context."):  # a row for each level
            grown, rows = _grow(weight.t(), [(len(weight), len(parameter))])
            state[name], is_new[name] = grown.t(), rows[:, None].expand(parameter.shape)
            continue
        if weight.shape != parameter.shape:  # the context comes last
            state[name], columns = _grow(weight, sizes)
        is_new[name] = columns.expand(parameter.shape)
    new.load_state_dict(state)
    return is_new


def _grow(weight: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Widen the last columns: each part, of these sizes before and after, by its own mean; say which are new."""
    start = weight.shape[1] - sum(before for before, _ in sizes)
    parts, is_new = [weight[:, :start]], [False] * start
    for before, after in sizes:
        part = weight[:, start : start + before]
        parts += [part, part.mean(1, keepdim=True).expand(-1, after - before)]
        is_new += [False] * before + [True] * (after - before)
        start += before
    return torch.cat(parts, dim=1), torch.tensor(is_new)


def _at_nearest_levels(fitted: Fitted, adata: AnnData, *, genes_present: float) -> AnnData:
    """Replace each new level by the known level under which its cells have the highest mean ELBO, with a warning."""
    schema, obs = fitted.schema, adata.obs.copy()
    for condition in schema.conditions:
        if condition.name not in obs.columns:
            continue
        column = column_of(obs, condition.name).astype(object)
        for level in column[~condition.is_known(column)].unique():
            rows = np.flatnonzero(column == level)
            examples = adata[rows[np.linspace(0, len(rows) - 1, min(len(rows), _CELLS_TO_COMPARE)).astype(int)]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # all cells are checked afterwards, with warnings
                source = open_source(examples, schema, unseen="marginal", genes_present=genes_present)
            elbo = {}
            for known in condition.levels or ():
                source.codes = schema.codes(examples.obs, {condition.name: known}, unseen="marginal")
                with threads(fitted.threads):
                    elbo[known] = cell_terms(fitted.vae, source, objective=fitted.objective).elbo.mean()
            nearest = max(elbo, key=lambda known: elbo[known])
            warn(
                f"condition {condition.name!r}: level {str(level)!r} ({len(rows):,} cells) was not seen in fit. It is "
                f"read as {nearest!r}, the known level that suits its cells best."
            )
            column.iloc[rows] = nearest
        obs[condition.name] = column
    return AnnData(X=adata.X, obs=obs, var=adata.var, layers={name: adata.layers[name] for name in layer_names(adata)})


def _doubt_new_levels(known: Schema, schema: Schema, adata: AnnData) -> list[str]:
    """Say which new levels are spelt nearly like a known one, have few cells, or have the cells of another level."""
    doubts, level_of_cells = [], dict[bytes, str]()
    for before, after in zip(known.conditions, schema.conditions, strict=True):
        new = (after.levels or ())[len(before.levels or ()) :]
        if not new:
            continue
        plain = {spelling(level): level for level in before.levels or ()}
        plain.pop("", None)
        text = as_text(adata.obs[before.name])
        n_cells, few = text.value_counts(), []
        for level in new:
            if like := plain.get(spelling(level)):
                doubts.append(
                    f"condition {before.name!r}: {level!r} is taken for a new level; if {like!r} is meant, mend its "
                    "spelling and map again."
                )
            elif n_cells[level] < _FEW_CELLS:
                few.append(level)
        if few:
            doubts.append(
                f"condition {before.name!r}: {len(few):,} new levels have fewer than {_FEW_CELLS} cells "
                f"({listed(few)}), from which little is learned. Is it the right column?"
            )
        of_condition = dict[bytes, str]()
        for level in new[:_LEVELS_TO_COMPARE]:
            cells = (text == level).to_numpy().tobytes()
            of_condition[cells] = f"{before.name}={level}"
            if cells in level_of_cells:
                doubts.append(
                    f"the new levels {level_of_cells[cells]} and {of_condition[cells]} have the same cells: their "
                    "effects cannot be separated."
                )
        level_of_cells |= of_condition
    return doubts
