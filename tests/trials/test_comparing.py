"""Models side by side, and the choice of the simplest that is as good as any."""

import json
import warnings
from copy import copy

import anndata
import numpy as np
import pytest
from scipy import sparse

import celbo
from celbo.trials.comparing import simplest


def planted(likelihood, seed, n_cells=1500, n_genes=60):
    """Cells of three types, counts of the likelihood that is named."""
    rng = np.random.default_rng(seed)
    profiles = np.exp(rng.normal(0, 1, (3, n_genes)))
    profiles *= 180 / profiles.sum(1, keepdims=True)
    types = rng.integers(3, size=n_cells)
    mu = profiles[types] * rng.lognormal(0, 0.2, (n_cells, 1))
    if likelihood == "bernoulli":
        x = rng.random(mu.shape) < 1 / (1 + np.exp(-np.log(mu / 3)))
    elif likelihood == "poisson":
        x = rng.poisson(mu)
    else:
        x = rng.poisson(mu * rng.gamma(2, 1 / 2, mu.shape))
        if likelihood == "zinb":
            x = x * (rng.random(mu.shape) > 0.35)
    return anndata.AnnData(sparse.csr_matrix(x, dtype=np.float32))


def options(**more):
    return {"latent_dim": 3, "hidden_dims": (32,), "train": celbo.TrainConfig(max_epochs=60), **more}


@pytest.mark.long
@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "nb", "zinb"])
def test_the_generating_likelihood_is_chosen(likelihood):
    model, compared = celbo.choose(celbo.ExpressionVAE(**options()), planted(likelihood, 0), likelihood=True)
    assert model.likelihood == compared[0].chosen == likelihood
    assert compared[0].held_out
    assert compared[0].sure > 0.5
    assert model.embed(planted(likelihood, 0)).shape == (1500, 3)


@pytest.mark.long
def test_no_more_dimensions_are_chosen_than_the_data_have():
    adata = planted("nb", 1)
    model, (found,) = celbo.choose(celbo.ExpressionVAE(**options()), adata, latent_dim=True)
    assert model.latent_dim == int(found.chosen) <= 5


def test_the_simplest_within_two_standard_errors_is_taken():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    alike = np.stack([noise, noise + rng.normal(scale=0.1, size=400), noise - 5])
    assert simplest(alike) == 0
    assert simplest(alike[::-1]) == 1
    assert simplest(np.stack([noise, noise + 0.5])) == 1


def test_differences_are_paired_and_of_cells_that_no_model_learned_from(cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=15)
        one, other = (celbo.ExpressionVAE(latent_dim=dim, hidden_dims=(16,), train=train).fit(cells) for dim in (1, 4))
    found = celbo.compare({"one": one, "other": other}, cells)
    assert found.held_out
    assert found.n_cells == 30
    rows = one.split_.validation
    of_each = [model.log_prob(cells[rows], refine=True)["log_p"].to_numpy() for model in (one, other)]
    worse, better = sorted(of_each, key=np.mean)
    expected = np.mean(worse - better)
    assert abs(found.table["difference"].min() - expected) < 0.3
    spread = np.std(worse - better, ddof=1) / np.sqrt(30)
    assert abs(found.table["se"].max() - spread) < 0.1
    assert spread < np.std(better, ddof=1) / np.sqrt(30)  # pairing pays
    elsewhere = celbo.compare({"one": one, "other": other}, cells[:200].copy())
    assert not elsewhere.held_out
    assert elsewhere.n_cells == 200


def test_what_cannot_be_compared_is_refused(cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=2)
        nb, of_others, gaussian, bernoulli, autoencoder = (
            celbo.ExpressionVAE(latent_dim=2, train=train, **more).fit(given)
            for more, given in [
                ({}, cells),
                ({}, cells[:, :40].copy()),
                ({"likelihood": "gaussian"}, cells),
                ({"likelihood": "bernoulli"}, cells),
                ({"objective": "autoencoder"}, cells),
            ]
        )
    for other, reason in (
        (of_others, "other genes"),
        (gaussian, "another|other kinds"),
        (bernoulli, "other kinds"),
        (autoencoder, "no p"),
    ):
        with pytest.raises(celbo.UsageError, match=reason):
            celbo.compare({"nb": nb, "other": other}, cells)
    with pytest.raises(celbo.UsageError, match="give each once"):
        celbo.compare({"nb": nb, "again": nb}, cells)
    with pytest.raises(celbo.UsageError, match="at least two"):
        celbo.compare({"nb": nb}, cells)
    with pytest.raises(celbo.UsageError, match="1 cell to compare"):
        celbo.compare({"nb": nb, "again": copy(nb)}, cells[:1].copy())
    with pytest.warns(UserWarning, match="only 20 cells to compare models on"):
        celbo.compare({"nb": nb, "again": copy(nb)}, cells[:20].copy())


@pytest.mark.long
def test_from_the_command_line(tmp_path, celbo_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted("poisson", 2, n_cells=600, n_genes=30).write_h5ad(tmp_path / "counts.h5ad")
    few = ["--latent-dim", "2", "--hidden-dim", "16", "--epochs", "20"]
    done = celbo_command("fit", "counts.h5ad", "-o", "auto", *few, "--likelihood", "auto")
    assert done.returncode == 0, done.stderr
    choice = json.loads((tmp_path / "auto" / "choice.json").read_text())[0]
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["options"]["likelihood"] == choice["chosen"]
    assert choice["chosen"] in done.stdout
    done = celbo_command("fit", "counts.h5ad", "-o", "nb", *few)
    assert done.returncode == 0, done.stderr
    done = celbo_command("compare", "auto", "nb", "--data", "counts.h5ad", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_cells"] == 60
    done = celbo_command("fit", "counts.h5ad", "-o", "x", "--latent-dim", "some")
    assert done.returncode == 2
    assert "--latent-dim some" in done.stderr
    assert "Traceback" not in done.stderr


def test_models_of_other_counts_are_not_compared():
    adata = planted("nb", 0, n_cells=300)
    adata.layers["twice"] = adata.X * 2
    models = {
        str(layer): celbo.ExpressionVAE(layer=layer, **options(train=celbo.TrainConfig(max_epochs=1))).fit(adata)
        for layer in (None, "twice")
    }
    with pytest.raises(celbo.UsageError, match="the models read another layer"):
        celbo.compare(models, adata)


@pytest.mark.long
def test_variants_are_tried_for_a_quarter_of_the_plan_on_cells_that_are_checked_once(monkeypatch):
    """For 400 cells a plan has 200 epochs, and a run that gains for long has up to 800."""
    adata = planted("nb", 0, n_cells=400, n_genes=12)
    fits, checks, check = [], [], celbo.estimator.check_to_fit

    def track(minibatches, plan, history):
        if not history:
            fits.append(plan.epochs)
        return minibatches[:1]  # one step for each epoch

    def counted(*arguments, **options):
        checks.append(options["values"])
        return check(*arguments, **options)

    monkeypatch.setattr("celbo.estimator.check_to_fit", counted)
    model = celbo.ExpressionVAE(hidden_dims=(4,), train=celbo.TrainConfig(patience=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        celbo.choose(model, adata, likelihood=True, latent_dim=True, track=track)
    early = [n for n in fits if n < 800]
    assert early == [50] * 6  # poisson, nb, zinb; widths 2, 5, 10
    assert checks == ["counts"]


def test_an_interrupt_ends_the_whole_choice():
    adata = planted("nb", 0, n_cells=320, n_genes=12)
    epochs = []

    def track(minibatches, plan, history):
        epochs.append(len(history))
        if len(epochs) == 6:  # in the second fit
            raise KeyboardInterrupt
        return minibatches

    model = celbo.ExpressionVAE(hidden_dims=(4,), train=celbo.TrainConfig(max_epochs=12))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training was interrupted")
        with pytest.raises(KeyboardInterrupt):
            celbo.choose(model, adata, latent_dim=True, track=track)
    assert epochs == [0, 1, 2, 0, 1, 2]
    assert repr(model).endswith("not fitted)")
