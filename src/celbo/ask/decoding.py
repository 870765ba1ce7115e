"""Decode cells under other conditions, with the same draws of z; and draw their counts.

For negative binomial counts the cell's own deviations are carried over. Such a count is Poisson with a rate ``mu u``,
``u ~ Gamma(theta, theta)``. The cell's counts inform about u, ``u | x ~ Gamma(theta + x, theta + mu)``, and under the
other condition the rate is ``mu' u``, scaled to the library (abduction, action, prediction; Pearl 2009, section 7.1).

For cells that are not supported there are two answers, and neither is known to be right: the decoder's mean there,
mu', and the mean under the cell's own condition times the effect that the decoder has learned at the nearest supported
cells, mu e. The draws use the two answers in turn; counts are drawn from ``(mu' mu e)**(1/2)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor
from torch.distributions import Distribution

from celbo.ask.support import nearest
from celbo.fit.cells import Cells
from celbo.minibatch import Contexts, Rows, Source, in_chunks
from celbo.model.distributions import NegativeBinomial
from celbo.model.filling import fill_in
from celbo.model.likelihoods import NegativeBinomialHead
from celbo.model.vae import VAE, context_of

__all__ = ["Carried", "Decoded", "Draws", "carried_effects", "decode_under", "draw_counts"]

_CHUNK = 64
"""Cells whose posterior samples are held at a time."""
_CARRIERS = 100
"""Supported cells nearest to an unsupported one; the effect that is carried to it is their mean effect."""


class Carried(NamedTuple):
    """Effects of the conditions asked for, carried from supported cells to cells that are not supported."""

    log_effect: NDArray[np.float32]
    """Log of the ratio of mean shares, ``(cells that are not supported, genes)``."""
    row_of: NDArray[np.intp]
    """Row of each cell in ``log_effect``, or -1, ``(cells,)``."""


def carried_effects(
    cells: Cells, contexts: Contexts, unsupported: NDArray[np.bool_], supported: NDArray[np.float32]
) -> Carried:
    """Compute the effect that the decoder has learned at the supported cells nearest to each unsupported cell.

    ``log mean_k mu(z_k, c') - log mean_k mu(z_k, c)`` over the 100 nearest; c is the cell's own context, and c' the
    context asked for.

    Parameters
    ----------
    cells
        The cells, with the model that encodes them.
    contexts
        Contexts to decode under, c'.
    unsupported
        Which cells are not supported, ``(cells,)``.
    supported
        Positions of supported known cells, ``(cells, latent_dim)``. If there are none, or the likelihood is not nb,
        nothing is carried.

    Returns
    -------
    Carried
    """
    vae, source = cells.vae, cells.source
    assert vae is not None
    is_nb = isinstance(vae.head, NegativeBinomialHead)
    rows = np.flatnonzero(unsupported) if len(supported) and is_nb else np.zeros(0, np.intp)
    row_of = np.full(source.n_cells, -1, np.intp)
    row_of[rows] = np.arange(len(rows))
    if not len(rows):
        return Carried(np.zeros((0, source.n_genes), np.float32), row_of)
    near = nearest(cKDTree(supported), cells.encoded_at(rows).mu_z, _CARRIERS)
    log_effect = np.empty((len(rows), source.n_genes), np.float32)
    device = next(vae.parameters()).device
    with torch.inference_mode():
        for chunk in in_chunks(np.arange(len(rows)), _CHUNK):
            z = torch.from_numpy(supported[near[chunk]]).to(device)
            library = z.new_ones(len(chunk), 1)
            own, other = (
                _decode(vae, z, context.to(device), library).mean.view(*z.shape[:2], -1).mean(1)
                for context in (cells.source.contexts(rows[chunk]), contexts(rows[chunk]))
            )
            smallest = torch.finfo(own.dtype).tiny
            log_effect[chunk] = (other.clamp(min=smallest).log() - own.clamp(min=smallest).log()).cpu().numpy()
    return Carried(log_effect, row_of)


class Draws(NamedTuple):
    """Draws of z from one model, and everything needed to decode them."""

    vae: VAE
    z: NDArray[np.float32]
    """``(cells, n_samples, latent_dim)``."""
    contexts: Contexts
    library: NDArray[np.float32]
    """``(cells, 1)``; it includes the counts that are filled in for genes that the cells lack."""
    source: Source
    """The cells."""
    carried: Carried


class Decoded(NamedTuple):
    """Cells decoded under another context, in numpy."""

    mean: NDArray[np.float32]
    """Mean over draws of z from every model, ``(cells, genes)``; ``lower`` and ``upper`` are 5 and 95 % quantiles."""
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    before: NDArray[np.float32]
    """Mean over cells, by draw, ``(models * n_samples, genes)``: under the own context, and ``after`` the other."""
    after: NDArray[np.float32]
    noise: NDArray[np.float64]
    """Variance of a count around its mean, before and after, averaged over cells: ``(2, genes)``."""
    draws: list[Draws]
    """One for each model."""


def decode_under(
    vaes: Sequence[VAE],
    source: Source,
    contexts: Contexts,
    carried: Sequence[Carried],
    *,
    n_samples: int,
    seed: int,
    has_width: bool = True,
) -> Decoded:
    """Decode the cells of a source under another context, with the same draws of z as under their own context.

    Parameters
    ----------
    vaes
        One or more models of the same genes and conditions. Their draws have the same weight.
    source
        The cells.
    contexts
        Contexts to decode under.
    carried
        Effects for unsupported cells, by model.
    n_samples
        Draws of z for each cell and model.
    seed
        Seed of the draws.
    has_width
        Whether z is drawn from the posterior; else z is mu_z, as in a plain autoencoder.

    Returns
    -------
    Decoded
    """
    n, n_genes, device = source.n_cells, source.n_genes, next(vaes[0].parameters()).device
    mean, lower, upper = (np.empty((n, n_genes), np.float32) for _ in range(3))
    before, after = (torch.zeros(len(vaes), n_samples, n_genes, dtype=torch.float64, device=device) for _ in range(2))
    draws = [
        Draws(
            vae,
            np.empty((n, n_samples, vae.latent_dim), np.float32),
            contexts,
            np.empty((n, 1), np.float32),
            source,
            effects,
        )
        for vae, effects in zip(vaes, carried, strict=True)
    ]
    noise = torch.zeros(2, n_genes, dtype=torch.float64, device=device)
    weights = torch.arange(n_samples).float() % 2  # the two answers in turn
    generator, quantiles = torch.Generator().manual_seed(seed), torch.tensor([0.05, 0.95], device=device)
    with torch.inference_mode():
        for rows in in_chunks(np.arange(n), _CHUNK):
            minibatch, decoded_by = source.take(rows), []
            for number, vae in enumerate(vaes):
                its_device = next(vae.parameters()).device  # models may be on different devices
                cells = fill_in(vae, minibatch.to(its_device), source)
                mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
                eps = torch.randn(len(rows), n_samples, vae.latent_dim, generator=generator).to(its_device)
                z = mu_z[:, None] + has_width * (0.5 * logvar_z[:, None]).exp() * eps
                own = _decode(vae, z, cells.context, cells.library)
                other = _decode(vae, z, contexts(rows).to(its_device), cells.library)
                x = cells.x.to_dense().repeat_interleave(n_samples, 0)
                means = own.mean, _between(other, own, carried[number], rows, weights.repeat(len(rows)))
                pair = [_rates(mean, own, x).view(len(rows), n_samples, n_genes).to(device) for mean in means]
                decoded_by.append(pair[1])
                before[number] += pair[0].sum(0)
                after[number] += pair[1].sum(0)
                noise += torch.stack([p.variance.sum(0) for p in (own, other)]).to(device)
                draws[number].z[rows], draws[number].library[rows] = z.cpu().numpy(), cells.library.cpu().numpy()
            decoded = torch.cat(decoded_by, dim=1)
            mean[rows] = decoded.mean(1).cpu().numpy()
            lower[rows], upper[rows] = torch.quantile(decoded, quantiles, dim=1).cpu().numpy()
    own_mean, other_mean = ((total / n).flatten(0, 1).float().cpu().numpy() for total in (before, after))
    variance = (noise / (n * n_samples * len(vaes))).cpu().numpy()
    return Decoded(mean, lower, upper, own_mean, other_mean, variance, draws)


def draw_counts(draws: Draws, rows: Rows, seed: int, weight: float = 0.5) -> sparse.csr_matrix:
    """Draw counts of these cells, ``(rows, genes)``; ``weight`` is that of the carried effect. Rows may repeat."""
    vae, z, contexts, library, source, carried = draws
    device, rng, blocks = next(vae.parameters()).device, np.random.default_rng(seed), []
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)  # not every distribution of torch takes a generator
        for chunk in in_chunks(rows, _CHUNK):
            chosen = torch.from_numpy(z[chunk, rng.integers(z.shape[1], size=len(chunk))]).to(device)
            size = torch.from_numpy(library[chunk]).to(device)
            p = vae.likelihood(chosen, context=contexts(chunk).to(device) if vae.context_dim else None, library=size)
            if isinstance(p, NegativeBinomial):
                cells = fill_in(vae, source.take(chunk).to(device), source)
                own = vae.likelihood(chosen, context=context_of(vae, cells), library=size)
                mean = _between(p, own, carried, chunk, torch.full((len(chunk),), weight))
                counts = torch.poisson(_rates(mean, own, cells.x.to_dense(), draw=True))
            else:
                counts = p.sample()
            blocks.append(sparse.csr_matrix(counts.cpu().numpy()))
    return sparse.vstack(blocks, format="csr")


def _decode(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Distribution:
    """Distribution p(x | z, c) for every draw of z, ``(cells * n_samples, genes)``."""
    n_samples = z.shape[1]
    again = context.repeat_interleave(n_samples, 0) if vae.context_dim else None
    return vae.likelihood(z.flatten(0, 1), context=again, library=library.repeat_interleave(n_samples, 0))


def _between(p: Distribution, own: Distribution, carried: Carried, rows: Rows, weights: Tensor) -> Tensor:
    """Mean of p; ``mu'**(1 - w) (mu e)**w`` for unsupported cells of a negative binomial."""
    mean: Tensor = p.mean
    row_of = np.repeat(carried.row_of[rows], len(mean) // len(rows))
    rows_of_draws = torch.from_numpy(np.flatnonzero(row_of >= 0)).to(mean.device)
    if not (len(rows_of_draws) and isinstance(p, NegativeBinomial) and isinstance(own, NegativeBinomial)):
        return mean
    effect = torch.from_numpy(carried.log_effect[row_of[row_of >= 0]]).to(mean.device)
    decoded, weight = p.log_mu[rows_of_draws], weights.to(mean.device)[rows_of_draws, None]
    between = (decoded + weight * (own.log_mu[rows_of_draws] + effect - decoded)).exp()
    total = mean[rows_of_draws].sum(-1, keepdim=True)
    return mean.index_copy(0, rows_of_draws, between * (total / between.sum(-1, keepdim=True)))


def _rates(mean: Tensor, own: Distribution, x: Tensor, *, draw: bool = False) -> Tensor:
    """Means, ``(cells, genes)``; for negative binomials times the posterior mean of u given x, or times a draw of u."""
    if not isinstance(own, NegativeBinomial):
        return mean
    theta = own.log_theta.exp()
    known = theta + x
    rates = mean * (torch._standard_gamma(known) if draw else known) / (theta + own.mean)
    return rates * (mean.sum(-1, keepdim=True) / rates.sum(-1, keepdim=True).clamp(min=1e-30))
