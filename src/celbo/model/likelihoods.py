"""Likelihood heads p(x | h, library), and the table LIKELIHOODS of all of them.

A head turns the decoder's last hidden layer ``h`` and its last linear map ``fc_out`` into a Distribution over genes. It
owns what the distribution needs beside them. A new likelihood is one final class with these three methods and one row.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal

from celbo.minibatch import GeneMoments
from celbo.model.distributions import NegativeBinomial, Poisson, Shares, ZeroInflatedNegativeBinomial

__all__ = [
    "DISPERSIONS",
    "LIKELIHOODS",
    "BernoulliHead",
    "GaussianHead",
    "Head",
    "Likelihood",
    "NegativeBinomialHead",
    "PoissonHead",
    "ZeroInflatedNegativeBinomialHead",
]

DISPERSIONS = ("gene", "gene-condition", "gene-cell", "fixed")
"""What theta of a negative binomial depends on: the gene; the gene and the condition's level; the gene and the cell.
A Gaussian's sigma depends on the gene, or is fixed at 1: the squared error of many a textbook, and a trap."""

# An empty cell has library 0; its mean then is 1e-8 counts, where every likelihood of a zero is 1 to float precision.
_SMALLEST_LIBRARY = 1e-8
# Bounds of theta at the start: outside them moments of a few counts say only that a gene is rare.
_THETA_RANGE = (1e-2, 1e3)
# Standard deviations below this are a constant gene; without a floor its density grows without bound.
_SMALLEST_SIGMA = 1e-2
# Shares and probabilities at the start stay this far from 0, where a logarithm would leave the gene out for good.
_HALF_A_COUNT = 0.5


class Head(Protocol):
    """Interface of a likelihood of `celbo.VAE`."""

    def encoder_input(self, x: Tensor) -> Tensor:
        """Scale values for the encoder, elementwise; 0 stays 0, so that sparse counts stay sparse."""
        ...

    def __call__(self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None) -> Distribution:
        """Return p(x | h, library): ``h (cells, width)``, ``fc_out`` from width to genes, ``library (cells, 1)``."""
        ...

    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Set ``fc_out.bias`` and the head's own parameters to the best model that ignores z."""
        ...


class GaussianHead(nn.Module):
    """Real numbers: ``x ~ N(out, sigma**2)``, one learned sigma per gene (Rybkin 2021, arXiv 2006.13202).

    With ``dispersion="fixed"`` sigma is 1, and minus the log-likelihood half the squared error.
    """

    def __init__(self, n_genes: int, width: int, context_dim: int, dispersion: str):
        super().__init__()
        self.log_sigma = None if dispersion == "fixed" else nn.Parameter(torch.zeros(n_genes))

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x

    def forward(self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None) -> Normal:
        """``N(out, sigma**2)``; the library size plays no part."""
        mean = fc_out(h)
        sigma = mean.new_ones(()) if self.log_sigma is None else _SMALLEST_SIGMA + self.log_sigma.exp()
        return Normal(mean, sigma.expand_as(mean), validate_args=False)

    @torch.no_grad()
    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Start at gene means and standard deviations."""
        mean = moments.x / moments.n_cells
        variance = moments.x_squared / moments.n_cells - mean.square()
        fc_out.bias.copy_(mean)
        if self.log_sigma is None:
            return
        sd = variance.clamp(min=0).sqrt()
        self.log_sigma.copy_((sd - _SMALLEST_SIGMA).clamp(min=_SMALLEST_SIGMA / 100).log())


class BernoulliHead(nn.Module):
    """Zero or one (detected or not): ``P(x = 1) = sigmoid(out)``."""

    def __init__(self, n_genes: int, width: int, context_dim: int, dispersion: str):
        super().__init__()

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x

    def forward(self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None) -> Bernoulli:
        """``Bernoulli(sigmoid(out))``; the library size plays no part, z has to carry depth."""
        return Bernoulli(logits=fc_out(h), validate_args=False)

    @torch.no_grad()
    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Start at the logit of the share of cells in which a gene is detected."""
        share = (moments.detected + _HALF_A_COUNT) / (moments.n_cells + 2 * _HALF_A_COUNT)
        fc_out.bias.copy_(torch.logit(share))


class PoissonHead(nn.Module):
    """Counts: ``x ~ Poisson(mu)``, ``mu = library softmax(out)``."""

    def __init__(self, n_genes: int, width: int, context_dim: int, dispersion: str):
        super().__init__()

    def encoder_input(self, x: Tensor) -> Tensor:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def forward(self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None) -> Poisson:
        """``Poisson(library softmax(out))``."""
        return Poisson(shares=_shares(h, fc_out, library), validate_args=False)

    @torch.no_grad()
    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Start at the logarithm of each gene's share of all counts."""
        fc_out.bias.copy_(_share(moments).log())


class NegativeBinomialHead(nn.Module):
    """Counts: ``x ~ NB(mu, theta)``, ``mu = library softmax(out)``, variance ``mu + mu**2 / theta``.

    ``log theta`` is one parameter per gene (``dispersion="gene"``), or the output of ``fc_theta`` applied to the
    context ("gene-condition") or to the decoder's last hidden layer ("gene-cell").
    """

    def __init__(self, n_genes: int, width: int, context_dim: int, dispersion: str):
        super().__init__()
        self.dispersion = dispersion
        if dispersion == "gene":
            self.log_theta = nn.Parameter(torch.zeros(n_genes))
        else:
            self.fc_theta = nn.Linear(width if dispersion == "gene-cell" else context_dim, n_genes)
            # Every cell and level starts with the gene's own theta, and moves away from it as the data ask.
            nn.init.zeros_(self.fc_theta.weight)

    def encoder_input(self, x: Tensor) -> Tensor:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def forward(self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None) -> NegativeBinomial:
        """``NB(library softmax(out), theta)``."""
        if self.dispersion == "gene":
            log_theta = self.log_theta
        else:
            log_theta = self.fc_theta(h if self.dispersion == "gene-cell" else context)
        return NegativeBinomial(shares=_shares(h, fc_out, library), log_theta=log_theta, validate_args=False)

    @torch.no_grad()
    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Start at shares of counts; theta by moments, ``sum mu**2 / sum((x - mu)**2 - mu)``, mu = library x share."""
        fc_out.bias.copy_(_share(moments).log())
        (self.log_theta if self.dispersion == "gene" else self.fc_theta.bias).copy_(_theta_by_moments(moments).log())


class ZeroInflatedNegativeBinomialHead(nn.Module):
    """Counts as in `NegativeBinomialHead`, zeroed with probability ``sigmoid(fc_gate(h))``."""

    def __init__(self, n_genes: int, width: int, context_dim: int, dispersion: str):
        super().__init__()
        self.nb = NegativeBinomialHead(n_genes, width, context_dim, dispersion)
        self.fc_gate = nn.Linear(width, n_genes)

    def encoder_input(self, x: Tensor) -> Tensor:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def forward(
        self, h: Tensor, fc_out: nn.Linear, context: Tensor | None, library: Tensor | None
    ) -> ZeroInflatedNegativeBinomial:
        """``ZINB(library softmax(out), theta, sigmoid(fc_gate(h)))``."""
        return ZeroInflatedNegativeBinomial(
            self.nb(h, fc_out, context, library), gate=self.fc_gate, validate_args=False
        )

    @torch.no_grad()
    def initialise(self, fc_out: nn.Linear, moments: GeneMoments) -> None:
        """Start as the negative binomial, with a gate that is open by the share of zeros that it does not explain."""
        self.nb.initialise(fc_out, moments)
        theta = _theta_by_moments(moments)
        mean = _share(moments) * moments.library / moments.n_cells
        expected = (theta / (theta + mean)) ** theta
        zeros = 1 - moments.detected / moments.n_cells
        # The gate is never quite shut: at 1e-2 it still has a gradient.
        gate = ((zeros - expected) / (1 - expected).clamp(min=1e-6)).clamp(1e-2, 0.9)
        self.fc_gate.bias.copy_(torch.logit(gate))


class Likelihood(NamedTuple):
    """A row of `LIKELIHOODS`."""

    name: str
    make_head: Callable[[int, int, int, str], Head]
    """``(n_genes, width of h, context_dim, dispersion)`` to a head."""
    values: str
    """What x is: "counts", "detected" (counts > 0), or "real" (log-normalised counts, or a layer of reals)."""
    dispersions: tuple[str, ...]
    """The `DISPERSIONS` that it can have."""
    meaning: str
    """One line for people."""


_OF_THETA = ("gene", "gene-condition", "gene-cell")

LIKELIHOODS: dict[str, Likelihood] = {
    row.name: row
    for row in (
        Likelihood(
            "gaussian", GaussianHead, "real", ("gene", "fixed"), "log-normalised counts, or a layer of real numbers"
        ),
        Likelihood("bernoulli", BernoulliHead, "detected", ("gene",), "whether a gene was detected at all"),
        Likelihood("poisson", PoissonHead, "counts", ("gene",), "counts whose only noise is counting"),
        Likelihood("nb", NegativeBinomialHead, "counts", _OF_THETA, "counts that vary more than counting explains"),
        Likelihood("zinb", ZeroInflatedNegativeBinomialHead, "counts", _OF_THETA, "such counts with additional zeros"),
    )
}
"""Every likelihood by name."""


def _shares(h: Tensor, fc_out: nn.Linear, library: Tensor | None) -> Shares:
    """Compute expression shares by a softmax, times the library size if there is one."""
    if library is None:
        return Shares(h, fc_out.weight, fc_out.bias, h.new_zeros(*h.shape[:-1], 1))
    return Shares(h, fc_out.weight, fc_out.bias, library.clamp(min=_SMALLEST_LIBRARY).log())


def _share(moments: GeneMoments) -> Tensor:
    """Compute each gene's share of all counts; a gene without counts gets half a count."""
    counts = moments.x.clamp(min=_HALF_A_COUNT)
    return counts / counts.sum()


def _theta_by_moments(moments: GeneMoments) -> Tensor:
    """Compute the inverse dispersion of each gene around library x share, clamped if counts are too few."""
    share = _share(moments)
    mu_squared = share.square() * moments.library_squared
    residual = moments.x_squared - 2 * share * moments.x_library + mu_squared
    excess = residual - share * moments.library
    smallest, largest = _THETA_RANGE
    return torch.where(excess > mu_squared / largest, mu_squared / excess, largest).clamp(smallest, largest)
