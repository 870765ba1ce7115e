"""Drawing new cells: the likelihood's noise, the conditions asked for, all types, refusals, and the command."""

from dataclasses import replace
from functools import partial

import anndata
import numpy as np
import pytest
from scipy import sparse

import celbo
from celbo.ask.generate import SOURCES

TRAIN = celbo.TrainConfig(max_epochs=60, seed=0)


@pytest.fixture(scope="module")
def every():
    return celbo.simulate_cells(
        n_cells=2000, n_genes=80, n_types=4, n_batches=2, batch_depth=0.5, type_strength=2, median_library=1000, seed=4
    )


@pytest.fixture(scope="module")
def cells(every):
    return every[:1200].copy()


@pytest.fixture(scope="module")
def held_out(every):
    return every[1200:].copy()


@pytest.fixture(scope="module")
def model(cells):
    return celbo.ExpressionVAE(latent_dim=5, conditions=["batch", "treatment"], train=TRAIN).fit(cells)


def logged(counts):
    counts = counts.toarray()
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


@pytest.mark.parametrize("source", SOURCES)
def test_samples_are_counts_over_the_models_genes_and_repeat(model, source):
    drawn = model.sample(70, source=source, seed=1)
    assert sparse.issparse(drawn.X)
    assert drawn.shape == (70, 80)
    assert list(drawn.var_names) == list(model.schema_.genes)
    assert (drawn.X.data % 1 == 0).all()
    assert (drawn.X.data > 0).all()
    assert drawn.obs_names.is_unique
    np.testing.assert_array_equal(model.sample(70, source=source, seed=1).X.toarray(), drawn.X.toarray())
    assert (model.sample(70, source=source, seed=2).X != drawn.X).nnz > 0


def test_the_model_reads_what_it_drew(cells):
    adata = cells.copy()
    adata.layers["counts"], adata.obs["size"] = adata.X.copy(), np.asarray(adata.X.sum(1)).ravel() / 500
    adata.obs["dose"] = np.linspace(0, 2, len(adata))
    quick = celbo.TrainConfig(max_epochs=2, seed=0)
    kept = {"layer": "counts", "size_factor": "size", "conditions": ["batch", "dose"]}
    model = celbo.ExpressionVAE(latent_dim=3, train=quick, **kept).fit(adata)
    drawn = model.sample(500)
    assert model.embed(drawn).shape == (500, 3)
    assert drawn.obs["dose"].between(0, 2).all()
    assert drawn.X.sum() / drawn.obs["size"].sum() == pytest.approx(model.schema_.library_scale, rel=0.05)


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "zinb"])
def test_means_and_variances_are_those_of_the_likelihood(cells, likelihood):
    """Of one cell drawn many times: z has a known mixture of few draws, so that both moments are computed from them."""
    model = celbo.ExpressionVAE(latent_dim=3, likelihood=likelihood, train=celbo.TrainConfig(max_epochs=10)).fit(cells)
    drawn = model.sample(4000, around=cells[:1], library=2000, seed=0)
    import torch

    with torch.inference_mode():
        p = model.vae_.likelihood(torch.from_numpy(drawn.obsm["z"]), library=torch.full((4000, 1), 2000.0))
        means, variances = p.mean.double().numpy(), p.variance.double().numpy()
    x = drawn.X.toarray().astype(np.float64)
    expected, spread = means.mean(0), variances.mean(0) + means.var(0)
    error = np.sqrt(spread / len(x))
    assert np.abs((x.mean(0) - expected) / error).max() < 4.5
    shown = expected > 1
    assert np.median(x.var(0)[shown] / spread[shown]) == pytest.approx(1, abs=0.03)


def test_conditions_are_honoured_and_the_others_come_as_they_occur(cells, model):
    adata = cells.copy()
    some = (adata.obs["batch"] == "batch_1") & (np.arange(len(adata)) % 3 > 0)
    adata.obs.loc[some.to_numpy(), "treatment"] = "treated"  # treatment is commoner in batch 1
    model = celbo.ExpressionVAE(latent_dim=3, conditions=["batch", "treatment"], train=celbo.TrainConfig(max_epochs=3))
    model.fit(adata)
    drawn = model.sample(2000, conditions={"batch": "batch_1"})
    assert set(drawn.obs["batch"]) == {"batch_1"}
    assert not set(model.sample(300).obs["batch"]) ^ {"batch_0", "batch_1"}
    real = (adata.obs["treatment"] == "treated")[(adata.obs["batch"] == "batch_1").to_numpy()].mean()
    assert (drawn.obs["treatment"] == "treated").mean() == pytest.approx(real, abs=0.03)
    assert abs(real - (adata.obs["treatment"] == "treated").mean()) > 0.1


@pytest.mark.parametrize("source", ["aggregated", "mixture"])
def test_cells_of_a_condition_look_like_real_ones_of_it(cells, model, source):
    """Genes that the treatment moves are moved by as much in samples."""
    levels = ("ctrl", "treated")
    of = {name: cells[(cells.obs["treatment"] == name).to_numpy()] for name in levels}
    truth = logged(of["treated"].X).mean(0) - logged(of["ctrl"].X).mean(0)
    one, two = (model.sample(2000, conditions={"treatment": name}, source=source).X for name in levels)
    assert np.corrcoef(logged(two).mean(0) - logged(one).mean(0), truth)[0, 1] > 0.9


@pytest.mark.parametrize("source", SOURCES)
def test_libraries_are_those_of_the_condition_or_as_given(cells, model, source):
    """The batches differ in depth by a factor of e."""
    drawn = {name: model.sample(400, conditions={"batch": name}, source=source) for name in ("batch_0", "batch_1")}
    for name, of_batch in drawn.items():
        real = np.log(np.asarray(cells[(cells.obs["batch"] == name).to_numpy()].X.sum(1)).ravel())
        found = np.log(of_batch.obs["library"])
        assert found.mean() == pytest.approx(real.mean(), abs=0.1)
        assert found.std() == pytest.approx(real.std(), rel=0.15)
    fixed = model.sample(500, source=source, library=3000)
    assert set(fixed.obs["library"]) == {3000}
    assert fixed.X.sum(1).mean() == pytest.approx(3000, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("source", ["aggregated", "mixture"])
def test_samples_are_like_cells_never_seen_and_cover_all_types(held_out, model, source):
    found = celbo.check_realism(model.sample(400, source=source), held_out, labels="cell_type")
    assert found.auc < 0.65
    assert found.missing == ()
    assert found.agreement.means > 0.95


def test_cells_around_others_are_like_each_of_them(cells, model):
    asked = cells[:40].copy()
    drawn = model.sample(400, around=asked)
    assert (drawn.obs["around"].value_counts() == 10).all()
    of = asked.obs.loc[drawn.obs["around"]]
    assert (of["batch"].astype(str).to_numpy() == drawn.obs["batch"].astype(str).to_numpy()).all()
    library = np.asarray(asked.X.sum(1)).ravel()[asked.obs_names.get_indexer(drawn.obs["around"])]
    np.testing.assert_allclose(drawn.obs["library"], library)
    types = cells.obs["cell_type"].astype(str)
    from sklearn.neighbors import KNeighborsClassifier

    by_neighbours = KNeighborsClassifier(15).fit(model.embed(cells), types)
    told = by_neighbours.predict(drawn.obsm["z"])
    assert (told == types.loc[drawn.obs["around"]].to_numpy()).mean() > 0.9
    only = model.sample(20, around=asked, conditions={"batch": "batch_0"})
    assert set(asked.obs.loc[only.obs["around"], "batch"]) == {"batch_0"}


@pytest.mark.long
def test_a_plain_autoencoder_cannot_be_sampled_from_the_prior(cells, held_out):
    found = {}
    for objective in ("vae", "autoencoder"):
        model = celbo.ExpressionVAE(latent_dim=5, objective=objective, train=TRAIN).fit(cells)
        found[objective] = celbo.check_realism(model.sample(400, source="prior"), held_out, labels="cell_type")
    assert celbo.check_realism(model.sample(400, around=held_out), held_out).auc < 0.65
    assert found["autoencoder"].auc > 0.9
    assert found["autoencoder"].auc > found["vae"].auc + 0.1


@pytest.mark.long
def test_a_prior_of_pseudo_cells_is_closer_than_the_normal(cells, held_out):
    auc = {"normal": [], "vamp:50": []}
    for prior in auc:
        for seed in range(3):
            model = celbo.ExpressionVAE(latent_dim=5, prior=prior, train=replace(TRAIN, seed=seed)).fit(cells)
            auc[prior].append(celbo.check_realism(model.sample(400, source="prior", seed=seed), held_out).auc)
    assert np.mean(auc["vamp:50"]) < np.mean(auc["normal"]) - 0.05, auc


def test_a_conditional_prior_is_drawn_from_at_each_cells_condition(cells):
    model = celbo.ExpressionVAE(latent_dim=3, conditions=["batch"], prior="conditional", train=TRAIN).fit(cells)
    drawn = model.sample(3000, source="prior")
    prior = model.vae_.prior
    for number, name in enumerate(("batch_0", "batch_1")):
        mean = (prior.fc_mu.weight[:, number] + prior.fc_mu.bias).detach().numpy()
        logvar = (prior.fc_logvar.weight[:, number] + prior.fc_logvar.bias).detach().numpy()
        z = drawn.obsm["z"][(drawn.obs["batch"] == name).to_numpy()]
        np.testing.assert_allclose(z.mean(0), mean, atol=0.12)
        np.testing.assert_allclose(z.std(0), np.exp(0.5 * logvar), rtol=0.1)


def test_a_gaussian_draws_real_numbers_and_bernoulli_zeros_and_ones(cells):
    quick = celbo.TrainConfig(max_epochs=3, seed=0)
    reals = celbo.ExpressionVAE(latent_dim=3, likelihood="gaussian", train=quick).fit(cells).sample(60)
    assert isinstance(reals.X, np.ndarray)
    assert (reals.X % 1 != 0).mean() > 0.99
    model = celbo.ExpressionVAE(latent_dim=3, likelihood="bernoulli", train=quick).fit(cells)
    assert set(np.unique(model.sample(60).X.toarray())) == {0, 1}
    with pytest.raises(celbo.UsageError, match="no meaning for 'bernoulli'"):
        model.sample(5, library=1000)


def test_a_line_goes_from_one_group_to_the_other(cells, model):
    one, two = (cells[(cells.obs["cell_type"] == name).to_numpy()] for name in ("type_0", "type_2"))
    line = model.interpolate(one, two, n_points=5, given={"batch": "batch_0", "treatment": "ctrl"}, library=1e4)
    np.testing.assert_allclose(line.obsm["z"][[0, -1]], [model.embed(one).mean(0), model.embed(two).mean(0)], rtol=1e-5)
    np.testing.assert_allclose(line.obsm["z"][2], line.obsm["z"][[0, -1]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(line.X.sum(1), 1e4, rtol=1e-4)
    apart = np.log1p(line.X[-1]) - np.log1p(line.X[0])
    real = logged(two.X).mean(0) - logged(one.X).mean(0)
    assert np.corrcoef(apart, real)[0, 1] > 0.9
    with pytest.raises(celbo.UsageError, match="at least its 2 ends"):
        model.interpolate(one, two, n_points=1)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"n": 0}, celbo.UsageError, "at least 1"),
        ({"n": 2.5}, celbo.UsageError, "give a whole number of at least 1"),
        ({"seed": -1}, celbo.UsageError, "a whole number from 0"),
        ({"source": "posterior"}, celbo.UsageError, "'aggregated', 'mixture', 'prior'"),
        ({"library": -1}, celbo.UsageError, "finite number above 0"),
        ({"conditions": {"dose": 1}}, celbo.UsageError, "'dose' is not a condition"),
        ({"conditions": {"batch": "batch_9"}}, celbo.DataError, "batch_9"),
        ({"conditions": {"batch": None}}, celbo.UsageError, "given no value"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, options, error, said):
    with pytest.raises(error, match=said):
        model.sample(**{"n": 10, **options})
    with pytest.raises(celbo.UsageError, match="exclude each other"):
        model.sample(10, around=celbo.simulate_cells(n_cells=20, n_genes=80), source="prior")


def test_conditions_never_seen_together_are_refused(cells):
    apart = cells[((cells.obs["batch"] == "batch_0") | (cells.obs["treatment"] == "ctrl")).to_numpy()].copy()
    train = celbo.TrainConfig(max_epochs=2)
    model = celbo.ExpressionVAE(latent_dim=3, conditions=["batch", "treatment"], train=train).fit(apart)
    with pytest.raises(celbo.UsageError, match="no reference cell has batch=batch_1, treatment=treated"):
        model.sample(10, conditions={"batch": "batch_1", "treatment": "treated"})


def test_without_reference_cells_the_prior_alone_can_be_drawn_from(model, tmp_path):
    model.save(tmp_path / "model", keep_reference=False)
    bare = celbo.load(tmp_path / "model")
    with pytest.raises(celbo.UsageError, match="keep_reference"):
        bare.sample(10)
    everything = {"batch": "batch_0", "treatment": "ctrl"}
    assert bare.sample(10, source="prior", conditions=everything, library=500).shape == (10, 80)


def test_the_command_writes_cells_and_replaces_nothing_else(cells, model, tmp_path, celbo_command):
    run = partial(celbo_command, "sample")
    model.save(tmp_path / "model")
    cells[:5].write_h5ad(tmp_path / "cells.h5ad")
    ask = [tmp_path / "model", "-n", 50, "--given", "treatment=treated", "--seed", 3]
    done = run(*ask, "-o", tmp_path / "new" / "drawn.h5ad")
    assert done.returncode == 0, done.stderr
    assert "50 cells x 80 genes" in done.stderr
    found = anndata.read_h5ad(tmp_path / "new" / "drawn.h5ad")
    expected = model.sample(50, conditions={"treatment": "treated"}, seed=3)
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert set(found.obs["treatment"]) == {"treated"}
    assert found.uns["celbo_sample"]["seed"] == 3
    assert run(*ask, "-o", tmp_path / "new" / "drawn.h5ad", "--from", "prior").returncode == 0  # its own file
    for arguments, code, said in (
        (["--given", "treatment"], 2, "write it as CONDITION=VALUE"),
        (["--given", "batch=batch_9"], 3, "batch_9"),
        (["--from", "thin air", "--library", "nan"], 2, "finite number above 0"),
        (["-o", tmp_path / "cells.h5ad"], 2, "name another file"),
    ):
        output = [] if "-o" in arguments else ["-o", tmp_path / "bad.h5ad"]
        bad = run(*ask[:1], *output, *arguments)
        assert bad.returncode == code, bad.stderr
        assert said in bad.stderr
        assert "Traceback" not in bad.stderr
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").n_obs == 5
