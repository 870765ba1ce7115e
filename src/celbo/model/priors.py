"""Priors p(z | c), each a mixture of normal distributions with diagonal covariance; and the table PRIORS of them.

A prior is one final class whose ``forward`` gives its components, and one row. `celbo.model.objective` alone
uses them: one component has a closed-form KL, several have one estimated from the sample of z.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from celbo.errors import UsageError

__all__ = [
    "PRIORS",
    "Components",
    "ConditionalPrior",
    "Encode",
    "MixturePrior",
    "Prior",
    "PriorRow",
    "StandardPrior",
    "VampPrior",
    "make_prior",
]


class Components(NamedTuple):
    """A mixture of K normal distributions. If it is the same for all cells, the axis of cells has length 1."""

    log_weights: Tensor
    """``(K,)``, summing to 1 as probabilities."""
    mu: Tensor
    """``(cells or 1, K, latent_dim)``."""
    logvar: Tensor
    """As ``mu``."""

    def distribution(self) -> Distribution:
        """Return the prior as a distribution of torch, over ``(cells or 1, latent_dim)``."""
        weights = Categorical(logits=self.log_weights.expand(self.mu.shape[:2]))
        normal = Independent(Normal(self.mu, (0.5 * self.logvar).exp(), validate_args=False), 1)
        return MixtureSameFamily(weights, normal, validate_args=False)


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``mu_z, logvar_z`` of what the encoder's first layer gave, ``(cells, width)``."""


class Prior(Protocol):
    """Interface of a prior of `celbo.VAE`."""

    def __call__(self, z: Tensor, context: Tensor | None, encode: Encode) -> Components:
        """Return the components for these cells; only shape and device of z ``(cells, latent_dim)`` matter."""
        ...


class StandardPrior(nn.Module):
    """``z ~ N(0, I)``."""

    def __init__(self, latent_dim: int, context_dim: int, width: int, size: int):
        super().__init__()

    def forward(self, z: Tensor, context: Tensor | None, encode: Encode) -> Components:
        """Return one component for all cells."""
        zeros = z.new_zeros(1, 1, z.shape[-1])
        return Components(z.new_zeros(1), zeros, zeros)


class ConditionalPrior(nn.Module):
    """``z ~ N(m(c), s(c)**2)``, both linear in the context (Sohn 2015): what follows from c is expected, and free."""

    def __init__(self, latent_dim: int, context_dim: int, width: int, size: int):
        super().__init__()
        if context_dim == 0:
            raise UsageError("prior='conditional' needs a condition to depend on; name one, or use 'normal'")
        self.fc_mu = nn.Linear(context_dim, latent_dim)
        self.fc_logvar = nn.Linear(context_dim, latent_dim)
        for parameter in self.parameters():  # the standard normal, until training moves it
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, context: Tensor | None, encode: Encode) -> Components:
        """Return one component for each cell."""
        assert context is not None
        mu, logvar = self.fc_mu(context), self.fc_logvar(context)
        return Components(mu.new_zeros(1), mu[:, None], logvar[:, None])


class MixturePrior(nn.Module):
    """``z ~ sum_k w_k N(m_k, s_k**2)``, everything learned."""

    def __init__(self, latent_dim: int, context_dim: int, width: int, size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))
        self.mu = nn.Parameter(torch.randn(size, latent_dim))
        self.logvar = nn.Parameter(torch.zeros(size, latent_dim))

    def forward(self, z: Tensor, context: Tensor | None, encode: Encode) -> Components:
        """Return the same K components for all cells."""
        return Components(self.logits.log_softmax(0), self.mu[None], self.logvar[None])


class VampPrior(nn.Module):
    """``z ~ mean_k q(z | u_k)``: the posteriors of K learned pseudo-cells (Tomczak & Welling 2018, arXiv 1705.07120).

    A pseudo-cell is kept as what the encoder's first layer makes of it, ``(K, width)``. That loses nothing, as the
    encoder sees a cell only through this layer, and no counts of the cells they start from are kept with the model.
    """

    def __init__(self, latent_dim: int, context_dim: int, width: int, size: int):
        super().__init__()
        if width == 0:
            raise UsageError("prior='vamp' needs an encoder with a hidden layer; give hidden_dims, or use 'mixture'")
        self.pseudo_cells = nn.Parameter(torch.randn(size, width))

    def forward(self, z: Tensor, context: Tensor | None, encode: Encode) -> Components:
        """Return the same K components for all cells."""
        mu, logvar = encode(self.pseudo_cells)
        size = len(self.pseudo_cells)
        return Components(mu.new_full((size,), -math.log(size)), mu[None], logvar[None])


class PriorRow(NamedTuple):
    """A row of `PRIORS`."""

    name: str
    make: Callable[[int, int, int, int], nn.Module]
    """``(latent_dim, context_dim, width of the encoder's first layer, number of components)`` to a prior."""
    size: int
    """Default number of components; 0 if the number is fixed."""
    meaning: str


PRIORS: dict[str, PriorRow] = {
    row.name: row
    for row in (
        PriorRow("normal", StandardPrior, 0, "the standard normal"),
        PriorRow("conditional", ConditionalPrior, 0, "a normal distribution for each level of the conditions"),
        PriorRow("mixture", MixturePrior, 20, "a mixture of normal distributions, learned"),
        PriorRow("vamp", VampPrior, 100, "a mixture of the posteriors of learned pseudo-cells"),
    )
}
"""Every prior by name; ``mixture:50`` asks for 50 components."""


def make_prior(text: str, latent_dim: int, context_dim: int, width: int) -> nn.Module:
    """Make the prior of this name, with the number of components after a colon if there is one.

    Examples
    --------
    >>> make_prior("mixture:3", latent_dim=2, context_dim=0, width=16).mu.shape
    torch.Size([3, 2])
    """
    name, colon, number = text.partition(":")
    row = PRIORS.get(name)
    if row is None or (colon and (not row.size or not number.isdecimal() or not 1 <= int(number) <= 10_000)):
        known = ", ".join(f"{row.name}:{row.size}" if row.size else row.name for row in PRIORS.values())
        raise UsageError(f"prior is {text!r}; choose one of {known} (the number is that of components, to 10,000)")
    return row.make(latent_dim, context_dim, width, int(number) if colon else row.size)
