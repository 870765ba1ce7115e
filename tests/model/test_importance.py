"""Refined, importance-weighted log p(x), against integration."""

import math
import warnings

import numpy as np
import pytest
import torch

import celbo
from celbo.fit.cells import open_cells
from celbo.model.importance import _refine, log_prob
from celbo.model.inference import cell_terms, encoded_blocks
from celbo.model.objective import log_prob_of_cells


def fitted(cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=20, seed=0)
        return celbo.ExpressionVAE(hidden_dims=(16,), conditions=["batch"], train=train, **options).fit(cells)


@pytest.mark.long
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "bernoulli", "gaussian"])
@pytest.mark.parametrize("prior", ["normal", "conditional", "mixture:3", "vamp:5"])
def test_it_is_the_integral_over_one_latent_dimension(cells, likelihood, prior):
    model = fitted(cells, latent_dim=1, likelihood=likelihood, prior=prior)
    source = open_cells(model.fitted_, cells).source
    rows = np.arange(60)
    found = log_prob(model.vae_, source, rows, n_samples=2000)
    minibatch, vae = source.take(rows), model.vae_
    grid = torch.linspace(-9, 9, 2001)[:, None]
    with torch.no_grad():
        for row in rows:
            context = minibatch.context[row].expand(len(grid), -1)
            p = vae.likelihood(grid, context=context, library=minibatch.library[row].expand(len(grid), 1))
            ll = log_prob_of_cells(p, minibatch.x.to_dense()[row].expand(len(grid), -1), None).double()
            prior_density = vae.prior_components(grid, context).distribution().log_prob(grid).double()
            truth = torch.logsumexp(ll + prior_density, 0) + math.log(18 / 2000)
            assert abs(found.log_p[row] - truth) < max(0.01, 4 * found.se[row])
    assert np.median(found.ess) > 1000


def test_it_is_above_the_bound_and_refinement_raises_its_certainty(cells):
    model = fitted(cells, latent_dim=4)
    source = open_cells(model.fitted_, cells).source
    rows = np.arange(60)
    refined, plain = (log_prob(model.vae_, source, rows, n_samples=300, refine_steps=steps) for steps in (150, 0))
    draws = np.array([cell_terms(model.vae_, source, rows, seed=seed).elbo for seed in range(40)])
    elbo, se = draws.mean(0), draws.std(0) / np.sqrt(len(draws))
    assert (refined.log_p + 4 * refined.se > elbo - 4 * se).all()
    assert refined.log_p.mean() > elbo.mean()
    assert np.median(refined.ess) > np.median(plain.ess)
    again = log_prob(model.vae_, source, rows, n_samples=300)
    np.testing.assert_array_equal(again.log_p, refined.log_p)


@pytest.mark.parametrize("refine", [False, True])
def test_a_cell_is_found_the_same_in_any_company(cells, refine):
    model = fitted(cells, latent_dim=3)
    some = np.random.default_rng(0).permutation(cells.n_obs)[:30]
    of_all, of_some = (model.log_prob(each, n_samples=20, refine=refine) for each in (cells, cells[some]))
    np.testing.assert_allclose(of_some["log_p"], of_all["log_p"].iloc[some], rtol=1e-5)
    other_seed = model.log_prob(cells[some], n_samples=20, refine=refine, seed=1)
    assert (abs(other_seed["log_p"] - of_some["log_p"]) > 1e-3).mean() > 0.5


def test_a_cell_is_found_the_same_however_its_counts_are_stored(cells):
    model = fitted(cells, latent_dim=3, likelihood="gaussian")
    found = []
    for dtype in ("float32", "int64", "int16"):
        stored = cells[:50].copy()
        stored.X = stored.X.astype(dtype)
        found.append(model.log_prob(stored, n_samples=20)["log_p"])
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_nothing_is_said_of_a_cell_without_a_count(cells):
    model = fitted(cells, latent_dim=3)
    some = cells[:10].copy()
    some.X = some.X.toarray()
    some.X[3] = 0
    with pytest.warns(UserWarning, match="1 of 10 cells have no counts"):
        found = model.log_prob(some, n_samples=20)
    assert np.flatnonzero(found["log_p"].isna()).tolist() == [3]
    assert not found["trusted"].iloc[3]
    with pytest.warns(UserWarning, match="1 of 10 cells have no counts"):
        found = model.outliers(some)
    assert np.flatnonzero(found["p_value"].isna()).tolist() == [3]
    assert found["kind"].iloc[3] == "empty"


def test_cells_that_lack_genes_are_filled_in_first(cells):
    model = fitted(cells, latent_dim=3)
    abundant = np.argsort(-np.asarray(cells.X.sum(0)).ravel())[:8]
    query = cells[:40, np.delete(np.arange(cells.n_vars), abundant)].copy()
    with pytest.warns(UserWarning, match="fills them in"):
        source = open_cells(model.fitted_, query).source
    found = log_prob(model.vae_, source, n_samples=300)
    elbo = np.mean([cell_terms(model.vae_, source, seed=seed).elbo for seed in range(10)], axis=0)
    assert found.log_p.mean() > elbo.mean() - 0.2


def test_the_model_is_left_as_it_was(cells):
    model = fitted(cells, latent_dim=2)
    source = open_cells(model.fitted_, cells).source
    log_prob(model.vae_, source, np.arange(3), n_samples=10, refine_steps=3)
    assert all(parameter.requires_grad for parameter in model.vae_.parameters())
    assert not model.vae_.training


def test_it_is_the_integral_over_two_latent_dimensions(cells):
    model = fitted(cells, latent_dim=2)
    source = open_cells(model.fitted_, cells).source
    rows, vae, step = np.arange(4), model.vae_, 0.06
    found = log_prob(vae, source, rows, n_samples=5000)
    line = torch.arange(-6, 6, step)
    grid = torch.cartesian_prod(line, line)
    minibatch = source.take(rows)
    with torch.no_grad():
        for row in rows:
            context, library = minibatch.context[row].expand(len(grid), -1), minibatch.library[row].expand(len(grid), 1)
            p = vae.likelihood(grid, context=context, library=library)
            ll = log_prob_of_cells(p, minibatch.x.to_dense()[row].expand(len(grid), -1), None).double()
            density = -0.5 * grid.double().square().sum(1) - math.log(2 * math.pi)
            truth = torch.logsumexp(ll + density, 0) + 2 * math.log(step)
            assert abs(found.log_p[row] - truth) < max(0.01, 4 * found.se[row])


def test_refinement_steps_are_those_of_adam_and_get_smaller(cells):
    """Adam's first step is the learning rate itself, .03 for means and .06 for log-variances; the rate falls to 0."""
    model = fitted(cells, latent_dim=2)
    (block,) = encoded_blocks(model.vae_, open_cells(model.fitted_, cells).source, np.arange(30), 30)

    def refined(steps):
        noise = [np.random.default_rng(cell) for cell in range(30)]
        return _refine(model.vae_.requires_grad_(False), block.cells, block.mu_z, block.logvar_z, steps, noise)

    mu_z, logvar_z = refined(1)
    torch.testing.assert_close((mu_z - block.mu_z).abs(), torch.full((30, 2), 0.03), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((logvar_z - block.logvar_z).abs(), torch.full((30, 2), 0.06), rtol=1e-3, atol=1e-5)
    assert (refined(2)[0] - block.mu_z).abs().max() < 0.03 + 0.5 * 0.03 + 1e-3
    model.vae_.requires_grad_(True)
