r"""Compute log-likelihoods of counts in plain torch: the definition that tests compare every faster tier with.

All functions take ``log mu`` and ``log theta``. They compute in float64, because float32 cannot compute the negative
binomial near its Poisson limit (at theta = 1e6 no digit is right). They evaluate special functions, which cost ten
times the rest, only at non-zero counts.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "AdamState",
    "DecodedCounts",
    "adam",
    "adam_constants",
    "decoded_log_prob",
    "nb_log_prob",
    "poisson_log_prob",
    "sparse_linear",
    "zinb_log_prob",
]

# Above this value, digamma(y) - log(y) uses its asymptotic series, whose first neglected term is 1e-17 here. Below,
# digamma is exact enough, because a small theta does not amplify the rounding errors of the logarithms.
_SERIES_FROM = 64.0


class AdamState(NamedTuple):
    """What Adam remembers of one vector of numbers."""

    first: Tensor
    """Running mean of the gradient."""
    second: Tensor
    """Running mean of the squared gradient."""
    average: Tensor
    """Running average of the numbers."""

    @classmethod
    def of(cls, numbers: Tensor) -> "AdamState":
        """Return the state before the first step of these numbers, ``(n,)``."""
        numbers = numbers.detach()
        return cls(torch.zeros_like(numbers), torch.zeros_like(numbers), numbers.clone())


def adam(
    weights: Tensor, gradient: Tensor, state: AdamState, *, factor: float, rate: float, step: int, share: float
) -> None:
    r"""Take step number ``step`` of Adam (Kingma & Ba 2015) in place, with the gradient times ``factor``.

    .. math::
        m \leftarrow .9 m + .1 g, \quad v \leftarrow .999 v + .001 g^2, \quad
        w \leftarrow w - \mathrm{rate} \frac{m / (1 - .9^t)}{\sqrt{v / (1 - .999^t)} + 10^{-8}}

    Then the average moves by ``share`` of its distance to the weights.
    """
    rate, floor = adam_constants(rate, step)
    gradient = gradient * factor
    state.first.lerp_(gradient, 0.1)
    state.second.lerp_(gradient.square(), 0.001)
    weights.sub_(rate * state.first / (state.second.sqrt() + floor))
    state.average.lerp_(weights, share)


def adam_constants(rate: float, step: int) -> tuple[float, float]:
    """Return the rate and the smallest denominator of a step of Adam, with both corrections of its bias in them."""
    root = math.sqrt(1 - 0.999**step)
    return rate * root / (1 - 0.9**step), 1e-8 * root


def nb_log_prob(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    r"""Compute the negative binomial log-probability of counts, with variance ``mu + mu**2 / theta``.

    With l = log mu - log theta::

        log NB(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - theta softplus(l) - x softplus(-l)
        d / d log mu    = theta (x - mu) / (theta + mu)
        d / d log theta = theta (log1p(u) - u + s(x + theta) - s(theta)),
            u = (x - mu) / (theta + mu),  s(y) = digamma(y) - log(y)

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``.
    log_mu, log_theta
        Logarithms of the mean and of the inverse dispersion; any shape that broadcasts with ``x``.

    Returns
    -------
    Tensor
        ``(cells, genes)``, nats, in the dtype of ``log_mu``. Differentiable once, in ``log_mu`` and ``log_theta``.

    Examples
    --------
    >>> import torch
    >>> nb_log_prob(torch.tensor([0.0, 3.0]), torch.zeros(2), torch.zeros(2))
    tensor([-0.6931, -2.7726])
    """
    result: Tensor = _NegativeBinomial.apply(x, log_mu, log_theta)  # type: ignore[no-untyped-call]
    return result


class _NegativeBinomial(torch.autograd.Function):
    """Compute the formulas of `nb_log_prob`, with an analytic gradient, which is more exact than autograd of lgamma."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
        x, log_ratio, theta = torch.broadcast_tensors(x, log_mu.double() - log_theta.double(), log_theta.double().exp())
        softplus = _softplus(log_ratio)
        log_prob = (-theta * softplus).contiguous()
        counted = x.reshape(-1).nonzero().squeeze(1)
        ctx.save_for_backward(x, log_ratio, theta, softplus, counted)
        ctx.of_mu, ctx.of_theta = (log_mu.shape, log_mu.dtype), (log_theta.shape, log_theta.dtype)

        x, log_ratio, theta = _at(counted, x).double(), _at(counted, log_ratio), _at(counted, theta)
        log_prob.view(-1)[counted] += (
            torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1) - x * _softplus(-log_ratio)
        )
        return log_prob.to(log_mu.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, log_ratio, theta, softplus, counted = ctx.saved_tensors
        success = torch.sigmoid(log_ratio)  # mu / (theta + mu)
        grad_mu = grad_theta = None
        if ctx.needs_input_grad[1]:
            d_log_mu = x * torch.sigmoid(-log_ratio) - theta * success
            shape, dtype = ctx.of_mu
            grad_mu = (grad * d_log_mu).sum_to_size(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            d_log_theta = (theta * (success - softplus)).contiguous()  # the formula below at x = 0
            x, theta = _at(counted, x).double(), _at(counted, theta)
            mu = theta * _at(counted, log_ratio).exp()
            u = (x - mu) / (theta + mu)
            d_log_theta.view(-1)[counted] = theta * (
                torch.log1p(u) - u + _digamma_minus_log(x + theta) - _digamma_minus_log(theta)
            )
            shape, dtype = ctx.of_theta
            grad_theta = (grad * d_log_theta).sum_to_size(shape).to(dtype)
        return None, grad_mu, grad_theta


def zinb_log_prob(x: Tensor, log_mu: Tensor, log_theta: Tensor, gate_logits: Tensor) -> Tensor:
    r"""Compute the zero-inflated negative binomial log-probability, a mixture in log space.

    With g the logit of the probability that a count is set to zero::

        log p(0)     = logaddexp(g, log NB(0)) - softplus(g)
        log p(x > 0) = log NB(x) - softplus(g)

    It becomes the negative binomial as g goes to minus infinity.

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``.
    log_mu, log_theta
        As in `nb_log_prob`, for the negative binomial before zero inflation.
    gate_logits
        Logit of the zero-inflation probability; any shape that broadcasts with ``x``.

    Returns
    -------
    Tensor
        ``(cells, genes)``, nats.

    Examples
    --------
    >>> import torch
    >>> zinb_log_prob(torch.tensor([0.0]), torch.zeros(1), torch.zeros(1), torch.zeros(1)).exp()
    tensor([0.7500])
    """
    log_nb = nb_log_prob(x, log_mu, log_theta)
    return torch.where(x == 0, torch.logaddexp(gate_logits, log_nb), log_nb) - F.softplus(gate_logits)


def poisson_log_prob(x: Tensor, log_mu: Tensor) -> Tensor:
    r"""Compute the Poisson log-probability, ``x log mu - mu - lgamma(x + 1)``.

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``.
    log_mu
        Logarithm of the mean; any shape that broadcasts with ``x``.

    Returns
    -------
    Tensor
        ``(cells, genes)``, nats, in the dtype of ``log_mu``.

    Examples
    --------
    >>> import torch
    >>> poisson_log_prob(torch.tensor([0.0, 2.0]), torch.zeros(2))
    tensor([-1.0000, -1.6931])
    """
    x, log_rate = torch.broadcast_tensors(x, log_mu.double())
    # A zero with a mean of zero has log-probability 0, but 0 * -inf is NaN.
    log_prob = torch.where(x > 0, x * log_rate, 0.0) - log_rate.exp()
    cells_genes = x.nonzero(as_tuple=True)
    log_factorial = torch.zeros_like(log_prob)
    log_factorial[cells_genes] = torch.lgamma(x[cells_genes].double() + 1)
    result: Tensor = (log_prob - log_factorial).to(log_mu.dtype)
    return result


class DecodedCounts(NamedTuple):
    """Counts, and the last layer of the decoder, which gives their distribution."""

    x: Tensor
    """Counts, ``(cells, genes)``, dense or CSR."""
    h: Tensor
    """Last hidden layer, ``(cells, width)``."""
    weight: Tensor
    """Weight of the linear map to logits of expression shares, ``(genes, width)``; ``bias`` is ``(genes,)``."""
    bias: Tensor
    log_library: Tensor
    """Logarithm of the library size, ``(cells, 1)``."""
    log_theta: Tensor | None = None
    """As in `nb_log_prob`, ``(genes,)`` or ``(cells, genes)``; None for a Poisson distribution."""
    gate_weight: Tensor | None = None
    """Weight and bias of the linear map to the logits of gates, for zero inflation."""
    gate_bias: Tensor | None = None


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    r"""Compute the log-probability of each cell's counts under the decoder's last layer.

    ``sum_g log NB(x_g | mu_g, theta_g)`` with ``mu = library softmax(h @ weight.T + bias)``; without theta
    ``sum_g log Poisson(x_g | mu_g)``; with gates zero-inflated, by logits ``h @ gate_weight.T + gate_bias``.

    Returns
    -------
    Tensor
        ``(cells,)``, nats, in the dtype of ``h``. Differentiable once, in all but x.

    Examples
    --------
    >>> import torch
    >>> x, zeros = torch.tensor([[1.0, 0.0]]), torch.zeros(2)
    >>> decoded_log_prob(DecodedCounts(x, torch.zeros(1, 3), torch.ones(2, 3), zeros, torch.zeros(1, 1), zeros))
    tensor([-1.9095])
    >>> nb_log_prob(x, torch.tensor(0.5).log(), zeros).sum(-1)
    tensor([-1.9095])
    """
    x, h, weight, bias, log_library, log_theta, gate_weight, gate_bias = counts
    x, log_mu = x.to_dense(), log_library + F.log_softmax(F.linear(h, weight, bias).double(), dim=-1)
    if log_theta is None:
        log_prob = poisson_log_prob(x, log_mu)
    elif gate_weight is None:
        log_prob = nb_log_prob(x, log_mu, log_theta)
    else:
        log_prob = zinb_log_prob(x, log_mu, log_theta, F.linear(h, gate_weight, gate_bias).double())
    return log_prob.sum(-1).to(h.dtype)


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.T``; x ``(cells, genes)`` is dense or CSR, weight is ``(units, genes)``.

    Returns ``(cells, units)``. Differentiable in the weight.

    Examples
    --------
    >>> import torch
    >>> sparse_linear(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.5]]))
    tensor([[2.5000]])
    """
    return x.to_dense() @ weight.t()


def _at(positions: Tensor, values: Tensor) -> Tensor:
    """Return the elements at these positions of the flattened array."""
    return values.reshape(-1)[positions]


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)). By default torch returns x above 20, an error of 2e-9 that counts would amplify."""
    return F.softplus(x, threshold=40.0)


def _digamma_minus_log(y: Tensor) -> Tensor:
    """Compute ``digamma(y) - log(y)`` with full relative precision, also for large y."""
    inverse = 1.0 / y
    square = inverse * inverse
    series = -0.5 * inverse - square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return torch.where(y < _SERIES_FROM, torch.digamma(y) - torch.log(y), series)
