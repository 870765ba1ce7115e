"""A fitted model over a Source, in chunks of bounded memory; torch in, numpy out."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.kernels.threads import in_threads, n_threads
from celbo.minibatch import Minibatch, Rows, Source, in_chunks
from celbo.objective import Objective, elbo_terms
from celbo.vae import VAE, Noise

__all__ = ["CellTerms", "cell_terms", "context_of", "expected_values", "posterior"]

_CHUNK = 1024
"""Cells computed together: enough to keep the processor busy, few enough to stay in its cache."""


_FILLING_ROUNDS = 5
"""Rounds of filling in genes that a query lacks: of a fifth missing, each takes the error down about fivefold."""


class CellTerms(NamedTuple):
    """Terms of the bound for each cell, as `celbo.objective.ElboTerms`, in numpy."""

    reconstruction: NDArray[np.float32]
    """``(cells,)``, nats."""
    kl: NDArray[np.float32]
    """``(cells, latent_dim)``, nats."""

    @property
    def elbo(self) -> NDArray[np.float32]:
        """Reconstruction less KL, ``(cells,)``, nats."""
        return self.reconstruction - self.kl.sum(1)


def posterior(vae: VAE, source: Source, rows: Rows | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and log-variance of q(z | x, c), each ``(cells, latent_dim)``, of these cells or of all."""
    rows = np.arange(source.n_cells) if rows is None else rows
    found = np.empty((2, len(rows), vae.latent_dim), np.float32)

    def encode(cells: Minibatch, here: slice) -> None:
        for part, values in zip(found, vae.encode(cells.x, context_of(vae, cells)), strict=True):
            part[here] = values.cpu().numpy()

    _for_chunks(vae, source, rows, encode)
    mu_z, logvar_z = found
    return mu_z, logvar_z


def cell_terms(
    vae: VAE, source: Source, rows: Rows | None = None, *, seed: int = 0, objective: Objective = elbo_terms
) -> CellTerms:
    """Terms of the bound for each cell, with one sample of z; the same seed draws the same noise.

    Parameters
    ----------
    vae
        The model; dropout is off meanwhile.
    source
        The cells.
    rows
        Which of them; all if None.
    seed
        Of the sampling noise.
    objective
        Whose terms.

    Returns
    -------
    CellTerms
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    # Drawn for all cells, so that a cell's noise does not depend on which others are asked for.
    eps = torch.randn(source.n_cells, vae.latent_dim, generator=torch.Generator().manual_seed(seed))[rows]
    reconstruction, kl = np.empty(len(rows), np.float32), np.empty((len(rows), vae.latent_dim), np.float32)

    def bound(cells: Minibatch, here: slice) -> None:
        noise = Noise(eps[here].to(cells.x.device), None, None)
        terms = objective(vae, cells.x, context_of(vae, cells), cells.library, noise, cells.observed)
        reconstruction[here], kl[here] = terms.reconstruction.cpu().numpy(), terms.kl.cpu().numpy()

    _for_chunks(vae, source, rows, bound)
    return CellTerms(reconstruction, kl)


def expected_values(
    vae: VAE, source: Source, *, context: Tensor | None = None, library: Tensor | None = None
) -> NDArray[np.float32]:
    """Mean of p(x | mu_z, c, library), where mu_z comes from each cell under its own conditions.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    context
        What to decode under, ``(cells, context_dim)``; each cell's own if None.
    library
        Library sizes to decode at, ``(cells, 1)``; each cell's own if None.

    Returns
    -------
    numpy.ndarray
        ``(cells, genes)`` float32.
    """
    means = np.empty((source.n_cells, source.n_genes), np.float32)

    def decode(cells: Minibatch, here: slice) -> None:
        mu_z, _ = vae.encode(cells.x, context_of(vae, cells))
        target = Minibatch(
            cells.x,
            cells.context if context is None else context[here].to(cells.x.device),
            cells.library if library is None else library[here].to(cells.x.device),
        )
        means[here] = vae.decode(mu_z, context_of(vae, target), target.library).cpu().numpy()

    _for_chunks(vae, source, np.arange(source.n_cells), decode)
    return means


def _for_chunks(vae: VAE, source: Source, rows: Rows, compute: Callable[[Minibatch, slice], None]) -> None:
    """Read these cells in chunks and call ``compute(cells, where they belong)``; threads take chunks by turns."""
    device = next(vae.parameters()).device
    pieces = list(in_chunks(rows, _CHUNK))
    reading = threading.Lock()
    was_training, n = vae.training, min(n_threads(), len(pieces)) if device.type == "cpu" else 1

    def work(turn: int) -> None:
        with torch.inference_mode():
            for number in range(turn, len(pieces), n):
                with reading:
                    cells = source.take(pieces[number]).to(device)
                if cells.observed is not None:
                    cells = _fill_in(vae, cells, cells.observed, source.library_is_sum)
                compute(cells, slice(number * _CHUNK, number * _CHUNK + len(pieces[number])))

    vae.eval()  # no dropout
    try:
        in_threads(work, n)
    finally:
        vae.train(was_training)


def _fill_in(vae: VAE, cells: Minibatch, observed: Tensor, library_is_sum: bool) -> Minibatch:
    """Give genes that were not measured the values the model expects of them, so that they pull a cell nowhere.

    Zeros would be read as measurements. Encode, decode, fill in, and again: each round starts from a better guess. A
    library that is a sum over the model's genes grows by what was filled in.
    """
    measured, library, context = cells.x.to_dense(), cells.library, context_of(vae, cells)
    x = measured
    for _ in range(_FILLING_ROUNDS):
        mu_z, _logvar_z = vae.encode(x, context)
        x = torch.where(observed, measured, vae.decode(mu_z, context, library))
        if library_is_sum:
            library = cells.library + x[:, ~observed].sum(-1, keepdim=True)
    return cells._replace(x=x, library=library)


def context_of(vae: VAE, minibatch: Minibatch) -> Tensor | None:
    """The minibatch's context as the model takes it: None where the model has no conditions."""
    return minibatch.context if vae.context_dim else None
