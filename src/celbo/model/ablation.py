"""Measure how much reconstruction is lost without z, without one of its dimensions, or without a condition."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from celbo.minibatch import Minibatch, Rows, Source
from celbo.model.inference import CHUNK, Encoded, encode, evaluating, for_chunks
from celbo.model.objective import log_prob_of_cells
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

__all__ = ["UseOfLatent", "encode_with_contexts", "in_brief", "sensitivity", "use_of_latent"]

_MOST_COLUMNS = 64
"""A context with more columns is summarised before contexts are compared."""


class UseOfLatent(NamedTuple):
    """How much the decoder uses z and the conditions, for each cell, in numpy."""

    mu_z: NDArray[np.float32]
    """``(cells, latent_dim)``, as ``logvar_z``."""
    logvar_z: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    """Reconstruction with each cell's own z, ``(cells,)``, nats."""
    lost: NDArray[np.float32]
    """Reconstruction lost, ``(parts, cells)``, nats: all of z permuted; each of its dimensions, if asked for; each set
    of context columns, NaN where the other cell has the same."""


def use_of_latent(
    vae: VAE,
    source: Source,
    rows: Rows | None = None,
    *,
    known: tuple[Encoded, sparse.csr_matrix] | None = None,
    by_dimension: bool = False,
    of_context: Sequence[slice] = (),
    sample: bool = True,
    seed: int = 0,
) -> UseOfLatent:
    """Compute the reconstruction of each cell, and the loss when z, or the context, is that of another cell.

    z is drawn from the posterior once, and permuted among cells of the same context; the context is permuted among all.

    Parameters
    ----------
    vae
        The model. Dropout is off.
    source
        The cells.
    rows
        Positions of the cells; all if None.
    known
        Posteriors and contexts of these cells, if they are known: what `encode_with_contexts` returns.
    by_dimension
        Whether to permute each dimension of z by itself, too.
    of_context
        Columns of the context to permute together: those of one condition, for example.
    sample
        Whether to draw z; else it is mu_z.
    seed
        Seed of the draws and permutations.

    Returns
    -------
    UseOfLatent
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    (mu_z, logvar_z, *_), context = known or encode_with_contexts(vae, source, rows)
    rng = random_stream(seed, Stream.ABLATION)
    eps = rng.standard_normal(mu_z.shape, np.float32) if sample else np.float32(0)
    z = mu_z + np.exp(0.5 * logvar_z) * eps
    within, among = _permutation(in_brief(context), rng), _permutation(np.empty((len(rows), 0)), rng)
    of_z = [slice(None), *(slice(j, j + 1) for j in range(vae.latent_dim) if by_dimension)]
    reconstruction, lost = (
        np.empty(len(rows), np.float32),
        np.empty((len(of_z) + len(of_context), len(rows)), np.float32),
    )

    def decode(cells: Minibatch, chunk: slice) -> None:
        def log_prob(z: NDArray[np.float32], context: NDArray[np.float32]) -> NDArray[np.float32]:
            parts = (torch.from_numpy(part).to(cells.x.device) for part in (z, context))
            p = vae.likelihood(next(parts), context=next(parts) if vae.context_dim else None, library=cells.library)
            values: NDArray[np.float32] = log_prob_of_cells(p, cells.x, cells.observed).cpu().numpy()
            return values

        own, of_other = context[chunk].toarray(), context[among[chunk]].toarray()
        reconstruction[chunk] = log_prob(z[chunk], own)
        for number, columns in enumerate([*of_z, *of_context]):
            z_there, context_there = z[chunk].copy(), own.copy()
            if number < len(of_z):
                z_there[:, columns] = z[within[chunk]][:, columns]
            else:
                context_there[:, columns] = of_other[:, columns]
            lost[number, chunk] = reconstruction[chunk] - log_prob(z_there, context_there)
            if number >= len(of_z):
                lost[number, chunk][(context_there == own).all(1)] = np.nan

    for_chunks(vae, source, rows, decode)
    return UseOfLatent(mu_z, logvar_z, reconstruction, lost)


def encode_with_contexts(vae: VAE, source: Source, rows: Rows) -> tuple[Encoded, sparse.csr_matrix]:
    """Encode these cells, and return their contexts too, ``(cells, context_dim)``: most are 0 if levels are many."""
    contexts = dict[int, sparse.csr_matrix]()

    def keep_context(cells: Minibatch, chunk: slice) -> None:
        contexts[chunk.start] = sparse.csr_matrix(cells.context.cpu().numpy()[:, : vae.context_dim])

    encoded = encode(vae, source, rows, also=keep_context)
    return encoded, sparse.vstack([contexts[start] for start in sorted(contexts)], format="csr")


def sensitivity(
    vae: VAE, source: Source, rows: Rows | None = None, *, encoded: Encoded | None = None
) -> NDArray[np.float64]:
    """Compute how far each latent dimension moves the decoded mean, relative to the noise; ``(latent_dim,)``.

    ``E sum_g (d m_g / d z_j)**2 / var_g * Var(mu_z_j)``, at mu_z of each cell: the Fisher information of the genes
    about z_j, times the variance of mu_z_j.
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    mu_z = (encode(vae, source, rows) if encoded is None else encoded).mu_z
    total = torch.zeros(vae.latent_dim, dtype=torch.float64)
    device = next(vae.parameters()).device
    with evaluating(vae):
        for start in range(0, len(rows), CHUNK):
            cells = source.take(rows[start : start + CHUNK]).to(device)
            z, context = torch.from_numpy(mu_z[start : start + CHUNK]).to(device), context_of(vae, cells)
            with torch.no_grad():
                variance = vae.likelihood(z, context=context, library=cells.library).variance.double().clamp(min=1e-30)
            with torch.enable_grad():
                for j, slope in enumerate(_slopes(vae, z, context, cells.library)):
                    total[j] += (slope.double().square() / variance).sum().cpu()
    moved: NDArray[np.float64] = total.numpy() / len(rows) * mu_z.var(0, dtype=np.float64)
    return moved


def _slopes(vae: VAE, z: Tensor, context: Tensor | None, library: Tensor) -> Iterator[Tensor]:
    """Compute ``d m / d z_j`` of the decoded mean m for each j, ``(cells, genes)`` each.

    The gradient in z of ``m @ v`` is linear in v, and the derivative of its j-th part in v is the slope. The decoder
    runs once for all dimensions; forward mode would run it once for each, and torch takes a second to load that mode.
    """
    z = z.requires_grad_()
    m = vae.decode(z, context, library)
    v = torch.zeros_like(m, requires_grad=True)
    (gradient,) = torch.autograd.grad(m, z, v, create_graph=True)
    for j in range(z.shape[1]):
        yield torch.autograd.grad(gradient[:, j].sum(), v, retain_graph=True)[0]


def in_brief(context: sparse.csr_matrix) -> NDArray[np.floating[Any]]:
    """Summarise contexts in few columns that differ if contexts differ: themselves, or a random projection."""
    if context.shape[1] <= _MOST_COLUMNS:
        return np.asarray(context.toarray())
    numbers: NDArray[np.float64] = context @ np.random.default_rng(13).random((context.shape[1], 1))
    return numbers


def _permutation(context: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.intp]:
    """Choose for each cell another cell of the same context, each once; of all cells if contexts hardly recur."""
    groups = np.zeros(len(context), np.intp)
    if context.shape[1]:
        groups = np.unique(context, axis=0, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(groups, minlength=1)
    if 2 * len(sizes) > len(context):
        groups = np.zeros_like(groups)
    else:
        groups[sizes[groups] < 2] = -1
    other = np.empty(len(context), np.intp)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        other[members] = np.roll(members, 1)
    return other
