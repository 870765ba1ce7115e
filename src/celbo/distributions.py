"""Count distributions with torch's manners; their log-probabilities are the kernels'.

Each can be made from its mean or, without rounding, from logarithms: `NegativeBinomial(mu, theta)` or
`NegativeBinomial(log_mu=..., log_theta=...)`, as torch lets a Bernoulli be made from ``probs`` or ``logits``.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from celbo import kernels

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]


class Poisson(Distribution):
    """Poisson counts: mean and variance ``mu``.

    Parameters
    ----------
    mu
        Mean, at least 0; any shape.
    log_mu
        Its logarithm, instead.

    Examples
    --------
    >>> import torch
    >>> Poisson(torch.tensor([1.0])).log_prob(torch.tensor([2.0]))
    tensor([-1.6931])
    """

    arg_constraints = {"mu": constraints.nonnegative}  # noqa: RUF012 (torch's own form)
    support = constraints.nonnegative_integer

    def __init__(self, mu: Tensor | None = None, *, log_mu: Tensor | None = None, validate_args: bool | None = None):
        _set_one("mu", self, mu, log_mu)
        shape = (log_mu if mu is None else mu).shape  # type: ignore[union-attr]
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @lazy_property
    def mu(self) -> Tensor:
        """Mean."""
        return self.log_mu.exp()

    @lazy_property
    def log_mu(self) -> Tensor:
        """Logarithm of the mean; in float64, so that nothing of ``mu`` is lost."""
        return _log(self.mu)

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
        return kernels.poisson_log_prob(value, self.log_mu).to(_float_dtype(value))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``."""
        rate = self.mu.double().expand(self._extended_shape(torch.Size(sample_shape)))
        return torch.poisson(rate, generator=generator).to(self.mu.dtype)


class NegativeBinomial(Distribution):
    r"""Negative binomial counts with mean ``mu`` and variance ``mu + mu**2 / theta``.

    ``theta`` is the inverse dispersion: the Poisson is its limit at infinity. The probability of a zero is
    ``(theta / (theta + mu)) ** theta``. ``mu`` and ``theta`` broadcast.

    Parameters
    ----------
    mu
        Mean, at least 0.
    theta
        Inverse dispersion, above 0.
    log_mu, log_theta
        Their logarithms, instead.

    Examples
    --------
    >>> import torch
    >>> nb = NegativeBinomial(torch.tensor([4.0]), torch.tensor([2.0]))
    >>> nb.mean, nb.variance, nb.log_prob(torch.tensor([0.0])).exp()
    (tensor([4.]), tensor([12.]), tensor([0.1111]))
    """

    arg_constraints = {"mu": constraints.nonnegative, "theta": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        *,
        log_mu: Tensor | None = None,
        log_theta: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        _set_one("mu", self, mu, log_mu)
        _set_one("theta", self, theta, log_theta)
        parts = [part for part in (mu, log_mu, theta, log_theta) if part is not None]
        shape = torch.broadcast_shapes(*(part.shape for part in parts))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    @lazy_property
    def mu(self) -> Tensor:
        """Mean."""
        return self.log_mu.exp()

    @lazy_property
    def theta(self) -> Tensor:
        """Inverse dispersion."""
        return self.log_theta.exp()

    @lazy_property
    def log_mu(self) -> Tensor:
        """Logarithm of the mean; in float64, so that nothing of ``mu`` is lost."""
        return _log(self.mu)

    @lazy_property
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
        """Log-probability of counts, nats; see `celbo.kernels.reference.nb_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return kernels.nb_log_prob(value, self.log_mu, self.log_theta).to(_float_dtype(value))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``: a Poisson whose rate is Gamma distributed."""
        shape = self._extended_shape(torch.Size(sample_shape))
        theta = self.theta.double().expand(shape)
        rate = torch._standard_gamma(theta, generator=generator) * (self.mu.double() / theta)
        return torch.poisson(rate, generator=generator).to(self.mu.dtype)


class ZeroInflatedNegativeBinomial(Distribution):
    r"""Negative binomial counts, each replaced by zero with probability ``pi = sigmoid(gate_logits)``.

    Mean ``(1 - pi) mu``, variance ``(1 - pi) (mu + mu**2 (1 / theta + pi))``.

    Parameters
    ----------
    base
        The counts before zeros are added.
    gate_logits
        Logit of the zero-inflation probability; broadcasts with ``base``.

    Examples
    --------
    >>> import torch
    >>> nb = NegativeBinomial(torch.tensor([4.0]), torch.tensor([2.0]))
    >>> ZeroInflatedNegativeBinomial(nb, torch.tensor([0.0])).mean
    tensor([2.])
    """

    arg_constraints = {"gate_logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, base: NegativeBinomial, gate_logits: Tensor, *, validate_args: bool | None = None):
        self.base = base
        self.gate_logits = gate_logits
        shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        super().__init__(batch_shape=shape, validate_args=validate_args)

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
        log_prob = kernels.zinb_log_prob(value, self.base.log_mu, self.base.log_theta, self.gate_logits)
        return log_prob.to(_float_dtype(value))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw counts, ``sample_shape + batch_shape``."""
        keep = torch.sigmoid(-self.gate_logits).expand(self._extended_shape(torch.Size(sample_shape)))
        counts = NegativeBinomial(self.base.mu.expand(self.batch_shape), self.base.theta, validate_args=False)
        return torch.bernoulli(keep, generator=generator) * counts.sample(sample_shape, generator)


def _set_one(name: str, to: Distribution, value: Tensor | None, log_value: Tensor | None) -> None:
    """Store a parameter in the form it was given; `lazy_property` makes the other when somebody asks."""
    if (value is None) == (log_value is None):
        raise ValueError(f"{type(to).__name__} takes either {name} or log_{name}, and needs one of them")
    to.__dict__[name if log_value is None else f"log_{name}"] = value if log_value is None else log_value


def _log(mu: Tensor) -> Tensor:
    """Logarithm in float64; minus infinity at 0, where its gradient (infinite) is left out."""
    mu = mu.double()
    return torch.where(mu > 0, mu, 1.0).log().masked_fill(mu == 0, -torch.inf)


def _float_dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_floating_point() else torch.get_default_dtype()
