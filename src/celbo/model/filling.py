"""Fill in genes that the cells lack, with the values that the model expects."""

import torch
from torch import Tensor

from celbo.minibatch import Minibatch, Source
from celbo.model.vae import VAE, context_of

__all__ = ["fill_in"]

_ROUNDS = 5
"""Number of rounds. With a fifth of the genes missing, each round divides the error by about five."""
_MOST_FILLED_IN = 0.9
"""Largest share of a cell's counts that may be attributed to genes that were not measured."""


def fill_in(vae: VAE, cells: Minibatch, source: Source) -> Minibatch:
    """Give genes that were not measured the values that the model expects, so that they do not move a cell.

    The encoder would read zeros as measurements. Each round encodes, decodes and fills in, and starts from a better
    guess. A library size that is a sum over the model's genes grows by the filled-in counts. Counts that were scaled to
    one library size and logged shrink instead. Cells that lack no gene stay as they are.
    """
    if cells.observed is None:
        return cells
    if cells.observed.dim() == 1:
        return _fill_in(vae, cells, source, cells.observed)
    rows = (~cells.observed).any(-1).nonzero()[:, 0]
    x = cells.x.to_dense()
    part = Minibatch(x[rows], cells.context[rows], cells.library[rows])
    filled = _fill_in(vae, part, source, cells.observed[rows])
    return cells._replace(x=x.index_copy(0, rows, filled.x), library=cells.library.index_copy(0, rows, filled.library))


def _fill_in(vae: VAE, cells: Minibatch, source: Source, observed: Tensor) -> Minibatch:
    measured, library, context = cells.x.to_dense(), cells.library, context_of(vae, cells)
    x = measured
    for _ in range(_ROUNDS):
        mu_z, _logvar_z = vae.encode(x, context)
        x = torch.where(observed, measured, vae.decode(mu_z, context, library))
        filled_in = x[:, ~observed] if observed.dim() == 1 else x.masked_fill(observed, 0)
        if source.scaled_to is None and source.library_is_sum:
            library = cells.library + filled_in.sum(-1, keepdim=True)
        elif source.scaled_to is not None:
            share = (filled_in.expm1().sum(-1, keepdim=True) / source.scaled_to).clamp(0, _MOST_FILLED_IN)
            measured = torch.where(observed, (cells.x.to_dense().expm1() * (1 - share)).log1p(), 0.0)
    return cells._replace(x=x, library=library)
