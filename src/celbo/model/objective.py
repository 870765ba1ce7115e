"""The evidence lower bound and its terms: the only place that sums over genes and over latent dimensions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from celbo.model.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from celbo.model.priors import StandardPrior
from celbo.model.vae import VAE, Noise, reparameterize

__all__ = [
    "OBJECTIVES",
    "ElboTerms",
    "Objective",
    "autoencoder_terms",
    "elbo_terms",
    "kl_divergence",
    "kl_to_prior",
    "log_prob_of_cells",
]


class ElboTerms(NamedTuple):
    """Terms of the evidence lower bound, one row per cell, unweighted."""

    reconstruction: Tensor
    """``log p(x | z, c)``, summed over genes: ``(cells,)``, nats."""
    kl: Tensor
    """``KL(q(z_j | x, c) || p(z_j))``: ``(cells, latent_dim)``, nats."""
    z: Tensor | None = None
    """The z that was decoded, ``(cells, latent_dim)``, for penalties on it."""

    @property
    def elbo(self) -> Tensor:
        """Reconstruction less KL, ``(cells,)``, nats."""
        return self.reconstruction - self.kl.sum(-1)


def kl_divergence(mu_z: Tensor, logvar_z: Tensor) -> Tensor:
    """Compute the divergence of the posterior from the standard normal prior, per latent dimension.

    ``KL(N(mu, sigma**2) || N(0, 1)) = (mu**2 + sigma**2 - log sigma**2 - 1) / 2`` (Kingma & Welling 2014, appendix B).

    Parameters
    ----------
    mu_z, logvar_z
        ``(cells, latent_dim)``.

    Returns
    -------
    Tensor
        ``(cells, latent_dim)``, nats.

    Examples
    --------
    >>> import torch
    >>> kl_divergence(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
    tensor([[0.0000, 0.5000]])
    """
    # expm1 keeps the difference sigma**2 - 1 exact where the posterior is close to the prior.
    return 0.5 * (mu_z.square() + torch.expm1(logvar_z) - logvar_z)


def elbo_terms(
    vae: VAE,
    x: Tensor,
    context: Tensor | None = None,
    library: Tensor | None = None,
    noise: Noise | None = None,
    observed: Tensor | None = None,
) -> ElboTerms:
    r"""Compute the terms of ``ELBO = E_q log p(x | z, c) - KL(q(z | x, c) || p(z))``, with one sample of z per cell.

    Parameters
    ----------
    vae
        The model.
    x
        ``(cells, genes)``, values as they are stored.
    context
        ``(cells, context_dim)``, where the model has one.
    library
        ``(cells, 1)``; x's own sums if None.
    noise
        The sampling noise and dropout masks; drawn from torch's global generator if None.
    observed
        Which genes were measured, ``(genes,)`` bool; the others add nothing to the reconstruction. All if None.

    Returns
    -------
    ElboTerms
        Per cell, in nats.

    Examples
    --------
    A training loop:

    >>> import torch, celbo
    >>> counts = torch.poisson(torch.rand(256, 50, generator=torch.Generator().manual_seed(0)) * 5)
    >>> vae = celbo.VAE(input_dim=50, latent_dim=2, hidden_dims=[32], likelihood=celbo.LIKELIHOODS["nb"])
    >>> optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    >>> for epoch in range(3):
    ...     for x in counts.split(64):
    ...         loss = -celbo.elbo_terms(vae, x).elbo.mean()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    """
    return _terms(vae, x, context, library, noise, observed, sample=True)


def autoencoder_terms(
    vae: VAE,
    x: Tensor,
    context: Tensor | None = None,
    library: Tensor | None = None,
    noise: Noise | None = None,
    observed: Tensor | None = None,
) -> ElboTerms:
    """Compute the terms of a plain autoencoder: z is mu_z, and there is no KL.

    Parameters and result are those of `elbo_terms`; ``kl`` is zero, ``elbo`` the reconstruction alone.
    """
    return _terms(vae, x, context, library, noise, observed, sample=False)


def _terms(
    vae: VAE,
    x: Tensor,
    context: Tensor | None,
    library: Tensor | None,
    noise: Noise | None,
    observed: Tensor | None,
    *,
    sample: bool,
) -> ElboTerms:
    library = x.to_dense().sum(-1, keepdim=True) if library is None else library
    mu_z, logvar_z = vae.encode(x, context, masks=noise and noise.encoder)
    z = reparameterize(mu_z, logvar_z, noise and noise.eps) if sample else mu_z
    likelihood = vae.likelihood(z, context=context, library=library, masks=noise and noise.decoder)
    kl = kl_to_prior(vae, mu_z, logvar_z, z, context) if sample else torch.zeros_like(mu_z)
    return ElboTerms(log_prob_of_cells(likelihood, x, observed), kl, z)


def kl_to_prior(vae: VAE, mu_z: Tensor, logvar_z: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Compute the divergence of the posterior from the model's prior p(z | c), per latent dimension.

    It has a closed form if the prior is one normal distribution. For a mixture it is the estimate
    ``log q(z_j | x, c) - log p(z_j | z_1 ... z_j-1, c)`` from the sample z; its sum over dimensions is
    ``log q(z | x, c) - log p(z | c)``.

    Parameters
    ----------
    vae
        The model, for its prior.
    mu_z, logvar_z
        Mean and log-variance of the posterior, ``(cells, latent_dim)``.
    z
        A sample of the posterior, ``(cells, latent_dim)``.
    context
        ``(cells, context_dim)``, where the model has one.

    Returns
    -------
    Tensor
        ``(cells, latent_dim)``, nats.
    """
    if isinstance(vae.prior, StandardPrior):
        return kl_divergence(mu_z, logvar_z)
    prior = vae.prior_components(z, context)
    if len(prior.log_weights) == 1:
        mu, logvar = prior.mu[:, 0], prior.logvar[:, 0]
        return kl_divergence((mu_z - mu) * (-0.5 * logvar).exp(), logvar_z - logvar)
    log_joint = _log_normal(z[:, None], prior.mu, prior.logvar).cumsum(-1) + prior.log_weights[:, None]
    log_prior = log_joint.logsumexp(1).diff(dim=-1, prepend=z.new_zeros(len(z), 1))
    return _log_normal(z, mu_z, logvar_z) - log_prior


def _log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi))


def log_prob_of_cells(p: Distribution, x: Tensor, observed: Tensor | None) -> Tensor:
    """Sum ``log p(x)`` of each cell over the measured genes."""
    if observed is not None:
        return torch.where(observed, p.log_prob(x.to_dense()), 0).sum(-1)
    if isinstance(p, Poisson | NegativeBinomial | ZeroInflatedNegativeBinomial):
        return p.log_prob_of_cells(x)
    return p.log_prob(x.to_dense()).sum(-1)


class Objective(NamedTuple):
    """A row of `OBJECTIVES`."""

    name: str
    terms: Callable[..., ElboTerms]
    """A function with the signature of `elbo_terms`."""
    samples_z: bool
    """Whether z is sampled from a posterior; else z is mu_z, and there is no KL."""
    meaning: str
    """One line for people."""


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("vae", elbo_terms, True, "the evidence lower bound"),
        Objective("autoencoder", autoencoder_terms, False, "the reconstruction alone: no KL, z = mu_z"),
    )
}
"""Every objective by name."""
