"""The ELBO is the bound it says it is: against closed forms where log p(x) is known, and as a thing to train."""

import inspect

import mpmath
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from celbo import LIKELIHOODS, VAE, elbo_terms
from celbo.fit.cells import open_cells
from celbo.model.inference import cell_terms
from celbo.model.objective import OBJECTIVES, ElboTerms, autoencoder_terms, kl_divergence
from celbo.model.vae import Noise, draw_noise

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N_GENES, LATENT = 12, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def make_vae(*args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VAE(*args, **options)


def counts_and_vae(name="nb", n_cells=9, **options):
    x = torch.poisson(torch.full((n_cells, N_GENES), 2.0), generator=seeded(4))
    return x, make_vae(N_GENES, LATENT, [16, 8], likelihood=LIKELIHOODS[name], **options)


# KL divergence


def test_kl_equals_torch():
    mu_z, logvar_z = normal(200, 5) * 3, normal(200, 5, seed=1) * 3
    expected = torch.distributions.kl_divergence(Normal(mu_z, torch.exp(logvar_z / 2)), Normal(0.0, 1.0))
    found = kl_divergence(mu_z, logvar_z)
    assert found.shape == (200, 5)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_kl_keeps_its_digits_near_the_prior(size, sign):
    mu_z, logvar_z = torch.tensor([[size]]), torch.tensor([[sign * size]])
    with mpmath.workdps(50):
        mu, logvar = mpmath.mpf(mu_z.item()), mpmath.mpf(logvar_z.item())
        truth = float((mu**2 + mpmath.expm1(logvar) - logvar) / 2)
    # What is left is the rounding of logvar_z itself; exp(logvar_z) - 1 would be wrong by 6e-8 at any size.
    assert kl_divergence(mu_z, logvar_z).item() == pytest.approx(truth, rel=1e-6, abs=1e-7 * size)


def test_kl_is_zero_at_the_prior_and_never_negative():
    logvar_z = torch.cat([torch.zeros(1), torch.logspace(-12, 1, 2000), -torch.logspace(-12, 2, 2000)])
    kl = kl_divergence(torch.zeros_like(logvar_z), logvar_z)
    assert kl[0] == 0
    assert (kl >= 0).all()
    assert kl[-1] == pytest.approx(49.5)


def test_gradients_of_kl_are_those_of_the_formula():
    mu_z, logvar_z = normal(20, 3).requires_grad_(), normal(20, 3, seed=1).requires_grad_()
    kl_divergence(mu_z, logvar_z).sum().backward()
    torch.testing.assert_close(mu_z.grad, mu_z.detach())
    torch.testing.assert_close(logvar_z.grad, (logvar_z.detach().exp() - 1) / 2)


# Terms


def test_the_elbo_is_reconstruction_less_kl():
    terms = ElboTerms(torch.tensor([-10.0, -20.0]), torch.tensor([[1.0, 2.0], [0.0, 0.5]]))
    torch.testing.assert_close(terms.elbo, torch.tensor([-13.0, -20.5]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_terms_are_those_of_the_models_own_parts(name):
    x, vae = counts_and_vae(name, context_dim=2)
    x = (x > 0).float() if name == "bernoulli" else x
    vae.eval()
    context, library = normal(9, 2, dtype=torch.float32), torch.full((9, 1), 50.0)
    noise = draw_noise(vae, 9, seeded(2))
    terms = elbo_terms(vae, x, context, library, Noise(noise.eps, None, None))
    mu_z, logvar_z = vae.encode(x, context)
    p = vae.likelihood(vae.reparameterize(mu_z, logvar_z, noise.eps), context=context, library=library)
    torch.testing.assert_close(terms.reconstruction, p.log_prob(x).sum(1))
    torch.testing.assert_close(terms.kl, kl_divergence(mu_z, logvar_z))
    assert terms.reconstruction.shape == terms.elbo.shape == (9,)
    assert terms.kl.shape == (9, LATENT)


def test_without_a_library_the_cells_own_sums_are_taken():
    x, vae = counts_and_vae()
    noise = draw_noise(vae, 9, seeded())
    own = elbo_terms(vae, x, noise=noise).elbo
    assert torch.equal(own, elbo_terms(vae, x, None, x.sum(1, keepdim=True), noise).elbo)
    assert not torch.allclose(own, elbo_terms(vae, x, None, 2 * x.sum(1, keepdim=True), noise).elbo)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_sparse_cells_have_the_terms_of_dense_ones(objective):
    x, vae = counts_and_vae()
    noise = draw_noise(vae, 9, seeded())
    torch.testing.assert_close(
        objective.terms(vae, x.to_sparse_csr(), noise=noise), objective.terms(vae, x, noise=noise)
    )


def test_objectives_are_called_alike():
    assert [row.terms for row in OBJECTIVES.values()] == [elbo_terms, autoencoder_terms]
    assert [row.samples_z for row in OBJECTIVES.values()] == [True, False]
    assert inspect.signature(elbo_terms) == inspect.signature(autoencoder_terms)


# The plain autoencoder


def test_an_autoencoder_has_no_kl_and_reconstructs_from_the_posterior_mean():
    x, vae = counts_and_vae()
    vae.eval()
    terms = autoencoder_terms(vae, x)
    p = vae.likelihood(vae.encode(x)[0], library=x.sum(1, keepdim=True))
    assert torch.equal(terms.kl, torch.zeros(9, LATENT))
    assert torch.equal(terms.elbo, terms.reconstruction)
    torch.testing.assert_close(terms.reconstruction, p.log_prob(x).sum(1))


def test_an_autoencoder_is_a_function_of_its_masks():
    x, vae = counts_and_vae(dropout=0.5)
    noise, other = draw_noise(vae, 9, seeded(1)), draw_noise(vae, 9, seeded(2))
    found = autoencoder_terms(vae, x, noise=noise).elbo
    assert torch.equal(autoencoder_terms(vae, x, noise=noise._replace(eps=other.eps)).elbo, found)
    assert not torch.allclose(autoencoder_terms(vae, x, noise=other._replace(eps=noise.eps)).elbo, found)


def test_an_autoencoder_trains_everything_but_the_posteriors_variance():
    x, vae = counts_and_vae(dropout=0.0)
    (-autoencoder_terms(vae, x).elbo.mean()).backward()
    untouched = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
    assert untouched == {"fc_logvar.weight", "fc_logvar.bias"}
    assert all(p.grad.abs().max() > 0 for name, p in vae.named_parameters() if name not in untouched)


# Where log p(x) is known in closed form: factor analysis, x = W z + b + noise


def sigma_points(latent_dim):
    """Values of eps with mean 0 and covariance I, over which the mean of any quadratic is its expectation."""
    return latent_dim**0.5 * torch.cat([torch.eye(latent_dim), -torch.eye(latent_dim)]).double()


def mean_elbo(vae, x, eps, weights=None):
    """Expectation of each cell's ELBO over rows of eps, which are the same for every cell."""
    every_x, every_eps = x.repeat_interleave(len(eps), 0), eps.repeat(len(x), 1)
    elbo = elbo_terms(vae, every_x, noise=Noise(every_eps, None, None)).elbo.view(len(x), len(eps))
    return (elbo.mean(1) if weights is None else elbo @ weights).detach()


class FactorAnalysis:
    """A linear Gaussian VAE in float64, whose posterior has a diagonal covariance, and cells drawn from it."""

    def __init__(self, n_cells=20):
        self.vae = make_vae(N_GENES, LATENT, []).double().eval()
        self.vae.head.log_sigma.data.copy_(normal(N_GENES) * 0.3 - 0.5)
        sigma = self.vae.likelihood(torch.zeros(1, LATENT).double()).stddev[0].detach()
        directions = torch.linalg.qr(normal(N_GENES, LATENT, seed=1)).Q
        loadings = sigma[:, None] * directions * torch.tensor([3.0, 1.0, 0.3])
        self.vae.fc_out.weight.data.copy_(loadings)
        offset = self.vae.fc_out.bias.detach()

        self.x = normal(n_cells, LATENT, seed=2) @ loadings.T + offset + sigma * normal(n_cells, N_GENES, seed=3)
        covariance = loadings @ loadings.T + torch.diag(sigma.square())
        self.log_p = MultivariateNormal(offset, covariance).log_prob(self.x)

        precision = torch.eye(LATENT).double() + (loadings / sigma.square()[:, None]).T @ loadings
        projection = torch.linalg.solve(precision, (loadings / sigma.square()[:, None]).T)
        self.posterior = Normal((self.x - offset) @ projection.T, precision.diagonal().rsqrt().expand(n_cells, -1))
        self.vae.fc_mu.weight.data.copy_(projection)
        self.vae.fc_mu.bias.data.copy_(-projection @ offset)
        self.vae.fc_logvar.weight.data.zero_()
        self.vae.fc_logvar.bias.data.copy_(-precision.diagonal().log())


def test_at_the_exact_posterior_the_elbo_is_log_p_of_x():
    model = FactorAnalysis()
    elbo = mean_elbo(model.vae, model.x, sigma_points(LATENT))
    torch.testing.assert_close(elbo, model.log_p, rtol=1e-10, atol=1e-9)


def test_at_the_exact_posterior_sampled_elbos_average_to_log_p_of_x():
    model = FactorAnalysis(n_cells=8)
    eps = normal(4000, LATENT, seed=5)
    every_x, every_eps = model.x.repeat_interleave(4000, 0), eps.repeat(8, 1)
    elbo = elbo_terms(model.vae, every_x, noise=Noise(every_eps, None, None)).elbo.detach().view(8, 4000)
    z_score = (elbo.mean(1) - model.log_p) / (elbo.std(1) / 4000**0.5)
    assert z_score.abs().max() < 4
    assert elbo.std(1).min() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_elsewhere_the_elbo_lies_below_by_the_divergence_from_the_exact_posterior(seed):
    model = FactorAnalysis()
    for i, parameter in enumerate((*model.vae.fc_mu.parameters(), *model.vae.fc_logvar.parameters())):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=10 * seed + i))
    mu_z, logvar_z = model.vae.encode(model.x)
    gap = torch.distributions.kl_divergence(Normal(mu_z, torch.exp(logvar_z / 2)), model.posterior).sum(1).detach()
    elbo = mean_elbo(model.vae, model.x, sigma_points(LATENT))
    assert (elbo < model.log_p).all()
    assert gap.mean() > 0.1
    torch.testing.assert_close(model.log_p - elbo, gap, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["poisson", "nb", "zinb", "bernoulli"])
def test_with_counts_the_elbo_lies_below_log_p_by_the_divergence_from_the_posterior(name):
    n_cells, n_genes = 10, 6
    vae = make_vae(n_genes, 1, [], likelihood=LIKELIHOODS[name]).double().eval()
    x = torch.poisson(torch.full((n_cells, n_genes), 1.0), generator=seeded(8)).double()
    x = x.clamp(max=1) if name == "bernoulli" else x
    x[:, 0] = 1.0

    # Both integrals over z, which has one dimension, as sums over a fine grid.
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    step = z[1] - z[0]
    with torch.no_grad():
        by_z = vae.likelihood(z.repeat(n_cells)[:, None], library=x.sum(1, keepdim=True).repeat_interleave(len(z), 0))
        log_likelihood = by_z.log_prob(x.repeat_interleave(len(z), 0)).sum(1).view(n_cells, len(z))
        log_joint = log_likelihood + Normal(0.0, 1.0).log_prob(z)
        log_p = log_joint.logsumexp(1, keepdim=True) + step.log()
        mu_z, logvar_z = vae.encode(x)
        log_q = Normal(mu_z, torch.exp(logvar_z / 2)).log_prob(z)
        gap = (log_q.exp() * (log_q - log_joint + log_p)).sum(1) * step

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
    elbo = mean_elbo(vae, x, nodes[:, None], weights / weights.sum())
    assert (elbo < log_p[:, 0]).all()
    assert gap.max() > 0.01
    torch.testing.assert_close(log_p[:, 0] - elbo, gap, rtol=1e-7, atol=1e-8)


# Training


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_training_loop_of_the_docstring_raises_the_elbo(name, objective):
    # Two kinds of cells, so that z has something to say.
    rate = torch.rand(2, 50, generator=seeded()) * 5
    counts = torch.poisson(rate[torch.arange(256) % 2], generator=seeded(1))
    values = {"gaussian": torch.log1p(counts), "bernoulli": (counts > 2).float()}.get(name, counts)
    vae = make_vae(50, 2, [32], likelihood=LIKELIHOODS[name])
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    noise = draw_noise(vae, 256, seeded(2))
    before = objective.terms(vae, values, noise=noise).elbo.mean().item()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(10):
            for x in values.split(64):
                loss = -objective.terms(vae, x).elbo.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    after = objective.terms(vae, values, noise=noise).elbo.mean().item()
    assert after > before + 2.0


def test_the_noise_of_a_cell_does_not_depend_on_which_other_cells_are_used(fitted, cells):
    opened = open_cells(fitted.fitted_, cells)
    rows = np.arange(200, 260)
    of_all, of_some = (cell_terms(fitted.vae_, opened.source, part, seed=3) for part in (None, rows))
    np.testing.assert_allclose(of_some.reconstruction, of_all.reconstruction[rows], rtol=1e-5)
