"""Fill in genes that the cells lack, with the values that the model expects."""

import torch

from celbo.minibatch import Minibatch, Rows, Source
from celbo.model.vae import VAE, context_of

__all__ = ["Filled", "fill_in"]

_ROUNDS = 5
"""Number of rounds. With a fifth of the genes missing, each round divides the error by about five."""
_MOST_FILLED_IN = 0.9
"""Largest share of a cell's counts that may be attributed to genes that were not measured."""


def fill_in(vae: VAE, cells: Minibatch, source: Source) -> Minibatch:
    """Give genes that were not measured the values that the model expects, so that they do not move a cell.

    The encoder would read zeros as measurements. Each round encodes, decodes and fills in, and starts from a better
    guess. A library size that is a sum over the model's genes grows by the filled-in counts. Counts that were scaled to
    one library size and logged shrink instead.
    """
    if (observed := cells.observed) is None:
        return cells
    measured, library, context = cells.x.to_dense(), cells.library, context_of(vae, cells)
    x = measured
    for _ in range(_ROUNDS):
        mu_z, _logvar_z = vae.encode(x, context)
        x = torch.where(observed, measured, vae.decode(mu_z, context, library))
        filled_in = x[:, ~observed]
        if source.scaled_to is None and source.library_is_sum:
            library = cells.library + filled_in.sum(-1, keepdim=True)
        elif source.scaled_to is not None:
            share = (filled_in.expm1().sum(-1, keepdim=True) / source.scaled_to).clamp(0, _MOST_FILLED_IN)
            measured = torch.where(observed, (cells.x.to_dense().expm1() * (1 - share)).log1p(), 0.0)
    return cells._replace(x=x, library=library)


class Filled:
    """A source whose minibatches have missing genes filled in by `fill_in`; a `Source`."""

    def __init__(self, vae: VAE, source: Source):
        self.vae, self.source = vae, source
        self.n_cells, self.n_genes = source.n_cells, source.n_genes
        self.library_is_sum, self.scaled_to = source.library_is_sum, source.scaled_to

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        was_training = self.vae.training
        self.vae.eval()
        with torch.no_grad():
            cells = fill_in(self.vae, self.source.take(rows).to(next(self.vae.parameters()).device), self.source)
        self.vae.train(was_training)
        return cells
