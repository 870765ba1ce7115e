"""Count distributions and their formulas, with the interface of torch; the kernels compute their log-probabilities.

Each can be made from its mean or, without rounding, from logarithms: `NegativeBinomial(mu, theta)` or
`NegativeBinomial(log_mu=..., log_theta=...)`, as torch lets a Bernoulli be made from ``probs`` or ``logits``. A third
form is the decoder's: `Shares`, of which the kernels take last layer, softmax and log-probability in one pass.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, constraints

from celbo.kernels.dispatch import decoded_log_prob
from celbo.kernels.reference import DecodedCounts, nb_log_prob, poisson_log_prob, zinb_log_prob

__all__ = ["NegativeBinomial", "Poisson", "Shares", "ZeroInflatedNegativeBinomial"]


class Shares(NamedTuple):
    """The parts of a decoded mean: ``mu = exp(log_library) softmax(h @ weight.T + bias)``."""

    h: Tensor
    """Last hidden layer, ``(cells, width)``."""
    weight: Tensor
    """``(genes, width)``."""
    bias: Tensor
    """``(genes,)``."""
    log_library: Tensor
    """``(cells, 1)``."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the mean, ``(cells, genes)``."""
        return torch.Size((*self.h.shape[:-1], len(self.weight)))


class Poisson(Distribution):
    """Poisson counts, ``p(x) = mu**x exp(-mu) / x!``: mean and variance ``mu``.

    Parameters
    ----------
    mu
        Mean, at least 0; any shape.
    log_mu
        Its logarithm, instead.
    shares
        Or what it is made of.

    Examples
    --------
    >>> import torch
    >>> Poisson(torch.tensor([1.0])).log_prob(torch.tensor([2.0]))
    tensor([-1.6931])
    """

    arg_constraints = {"mu": constraints.nonnegative}  # noqa: RUF012 (torch's own form)
    support = constraints.nonnegative_integer
    shares: Shares

    def __init__(
        self,
        mu: Tensor | None = None,
        *,
        log_mu: Tensor | None = None,
        shares: Shares | None = None,
        validate_args: bool | None = None,
    ):
        shape = _set_one(self, mu=mu, log_mu=log_mu, shares=shares)
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @cached_property
    def mu(self) -> Tensor:
        """Mean."""
        return _mean(self)

    @cached_property
    def log_mu(self) -> Tensor:
        """Logarithm of the mean; in float64 if it is computed from ``mu``, to keep its precision."""
        return _log_mean(self)

    @property
    def mean(self) -> Tensor:
        """``mu``."""
        return self.mu

    @property
    def variance(self) -> Tensor:
        """``mu``."""
        return self.mu

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts, nats; see `celbo.kernels.reference.poisson_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return poisson_log_prob(value, self.log_mu).to(_float_dtype(value))

    def log_prob_of_cells(self, value: Tensor) -> Tensor:
        """Sum of `log_prob` over genes, ``(cells,)``; ``value`` may be CSR."""
        if not _is_softmax(self, value):
            return self.log_prob(value.to_dense()).sum(-1)
        return decoded_log_prob(DecodedCounts(value, *self.shares))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``."""
        rate = self.mu.double().expand(self._extended_shape(torch.Size(sample_shape)))
        return torch.poisson(rate, generator=generator).to(self.mu.dtype)


class NegativeBinomial(Distribution):
    r"""Negative binomial counts with mean ``mu`` and variance ``mu + mu**2 / theta``.

    The formula is
    ``p(x) = Gamma(x + theta) / (Gamma(theta) x!) (theta / (theta + mu))**theta (mu / (theta + mu))**x``; its logarithm
    is computed by `celbo.kernels.reference.nb_log_prob`. ``theta`` is the inverse dispersion: at infinity the
    distribution is a Poisson. ``mu`` and ``theta`` broadcast.

    Parameters
    ----------
    mu
        Mean, at least 0.
    theta
        Inverse dispersion, above 0.
    log_mu, log_theta
        Their logarithms, instead.
    shares
        Or what the mean is made of.

    Examples
    --------
    >>> import torch
    >>> nb = NegativeBinomial(torch.tensor([4.0]), torch.tensor([2.0]))
    >>> nb.mean, nb.variance, nb.log_prob(torch.tensor([0.0])).exp()
    (tensor([4.]), tensor([12.]), tensor([0.1111]))
    """

    arg_constraints = {"mu": constraints.nonnegative, "theta": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer
    shares: Shares

    def __init__(
        self,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        *,
        log_mu: Tensor | None = None,
        shares: Shares | None = None,
        log_theta: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        shape = _set_one(self, mu=mu, log_mu=log_mu, shares=shares)
        of_theta = _set_one(self, theta=theta, log_theta=log_theta)
        super().__init__(batch_shape=torch.broadcast_shapes(shape, of_theta), validate_args=validate_args)

    @cached_property
    def mu(self) -> Tensor:
        """Mean."""
        return _mean(self)

    @cached_property
    def theta(self) -> Tensor:
        """Inverse dispersion."""
        return self.log_theta.exp()

    @cached_property
    def log_mu(self) -> Tensor:
        """Logarithm of the mean; in float64 if it is computed from ``mu``, to keep its precision."""
        return _log_mean(self)

    @cached_property
    def log_theta(self) -> Tensor:
        """Logarithm of the inverse dispersion, in float64."""
        return self.theta.double().log()

    @property
    def mean(self) -> Tensor:
        """``mu``."""
        return self.mu.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """``mu + mu**2 / theta``."""
        return self.mu + self.mu.square() / self.theta

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-probability of counts, nats; see `celbo.kernels.reference.nb_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return nb_log_prob(value, self.log_mu, self.log_theta).to(_float_dtype(value))

    def log_prob_of_cells(self, value: Tensor) -> Tensor:
        """Sum of `log_prob` over genes, ``(cells,)``; ``value`` may be CSR."""
        if not _is_softmax(self, value):
            return self.log_prob(value.to_dense()).sum(-1)
        return decoded_log_prob(DecodedCounts(value, *self.shares, self.log_theta))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``: a Poisson whose rate is Gamma distributed."""
        shape = self._extended_shape(torch.Size(sample_shape))
        theta = self.theta.double().expand(shape)
        rate = torch._standard_gamma(theta, generator=generator) * (self.mu.double() / theta)
        return torch.poisson(rate, generator=generator).to(self.mu.dtype)


class ZeroInflatedNegativeBinomial(Distribution):
    r"""Negative binomial counts, each replaced by zero with probability ``pi = sigmoid(gate_logits)``.

    ``p(x) = pi [x = 0] + (1 - pi) NB(x)``, mean ``(1 - pi) mu``, variance ``(1 - pi) (mu + mu**2 (1 / theta + pi))``.

    Parameters
    ----------
    base
        The counts before zeros are added.
    gate_logits
        Logit of the zero-inflation probability; broadcasts with ``base``.
    gate
        Instead, the linear map that makes it of the ``h`` of the base's `Shares`.

    Examples
    --------
    >>> import torch
    >>> nb = NegativeBinomial(torch.tensor([4.0]), torch.tensor([2.0]))
    >>> ZeroInflatedNegativeBinomial(nb, torch.tensor([0.0])).mean
    tensor([2.])
    """

    arg_constraints = {"gate_logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self,
        base: NegativeBinomial,
        gate_logits: Tensor | None = None,
        *,
        gate: nn.Linear | None = None,
        validate_args: bool | None = None,
    ):
        self.base = base
        shape = base.batch_shape
        if gate is None:
            shape = torch.broadcast_shapes(shape, _set_one(self, gate_logits=gate_logits))
        else:
            self.gate = gate
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @cached_property
    def gate_logits(self) -> Tensor:
        """Logit of the probability of an added zero."""
        logits: Tensor = self.gate(self.base.shares.h)
        return logits

    @property
    def mean(self) -> Tensor:
        """``(1 - pi) mu``."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """``(1 - pi) (mu + mu**2 (1 / theta + pi))``."""
        gate = torch.sigmoid(self.gate_logits)
        return (1 - gate) * (self.base.variance + gate * self.base.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts, nats; see `celbo.kernels.reference.zinb_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = zinb_log_prob(value, self.base.log_mu, self.base.log_theta, self.gate_logits)
        return log_prob.to(_float_dtype(value))

    def log_prob_of_cells(self, value: Tensor) -> Tensor:
        """Sum of `log_prob` over genes, ``(cells,)``; ``value`` may be CSR."""
        base = self.base
        if "gate" not in self.__dict__ or not _is_softmax(base, value):
            return self.log_prob(value.to_dense()).sum(-1)
        return decoded_log_prob(DecodedCounts(value, *base.shares, base.log_theta, self.gate.weight, self.gate.bias))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``."""
        keep = torch.sigmoid(-self.gate_logits).expand(self._extended_shape(torch.Size(sample_shape)))
        counts = NegativeBinomial(self.base.mu.expand(self.batch_shape), self.base.theta, validate_args=False)
        return torch.bernoulli(keep, generator=generator) * counts.sample(sample_shape, generator)


def _set_one(to: Distribution, **forms: Tensor | Shares | None) -> torch.Size:
    """Store a parameter in the form in which it was given; `cached_property` makes the other forms on first use."""
    given = {name: value for name, value in forms.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{type(to).__name__} takes one of {', '.join(forms)}, and got {', '.join(given) or 'none'}")
    to.__dict__.update(given)
    (value,) = given.values()
    return value.shape


def _mean(p: Poisson | NegativeBinomial) -> Tensor:
    if "shares" not in p.__dict__:
        return p.log_mu.exp()
    return p.shares.log_library.exp() * F.softmax(F.linear(*p.shares[:3]), dim=-1)


def _log_mean(p: Poisson | NegativeBinomial) -> Tensor:
    if "shares" not in p.__dict__:
        return _log(p.mu)
    return p.shares.log_library + F.log_softmax(F.linear(*p.shares[:3]), dim=-1)


def _is_softmax(p: Poisson | NegativeBinomial, value: Tensor) -> bool:
    """Whether the kernels that take last layer, softmax and log-probability in one pass fit."""
    return "shares" in p.__dict__ and len(p.batch_shape) == 2 and value.shape == p.batch_shape


def _log(mu: Tensor) -> Tensor:
    """Compute the logarithm in float64; at 0 it is minus infinity, with a gradient of 0."""
    mu = mu.double()
    return torch.where(mu > 0, mu, 1.0).log().masked_fill(mu == 0, -torch.inf)


def _float_dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_floating_point() else torch.get_default_dtype()
