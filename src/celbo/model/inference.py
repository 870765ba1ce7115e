"""A fitted model over a Source, in chunks of bounded memory; torch in, numpy out."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.kernels.threads import in_threads, n_threads
from celbo.minibatch import Contexts, Minibatch, Rows, Source, in_chunks
from celbo.model.filling import fill_in
from celbo.model.objective import Objective, elbo_terms
from celbo.model.vae import VAE, Noise, context_of

__all__ = [
    "CHUNK",
    "CellTerms",
    "cell_terms",
    "expected_values",
    "false_share",
    "filled_library",
    "for_chunks",
    "posterior",
]

CHUNK = 1024
"""Cells computed together: enough to keep the processor busy, few enough to stay in its cache."""
_CONTEXT_CHUNK = 1_000_000
"""Numbers of their contexts together, where there are very many levels."""


class CellTerms(NamedTuple):
    """Terms of the bound for each cell, as `celbo.model.objective.ElboTerms`, in numpy."""

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

    for_chunks(vae, source, rows, encode)
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

    for_chunks(vae, source, rows, bound)
    return CellTerms(reconstruction, kl)


def expected_values(
    vae: VAE, source: Source, *, contexts: Contexts | None = None, library: Tensor | None = None
) -> NDArray[np.float32]:
    """Mean of p(x | mu_z, c, library), where mu_z comes from each cell under its own conditions.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    contexts
        What to decode under; each cell's own if None.
    library
        Library sizes to decode at, ``(cells, 1)``; each cell's own if None.

    Returns
    -------
    numpy.ndarray
        ``(cells, genes)`` float32.
    """
    every, means = np.arange(source.n_cells), np.empty((source.n_cells, source.n_genes), np.float32)

    def decode(cells: Minibatch, here: slice) -> None:
        mu_z, _ = vae.encode(cells.x, context_of(vae, cells))
        target = Minibatch(
            cells.x,
            cells.context if contexts is None else contexts(every[here]).to(cells.x.device),
            cells.library if library is None else library[here].to(cells.x.device),
        )
        means[here] = vae.decode(mu_z, context_of(vae, target), target.library).cpu().numpy()

    for_chunks(vae, source, every, decode)
    return means


def for_chunks(vae: VAE, source: Source, rows: Rows, compute: Callable[[Minibatch, slice], None]) -> None:
    """Read these cells in chunks and call ``compute(cells, where they belong)``; threads take chunks by turns."""
    device = next(vae.parameters()).device
    size = min(CHUNK, max(1, _CONTEXT_CHUNK // max(vae.context_dim, 1)))
    pieces = list(in_chunks(rows, size))
    reading = threading.Lock()
    was_training, n = vae.training, min(n_threads(), len(pieces)) if device.type == "cpu" else 1

    def work(turn: int) -> None:
        with torch.inference_mode():
            for number in range(turn, len(pieces), n):
                with reading:
                    cells = source.take(pieces[number]).to(device)
                cells = fill_in(vae, cells, source)
                compute(cells, slice(number * size, number * size + len(pieces[number])))

    vae.eval()  # no dropout
    try:
        in_threads(work, n)
    finally:
        vae.train(was_training)


def false_share(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of false ones expected among each and those that are surer: the mean of ``1 - probability`` over them.

    Examples
    --------
    >>> false_share(np.array([0.5, 1.0, 0.9])).round(2).tolist()
    [0.2, 0.0, 0.05]
    """
    order, share = np.argsort(-probability, kind="stable"), np.empty(len(probability))
    share[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return share


def filled_library(vae: VAE, source: Source) -> NDArray[np.float32]:
    """Library sizes of all cells, ``(cells,)``, grown by what `fill_in` gives genes that were not measured."""
    found = np.empty(source.n_cells, np.float32)

    def look(cells: Minibatch, here: slice) -> None:
        found[here] = cells.library[:, 0].cpu().numpy()

    for_chunks(vae, source, np.arange(source.n_cells), look)
    return found
