"""Count kernels against 60-digit truth at the very float32 inputs, and against each other at their limits."""

from itertools import product
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from celbo.kernels import dispatch as kernels
from celbo.kernels.reference import DecodedCounts, nb_log_prob, poisson_log_prob, zinb_log_prob
from celbo.model.distributions import NegativeBinomial, Poisson

THETAS = [1e-3, 0.02, 0.3, 1.0, 7.0, 63.9, 64.1, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8]
MUS = [1e-8, 1e-4, 0.1, 1.0, 2.5, 10.0, 300.0, 1e4, 1e6]
COUNTS = [0, 1, 2, 3, 10, 300, 10_000, 1_000_000]
GATES = [-30.0, -4.0, 0.0, 3.0, 8.0, 25.0]


class Points(NamedTuple):
    """Float32 inputs in one row each."""

    x: torch.Tensor
    mu: torch.Tensor
    theta: torch.Tensor


class Truth(NamedTuple):
    """Values and derivatives in multiple precision, one list each."""

    log_prob: list
    d_log_mu: list
    d_log_theta: list


def some_points():
    """A grid with x = mu in it, and as many points at random whose x is near mu, anywhere, or zero."""
    rng = np.random.default_rng(0)
    grid = np.array(list(product(COUNTS, MUS, THETAS)))
    mu, theta = 10 ** rng.uniform(-8, 6, 900), 10 ** rng.uniform(-3, 8, 900)
    near, anywhere = rng.poisson(np.minimum(mu[:400], 9e5)), np.floor(10 ** rng.uniform(0, 6, 400))
    at_random = np.stack([np.concatenate([near, anywhere, np.zeros(100)]), mu, theta], axis=1)
    return Points(*torch.from_numpy(np.concatenate([grid, at_random])).float().unbind(1))


@mpmath.workdps(60)
def nb_truth(x, mu, theta):
    """The three formulas of the negative binomial, for lists of multiple-precision mu and theta."""
    truth = Truth([], [], [])
    for x_i, mu_i, theta_i in zip(x.tolist(), mu, theta, strict=True):
        x_i = mpmath.mpf(x_i)
        log_binomial = mpmath.loggamma(x_i + theta_i) - mpmath.loggamma(theta_i) - mpmath.loggamma(x_i + 1)
        log_success, log_failure = -mpmath.log1p(theta_i / mu_i), -mpmath.log1p(mu_i / theta_i)
        truth.log_prob.append(log_binomial + theta_i * log_failure + x_i * log_success)
        truth.d_log_mu.append(theta_i * (x_i - mu_i) / (theta_i + mu_i))
        digammas = mpmath.digamma(x_i + theta_i) - mpmath.digamma(theta_i)
        truth.d_log_theta.append(theta_i * (digammas + log_failure - (x_i - mu_i) / (theta_i + mu_i)))
    return truth


@mpmath.workdps(60)
def exact(values):
    return [mpmath.mpf(value) for value in values.tolist()]


@mpmath.workdps(60)
def exact_exp(values):
    return [mpmath.exp(mpmath.mpf(value)) for value in values.tolist()]


def assert_close(found, truth, points, within=1e-5, least=1.0):
    """Every value is within ``within * max(least, |truth|)`` of the truth."""
    truth = np.array([float(value) for value in truth])
    error = np.abs(found.detach().double().numpy() - truth) / np.maximum(least, np.abs(truth))
    worst = int(np.argmax(error))  # a NaN counts as the largest
    at = {name: values[worst].item() for name, values in points._asdict().items()}
    assert error[worst] <= within, f"found {found[worst].item()}, truth {truth[worst]}, at {at}"


def assert_theta_gradient(found, truth, points, least_that_matter=0.8):
    assert_close(found, truth, points, within=1e-4, least=1e-3)
    truth = np.array([float(value) for value in truth])
    matters = np.abs(truth) > 1e-6
    assert matters.mean() > least_that_matter
    np.testing.assert_array_equal(np.sign(found.detach().numpy())[matters], np.sign(truth)[matters])


def leaf(values):
    return values.clone().requires_grad_()


@pytest.fixture(scope="module")
def points():
    return some_points()


@pytest.fixture(scope="module")
def logs(points):
    """Float32 log mu and log theta, and the truth at exactly these."""
    log_mu, log_theta = points.mu.log(), points.theta.log()
    return log_mu, log_theta, nb_truth(points.x, exact_exp(log_mu), exact_exp(log_theta))


def test_the_points_cover_the_promised_range(points):
    for values, smallest, largest in ((points.x, 0, 1e6), (points.mu, 1e-8, 1e6), (points.theta, 1e-3, 1e8)):
        assert values.min().item() == pytest.approx(smallest)
        assert values.max().item() == pytest.approx(largest)
    x, mu, theta = points
    assert ((x == 1e6) & (mu == 1e6) & (theta == 1e8)).any()
    assert len(x) > 1500


def test_nb_at_logarithms_agrees_with_multiple_precision(points, logs):
    log_mu, log_theta, truth = leaf(logs[0]), leaf(logs[1]), logs[2]
    log_prob = nb_log_prob(points.x, log_mu, log_theta)
    log_prob.sum().backward()
    assert log_prob.dtype == log_mu.grad.dtype == log_theta.grad.dtype == torch.float32
    assert_close(log_prob, truth.log_prob, points)
    assert_close(log_mu.grad, truth.d_log_mu, points)
    assert_theta_gradient(log_theta.grad, truth.d_log_theta, points)


def test_nb_at_mean_and_theta_agrees_with_multiple_precision(points):
    truth = nb_truth(points.x, exact(points.mu), exact(points.theta))
    mu, theta = leaf(points.mu), leaf(points.theta)
    log_prob = NegativeBinomial(mu, theta).log_prob(points.x)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    assert_close(log_prob, truth.log_prob, points)
    assert_close(mu.grad.double() * points.mu, truth.d_log_mu, points)
    assert_theta_gradient(theta.grad.double() * points.theta, truth.d_log_theta, points)


@pytest.mark.parametrize("gate", GATES)
@mpmath.workdps(60)
def test_zinb_agrees_with_multiple_precision(points, logs, gate):
    log_mu, log_theta, gates = leaf(logs[0]), leaf(logs[1]), torch.full_like(logs[0], gate).requires_grad_()
    log_prob = zinb_log_prob(points.x, log_mu, log_theta, gates)
    log_prob.sum().backward()

    opened = 1 / (1 + mpmath.exp(-mpmath.mpf(gate)))  # probability that a count is zeroed
    truth, d_gate = Truth([], [], []), []
    for x, log_nb, d_log_mu, d_log_theta in zip(points.x.tolist(), *logs[2], strict=True):
        p = (1 - opened) * mpmath.exp(log_nb) + (opened if x == 0 else 0)
        counted = (1 - opened) * mpmath.exp(log_nb) / p  # probability that the count is the negative binomial's
        truth.log_prob.append(mpmath.log(p))
        truth.d_log_mu.append(counted * d_log_mu)
        truth.d_log_theta.append(counted * d_log_theta)
        d_gate.append(1 - counted - opened)
    assert_close(log_prob, truth.log_prob, points)
    assert_close(log_mu.grad, truth.d_log_mu, points)
    assert_theta_gradient(log_theta.grad, truth.d_log_theta, points, least_that_matter=0.5)
    assert_close(gates.grad, d_gate, points)


def test_poisson_agrees_with_multiple_precision(points, logs):
    log_mu = leaf(logs[0])
    log_prob = poisson_log_prob(points.x, log_mu)
    log_prob.sum().backward()
    truth, gradient = poisson_truth(points.x, exact_exp(logs[0]))
    assert_close(log_prob, truth, points)
    assert_close(log_mu.grad, gradient, points)


def test_poisson_at_its_mean_agrees_with_multiple_precision(points):
    mu = leaf(points.mu)
    log_prob = Poisson(mu).log_prob(points.x)
    log_prob.sum().backward()
    truth, gradient = poisson_truth(points.x, exact(points.mu))
    assert_close(log_prob, truth, points)
    assert_close(mu.grad.double() * points.mu, gradient, points)


@mpmath.workdps(60)
def poisson_truth(x, mu):
    pairs = [(mpmath.mpf(x_i), mu_i) for x_i, mu_i in zip(x.tolist(), mu, strict=True)]
    return [x * mpmath.log(mu) - mu - mpmath.loggamma(x + 1) for x, mu in pairs], [x - mu for x, mu in pairs]


def some_counts(*shape, seed=0, rate=0.7):
    """Counts of which about half are zero, and float64 log mu, log theta and gate logits of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.poisson(torch.full(shape, rate), generator=generator)
    return x, *(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3))


def textbook_nb(x, log_mu, log_theta):
    """The formula as the books write it; good enough in float64 while theta is moderate."""
    x, theta, log_ratio = x.double(), log_theta.exp(), log_mu - log_theta
    choices = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return choices - theta * F.softplus(log_ratio) - x * F.softplus(-log_ratio)


def textbook_zinb(x, log_mu, log_theta, gate):
    p = torch.sigmoid(-gate) * textbook_nb(x, log_mu, log_theta).exp() + torch.sigmoid(gate) * (x == 0)
    return p.log()


def textbook_poisson(x, log_mu):
    return x * log_mu - log_mu.exp() - torch.lgamma(x.double() + 1)


KERNELS = {
    "nb": (nb_log_prob, textbook_nb, 2),
    "zinb": (zinb_log_prob, textbook_zinb, 3),
    "poisson": (poisson_log_prob, textbook_poisson, 1),
}
each_kernel = pytest.mark.parametrize("name", KERNELS)


def value_and_gradients(function, x, parameters, weight):
    """The value, and the gradients of its weighted sum."""
    parameters = [leaf(parameter) for parameter in parameters]
    log_prob = function(x, *parameters)
    return log_prob.detach(), torch.autograd.grad((log_prob * weight).sum(), parameters)


@each_kernel
@pytest.mark.parametrize("shape", [(1, 1), (41, 1271), (3, 1), (1, 7), (6,), (2, 3, 4)])
def test_values_and_weighted_gradients_equal_the_textbook_formula_at_every_shape(name, shape):
    kernel, textbook, n_parameters = KERNELS[name]
    x, *parameters = some_counts(*shape)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, gradients = value_and_gradients(kernel, x, parameters[:n_parameters], weight)
    expected, expected_gradients = value_and_gradients(textbook, x, parameters[:n_parameters], weight)
    assert found.shape == shape
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-10)


@each_kernel
@pytest.mark.parametrize("row", ["empty", "full", "all empty", "all full"])
def test_rows_without_counts_and_rows_without_zeros_are_no_exception(name, row):
    kernel, textbook, n_parameters = KERNELS[name]
    x, *parameters = some_counts(5, 40)
    x[slice(None) if row.startswith("all") else 2] = 0 if row.endswith("empty") else 3
    found = value_and_gradients(kernel, x, parameters[:n_parameters], 1.0)
    torch.testing.assert_close(found, value_and_gradients(textbook, x, parameters[:n_parameters], 1.0))


@each_kernel
def test_no_cells_give_no_values(name):
    kernel, _, n_parameters = KERNELS[name]
    found, gradients = value_and_gradients(kernel, torch.zeros(0, 4), [torch.zeros(4)] * n_parameters, 1.0)
    assert found.shape == (0, 4)
    assert all(torch.equal(gradient, torch.zeros(4)) for gradient in gradients)


@each_kernel
def test_transposed_arrays_give_transposed_values(name):
    kernel, _, n_parameters = KERNELS[name]
    x, *parameters = some_counts(6, 9)
    parameters = parameters[:n_parameters]
    found, gradients = value_and_gradients(kernel, x.T, [parameter.T for parameter in parameters], 1.0)
    expected, expected_gradients = value_and_gradients(kernel, x, parameters, 1.0)
    torch.testing.assert_close(found, expected.T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradients, tuple(g.T for g in expected_gradients), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (6, 1), (1, 1), (), (6, 9)])
def test_theta_broadcasts_and_its_gradient_is_summed_back(shape):
    x, log_mu, _, _ = some_counts(6, 9)
    log_theta = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, gradients = value_and_gradients(nb_log_prob, x, (log_mu, log_theta), 1.0)
    expected, (_, by_element) = value_and_gradients(nb_log_prob, x, (log_mu, log_theta.expand(6, 9).clone()), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], by_element.sum_to_size(shape))
    assert gradients[1].shape == shape


@each_kernel
@pytest.mark.parametrize("shape", [(9,), (6, 1)])
def test_every_parameter_broadcasts(name, shape):
    kernel, textbook, n_parameters = KERNELS[name]
    x, *_ = some_counts(6, 9)
    _, *parameters = some_counts(*shape, seed=3)
    found = value_and_gradients(kernel, x, parameters[:n_parameters], 1.0)
    torch.testing.assert_close(found, value_and_gradients(textbook, x, parameters[:n_parameters], 1.0))
    assert found[0].shape == (6, 9)


@each_kernel
def test_analytic_gradients_equal_finite_differences(name):
    kernel, _, n_parameters = KERNELS[name]
    x, *parameters = some_counts(3, 4)
    leaves = [leaf(parameter) for parameter in parameters[:n_parameters]]
    assert torch.autograd.gradcheck(lambda *values: kernel(x, *values), leaves)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_parameters_is_kept(name, dtype):
    kernel, _, n_parameters = KERNELS[name]
    x, *parameters = some_counts(2, 3)
    parameters = [parameter.to(dtype) for parameter in parameters[:n_parameters]]
    found, gradients = value_and_gradients(kernel, x, parameters, 1.0)
    assert {found.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}


@each_kernel
def test_whole_number_counts_give_what_float_counts_give(name):
    kernel, _, n_parameters = KERNELS[name]
    x, *parameters = some_counts(4, 5)
    found = value_and_gradients(kernel, x.long(), parameters[:n_parameters], 1.0)
    torch.testing.assert_close(found, value_and_gradients(kernel, x, parameters[:n_parameters], 1.0), rtol=0, atol=0)


@each_kernel
def test_the_inputs_are_left_as_they_were(name):
    kernel, _, n_parameters = KERNELS[name]
    inputs = some_counts(4, 5)[: 1 + n_parameters]
    before = [values.clone() for values in inputs]
    kernel(*inputs)
    assert all(torch.equal(values, old) for values, old in zip(inputs, before, strict=True))


@each_kernel
def test_a_mean_of_zero_explains_a_zero_perfectly(name):
    kernel, _, n_parameters = KERNELS[name]
    parameters = [torch.full((1, 3), value) for value in (-torch.inf, 0.5, 0.0)][:n_parameters]
    log_prob, gradients = value_and_gradients(kernel, torch.zeros(1, 3), parameters, 1.0)
    assert torch.equal(log_prob, torch.zeros(1, 3))
    assert all(torch.equal(gradient, torch.zeros(1, 3)) for gradient in gradients)


@each_kernel
def test_a_mean_of_zero_rules_out_any_other_count(name):
    kernel, _, n_parameters = KERNELS[name]
    parameters = [torch.full((1, 1), value) for value in (-torch.inf, 0.5, 0.0)][:n_parameters]
    assert kernel(torch.ones(1, 1), *parameters).item() == -torch.inf


def test_nb_becomes_poisson_as_theta_grows():
    x, mu = torch.arange(30.0)[:, None], torch.tensor([1e-3, 0.2, 1.0, 8.0, 40.0], dtype=torch.float64)
    poisson = poisson_log_prob(x, mu.log())
    far = [(nb_log_prob(x, mu.log(), torch.tensor(theta).log()) - poisson).abs().max() for theta in (1e3, 1e5, 1e7)]
    assert far[0] > 50 * far[1] > 2500 * far[2]
    assert far[2] < 1e-4
    # To first order in 1 / theta, log NB - log Poisson = ((x - mu)**2 - x) / (2 theta).
    excess = nb_log_prob(x, mu.log(), torch.tensor(1e5, dtype=torch.float64).log()) - poisson
    torch.testing.assert_close(excess * 1e5, ((x - mu).square() - x) / 2, rtol=1e-3, atol=2e-3)


def test_the_gradient_of_nb_becomes_that_of_poisson_as_theta_grows():
    x, log_mu, _, _ = some_counts(20, 30)
    _, (nb, _) = value_and_gradients(nb_log_prob, x, (log_mu, torch.tensor(1e8).log()), 1.0)
    _, (poisson,) = value_and_gradients(poisson_log_prob, x, (log_mu,), 1.0)
    torch.testing.assert_close(nb, poisson, rtol=0, atol=1e-5)


def test_zinb_becomes_nb_as_the_gate_closes():
    x, log_mu, log_theta, _ = some_counts(20, 30)
    expected = value_and_gradients(nb_log_prob, x, (log_mu, log_theta), 1.0)
    far = []
    for gate in (-5.0, -10.0, -20.0, -80.0):
        found, gradients = value_and_gradients(zinb_log_prob, x, (log_mu, log_theta, torch.full((1,), gate)), 1.0)
        far.append((found - expected[0]).abs().max().item())
    assert far[0] > 100 * far[1] > 1e5 * far[2]
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[:2], expected[1], rtol=0, atol=1e-12)
    assert gradients[2].abs() < 1e-12


def test_zinb_with_the_gate_wide_open_is_a_certain_zero():
    x, log_mu, log_theta, _ = some_counts(20, 30)
    log_prob = zinb_log_prob(x, log_mu, log_theta, torch.full((1,), 60.0, dtype=torch.float64))
    assert log_prob[x == 0].abs().max() < 1e-12
    assert log_prob[x > 0].max() < -60


def fused(tier, points, *parameters):
    """Values of a fused function for cells of one gene, whose share is 1, and derivatives in log mu and the others."""
    device = "cuda" if tier == "gpu" and torch.cuda.is_available() else "cpu"
    leaves = [leaf(values[:, None].to(device)) for values in parameters]
    n_cells, layer = len(points.x), (torch.zeros(1, 2, device=device), torch.zeros(1, device=device))
    kernels.use(tier)
    x, h = points.x[:, None].to(device), torch.zeros(n_cells, 2, device=device)
    value = kernels.decoded_log_prob(DecodedCounts(x, h, *layer, *leaves))
    kernels.use("auto")
    value.sum().backward()
    return value.cpu(), *(values.grad[:, 0].cpu() for values in leaves)


each_tier = pytest.mark.parametrize(("tier", "library"), [("reference", "torch"), ("cpu", "numba"), ("gpu", "triton")])


@each_tier
def test_fused_kernels_are_exact_too(tier, library, points, logs):
    pytest.importorskip(library)
    value, d_log_mu, d_log_theta = fused(tier, points, *logs[:2])
    assert_close(value, logs[2].log_prob, points)
    assert_close(d_log_mu, logs[2].d_log_mu, points)
    assert_theta_gradient(d_log_theta, logs[2].d_log_theta, points)


@each_tier
def test_fused_poisson_is_exact_too(tier, library, points, logs):
    pytest.importorskip(library)
    value, d_log_mu = fused(tier, points, logs[0])
    truth, gradient = poisson_truth(points.x, exact_exp(logs[0]))
    assert_close(value, truth, points)
    assert_close(d_log_mu, gradient, points)
