"""Remedies: formulas against what the papers write, the table as a whole, and what is refused."""

import itertools
import math
import warnings
from itertools import permutations, product

import numpy as np
import pytest
import torch

import celbo
from celbo.fit.remedies import REMEDIES, REMOVED, combine, contradictions, linear_warmup, remedy_table
from celbo.fit.train import TrainConfig, plan_run
from celbo.model.objective import kl_divergence


def weights(remedies, warmup=40, steps=60):
    recipe = combine(remedies)
    return [recipe.kl_weight(step, warmup) for step in range(steps)]


@pytest.mark.parametrize("name", [row.name for row in REMEDIES.values() if row.part == "schedule"])
def test_every_schedule_ends_at_one_and_stays_there(name):
    found = weights([name])
    assert all(0 <= weight <= 1 for weight in found)
    assert found[39:] == [1.0] * 21
    assert found[0] <= 0.2
    if name != "cyclical":
        assert found == sorted(found)


def test_a_cyclical_weight_rises_anew_in_each_cycle():
    found = weights(["cyclical:2"])
    assert found[9] == pytest.approx(1)
    assert found[18] == 1
    assert found[20] == pytest.approx(0.1)
    assert sum(b < a for a, b in itertools.pairwise(found)) == 1


def test_an_autoencoder_start_has_no_kl_at_first():
    found = weights(["autoencoder_start"], warmup=30)
    assert found[:10] == [0.0] * 10
    assert found[10] > 0


@pytest.mark.parametrize("name", [row.name for row in REMEDIES.values() if row.part == "schedule"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_a_schedule_is_over_by_half_of_the_run(name, fraction):
    plan = plan_run(1000, TrainConfig(max_epochs=20, warmup_fraction=fraction), combine([name]))
    assert 0 < plan.warmup_steps <= plan.epochs * plan.steps_per_epoch // 2


def test_beta_weighs_the_kl_for_good():
    assert weights(["beta:4"])[-1] == 4
    assert not combine(["beta:4"]).is_bound
    assert combine(["beta:1", "linear"]).is_bound


def test_without_remedies_the_penalty_is_the_kl_itself():
    kl = torch.rand(7, 3)
    recipe = combine([])
    assert recipe.is_bound
    assert recipe.penalty(kl, 0.5, None)[0] == pytest.approx(0.5 * kl.sum().item() / 7)
    assert [recipe.kl_weight(step, 4) for step in range(5)] == [linear_warmup(step, 4) for step in range(5)]


def test_free_bits_pull_at_no_dimension_below_the_floor():
    kl = torch.tensor([[0.02, 1.0], [0.04, 3.0]], requires_grad=True)
    loss, _ = combine(["free_bits:0.1"]).penalty(kl, 1.0, None)
    assert loss.item() == pytest.approx(0.1 + 2.0)
    loss.backward()
    assert kl.grad.tolist() == [[0.0, 0.5], [0.0, 0.5]]


def test_free_bits_together_share_one_floor():
    penalty = combine(["free_bits_together:1"]).penalty
    assert penalty(torch.tensor([[0.2, 0.3]]), 1.0, None)[0] == 1
    assert penalty(torch.tensor([[0.2, 1.3]]), 1.0, None)[0] == 1.5


def test_soft_free_bits_hold_the_kl_in_its_band():
    """A KL that answers to its weight, as a real one does: KL = .3 / (1 + 2 weight) settles at the floor."""
    penalty, memory = combine(["soft_free_bits:0.2"]).penalty, None
    for _ in range(200):
        weight = 1.0 if memory is None else memory.item()
        _, memory = penalty(torch.full((5, 1), 0.3 / (1 + 2 * weight)), 1.0, memory)
    assert 0.3 / (1 + 2 * memory.item()) == pytest.approx(0.2, rel=0.1)
    for _ in range(200):
        _, memory = penalty(torch.full((5, 1), 9.0), 1.0, memory)
    assert memory.item() == 1  # never above what the ELBO asks


def test_capacity_holds_the_kl_at_what_the_schedule_has_reached():
    penalty = combine(["capacity:8"]).penalty
    assert penalty(torch.tensor([[1.0, 2.0]]), 0.5, None)[0] == pytest.approx(10.0)
    assert penalty(torch.tensor([[1.0, 4.0]]), 0.5, None)[0] == pytest.approx(10.0)


def test_mmd_is_nothing_for_draws_of_the_prior_and_something_elsewhere():
    generator = torch.Generator().manual_seed(0)
    pull = combine(["mmd:1"]).pull
    of_prior = [pull(torch.randn(200, 4, generator=generator), None, generator).item() for _ in range(50)]
    assert abs(np.mean(of_prior)) < 3 * np.std(of_prior) / math.sqrt(50)  # unbiased
    assert pull(torch.randn(200, 4, generator=generator) + 2, None, generator) > 10 * np.std(of_prior)


def squared_mmd(a, b):
    """Unbiased, pair by pair."""
    scale = 2 * a.shape[1]

    def mean(pairs):
        return np.mean([scale / (scale + ((one - other) ** 2).sum()) for one, other in pairs])

    return mean(permutations(a, 2)) + mean(permutations(b, 2)) - 2 * mean(product(a, b))


def test_levels_are_matched_by_the_mmd_of_each_against_the_others():
    rng = np.random.default_rng(0)
    z, level = rng.normal(size=(12, 3)), np.repeat([0, 1, 2], [3, 4, 5])
    z[level == 2] += 1
    dose, lonely = rng.normal(size=(12, 1)), np.eye(12)[:, :1]  # neither has levels to compare
    context = torch.from_numpy(np.hstack([np.eye(3)[level], dose, lonely]))
    found = combine(["match_levels:2"]).pull(torch.from_numpy(z), context, torch.Generator())
    wanted = 2 * sum((level == n).mean() * squared_mmd(z[level == n], z[level != n]) for n in range(3))
    assert found.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.long
def test_matched_levels_lie_nearer_to_each_other():
    cells = celbo.simulate_cells(
        n_cells=1000, n_genes=100, n_batches=2, batch_strength=1.5, median_library=1500, seed=0
    )
    level = torch.from_numpy(np.eye(2)[(cells.obs["batch"] == "batch_0").to_numpy().astype(int)])
    apart = {}
    for remedies in ([], ["match_levels:10"]):
        model = celbo.ExpressionVAE(latent_dim=4, nuisance=["batch"], encode_context=False, remedies=remedies)
        mu_z, sd_z = model.fit(cells).posterior(cells)
        z = torch.from_numpy(mu_z + sd_z * np.random.default_rng(0).standard_normal(mu_z.shape))
        apart[bool(remedies)] = combine(["match_levels:1"]).pull(z, level, torch.Generator()).item()
    assert apart[False] > 1e-3
    assert apart[True] < 0.3 * apart[False]


def test_remedies_of_different_parts_go_together():
    recipe = combine(["cyclical:2", "free_bits:0.1", "mmd:3", "norm_mu", "narrow_decoder:16", "vamp_prior:50"])
    assert recipe.options == {"norm_mu": True, "decoder_dims": (16,), "prior": "vamp:50"}
    assert recipe.pull is not None
    assert recipe.stretch == 2


@pytest.mark.parametrize(
    ("remedies", "said"),
    [
        (["free_bit"], "no remedy 'free_bit'"),
        (["cyclical", "linear"], "'linear' and 'cyclical', both of which change the schedule"),
        (["free_bits", "soft_free_bits:0.2"], "both of which change the penalty"),
        (["skip", "skip"], "'skip' twice"),
        (["free_bits:much"], "needs a number above 0"),
        (["free_bits:-1"], "needs a number above 0"),
        (["free_bits:nan"], "needs a number above 0"),
        (["cyclical:2.5"], "needs a whole number above 0"),
        (["skip:3"], "takes no number"),
        (["decoder_dropout:1"], "from 0, 0.99 at most"),
    ],
)
def test_what_cannot_be_is_refused_with_the_table(remedies, said):
    with pytest.raises(celbo.UsageError, match=said) as caught:
        combine(remedies)
    assert all(name in str(caught.value) for name in REMEDIES)


def test_one_text_in_place_of_a_list_is_refused():
    with pytest.raises(celbo.UsageError, match=r"give a list: \['skip'\]"):
        combine("skip")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remedies": ["skip"]}, "at least two widths"),
        ({"remedies": ["conditional_prior"]}, "needs a condition"),
        ({"remedies": ["free_bits"], "objective": "autoencoder"}, "has no KL"),
        ({"remedies": ["vamp_prior", "norm_mu"]}, "batch norms do not allow"),
        ({"remedies": ["learned_sigma"]}, "is for likelihood='gaussian'"),
        ({"remedies": ["mmd"], "prior": "mixture:3"}, "the prior is another"),
        ({"remedies": ["match_levels"]}, "needs a condition"),
    ],
)
def test_a_remedy_that_the_model_cannot_take_is_refused_with_the_table(options, said, cells):
    with pytest.raises(celbo.UsageError, match=said) as caught:
        celbo.ExpressionVAE(**options).fit(cells)
    assert remedy_table() in str(caught.value)


@pytest.mark.parametrize("name", list(REMEDIES))
def test_every_remedy_trains_repeatably_and_its_history_is_that_of_the_bound(name, cells, tmp_path):
    options = {"hidden_dims": (16, 16), "latent_dim": 3, "conditions": ["batch"], "remedies": [name]}
    if name == "learned_sigma":
        options |= {"likelihood": "gaussian"}
    if name == "shallow":
        del options["hidden_dims"]
    train = celbo.TrainConfig(max_epochs=4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # after four epochs nothing is learned
        model, again = (celbo.ExpressionVAE(**options, train=train).fit(cells) for _ in range(2))
    np.testing.assert_array_equal(model.embed(cells), again.embed(cells))
    last = model.history_[-1]
    assert last.validation_elbo == pytest.approx(last.validation_reconstruction - last.validation_kl)
    assert last.kl_weight == 1 or not model.recipe().is_bound
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.remedies == [name]
    np.testing.assert_array_equal(loaded.embed(cells), model.embed(cells))


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_remedy_is_refused_with_the_reason(name):
    with pytest.raises(celbo.UsageError, match=f"'{name}' was removed: "):
        combine([f"{name}:5"])


def test_a_remedy_that_contradicts_an_option_is_refused(cells):
    given = {"hidden_dims": (32, 16), "norm": "layer"}
    clash = contradictions(["shallow:64"], given, {"hidden_dims": (128,), "norm": "layer"})
    assert clash == [
        "remedy 'shallow:64' sets hidden_dims=(64,), and hidden_dims=(32, 16) is given; leave one of them out."
    ]
    assert not contradictions(["shallow:64"], {"hidden_dims": [64], "norm": "layer"}, {"hidden_dims": (128,)})
    with pytest.raises(celbo.UsageError, match="sets norm='layer', and norm='none' is given"):
        celbo.ExpressionVAE(norm="none", remedies=["layer_norm"]).fit(cells)


def test_norm_mu_leaves_no_dimension_silent(cells):
    train = celbo.TrainConfig(max_epochs=10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celbo.ExpressionVAE(latent_dim=6, hidden_dims=(16,), remedies=["norm_mu", "beta:50"], train=train)
        model.fit(cells)
    mu_z, _ = model.posterior(cells)
    np.testing.assert_allclose(mu_z[model.split_.train].std(0), 0.6, rtol=0.1)
    assert (model.elbo(cells).filter(like="kl_").mean() >= 0.5 * 0.6**2 * 0.9).all()


def test_a_model_forced_by_a_heavy_kl_says_nothing_and_warns(cells):
    train = celbo.TrainConfig(max_epochs=15, seed=0)
    with pytest.warns(UserWarning, match="posterior collapse: the decoder loses"):
        model = celbo.ExpressionVAE(latent_dim=4, hidden_dims=(16,), remedies=["beta:1000"], train=train).fit(cells)
    assert model.history_[-1].active_units == 0
    assert model.history_[-1].ablation < 1
    assert kl_divergence(*(torch.from_numpy(part) for part in model.posterior(cells))).isfinite().all()
