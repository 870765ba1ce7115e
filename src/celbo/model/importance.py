"""Estimate log p(x | library, conditions) by importance weighting, with each cell's posterior refined first."""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.kernels.dispatch import adam
from celbo.kernels.reference import AdamState
from celbo.minibatch import Minibatch, Rows, Source, csr_tensor, scipy_csr
from celbo.model.inference import Block, encoded_blocks, evaluating
from celbo.model.objective import kl_to_prior, log_prob_of_cells
from celbo.model.priors import Components
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

__all__ = ["BLOCK", "LogProb", "log_prob", "log_prob_of_block"]

BLOCK = 256
"""Cells that are refined together."""
_ROWS_AT_ONCE = 2048
"""Pairs of cell and sample that are decoded together."""
_CONTEXT_AT_ONCE = 1_000_000
"""Largest number of context values decoded together; it matters where there are very many levels."""
_LEARNING_RATE = 0.03
"""Learning rate of the refinement. It falls to 0."""
_WIDTHS = (1.2, 1.2, 2.0, 1.2, 1.2, 3.0, 1.2, 1.2, None, 1.2)
"""Widths of the samples in turn, in standard deviations of q; None draws from the prior. Most samples lie where q lies.
The others find what one normal distribution misses, a second mode or a heavy tail, so that the ESS reports it."""


class LogProb(NamedTuple):
    """Estimates by cell, ``(cells,)`` float64."""

    log_p: NDArray[np.float64]
    """Nats."""
    se: NDArray[np.float64]
    """Standard error of log_p, ``sqrt(1 / ESS - 1 / K)``."""
    ess: NDArray[np.float64]
    """Effective number of the K samples. Do not trust an estimate with fewer than 10."""


def log_prob(
    vae: VAE,
    source: Source,
    rows: Rows | None = None,
    *,
    n_samples: int = 500,
    refine_steps: int = 150,
    seed: int = 0,
) -> LogProb:
    """Estimate ``log mean_k p(x | z_k, c, l) p(z_k | c) / r(z_k)`` by importance weighting (Burda 2016).

    r is a mixture around the posterior q. Of each ten samples seven have 1.2 times its standard deviation, one 2 times,
    one 3 times, and one is drawn from the prior (none if there are fewer than nine samples). Weights are by the density
    of the mixture (Owen & Zhou 2000, JASA 95:135). q starts as the encoder's posterior, and Adam refines it for each
    cell on the cell's own ELBO, so that models are compared and not their encoders. Sums are in float64. The library
    size is given: this is a density given the total. The samples for a cell depend on the seed and on its own values,
    so its estimate does not depend on the other cells.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    rows
        Positions of the cells to use; all if None.
    n_samples
        K.
    refine_steps
        Steps of refinement; 0 for none.
    seed
        Seed of all random draws.

    Returns
    -------
    LogProb
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    parts = [
        log_prob_of_block(vae, block, n_samples=n_samples, refine_steps=refine_steps, seed=seed)
        for block in encoded_blocks(vae, source, rows, BLOCK)
    ]
    return LogProb(*map(np.concatenate, zip(*parts, strict=True))) if parts else LogProb(*np.empty((3, 0)))


def log_prob_of_block(vae: VAE, block: Block, *, n_samples: int, refine_steps: int, seed: int) -> LogProb:
    """Estimate log p(x) of cells that are encoded already; parameters as in `log_prob`."""
    noise = _generators(block.measured, seed)
    learns = [parameter.requires_grad for parameter in vae.parameters()]
    with evaluating(vae.requires_grad_(False)):
        try:
            q = _refine(vae, block.cells, block.mu_z, block.logvar_z, refine_steps, noise)
            log_p, ess = _weighted(vae, block.cells, *q, n_samples, noise)
        finally:
            for parameter, wanted in zip(vae.parameters(), learns, strict=True):
                parameter.requires_grad_(wanted)
    return LogProb(log_p, np.sqrt(np.maximum(0.0, 1 / ess - 1 / n_samples)), ess)


@torch.no_grad()
def _weighted(
    vae: VAE,
    cells: Minibatch,
    mu_z: Tensor,
    logvar_z: Tensor,
    n_samples: int,
    noise: Sequence[np.random.Generator],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate log p and the effective number of samples, ``(cells,)`` each, by sampling around q."""
    context, sd = context_of(vae, cells), (0.5 * logvar_z).exp()
    rows = min(_ROWS_AT_ONCE, _CONTEXT_AT_ONCE // max(vae.context_dim, 1))
    n_cells, at_once = len(mu_z), max(1, rows // len(mu_z))
    widths = list(islice(cycle(_WIDTHS), n_samples))
    shares = {width: n / n_samples for width, n in Counter(widths).items()}
    prior = vae.prior_components(mu_z, context)
    log_weights = []
    for start in range(0, n_samples, at_once):
        z = _draw(widths[start : start + at_once], mu_z, sd, prior, noise)
        again = _repeated(cells, len(z))
        p = vae.likelihood(z.flatten(0, 1), context=context_of(vae, again), library=again.library)
        log_likelihood = log_prob_of_cells(p, again.x, again.observed).double().view(len(z), n_cells)
        log_prior = prior.distribution().log_prob(z).double()
        log_weights.append(log_likelihood + log_prior - _log_density(z, mu_z, sd, log_prior, shares))
    weights = torch.cat(log_weights)
    log_p = torch.logsumexp(weights, 0) - math.log(n_samples)
    ess = torch.exp(2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0))
    return log_p.cpu().numpy(), ess.cpu().numpy()


def _draw(
    widths: Sequence[float | None], mu_z: Tensor, sd: Tensor, prior: Components, noise: Sequence[np.random.Generator]
) -> Tensor:
    """Draw a sample of z for each cell and each of these `_WIDTHS`, ``(widths, cells, latent_dim)``."""
    eps = _normal(noise, len(widths), mu_z.shape[1] + 1).to(mu_z.device)
    eps, chance = eps[..., :-1], torch.special.ndtr(eps[..., -1])
    cells, up_to = torch.arange(len(mu_z), device=mu_z.device), prior.log_weights.exp().cumsum(0)[:-1]
    drawn = []
    for number, width in enumerate(widths):
        if width is not None:
            drawn.append(mu_z + width * sd * eps[number])
            continue
        component = torch.searchsorted(up_to, chance[number].contiguous())
        mu, logvar = (part.expand(len(mu_z), -1, -1)[cells, component] for part in (prior.mu, prior.logvar))
        drawn.append(mu + (0.5 * logvar).exp() * eps[number])
    return torch.stack(drawn)


def _log_density(
    z: Tensor, mu_z: Tensor, sd: Tensor, log_prior: Tensor, shares: Mapping[float | None, float]
) -> Tensor:
    """Compute the log density of the mixture of `_draw`, ``(widths, cells)`` float64, and shares of `_WIDTHS`."""
    apart = ((z - mu_z) / sd).double().square().sum(-1)
    log_volume = (sd.double().log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    parts = [
        math.log(share)
        + (log_prior if width is None else -0.5 * apart / width**2 - z.shape[-1] * math.log(width) - log_volume)
        for width, share in shares.items()
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def _refine(
    vae: VAE, cells: Minibatch, mu_z: Tensor, logvar_z: Tensor, steps: int, noise: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Maximise each cell's ELBO over its own mean and log-variance."""
    mu_z, logvar_z = mu_z.clone().requires_grad_(), logvar_z.clone().requires_grad_()
    learned = [(mu_z, _LEARNING_RATE), (logvar_z, 2 * _LEARNING_RATE)]
    states = [AdamState.of(q.view(-1)) for q, _ in learned]
    context = context_of(vae, cells)
    for step in range(steps):
        eps = _normal(noise, 1, vae.latent_dim)[0].to(mu_z.device)
        z = mu_z + (0.5 * logvar_z).exp() * eps
        p = vae.likelihood(z, context=context, library=cells.library)
        kl = kl_to_prior(vae, mu_z, logvar_z, z, context).sum(-1)
        loss = (kl - log_prob_of_cells(p, cells.x, cells.observed)).sum()
        gradients = torch.autograd.grad(loss, [mu_z, logvar_z])
        for (q, rate), gradient, state in zip(learned, gradients, states, strict=True):
            rate *= 1 - step / steps
            adam(q.data.view(-1), gradient.reshape(-1), state, factor=1.0, rate=rate, step=step + 1, share=0.0)
    return mu_z.detach(), logvar_z.detach()


def _generators(x: Tensor, seed: int) -> list[np.random.Generator]:
    """Make a random generator for each cell, seeded by the cell's values."""
    stored = scipy_csr(x).copy()  # it is changed below
    stored.eliminate_zeros()
    stored.sort_indices()
    genes, bounds = stored.indices.astype(np.int64), stored.indptr
    cells = [slice(*ends) for ends in pairwise(bounds)]
    of_cells = [zlib.crc32(stored.data[cell].tobytes(), zlib.crc32(genes[cell].tobytes())) for cell in cells]
    return [random_stream(seed, Stream.IMPORTANCE, of_cell) for of_cell in of_cells]


def _normal(noise: Sequence[np.random.Generator], n: int, dim: int) -> Tensor:
    """Draw the next standard normal numbers, ``(n, cells, dim)``."""
    return torch.from_numpy(np.stack([rng.standard_normal((n, dim), np.float32) for rng in noise], axis=1))


def _repeated(cells: Minibatch, times: int) -> Minibatch:
    """Repeat the cells, one whole set after another."""
    if times == 1:
        return cells
    x = cells.x
    if x.layout == torch.sparse_csr:
        starts, values = x.crow_indices(), x.values()
        shift = torch.arange(times)[:, None] * len(values)
        crow = torch.cat([(starts[:-1] + shift).reshape(-1), starts.new_tensor([times * len(values)])])
        x = csr_tensor(
            crow.to(starts.dtype), x.col_indices().repeat(times), values.repeat(times), (times * x.shape[0], x.shape[1])
        )
    else:
        x = x.repeat(times, 1)
    observed = cells.observed
    if observed is not None and observed.dim() == 2:
        observed = observed.repeat(times, 1)
    return Minibatch(x, cells.context.repeat(times, 1), cells.library.repeat(times, 1), observed)
