"""Diagnostics: planted truths, known values, float64 by hand."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import norm

import celbo
from celbo.fit import fitted
from celbo.fit.cells import open_cells
from celbo.model.ablation import sensitivity, use_of_latent
from celbo.model.inference import cell_terms, posterior
from celbo.model.information import mutual_information
from celbo.model.objective import elbo_terms, log_prob_of_cells
from celbo.model.vae import Noise
from celbo.trust import diagnosing
from celbo.trust.evidence import gather
from celbo.trust.findings import (
    active_units,
    aggregated_gap,
    condition_ablation,
    condition_leakage,
    energy_distance,
    kl_by_dimension,
    lasting_collapse,
    latent_information,
    types_kept,
)
from celbo.trust.simpler import expected_dim, gene_mean_log_prob, read_sample

TRAIN = celbo.TrainConfig(seed=0)


def cells_to_measure(model, adata):
    """The source of these cells, those to measure on, and those that simpler models learn from."""
    cells = open_cells(model.fitted_, adata)
    return cells.source, *fitted.cells_to_measure(model.fitted_, cells)


@pytest.fixture(scope="module")
def many():
    return celbo.simulate_cells(n_cells=1200, n_genes=120, n_types=5, type_strength=1.5, median_library=1500, seed=3)


@pytest.fixture(scope="module")
def healthy(many):
    return celbo.ExpressionVAE(latent_dim=3, hidden_dims=(32,), conditions=["batch"], train=TRAIN).fit(many)


def copy_of(model, many):
    """The same fitted model, whose weights may be changed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        return celbo.load(f"{folder}/model")


def decoder_input(model):
    return next(layer for layer in model.vae_.decoder if isinstance(layer, torch.nn.Linear)).weight.data


# Figures with a known value.


def test_mutual_information_of_clusters_is_log_of_their_number():
    for k in (2, 5, 20):
        mu = np.repeat(np.arange(k) * 50.0, 4000 // k)[:, None]
        assert mutual_information(mu, np.zeros_like(mu)) == pytest.approx(math.log(k), abs=0.02)


@pytest.mark.parametrize("sd", [0.3, 0.5, 1.0, 3.0])
def test_mutual_information_of_a_gaussian_channel(sd):
    """mu ~ N(0, 1), z = mu + sd eps: I = log(1 + 1 / sd**2) / 2 in each of two dimensions."""
    mu = np.random.default_rng(0).standard_normal((5000, 2))
    truth = math.log1p(1 / sd**2)
    assert truth < math.log(5000) - 3
    assert mutual_information(mu, np.full_like(mu, 2 * math.log(sd))) == pytest.approx(truth, abs=0.1)


def test_mutual_information_near_its_cap_is_called_capped():
    mu = np.random.default_rng(0).standard_normal((500, 4)) * 3
    found = latent_information(mu, np.full_like(mu, -8.0))
    assert found.value <= math.log(500)
    assert "capped" in found.meaning
    loose = latent_information(mu, np.full_like(mu, 4.0))
    assert "capped" not in loose.meaning


def test_mutual_information_does_not_mind_where_the_cells_lie():
    mu = np.random.default_rng(0).standard_normal((800, 3)).astype(np.float32)
    logvar = np.full_like(mu, -1.0)
    assert mutual_information(mu + 1000, logvar) == pytest.approx(mutual_information(mu, logvar), abs=1e-2)


def test_the_gap_to_the_prior_of_shifted_cells():
    """q(z | x) = N(m, 1) for all cells: KL(q(z) || p(z)) = m**2 / 2, and nothing is known of a cell."""
    mu = np.full((3000, 1), 2.5)
    found = aggregated_gap(mu, np.zeros_like(mu))
    assert found.value == pytest.approx(2.5**2 / 2, abs=0.05)
    assert found.verdict == "watch"
    assert "vamp_prior" in found.try_next
    rng = np.random.default_rng(0)
    fits = rng.standard_normal((3000, 1)) * math.sqrt(0.75)
    assert aggregated_gap(fits, np.full_like(fits, math.log(0.25))).verdict == "good"


def test_the_gap_near_the_cap_is_an_energy_distance():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((1000, 10)) * math.sqrt(1 - 0.25**2)
    narrow = np.full_like(mu, 2 * math.log(0.25))
    assert "energy distance" in aggregated_gap(mu, narrow).meaning
    assert aggregated_gap(mu, narrow).verdict == "good"
    assert aggregated_gap(mu + 2, narrow).verdict == "watch"


def test_energy_distance_of_two_normals():
    """In one dimension E|a - b| is known: sqrt(2 E|a-b| - E|a-a'| - E|b-b'|) for N(0, 1) and N(m, 1)."""
    rng, m = np.random.default_rng(0), 1.5
    a, b = rng.standard_normal((4000, 1)), rng.standard_normal((4000, 1)) + m
    between = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * (1 - 2 * norm.cdf(-m / math.sqrt(2)))
    truth = math.sqrt(2 * between - 4 / math.sqrt(math.pi))
    assert energy_distance(a, b) == pytest.approx(truth, rel=0.05)


def test_active_units_counts_what_varies():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((2000, 4)) * [1.0, 0.2, 0.05, 0.0]
    found = active_units(mu)
    assert np.array(found.value) == pytest.approx([1.0, 0.04, 0.0025, 0.0], rel=0.1)
    assert "2 of 4" in found.meaning
    assert "z_2, z_3" in found.meaning
    assert active_units(mu[:, 3:]).verdict == "bad"


def test_kl_and_lasting_collapse_by_dimension():
    kl = np.zeros((1000, 3))
    kl[:, 1] = 0.05
    kl[:, 2] = np.linspace(0, 4, 1000)
    found = kl_by_dimension(kl)
    assert found.value[2] == pytest.approx({"mean": 2, "5%": 0.2, "50%": 2, "95%": 3.8}, abs=0.01)
    assert "dead dimensions 1, weak 1 of 3" in found.meaning
    assert lasting_collapse(kl).value == pytest.approx([1, 0, 0.003], abs=1e-6)
    assert "1 of 3 dimensions" in lasting_collapse(kl).meaning


def test_expected_dimensions_are_those_that_were_planted():
    counts = celbo.simulate_cells(
        n_cells=2000,
        n_genes=300,
        n_types=4,
        n_programmes=0,
        n_batches=1,
        treatment_strength=0,
        median_library=3000,
        seed=0,
    )
    model = celbo.ExpressionVAE(train=celbo.TrainConfig(max_epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(counts)
        source, _, _ = cells_to_measure(model, counts)
    assert expected_dim(read_sample(source, np.arange(2000), is_counts=True)) in (
        3,
        4,
    )  # four types span three dimensions, and bend them a little
    rng = np.random.default_rng(0)
    counts.X = rng.poisson(3.0, counts.shape).astype(np.float32)
    source, _, _ = cells_to_measure(model, counts)
    assert expected_dim(read_sample(source, np.arange(2000), is_counts=True)) == 0


# What is asked of a model, against the definition.


def test_ablation_agrees_with_a_direct_computation(healthy, many):
    source, rows, _ = cells_to_measure(healthy, many)
    rows = rows[:50]
    vae = healthy.vae_
    use = use_of_latent(vae, source, rows, by_dimension=True, of_context=[slice(0, 2)], seed=5)
    assert use.lost.shape == (1 + 3 + 1, 50)
    cells = source.take(rows)
    mu, logvar = posterior(vae, source, rows)
    np.testing.assert_array_equal(use.mu_z, mu)
    rng = np.random.default_rng([5, 5])
    z = mu + np.exp(0.5 * logvar) * rng.standard_normal(mu.shape, np.float32)
    x, vae64 = cells.x.to_dense().double(), copy_of(healthy, many).vae_.double()

    def direct(z, context):
        with torch.no_grad():
            p = vae64.likelihood(torch.from_numpy(z).double(), context=context.double(), library=cells.library.double())
            return log_prob_of_cells(p, x, None).numpy()

    np.testing.assert_allclose(use.reconstruction, direct(z, cells.context), rtol=1e-5)
    # Whatever the permutation was, it took each cell's z once, from a cell of the same batch.
    own = direct(z, cells.context)
    batch = cells.context.numpy().argmax(1)
    lost = np.array([[own[i] - direct(z[[j]].repeat(50, 0), cells.context)[i] for j in range(50)] for i in range(50)])
    partners = [
        [j for j in range(50) if j != i and batch[j] == batch[i] and abs(lost[i, j] - use.lost[0, i]) < 2e-3]
        for i in range(50)
    ]
    assert all(partners)


def test_kl_figures_agree_with_float64(healthy, many):
    source, rows, _ = cells_to_measure(healthy, many)
    mu, logvar = (part.astype(np.float64) for part in posterior(healthy.vae_, source, rows))
    direct = 0.5 * (mu**2 + np.exp(logvar) - logvar - 1)
    np.testing.assert_allclose(cell_terms(healthy.vae_, source, rows).kl, direct, rtol=1e-5, atol=1e-6)


def test_sensitivity_agrees_with_finite_differences(healthy, many):
    source, rows, _ = cells_to_measure(healthy, many)
    rows = rows[:40]
    vae, cells = copy_of(healthy, many).vae_.double(), source.take(rows)
    mu, _ = posterior(healthy.vae_, source, rows)
    z, context, library = torch.from_numpy(mu).double(), cells.context.double(), cells.library.double()
    step, truth = 1e-5, []
    with torch.no_grad():
        variance = vae.likelihood(z, context=context, library=library).variance
        for j in range(3):
            along = torch.zeros_like(z)
            along[:, j] = step
            slope = (vae.decode(z + along, context, library) - vae.decode(z - along, context, library)) / (2 * step)
            truth.append(float((slope**2 / variance).sum(1).mean()) * mu[:, j].var(dtype=np.float64))
    np.testing.assert_allclose(sensitivity(healthy.vae_, source, rows), truth, rtol=1e-3)


def test_gene_means_are_the_model_that_ignores_z(many):
    """A model before its first step, whose decoder is deaf, explains cells just as well."""
    model = celbo.ExpressionVAE(train=celbo.TrainConfig(max_epochs=1, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(many)
    source, rows, training = cells_to_measure(model, many)
    vae = celbo.VAE(120, 2, [8], likelihood=celbo.LIKELIHOODS["nb"]).eval()
    from celbo.minibatch import gene_moments

    vae.head.initialise(vae.fc_out, gene_moments(source, training))
    vae.fc_out.weight.data.zero_()
    cells = source.take(rows)
    with torch.no_grad():
        terms = elbo_terms(vae, cells.x, None, cells.library, Noise(torch.zeros(len(rows), 2), None, None))
    found = gene_mean_log_prob(source, rows, training, celbo.LIKELIHOODS["nb"])
    np.testing.assert_allclose(found, terms.reconstruction, rtol=1e-5)


# Planted truths.


def test_a_healthy_model_is_called_healthy(healthy, many):
    found = healthy.diagnose(many)
    assert not found.collapsed
    assert found.active_units == 3
    assert "3 of 3 dimensions carry information" in found.verdict
    assert found.finding("latent ablation").verdict == "good"
    assert found.finding("ablation of batch").verdict == "good"
    assert found.finding("leakage of batch").verdict == "good"


def test_a_decoder_that_ignores_z_is_called_collapsed(healthy, many):
    model = copy_of(healthy, many)
    decoder_input(model)[:, :3] = 0
    found = model.diagnose(many)
    assert found.collapsed
    assert found.active_units == 0
    assert found.verdict.startswith("Collapsed: the decoder loses 0.0 nats")
    assert "blob without separation" in found.verdict
    assert found.findings[0].verdict == "bad"
    assert found.remedies[0].remedy == "norm_mu"
    assert found.remedies[0].keyword == "remedies=['norm_mu']"


def test_too_few_epochs_are_the_first_cause_of_a_collapse(many):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"latent_dim": 3, "hidden_dims": (32,)}
        trains = (celbo.TrainConfig(max_epochs=n, seed=0) for n in (2, 40))
        short, usual = (celbo.ExpressionVAE(**options, train=train).fit(many) for train in trains)
    found = short.diagnose(many)
    assert found.collapsed
    assert found.remedies[0].command == "--epochs 200"
    assert found.remedies[0].why == "training had 2 epochs; without --epochs it is planned for 200"
    decoder_input(usual)[:] = 0
    ended = copy_of(usual, many)
    ended.fitted_ = replace(ended.fitted_, config=replace(usual.train, max_epochs=100))  # it needed fewer
    for model in (usual, ended):
        found = model.diagnose(many)
        assert found.collapsed
        assert not [advice for advice in found.remedies if "epochs" in advice.command]


@pytest.mark.parametrize("k", [1, 2])
def test_live_dimensions_are_counted(healthy, many, k):
    model = copy_of(healthy, many)
    decoder_input(model)[:, k:3] = 0
    found = model.diagnose(many)
    assert found.active_units == k
    assert f"{k} of 3 dimensions" in found.verdict


def test_a_floor_under_the_kl_is_no_information(many):
    """Dimensions that a norm makes vary, with a KL of nats, to which the decoder does not listen."""
    train = celbo.TrainConfig(max_epochs=10, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celbo.ExpressionVAE(latent_dim=3, hidden_dims=(32,), remedies=["norm_mu"], train=train).fit(many)
    decoder_input(model)[:] = 0
    found = model.diagnose(many)
    assert found.finding("active units").verdict == "good"
    assert found.finding("KL by dimension").verdict == "good"
    assert found.collapsed


def test_a_decoder_that_ignores_its_condition_is_called_so(healthy, many):
    model = copy_of(healthy, many)
    decoder_input(model)[:, 3:] = 0
    found = model.diagnose(many)
    assert found.finding("ablation of batch").verdict == "bad"
    assert "ignores it" in found.finding("ablation of batch").meaning
    assert any(advice.remedy == "conditional_prior" for advice in found.remedies)


@pytest.mark.long
def test_a_latent_that_carries_its_condition_is_called_so(many):
    """A strong batch effect, kept from encoder and decoder, lands in z; given to the model later it is told from z."""
    cells = celbo.simulate_cells(n_cells=1200, n_genes=120, n_types=3, batch_strength=1.0, median_library=1500, seed=3)
    z = celbo.ExpressionVAE(latent_dim=4, hidden_dims=(32,), train=TRAIN).fit(cells).embed(cells)
    found = condition_leakage("batch", z, cells.obs["batch"].to_numpy())
    assert found.verdict == "bad"
    assert found.value > 0.9
    mixed = condition_leakage("batch", z, np.random.default_rng(0).permutation(cells.obs["batch"].to_numpy()))
    assert mixed.verdict == "good"
    assert abs(mixed.value) < 0.1


def test_leakage_within_types_forgives_types_that_go_with_a_condition():
    rng = np.random.default_rng(0)
    types = rng.integers(0, 2, 2000)
    condition = np.where(rng.random(2000) < 0.9, types, 1 - types)
    z = types[:, None] * 6 + rng.standard_normal((2000, 3))
    assert condition_leakage("c", z, condition).verdict == "bad"
    assert condition_leakage("c", z, condition, types).verdict == "good"


def test_leakage_of_a_continuous_condition():
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((1500, 2)), rng.standard_normal(1500)
    assert condition_leakage("dose", z, z[:, 0] + 0.1 * noise).verdict == "bad"
    assert condition_leakage("dose", z, noise).verdict == "good"


def test_an_ignored_condition_needs_more_than_noise_to_count():
    rng = np.random.default_rng(0)
    assert condition_ablation("c", rng.standard_normal(500)).verdict == "bad"
    assert condition_ablation("c", rng.standard_normal(500) + 1).verdict == "good"
    assert condition_ablation("c", 5 * rng.standard_normal(20)).verdict == "watch"  # too few to say


def test_cells_without_structure_are_explained(many):
    """Nothing but gene means and depth: z has nothing to say, and no remedy is promised to help."""
    cells = celbo.simulate_cells(
        n_cells=1000, n_genes=100, n_types=1, n_programmes=0, n_batches=1, treatment_strength=0, seed=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = celbo.ExpressionVAE(latent_dim=3, hidden_dims=(16,), train=TRAIN).fit(cells).diagnose(cells)
    assert found.collapsed
    assert "there is little to find" in found.verdict


def test_a_collapse_in_part_is_announced(many):
    cells = celbo.simulate_cells(n_cells=1000, n_genes=300, n_types=6, median_library=1500, seed=1)
    deep = {"hidden_dims": (128, 128, 128), "norm": "none"}
    train = celbo.TrainConfig(seed=0, warmup_fraction=0.0, max_epochs=40)
    with pytest.warns(UserWarning, match="posterior collapse"):
        model = celbo.ExpressionVAE(**deep, train=train).fit(cells)
    found = model.diagnose(cells)
    assert found.verdict.startswith(("Partly collapsed", "Collapsed"))
    assert [advice.remedy for advice in found.remedies][:2] == ["shallow", "linear"]


# How it is asked.


def test_the_same_cells_are_held_out_after_loading(healthy, many, tmp_path):
    healthy.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.diagnose(many).to_json() == healthy.diagnose(many).to_json()
    _, rows, training = cells_to_measure(loaded, many)
    np.testing.assert_array_equal(rows, healthy.split_.validation)
    np.testing.assert_array_equal(training, healthy.split_.train)
    _, rows, training = cells_to_measure(loaded, many[:500])
    assert len(rows) == len(training) == 500


def test_a_diagnosis_is_plain_json(healthy, many):
    found = healthy.diagnose(many)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["active_units"] == 3
    assert {"name", "value", "expected", "verdict", "meaning", "try_next"} == set(document["findings"][0])
    order = [("bad", "watch", "good").index(each["verdict"]) for each in document["findings"]]
    assert order == sorted(order)
    assert str(found).splitlines()[0] == found.verdict


def test_an_unknown_column_of_types_is_refused(healthy, many):
    with pytest.raises(celbo.UsageError, match="groupby='kind' is no column of obs"):
        healthy.diagnose(many, groupby="kind")


def test_diagnostics_need_neither_torch_nor_anndata():
    code = "import sys, celbo.trust.advice; print([m for m in ('torch', 'anndata') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.long
@pytest.mark.parametrize("name", ["zeisel_1464", "pbmc_3tech"])
def test_models_of_real_cells_are_called_healthy(name, real_data):
    cells = real_data(name)
    conditions = ["batch"] if "batch" in cells.obs else []
    found = celbo.ExpressionVAE(conditions=conditions, train=celbo.TrainConfig(seed=0)).fit(cells).diagnose(cells)
    assert not found.collapsed
    gained = found.finding("gain over gene means").value
    assert found.finding("latent ablation").value[0]["nats"] > 0.05 * gained


# Whatever the order and the kind of the cells.


def test_a_condition_of_one_level_cannot_be_measured(healthy, many):
    some = many[(many.obs["batch"] == many.obs["batch"].iloc[0]).to_numpy()]
    found = healthy.diagnose(some)
    for name in ("ablation of batch", "leakage of batch"):
        assert found.finding(name).verdict == "watch"
        assert "cannot be measured" in found.finding(name).meaning
    assert not any(advice.remedy == "conditional_prior" for advice in found.remedies)


def test_a_rare_level_counts_by_its_own_cells(healthy, many):
    """Only cells whose level changes tell what the condition is worth."""
    source, rows, _ = cells_to_measure(healthy, many)
    batch = source.take(np.arange(source.n_cells)).context.numpy().argmax(1)
    rare = np.concatenate([rows[batch[rows] == 0], rows[batch[rows] == 1][:3]])
    lost = use_of_latent(healthy.vae_, source, rare, of_context=[slice(0, 2)]).lost[-1]
    assert 2 <= (~np.isnan(lost)).sum() <= 6
    assert condition_ablation("batch", lost[~np.isnan(lost)]).value > 1


def test_the_same_cells_in_another_order_are_not_taken_for_those_of_fit(healthy, many):
    _, rows, training = cells_to_measure(healthy, many[::-1])
    assert len(rows) == len(training) == many.n_obs


def test_norms_do_not_depend_on_the_order_of_the_cells(many):
    """Cells sorted by type, as files often are: mu_z still has the spread that the norm gives it."""
    order = np.argsort(many.obs["cell_type"].astype(str).to_numpy(), kind="stable")
    model = celbo.ExpressionVAE(
        latent_dim=3, hidden_dims=(32,), remedies=["norm_mu"], train=celbo.TrainConfig(max_epochs=20, seed=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(many[order].copy())
    mu_z = model.embed(many[order])[model.split_.train]
    np.testing.assert_allclose(mu_z.std(0), 0.6, rtol=0.05)


def test_an_autoencoder_is_followed_as_it_is(many):
    train = celbo.TrainConfig(max_epochs=12, seed=0)
    model = celbo.ExpressionVAE(latent_dim=3, hidden_dims=(32,), objective="autoencoder", train=train).fit(many)
    last = [epoch.ablation for epoch in model.history_ if epoch.ablation is not None][-1]
    found = model.diagnose(many).finding("latent ablation").value[0]
    assert abs(last - found["nats"]) < 4 * found["se"] + 0.2 * found["nats"]


def test_an_estimated_kl_is_not_quoted_cell_by_cell(many):
    train = celbo.TrainConfig(max_epochs=12, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celbo.ExpressionVAE(latent_dim=3, hidden_dims=(32,), prior="mixture:5", train=train).fit(many)
    names = {each.name for each in model.diagnose(many).findings}
    assert "KL by dimension" not in names
    assert "gap to the prior" not in names
    assert "mutual information" in names


def test_a_diagnosis_leaves_torchs_randomness_alone(healthy, many):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    healthy.diagnose(many)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_nuisance_that_does_nothing_is_no_fault_and_one_that_z_tells_is():
    rng = np.random.default_rng(0)
    assert condition_ablation("c", rng.standard_normal(500), nuisance=True).verdict == "good"
    batch = rng.integers(0, 2, 1000)
    z = batch[:, None] * 6 + rng.standard_normal((1000, 2))
    found = condition_leakage("batch", z, batch, nuisance=True)
    assert found.verdict == "bad"
    assert "not removed" in found.meaning


def test_a_nuisance_reaches_model_and_diagnosis(many):
    model = celbo.ExpressionVAE(latent_dim=3, nuisance=["batch"], train=celbo.TrainConfig(max_epochs=3)).fit(many)
    assert [(each.name, each.nuisance) for each in model.schema_.conditions] == [("batch", True)]
    ablation = model.diagnose(many).finding("ablation of batch")
    assert ablation.verdict == "good"
    with pytest.raises(celbo.DataError, match="named more than once"):
        celbo.ExpressionVAE(nuisance=["batch"], conditions=["batch"]).fit(many)
    with pytest.raises(celbo.UsageError, match="nuisance is the text"):
        celbo.ExpressionVAE(nuisance="batch").fit(many)


def test_types_that_z_merges_are_named():
    rng = np.random.default_rng(0)
    types = np.repeat(["common", "other", "rare"], [400, 400, 40])
    batch = rng.integers(2, size=840)
    place = np.array([[0, 0], [8, 0], [0, 8]])[np.unique(types, return_inverse=True)[1]]
    counts = place + rng.normal(size=(840, 2)) + 20 * batch[:, None]
    kept = types_kept(place + rng.normal(size=(840, 2)), counts, types, batch)
    assert kept.verdict == "good"
    assert {each["type"] for each in kept.value} == {"common", "other", "rare"}
    assert all(each["z"] > 0.9 and each["counts"] > 0.9 for each in kept.value)
    lost = place.copy()
    lost[types == "rare"] = place[0]
    merged = types_kept(lost + rng.normal(size=(840, 2)), counts, types, batch)
    assert merged.verdict == "bad"
    assert "rare" in merged.meaning
    assert "other" not in merged.meaning


@pytest.mark.long
def test_a_model_that_removes_a_batch_keeps_the_types():
    cells = celbo.simulate_cells(
        n_cells=1500, n_genes=150, n_types=4, batch_strength=1.0, type_strength=1.5, median_library=1500, seed=3
    )
    train = celbo.TrainConfig(max_epochs=40)
    model = celbo.ExpressionVAE(latent_dim=6, nuisance=["batch"], train=train).fit(cells)
    found = model.diagnose(cells, groupby="cell_type")
    assert found.finding("types kept apart").verdict == "good"
    assert "types kept apart" not in {each.name for each in model.diagnose(cells).findings}


def test_evidence_is_what_direct_computations_give(many):
    """Posteriors and contexts that are known already give what encoding again gives."""
    model = celbo.ExpressionVAE(
        latent_dim=3,
        hidden_dims=(16,),
        conditions=["treatment"],
        nuisance=["batch"],
        train=celbo.TrainConfig(max_epochs=5),
    ).fit(many)
    opened = open_cells(model.fitted_, many)
    rows, training = fitted.cells_to_measure(model.fitted_, opened)
    evidence = gather(model.fitted_, opened, rows, training, seed=4)
    columns = model.schema_.context_columns
    use = use_of_latent(model.vae_, opened.source, rows, by_dimension=True, of_context=columns, seed=4)
    np.testing.assert_allclose(evidence.lost, use.lost[:4], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(evidence.logvar_z, use.logvar_z, rtol=1e-4, atol=1e-5)
    for condition, lost in zip(model.schema_.conditions, use.lost[4:], strict=True):
        measured = evidence.lost_by_condition[condition.name]
        np.testing.assert_allclose(measured, lost[~np.isnan(lost)], rtol=1e-3, atol=1e-3)
    assert evidence.settings.nuisance == ("batch",)


def test_few_dimensions_in_use_of_many_are_announced(many):
    train = celbo.TrainConfig(max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celbo.ExpressionVAE(latent_dim=10, train=train).fit(many)
    opened = open_cells(model.fitted_, many)
    use = use_of_latent(model.vae_, opened.source, np.arange(300))
    for n_active, announced in ((1, True), (8, False)):
        mu_z = np.zeros((300, 10), np.float32)
        mu_z[:, :n_active] = np.linspace(-1, 1, 300)[:, None]
        seen = use._replace(mu_z=mu_z, lost=np.full((1, 300), 50.0, np.float32))
        with mock.patch.object(diagnosing, "use_of_latent", return_value=seen):
            doubts = diagnosing.doubts_of_fit(model.fitted_, opened)
        assert any("posterior collapse in part: 1 of 10" in doubt for doubt in doubts) == announced
