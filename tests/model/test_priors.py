"""Priors: every row of the table, and the KL to them against integration and torch's own."""

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import celbo
from celbo.model.objective import elbo_terms, kl_to_prior
from celbo.model.priors import PRIORS, make_prior

ROWS = sorted(PRIORS)


def vae_with(prior, latent_dim=2, context_dim=3, seed=0, **options):
    torch.manual_seed(seed)
    vae = celbo.VAE(12, latent_dim, [8], context_dim=context_dim, prior=prior, **options)
    with torch.no_grad():
        for name, parameter in vae.prior.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if "logvar" in name else 1))
    return vae.double().eval()


def contexts(n):
    return torch.eye(3, dtype=torch.float64)[torch.arange(n) % 3]


@pytest.mark.parametrize("prior", ROWS)
def test_components_are_a_distribution(prior):
    vae = vae_with(prior)
    z = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    context = contexts(1).expand(len(grid), -1)
    with torch.no_grad():
        density = vae.prior_components(grid, context).distribution().log_prob(grid).exp()
    assert density.sum() * (z[1] - z[0]) ** 2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("prior", ROWS)
def test_kl_agrees_with_many_draws(prior):
    vae = vae_with(prior)
    mu, logvar, context = torch.randn(6, 2).double(), torch.randn(6, 2).double(), contexts(6)
    n = 40_000
    eps = torch.randn(n, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = mu + (logvar / 2).exp() * eps
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    prior_of_z = vae.prior_components(z[0], context).distribution()
    truth = (q.log_prob(z) - prior_of_z.log_prob(z)).mean(0).detach()
    flat = [part.repeat(n, 1) for part in (mu, logvar)]
    found = kl_to_prior(vae, *flat, z.reshape(-1, 2), context.repeat(n, 1)).sum(-1).view(n, 6).mean(0).detach()
    torch.testing.assert_close(found, truth, rtol=0, atol=0.05)


def test_kl_to_a_conditional_prior_is_torchs_own():
    vae = vae_with("conditional")
    mu, logvar, context = torch.randn(9, 2).double(), torch.randn(9, 2).double(), contexts(9)
    p = vae.prior_components(mu, context)
    truth = kl_divergence(
        Normal(mu, (logvar / 2).exp()), Normal(p.mu[:, 0].detach(), (p.logvar[:, 0].detach() / 2).exp())
    )
    torch.testing.assert_close(kl_to_prior(vae, mu, logvar, mu, context).detach(), truth, rtol=1e-12, atol=1e-12)


def test_dimensions_of_an_estimated_kl_add_up_to_the_whole():
    vae = vae_with("mixture:5", latent_dim=4)
    mu, logvar = torch.randn(7, 4).double(), torch.randn(7, 4).double()
    z = mu + (logvar / 2).exp()
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    p = vae.prior_components(z, contexts(7)).distribution()
    found = kl_to_prior(vae, mu, logvar, z, contexts(7))
    assert found.shape == (7, 4)
    torch.testing.assert_close(found.sum(1), q.log_prob(z) - p.log_prob(z))


@pytest.mark.parametrize("prior", [name for name in ROWS if name != "normal"])
def test_gradients_reach_every_parameter_of_a_prior(prior):
    vae = vae_with(prior)
    x = torch.rand(6, 12, dtype=torch.float64)
    (-elbo_terms(vae, x, contexts(6)).elbo.mean()).backward()
    for name, parameter in vae.prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_conditional_prior_starts_as_the_standard_normal():
    vae = celbo.VAE(12, 2, [8], context_dim=3, prior="conditional")
    p = vae.prior_components(torch.zeros(4, 2), torch.eye(3)[[0, 1, 2, 0]])
    assert not p.mu.any()
    assert not p.logvar.any()


def test_pseudo_cells_start_as_cells():
    torch.manual_seed(0)
    vae = celbo.VAE(12, 2, [8], context_dim=3, prior="vamp:4", likelihood=celbo.LIKELIHOODS["nb"]).eval()
    x, context = torch.poisson(torch.full((4, 12), 3.0)), torch.eye(3)[[0, 1, 2, 0]]
    vae.start_prior(x, context)
    mu, logvar = vae.encode(x, context)
    found = vae.prior_components(torch.zeros(1, 2), context[:1])
    torch.testing.assert_close(found.mu[0], mu)
    torch.testing.assert_close(found.logvar[0], logvar)


@pytest.mark.parametrize("prior", ["normal", "conditional", "mixture:3", "vamp:7"])
def test_a_model_with_any_prior_trains_saves_and_loads(prior, cells, tmp_path):
    train = celbo.TrainConfig(max_epochs=3, seed=0)
    model = celbo.ExpressionVAE(
        latent_dim=3, hidden_dims=(16,), conditions=["batch"], prior=prior, train=train, norm="layer"
    ).fit(cells)
    again = celbo.ExpressionVAE(
        latent_dim=3, hidden_dims=(16,), conditions=["batch"], prior=prior, train=train, norm="layer"
    ).fit(cells)
    np.testing.assert_array_equal(model.embed(cells), again.embed(cells))
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.embed(cells), model.embed(cells))
    np.testing.assert_array_equal(loaded.elbo(cells), model.elbo(cells))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vampire", "choose one of normal, conditional, mixture:20, vamp:100"),
        ("normal:3", "choose one of"),
        ("mixture:0", "choose one of"),
        ("mixture:two", "choose one of"),
        ("conditional", "needs a condition"),
        ("vamp:3", "needs an encoder with a hidden layer"),
    ],
)
def test_a_prior_that_cannot_be(text, said):
    with pytest.raises(celbo.UsageError, match=said):
        make_prior(text, latent_dim=2, context_dim=0, width=0)
