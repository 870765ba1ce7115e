"""Count distributions: proper masses, the stated moments, samples that follow them, scipy's numbers."""

import numpy as np
import pytest
import scipy.stats
import torch

from celbo import NegativeBinomial, ZeroInflatedNegativeBinomial
from celbo.model.distributions import Poisson

MU = torch.tensor([0.02, 0.5, 1.0, 6.0, 20.0], dtype=torch.float64)
THETA = torch.tensor([0.5, 4.0, 0.3, 1e4, 2.0], dtype=torch.float64)
GATE = torch.tensor([-2.0, 0.5, 1.0, -1.0, -6.0], dtype=torch.float64)

DISTRIBUTIONS = {
    "poisson": lambda: Poisson(MU),
    "poisson from logs": lambda: Poisson(log_mu=MU.log()),
    "nb": lambda: NegativeBinomial(MU, THETA),
    "nb from logs": lambda: NegativeBinomial(log_mu=MU.log(), log_theta=THETA.log()),
    "zinb": lambda: ZeroInflatedNegativeBinomial(NegativeBinomial(MU, THETA), GATE),
    "zinb from logs": lambda: ZeroInflatedNegativeBinomial(
        NegativeBinomial(log_mu=MU.log(), log_theta=THETA.log()), GATE
    ),
}
each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
N_DRAWS = 100_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mass(p, largest=6000):
    """Every count that matters, ``(counts, 1)``, and its probability, ``(counts, parameters)``."""
    x = torch.arange(largest, dtype=torch.float64)[:, None]
    return x, p.log_prob(x).exp()


@each_distribution
def test_the_mass_sums_to_one(name):
    _, probability = mass(DISTRIBUTIONS[name]())
    torch.testing.assert_close(probability.sum(0), torch.ones_like(MU), rtol=0, atol=1e-9)


@each_distribution
def test_mean_and_variance_are_those_of_the_mass(name):
    p = DISTRIBUTIONS[name]()
    x, probability = mass(p)
    mean = (x * probability).sum(0)
    torch.testing.assert_close(p.mean, mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(p.variance, ((x - mean).square() * probability).sum(0), rtol=1e-7, atol=0)


@each_distribution
def test_samples_have_the_stated_mean_variance_and_share_of_zeros(name):
    p = DISTRIBUTIONS[name]()
    x = p.sample((N_DRAWS,), generator=seeded())
    squares = (x - p.mean).square()
    p_zero = p.log_prob(torch.zeros_like(MU)).exp()
    for found, expected, sd in (
        (x.mean(0), p.mean, p.variance.sqrt()),
        (squares.mean(0), p.variance, squares.std(0)),
        ((x == 0).double().mean(0), p_zero, (p_zero * (1 - p_zero)).sqrt()),
    ):
        z_score = (found - expected) / (sd / N_DRAWS**0.5)
        assert z_score.abs().max() < 4


@each_distribution
def test_samples_have_the_mass_at_every_small_count(name):
    p = DISTRIBUTIONS[name]()
    x = p.sample((N_DRAWS,), generator=seeded(1))
    _, probability = mass(p, largest=8)
    found = torch.stack([(x == count).double().mean(0) for count in range(8)])
    sd = (probability * (1 - probability) / N_DRAWS).sqrt()
    assert ((found - probability).abs() < 4.5 * sd + 2 / N_DRAWS).all()


def test_formulas_of_the_probability_of_a_zero():
    zero = torch.zeros_like(MU)
    nb = NegativeBinomial(MU, THETA)
    zinb = ZeroInflatedNegativeBinomial(nb, GATE)
    p_nb = (THETA / (THETA + MU)) ** THETA
    torch.testing.assert_close(Poisson(MU).log_prob(zero).exp(), (-MU).exp())
    torch.testing.assert_close(nb.log_prob(zero).exp(), p_nb)
    gate = torch.sigmoid(GATE)
    torch.testing.assert_close(zinb.log_prob(zero).exp(), gate + (1 - gate) * p_nb)


def test_formulas_of_mean_and_variance():
    nb, gate = NegativeBinomial(MU, THETA), torch.sigmoid(GATE)
    zinb = ZeroInflatedNegativeBinomial(nb, GATE)
    torch.testing.assert_close(Poisson(MU).variance, MU)
    torch.testing.assert_close(nb.variance, MU + MU**2 / THETA)
    torch.testing.assert_close(zinb.mean, (1 - gate) * MU)
    torch.testing.assert_close(zinb.variance, (1 - gate) * (MU + MU**2 * (1 / THETA + gate)))


def test_nb_and_poisson_agree_with_scipy():
    x = np.concatenate([np.arange(200), [1000, 5000]])[:, None]
    mu, theta = MU.numpy(), THETA.numpy()
    nb = NegativeBinomial(MU, THETA).log_prob(torch.from_numpy(x).double())
    np.testing.assert_allclose(nb, scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-8, atol=1e-8)
    poisson = Poisson(MU).log_prob(torch.from_numpy(x).double())
    np.testing.assert_allclose(poisson, scipy.stats.poisson.logpmf(x, mu), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["poisson", "nb", "zinb"])
def test_the_log_form_equals_the_plain_form(name):
    plain, logs = DISTRIBUTIONS[name](), DISTRIBUTIONS[f"{name} from logs"]()
    x = torch.arange(50.0)[:, None]
    torch.testing.assert_close(logs.mean, plain.mean)
    torch.testing.assert_close(logs.variance, plain.variance)
    torch.testing.assert_close(logs.log_prob(x), plain.log_prob(x))
    assert logs.batch_shape == plain.batch_shape == MU.shape


@each_distribution
def test_a_generator_makes_samples_reproducible_and_leaves_the_global_one_alone(name):
    p = DISTRIBUTIONS[name]()
    before = torch.get_rng_state()
    first, again, other = (p.sample((100,), generator=seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@each_distribution
def test_samples_are_counts_in_the_support(name):
    p = DISTRIBUTIONS[name]()
    x = p.sample((3, 50), generator=seeded())
    assert x.shape == (3, 50, len(MU))
    assert x.dtype == MU.dtype
    assert p.support.check(x).all()
    assert x.max() > 0


def test_samples_carry_no_gradient():
    mu, theta, gate = (values.clone().requires_grad_() for values in (MU, THETA, GATE))
    nb = NegativeBinomial(mu, theta)
    for p in (Poisson(mu), nb, ZeroInflatedNegativeBinomial(nb, gate)):
        assert not p.sample((2,), generator=seeded()).requires_grad
        assert p.mean.requires_grad


def test_theta_of_each_gene_goes_with_mu_of_each_cell_and_gene():
    mu = torch.rand(6, 4, generator=seeded()) * 5
    theta, gate = torch.tensor([0.5, 1.0, 2.0, 10.0]), torch.randn(6, 1, generator=seeded(1))
    nb = NegativeBinomial(mu, theta)
    full = NegativeBinomial(mu, theta.expand(6, 4))
    x = full.sample(generator=seeded(2))
    assert nb.batch_shape == nb.mean.shape == nb.variance.shape == (6, 4)
    torch.testing.assert_close(nb.log_prob(x), full.log_prob(x), rtol=0, atol=0)
    torch.testing.assert_close(nb.sample((2,), generator=seeded(2)), full.sample((2,), generator=seeded(2)))
    zinb = ZeroInflatedNegativeBinomial(nb, gate)
    assert zinb.batch_shape == zinb.mean.shape == zinb.variance.shape == zinb.sample().shape == (6, 4)
    torch.testing.assert_close(zinb.mean, torch.sigmoid(-gate) * mu)


def test_mu_of_each_gene_goes_with_theta_of_each_cell_and_gene():
    nb = NegativeBinomial(torch.ones(4), torch.ones(6, 4))
    assert nb.batch_shape == nb.mean.shape == nb.variance.shape == nb.sample().shape == (6, 4)


@each_distribution
@pytest.mark.parametrize(
    ("value", "expected"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.int64, torch.float32)],
)
def test_log_prob_has_the_float_dtype_of_the_counts(name, value, expected):
    x = torch.full(MU.shape, 3, dtype=value)
    log_prob = DISTRIBUTIONS[name]().log_prob(x)
    assert log_prob.dtype == expected
    torch.testing.assert_close(log_prob.double(), DISTRIBUTIONS[name]().log_prob(x.double()), rtol=1e-6, atol=1e-6)


def test_a_mean_of_zero_gives_zeros_alone():
    zero, theta = torch.zeros(3), torch.tensor([0.1, 1.0, 1e4])
    nb = NegativeBinomial(zero, theta)
    for p in (Poisson(zero), nb, ZeroInflatedNegativeBinomial(nb, torch.zeros(3))):
        torch.testing.assert_close(p.log_prob(zero), zero, rtol=0, atol=1e-8)
        assert torch.equal(p.sample((20,), generator=seeded()), torch.zeros(20, 3))
        assert torch.equal(p.mean, zero)
        assert torch.equal(p.variance, zero)


@each_distribution
@pytest.mark.parametrize("count", [-1.0, 0.5, torch.nan, torch.inf])
def test_values_that_are_not_counts_are_refused(name, count):
    with pytest.raises(ValueError, match="support"):
        DISTRIBUTIONS[name]().log_prob(torch.full(MU.shape, count))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda bad, **options: Poisson(bad, **options), "mu"),
        (lambda bad, **options: NegativeBinomial(bad, ONE, **options), "mu"),
        (lambda bad, **options: NegativeBinomial(ONE, bad, **options), "theta"),
    ],
)
@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_parameters_out_of_range_are_refused_unless_told_not_to_look(make, parameter, bad):
    with pytest.raises(ValueError, match=f"parameter {parameter} "):
        make(torch.tensor([bad]))
    make(torch.tensor([bad]), validate_args=False)


def test_theta_of_zero_and_a_gate_that_is_not_a_number_are_refused():
    with pytest.raises(ValueError, match="theta"):
        NegativeBinomial(ONE, torch.zeros(1))
    with pytest.raises(ValueError, match="gate_logits"):
        ZeroInflatedNegativeBinomial(NegativeBinomial(ONE, ONE), torch.tensor([torch.nan]))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Poisson(), "mu"),
        (lambda: Poisson(ONE, log_mu=ONE), "mu"),
        (lambda: NegativeBinomial(ONE), "theta"),
        (lambda: NegativeBinomial(theta=ONE), "mu"),
        (lambda: NegativeBinomial(ONE, ONE, log_mu=ONE), "mu"),
        (lambda: NegativeBinomial(ONE, ONE, log_theta=ONE), "theta"),
    ],
)
def test_each_parameter_is_given_once_in_one_form(make, named):
    with pytest.raises(ValueError, match=f"takes one of {named}, log_{named}"):
        make()


def test_a_mean_of_zero_leaves_no_nan_in_the_gradient():
    mu = torch.tensor([0.0, 2.0], requires_grad=True)
    NegativeBinomial(mu, torch.ones(2)).log_prob(torch.zeros(2)).sum().backward()
    assert torch.isfinite(mu.grad).all()
