"""log p(x | library, conditions) by importance weighting, after each cell's posterior was refined."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.inference import context_of, fill_in
from celbo.minibatch import Minibatch, Rows, Source, csr_tensor, in_chunks
from celbo.objective import kl_to_prior, log_prob_of_cells
from celbo.vae import VAE

__all__ = ["LogProb", "log_prob"]

_CHUNK = 256
"""Cells that are refined together."""
_ROWS_AT_ONCE = 2048
"""Pairs of cell and sample that are decoded together."""
_CONTEXT_AT_ONCE = 1_000_000
"""Numbers of their contexts together, where there are very many levels."""
_LEARNING_RATE, _WIDER = 0.03, 1.2
"""Of the refinement, falling to 0; and how much wider than the posterior samples are drawn."""


class LogProb(NamedTuple):
    """By cell, float64."""

    log_p: NDArray[np.float64]
    """Nats."""
    se: NDArray[np.float64]
    """Its standard error, ``sqrt(1 / ESS - 1 / K)``."""
    ess: NDArray[np.float64]
    """Effective number of the K samples; below 10 the estimate is not to be trusted."""


def log_prob(
    vae: VAE,
    source: Source,
    rows: Rows | None = None,
    *,
    n_samples: int = 500,
    refine_steps: int = 150,
    seed: int = 0,
) -> LogProb:
    """``log mean_k p(x | z_k, c, l) p(z_k | c) / q(z_k)``, ``z_k ~ q = N(mu_z, (1.2 sd_z)**2)`` (Burda 2016).

    q starts as the encoder's posterior, and is refined for each cell by Adam on its own ELBO: what is compared then is
    the model, not its encoder. Sums are taken in float64. With the library size given it is a density given the total.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    rows
        Which of them; all if None.
    n_samples
        K.
    refine_steps
        Steps of refinement; 0 for none.
    seed
        Of all draws.

    Returns
    -------
    LogProb
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    device = next(vae.parameters()).device
    was_training, learns = vae.training, [parameter.requires_grad for parameter in vae.parameters()]
    vae.eval().requires_grad_(False)
    try:
        found = [
            _of_cells(vae, source, source.take(piece).to(device), n_samples, refine_steps, seed, number)
            for number, piece in enumerate(in_chunks(rows, _CHUNK))
        ]
    finally:
        vae.train(was_training)
        for parameter, wanted in zip(vae.parameters(), learns, strict=True):
            parameter.requires_grad_(wanted)
    log_p, ess = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.empty(0), np.empty(0))
    return LogProb(log_p, np.sqrt(np.maximum(0.0, 1 / ess - 1 / n_samples)), ess)


def _of_cells(
    vae: VAE, source: Source, cells: Minibatch, n_samples: int, refine_steps: int, seed: int, number: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 10, number]).generate_state(1)[0]))
    context = context_of(vae, cells)
    with torch.no_grad():
        cells = fill_in(vae, cells, source)
        mu_z, logvar_z = vae.encode(cells.x, context)
    mu_z, logvar_z = _refine(vae, cells, mu_z, logvar_z, refine_steps, generator)
    sd = _WIDER * (0.5 * logvar_z).exp()
    rows = min(_ROWS_AT_ONCE, _CONTEXT_AT_ONCE // max(vae.context_dim, 1))
    n_cells, at_once = len(mu_z), max(1, rows // len(mu_z))
    log_weights = []
    with torch.no_grad():
        for start in range(0, n_samples, at_once):
            k = min(at_once, n_samples - start)
            eps = torch.randn(k, *mu_z.shape, generator=generator).to(mu_z.device)
            z = (mu_z + sd * eps).flatten(0, 1)
            again = _repeated(cells, k)
            prior = vae.prior_components(z, context_of(vae, again)).distribution()
            log_prior = prior.log_prob(z).double()
            p = vae.likelihood(z, context=context_of(vae, again), library=again.library)
            log_likelihood = log_prob_of_cells(p, again.x, again.observed).double()
            log_q = (-0.5 * eps.double().square() - sd.double().log() - 0.5 * math.log(2 * math.pi)).sum(-1)
            log_weights.append((log_likelihood + log_prior).view(k, n_cells) - log_q)
    weights = torch.cat(log_weights)
    log_p = torch.logsumexp(weights, 0) - math.log(n_samples)
    ess = torch.exp(2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0))
    return log_p.cpu().numpy(), ess.cpu().numpy()


def _refine(
    vae: VAE, cells: Minibatch, mu_z: Tensor, logvar_z: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Maximise each cell's ELBO over its own mean and log-variance."""
    mu_z, logvar_z = mu_z.clone().requires_grad_(), logvar_z.clone().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [mu_z]}, {"params": [logvar_z], "lr": 2 * _LEARNING_RATE}]
    optimizer = torch.optim.Adam(groups, lr=_LEARNING_RATE)
    rates = [group["lr"] for group in optimizer.param_groups]
    context = context_of(vae, cells)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        eps = torch.randn(mu_z.shape, generator=generator).to(mu_z.device)
        z = mu_z + (0.5 * logvar_z).exp() * eps
        p = vae.likelihood(z, context=context, library=cells.library)
        kl = kl_to_prior(vae, mu_z, logvar_z, z, context).sum(-1)
        loss = (kl - log_prob_of_cells(p, cells.x, cells.observed)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mu_z.detach(), logvar_z.detach()


def _repeated(cells: Minibatch, times: int) -> Minibatch:
    """The same cells again and again, one whole set after another."""
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
    return Minibatch(x, cells.context.repeat(times, 1), cells.library.repeat(times, 1), cells.observed)
