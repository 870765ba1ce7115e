"""Levels that fit did not see: read as the nearest known one, or taken into the model (surgery, Lotfollahi 2021)."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from celbo.data.conditions import as_text, column_of, spelling
from celbo.data.schema import Schema
from celbo.data.sources import open_source
from celbo.errors import listed
from celbo.model.inference import cell_terms
from celbo.model.objective import Objective
from celbo.model.vae import VAE

__all__ = ["at_nearest_levels", "copy_weights", "doubt_new_levels"]

_CELLS_TO_COMPARE = 200
"""Cells of a level that decide which known level is nearest to it."""
_FEW_CELLS = 20
"""Cells of a new level below which what is learned of it is little."""
_LEVELS_TO_COMPARE = 50
"""New levels of a condition whose cells are compared with those of another's."""


@torch.no_grad()
def copy_weights(old: VAE, new: VAE, old_schema: Schema, new_schema: Schema) -> dict[str, Tensor]:
    """Give a model the weights of one that knows fewer levels; a new level starts as the mean of the known ones.

    Parameters
    ----------
    old
        The fitted model.
    new
        One made for the schema with more levels; changed in place.
    old_schema, new_schema
        Theirs, as `Schema.with_levels_of` makes them.

    Returns
    -------
    dict
        Which numbers of each parameter are those of new levels: bool, of its shape.
    """
    pairs = list(zip(old_schema.conditions, new_schema.conditions, strict=True))
    dim = 0 if new.embed_context is None else new.embed_context.dim
    # As `celbo.model.vae.ContextEmbedding` lays the context out: one-hot levels and numbers, then what is learned.
    sizes = [(before.dim, after.dim) for before, after in pairs if not after.embedded]
    if new.embed_context is not None:
        sizes += [(dim, dim)] * (len(new.embed_context.levels) + len(new.embed_context.combinations))
    state, is_new = old.state_dict(), dict[str, Tensor]()
    for name, parameter in new.named_parameters():
        weight, columns = state[name], torch.zeros(parameter.shape[-1], dtype=torch.bool)
        if name.startswith("embed_context.combinations."):  # a new one is no more than its parts, at first
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
    """Widen the last columns, parts of these sizes before and after, by means of each part; and which are new."""
    start = weight.shape[1] - sum(before for before, _ in sizes)
    parts, is_new = [weight[:, :start]], [False] * start
    for before, after in sizes:
        part = weight[:, start : start + before]
        parts += [part, part.mean(1, keepdim=True).expand(-1, after - before)]
        is_new += [False] * before + [True] * (after - before)
        start += before
    return torch.cat(parts, dim=1), torch.tensor(is_new)


def at_nearest_levels(
    vae: VAE, schema: Schema, adata: AnnData, objective: Objective, *, genes_present: float
) -> AnnData:
    """The cells, where levels that fit did not see are replaced by the known ones that suit their cells best.

    Parameters
    ----------
    vae, schema, objective
        Of the model.
    adata
        The cells; left as they are.
    genes_present
        Share of the model's genes that must be there.

    Returns
    -------
    anndata.AnnData
        With the levels under which the cells of each new level have the highest mean ELBO; each is warned of.
    """
    obs = adata.obs.copy()
    for condition in schema.conditions:
        if condition.name not in obs.columns:
            continue
        column = column_of(obs, condition.name).astype(object)
        for level in column[~condition.is_known(column)].unique():
            there = np.flatnonzero(column == level)
            some = adata[there[np.linspace(0, len(there) - 1, min(len(there), _CELLS_TO_COMPARE)).astype(int)]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # all cells are checked, and warned of, afterwards
                source = open_source(some, schema, unseen="marginal", genes_present=genes_present)
            elbo = {}
            for known in condition.levels or ():
                source.codes = schema.codes(some.obs, {condition.name: known}, unseen="marginal")
                elbo[known] = cell_terms(vae, source, objective=objective).elbo.mean()
            nearest = max(elbo, key=lambda each: elbo[each])
            warnings.warn(
                f"condition {condition.name!r}: level {str(level)!r} ({len(there):,} cells), not seen in fit, is "
                f"read as {nearest!r}, the known level that suits its cells best.",
                stacklevel=5,
            )
            column.iloc[there] = nearest
        obs[condition.name] = column
    return AnnData(X=adata.X, obs=obs, var=adata.var, layers=dict(adata.layers))


def doubt_new_levels(known: Schema, schema: Schema, adata: AnnData) -> list[str]:
    """What is to be said of new levels: those spelt nearly as a known one, of few cells, or with another's cells."""
    found, cells_of = [], dict[bytes, str]()
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
                found.append(
                    f"condition {before.name!r}: {level!r} is taken for a new level; if {like!r} is meant, mend its "
                    "spelling and map again."
                )
            elif n_cells[level] < _FEW_CELLS:
                few.append(level)
        if few:
            found.append(
                f"condition {before.name!r}: {len(few):,} new levels have fewer than {_FEW_CELLS} cells "
                f"({listed(few)}), from which little is learned. Is it the right column?"
            )
        here = dict[bytes, str]()
        for level in new[:_LEVELS_TO_COMPARE]:
            cells = (text == level).to_numpy().tobytes()
            here[cells] = f"{before.name}={level}"
            if cells in cells_of:
                found.append(
                    f"the new levels {cells_of[cells]} and {here[cells]} are those of the same cells: what one does "
                    "cannot be told from what the other does."
                )
        cells_of |= here
    return found
