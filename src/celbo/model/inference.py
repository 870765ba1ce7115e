"""Run a model over a Source, in chunks of bounded memory: torch in, numpy out."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.kernels.threads import in_threads, n_threads
from celbo.minibatch import FEWEST_ROWS, Contexts, Minibatch, Rows, Source, in_chunks, in_even_pieces
from celbo.model.filling import fill_in
from celbo.model.objective import OBJECTIVES, Objective
from celbo.model.surprise import surprise
from celbo.model.vae import VAE, Noise, context_of

__all__ = [
    "Block",
    "CellTerms",
    "Encoded",
    "cell_terms",
    "decoded_blocks",
    "encode",
    "encoded_blocks",
    "evaluating",
    "false_share",
    "for_chunks",
    "posterior",
    "take_filled",
]

CHUNK = 1024
"""Cells computed together: enough to keep the processor busy, few enough to stay in its cache."""
_CONTEXT_CHUNK = 1_000_000
"""Largest number of context values in a chunk; it makes chunks smaller where there are very many levels."""
_PIECE, _BLOCK = 1 << 21, 1 << 23
"""Largest number of values that a thread decodes at once, and of values in a block that is returned."""


class Encoded(NamedTuple):
    """Approximate posteriors of cells, and their library sizes. Missing genes were filled in first."""

    mu_z: NDArray[np.float32]
    """``(cells, latent_dim)``, as ``logvar_z``."""
    logvar_z: NDArray[np.float32]
    library: NDArray[np.float32]
    """``(cells,)``; it includes the counts that `celbo.model.filling.fill_in` gives to missing genes."""
    surprise: NDArray[np.float32]
    """`celbo.model.surprise.surprise`, ``(cells,)``; NaN where it was not asked for."""

    def at(self, rows: Rows) -> "Encoded":
        """Return the cells at these positions."""
        return Encoded(*(part[rows] for part in self))


class Block(NamedTuple):
    """Some cells of a source, filled in and encoded, on the model's device."""

    rows: Rows
    """Positions of the cells in the source."""
    measured: Tensor
    """Values before genes were filled in, ``(cells, genes)``."""
    cells: Minibatch
    """The cells; missing genes are filled in."""
    mu_z: Tensor
    """``(cells, latent_dim)``, as ``logvar_z``."""
    logvar_z: Tensor


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


@contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Switch dropout off, and give the model its mode back afterwards."""
    was_training = vae.training
    vae.eval()
    try:
        yield
    finally:
        vae.train(was_training)


def take_filled(vae: VAE, source: Source, rows: Rows) -> Minibatch:
    """Read the cells at these positions to the model's device; fill in missing genes, without a gradient."""
    cells = source.take(rows).to(next(vae.parameters()).device)
    if cells.observed is None:
        return cells
    with evaluating(vae), torch.no_grad():
        return fill_in(vae, cells, source)


def encode(
    vae: VAE,
    source: Source,
    rows: Rows | None = None,
    *,
    surprise_of: NDArray[np.bool_] | None = None,
    also: Callable[[Minibatch, slice], None] | None = None,
) -> Encoded:
    """Encode these cells, or all; each cell is read, filled in and encoded once.

    Parameters
    ----------
    vae, source, rows
        The model, the cells, and the positions of those to encode; all if None.
    surprise_of
        Which of these cells to decode too, for `Encoded.surprise`, ``(rows,)``; none if None.
    also
        Called with each chunk.
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    mu_z, logvar_z = np.empty((2, len(rows), vae.latent_dim), np.float32)
    library, surprising = np.full((2, len(rows)), np.nan, np.float32)

    def encode_chunk(cells: Minibatch, chunk: slice) -> None:
        mu, logvar = vae.encode(cells.x, context_of(vae, cells))
        mu_z[chunk], logvar_z[chunk] = mu.cpu().numpy(), logvar.cpu().numpy()
        library[chunk] = cells.library[:, 0].cpu().numpy()
        if surprise_of is not None and surprise_of[chunk].any():
            chosen = surprise_of[chunk]
            surprising[chunk][chosen] = surprise(vae, _dense_part(cells, chosen), mu[chosen]).cpu().numpy()
        if also is not None:
            also(cells, chunk)

    for_chunks(vae, source, rows, encode_chunk)
    return Encoded(mu_z, logvar_z, library, surprising)


def _dense_part(cells: Minibatch, chosen: NDArray[np.bool_]) -> Minibatch:
    """Choose cells of a minibatch; their values become dense."""
    observed = cells.observed if cells.observed is None or cells.observed.dim() == 1 else cells.observed[chosen]
    return Minibatch(cells.x.to_dense()[chosen], cells.context[chosen], cells.library[chosen], observed)


def posterior(vae: VAE, source: Source, rows: Rows | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and log-variance of q(z | x, c), each ``(cells, latent_dim)``, of these cells or of all."""
    encoded = encode(vae, source, rows)
    return encoded.mu_z, encoded.logvar_z


def encoded_blocks(vae: VAE, source: Source, rows: Rows, size: int) -> Iterator[Block]:
    """Read, fill in and encode these cells in blocks of at most ``size``, each cell once."""
    device = next(vae.parameters()).device
    for piece in in_chunks(rows, size):
        minibatch = source.take(piece).to(device)
        with evaluating(vae), torch.no_grad():
            cells = fill_in(vae, minibatch, source)
            mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
        yield Block(piece, minibatch.x, cells, mu_z, logvar_z)


def cell_terms(
    vae: VAE, source: Source, rows: Rows | None = None, *, seed: int = 0, objective: Objective = OBJECTIVES["vae"]
) -> CellTerms:
    """Compute the terms of the bound for each cell, with one sample of z; the same seed draws the same noise.

    Parameters
    ----------
    vae
        The model. Dropout is off.
    source
        The cells.
    rows
        Positions of the cells to use; all if None.
    seed
        Seed of the sampling noise.
    objective
        Row of `celbo.model.objective.OBJECTIVES` whose terms are computed.

    Returns
    -------
    CellTerms
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    # Noise is drawn for all cells, so that a cell's noise does not depend on which other cells are used.
    eps = torch.randn(source.n_cells, vae.latent_dim, generator=torch.Generator().manual_seed(seed))[rows]
    reconstruction, kl = np.empty(len(rows), np.float32), np.empty((len(rows), vae.latent_dim), np.float32)

    def bound(cells: Minibatch, chunk: slice) -> None:
        noise = Noise(eps[chunk].to(cells.x.device), None, None)
        terms = objective.terms(vae, cells.x, context_of(vae, cells), cells.library, noise, cells.observed)
        reconstruction[chunk], kl[chunk] = terms.reconstruction.cpu().numpy(), terms.kl.cpu().numpy()

    for_chunks(vae, source, rows, bound)
    return CellTerms(reconstruction, kl)


def decoded_blocks(
    vae: VAE, encoded: Encoded, contexts: Sequence[Contexts], *, library: float | None = None
) -> Iterator[NDArray[np.float32]]:
    """Compute the mean of p(x | mu_z, c, library) in blocks of consecutive cells; at most 32 MB or 16 cells a block.

    Parameters
    ----------
    vae
        The model.
    encoded
        The cells, encoded under their own conditions.
    contexts
        Conditions to decode under. With several, the mean over them with equal weights is computed.
    library
        Library size to decode at, the same for all cells; each cell's own if None.

    Yields
    ------
    numpy.ndarray
        ``(cells of the block, genes)`` float32.
    """
    n_genes, device = vae.input_dim, next(vae.parameters()).device
    most = max(FEWEST_ROWS, _PIECE // n_genes)
    chunks = in_chunks(np.arange(len(encoded.mu_z)), _chunk_size(vae))
    pieces = [piece for chunk in chunks for piece in in_even_pieces(chunk, most)]
    together = max(1, _BLOCK // (n_genes * max(map(len, pieces), default=1)))

    def decode(piece: Rows) -> NDArray[np.float32]:
        mu_z = torch.from_numpy(encoded.mu_z[piece]).to(device)
        sizes = encoded.library[piece, None] if library is None else np.full((len(piece), 1), library, np.float32)
        total, n = np.zeros((len(piece), n_genes), np.float32), np.float32(len(contexts))
        for context in contexts:
            given = context(piece).to(device) if vae.context_dim else None
            total += vae.decode(mu_z, given, torch.from_numpy(sizes).to(device)).cpu().numpy() / n
        return total

    for start in range(0, len(pieces), together):
        some = pieces[start : start + together]
        block, first = np.empty((sum(map(len, some)), n_genes), np.float32), some[0][0]

        def work(turn: int, n: int, some: Sequence[Rows] = some, block: Any = block, first: int = first) -> None:
            with torch.inference_mode():
                for piece in some[turn::n]:
                    block[piece - first] = decode(piece)

        n = min(n_threads(), len(some)) if device.type == "cpu" else 1
        with evaluating(vae):
            in_threads(partial(work, n=n), n)
        yield block


def _chunk_size(vae: VAE) -> int:
    """Return how many cells are computed together."""
    return min(CHUNK, max(1, _CONTEXT_CHUNK // max(vae.context_dim, 1)))


def for_chunks(vae: VAE, source: Source, rows: Rows, compute: Callable[[Minibatch, slice], None]) -> None:
    """Read these cells in chunks, fill in missing genes, and call ``compute(cells, slice of rows)``.

    Threads share the chunks: each takes every n-th.
    """
    device = next(vae.parameters()).device
    size = _chunk_size(vae)
    pieces = list(in_chunks(rows, size))
    reading = threading.Lock()
    n = min(n_threads(), len(pieces)) if device.type == "cpu" else 1

    def work(turn: int) -> None:
        with torch.inference_mode():
            for number in range(turn, len(pieces), n):
                with reading:
                    cells = source.take(pieces[number]).to(device)
                cells = fill_in(vae, cells, source)
                compute(cells, slice(number * size, number * size + len(pieces[number])))

    with evaluating(vae):
        in_threads(work, n)


def false_share(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the expected share of false positives among each item and surer ones: mean of ``1 - probability``.

    Examples
    --------
    >>> false_share(np.array([0.5, 1.0, 0.9])).round(2).tolist()
    [0.2, 0.0, 0.05]
    """
    order, share = np.argsort(-probability, kind="stable"), np.empty(len(probability))
    share[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return share
