"""Surgery: a fitted model takes new levels of its conditions, and only their weights are new (Lotfollahi 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from celbo.data import Schema
from celbo.vae import VAE

__all__ = ["copy_weights"]


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
    # As `celbo.vae.ContextEmbedding` lays the context out: one-hot levels and numbers, then what is learned.
    sizes = [(before.dim, after.dim) for before, after in pairs if not after.embedded]
    sizes += [(dim, dim) for _, after in pairs if after.embedded]
    state, is_new = old.state_dict(), dict[str, Tensor]()
    for name, parameter in new.named_parameters():
        weight, columns = state[name], torch.zeros(parameter.shape[-1], dtype=torch.bool)
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
