"""Refined importance-weighted log p(x) of negative binomial models: one evaluator for every tool.

It knows no tool: it takes a posterior N(mu_z, sd_z**2) to start from and a function that decodes z into log mu and
log theta. For each cell the posterior is first refined by Adam on its own ELBO, the same way for all; then

    log p(x | l, c) = log mean_k p(x | z_k, c, l) p(z_k) / q(z_k),   z_k ~ q = N(mu_z, (1.2 sd_z)**2)

(Burda 2016, arXiv 1509.00519), accumulated in float64. Beside it stands the figure without refinement: the difference
is what the encoder loses. ESS is the effective number of the K samples; a median below 10 is no result.

``python benchmarks/evaluate.py`` compares the estimate with quadrature on a model of one latent dimension.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(z (n, latent_dim), rows (n,)) -> log mu, log theta``, each broadcastable to ``(n, genes)``."""

STEPS, LEARNING_RATE, WIDER = 150, 0.03, 1.2


class LogP(NamedTuple):
    """By cell: the estimate and its effective sample size, refined and not."""

    log_p: np.ndarray
    ess: np.ndarray
    unrefined: np.ndarray
    unrefined_ess: np.ndarray


def log_likelihood(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """``sum_g log NB(x_g | mu_g, theta_g)`` in float64, ``(n,)``: the only formula of this benchmark."""
    x, log_mu, log_theta = x.double(), log_mu.double(), log_theta.double()
    theta, ratio = log_theta.exp(), log_mu - log_theta
    softplus = torch.nn.functional.softplus
    zeros = -theta * softplus(ratio)
    there = x > 0
    k = x[there]
    t, r = theta.expand_as(x)[there], ratio.expand_as(x)[there]
    more = torch.lgamma(k + t) - torch.lgamma(t) - torch.lgamma(k + 1) - k * softplus(-r)
    rows = there.nonzero()[:, 0]
    return zeros.expand_as(x).sum(-1).index_add(0, rows, more)


def evaluate(
    x: Tensor, mu_z: Tensor, sd_z: Tensor, decode: Decode, *, n_samples: int = 300, seed: int = 0, chunk: int = 4000
) -> LogP:
    """Estimate log p(x) of each cell: ``x (cells, genes)``, ``mu_z, sd_z (cells, latent_dim)``."""
    plain = importance(x, mu_z, WIDER * sd_z, decode, n_samples, seed, chunk)
    mu_z, sd_z = refine(x, mu_z, sd_z, decode, seed)
    refined = importance(x, mu_z, WIDER * sd_z, decode, n_samples, seed, chunk)
    return LogP(*refined, *plain)


def refine(x: Tensor, mu_z: Tensor, sd_z: Tensor, decode: Decode, seed: int) -> tuple[Tensor, Tensor]:
    """Maximise each cell's ELBO over its own mean and standard deviation, with fresh noise at each step."""
    generator = torch.Generator().manual_seed(seed)
    mu, log_sd = mu_z.clone().requires_grad_(), sd_z.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([mu, log_sd], lr=LEARNING_RATE)
    rows = torch.arange(len(x))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        z = mu + log_sd.exp() * torch.randn(mu.shape, generator=generator)
        kl = 0.5 * (mu**2 + (2 * log_sd).exp() - 2 * log_sd - 1).sum(-1)
        loss = (kl - log_likelihood(x, *decode(z, rows))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mu.detach(), log_sd.detach().exp()


@torch.no_grad()
def importance(
    x: Tensor, mu: Tensor, sd: Tensor, decode: Decode, n_samples: int, seed: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Importance-weighted log p(x) and the effective number of samples, by cell."""
    n_cells, rows = len(x), torch.arange(len(x))
    generator = torch.Generator().manual_seed(seed + 1)
    at_once = max(1, chunk // n_cells)
    log_weights = []
    for start in range(0, n_samples, at_once):
        k = min(at_once, n_samples - start)
        eps = torch.randn(k, *mu.shape, generator=generator)
        z = mu + sd * eps
        log_prior = -0.5 * (z.double() ** 2).sum(-1)
        log_q = -0.5 * (eps.double() ** 2).sum(-1) - sd.double().log().sum(-1)
        ll = log_likelihood(x.repeat(k, 1), *decode(z.reshape(k * n_cells, -1), rows.repeat(k)))
        log_weights.append(ll.reshape(k, n_cells) + log_prior - log_q)
    weights = torch.cat(log_weights)
    log_p = torch.logsumexp(weights, 0) - math.log(len(weights))
    ess = torch.exp(2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0))
    return log_p.numpy(), ess.numpy()


def self_test() -> None:
    """One latent dimension, thirty genes: the integral over z by ten thousand points against the estimate."""
    generator = torch.Generator().manual_seed(0)
    slope, base = torch.randn(30, generator=generator), torch.rand(30, generator=generator) * 2
    log_theta = torch.zeros(1)

    def decode(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return base + z * slope, log_theta

    z = torch.randn(20, 1, generator=generator)
    torch.manual_seed(0)  # Gamma draws from the global generator
    rate = torch.distributions.Gamma(1.0, torch.exp(-decode(z, z)[0])).sample()
    x = torch.poisson(rate, generator=generator)
    grid = torch.linspace(-8, 8, 10_001, dtype=torch.float64)[:, None]
    prior = -0.5 * grid[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) + math.log(16 / 10_000)
    truth = [
        float(torch.logsumexp(log_likelihood(cell.expand(len(grid), -1), *decode(grid, grid)) + prior, 0)) for cell in x
    ]
    found = evaluate(x, torch.zeros(20, 1), torch.ones(20, 1), decode, n_samples=2000)
    error = np.abs(found.log_p - truth).max()
    print(f"largest error of 20 cells: {error:.3f} nats (unrefined {np.abs(found.unrefined - truth).max():.3f})")
    assert error < 0.1


if __name__ == "__main__":
    self_test()
