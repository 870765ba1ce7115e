"""How likely and how unusual cells are."""

import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

import celbo
from celbo.ask.outliers import joined, p_values, standardised
from celbo.fit.reference import READINGS


@pytest.fixture(scope="module")
def known():
    """A model of four of five types, and 1,000 cells it has not seen."""
    cells = celbo.simulate_cells(n_cells=3600, n_genes=200, n_types=5, median_library=800, type_strength=1.5, seed=1)
    unseen = np.arange(cells.n_obs) >= 2400
    new = (cells.obs["cell_type"] == "type_4").to_numpy()
    train = celbo.TrainConfig(max_epochs=40, validation_fraction=0.3)  # 570 cells to calibrate with
    options = {"latent_dim": 5, "conditions": ["batch"], "train": train}
    model = celbo.ExpressionVAE(**options).fit(cells[~unseen & ~new].copy())
    return model, cells[unseen & ~new].copy(), cells[unseen & new].copy()


def made(cells, x):
    return anndata.AnnData(sparse.csr_matrix(x, dtype=np.float32), obs=cells.obs.copy(), var=cells.var)


def area(usual, unusual):
    return roc_auc_score(np.repeat([0, 1], [len(usual), len(unusual)]), [*usual, *unusual])


def test_usual_cells_have_even_p_values(known):
    model, usual, _ = known
    found = model.outliers(usual)
    assert kstest(found["p_value"], "uniform").statistic < 0.1  # 570 held-out cells against 950
    assert (found["p_value"] < 0.05).mean() < 0.1
    assert (found["kind"] == "usual").mean() > 0.97
    assert found["q_value"].ge(found["p_value"] - 1e-12).all()


def test_planted_cells_stand_out(known):
    model, usual, of_new_type = known
    rng = np.random.default_rng(0)
    without = model.outliers(usual)
    x = np.asarray(usual.X.todense())
    types = usual.obs["cell_type"].to_numpy()
    other = np.array([rng.choice(np.flatnonzero(types != each)) for each in types])
    mean = x.sum(0, dtype=float)
    planted = {
        "doublets": made(usual, x + x[other]),
        "permuted": made(usual, rng.permuted(x, axis=1)),
        "ambient": made(usual, [rng.multinomial(int(total), mean / mean.sum()) for total in x.sum(1)]),
        "new type": of_new_type,
    }
    found = {name: model.outliers(cells) for name, cells in planted.items()}
    areas = {name: area(without["score"], those["score"]) for name, those in found.items()}
    assert min(areas.values()) > 0.8, areas
    assert (found["permuted"]["kind"] == "unexplained").mean() > 0.9
    told = {reading: area(without[reading], found["ambient"][reading]) for reading in READINGS}
    assert max(told, key=told.get) == "ambient", told
    assert told["ambient"] > 0.9


def test_depth_alone_makes_no_cell_unusual(known):
    model, usual, _ = known
    deep = np.asarray(usual.X.sum(1)).ravel()
    score = model.outliers(usual)["score"]
    assert abs(area(score[deep < np.median(deep)], score[deep >= np.median(deep)]) - 0.5) < 0.06
    log_p = model.log_prob(usual, n_samples=50)["log_p"]
    assert abs(area(log_p[deep < np.median(deep)], log_p[deep >= np.median(deep)]) - 0.5) > 0.3


def test_top_genes_are_those_that_were_changed(known):
    model, usual, _ = known
    rare = int(np.argsort(np.asarray(usual.X.mean(0)).ravel())[20])
    x = np.asarray(usual.X.todense())[:50].copy()
    x[:, rare] += 60
    found = model.outliers(made(usual[:50], x))
    assert found["top_genes"].str.split().str[0].eq(f"{model.schema_.genes[rare]}+").mean() > 0.9


def test_shares_of_even_scores_are_even_in_bulk_and_tail():
    rng = np.random.default_rng(0)
    found = np.concatenate([p_values(rng.exponential(size=1000), rng.exponential(size=10000)) for _ in range(30)])
    for level in (0.001, 0.01, 0.05, 0.1, 0.5):
        assert abs((found <= level).mean() / level - 1) < 0.25
    assert p_values(rng.normal(size=2000), np.array([50.0]))[0] < 1e-3
    assert p_values(np.zeros(40), np.array([0.0])).tolist() == [1.0]


def test_the_tail_begins_where_the_shares_end():
    usual = np.arange(100.0)
    start = np.quantile(usual, 0.9)
    below, above = p_values(usual, np.array([start - 1e-9, start + 1e-9]))
    assert below == pytest.approx(11 / 101)  # ten are as high, and the cell itself
    assert above == pytest.approx(below, abs=1e-6)


def test_a_reading_is_standardised_by_depth_and_batch():
    rng = np.random.default_rng(0)
    library, batch = np.exp(rng.normal(7, 1, 4000)), rng.integers(2, size=4000)
    read = np.stack([np.log(library) * 5 + 30 * batch + rng.normal(size=4000) * np.sqrt(np.log(library))] * 2, axis=1)
    half = slice(0, 2000), slice(2000, 4000)
    usual, here = standardised(
        read[half[0]],
        read[half[1]],
        library=(library[half[0]], library[half[1]]),
        batch=(batch[half[0]], batch[half[1]]),
    )
    for part in (usual, here):
        assert abs(part.mean()) < 0.1
        assert abs(part.std() - 1) < 0.1
    assert abs(np.corrcoef(here[:, 0], np.log(library[half[1]]))[0, 1]) < 0.06
    assert abs(here[batch[half[1]] == 0, 0].mean() - here[batch[half[1]] == 1, 0].mean()) < 0.1
    assert joined(usual, here).shape == (2000,)


def test_a_loaded_model_says_the_same(known, tmp_path):
    model, usual, _ = known
    model.save(tmp_path / "model")
    pd.testing.assert_frame_equal(celbo.load(tmp_path / "model").outliers(usual[:40]), model.outliers(usual[:40]))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "zinb", "poisson"])
def test_every_likelihood_is_served(cells, likelihood):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=5, validation_fraction=0.3)
        model = celbo.ExpressionVAE(latent_dim=2, likelihood=likelihood, train=train).fit(cells)
    found = model.outliers(cells[:20])
    assert np.isfinite(found["score"]).all()
    assert [name for name in READINGS if name in found] == list(
        READINGS[: 4 if likelihood in ("zinb", "poisson") else 2]
    )
    assert model.log_prob(cells[:20], n_samples=20)["ess"].between(1, 20).all()


def test_refined_it_says_what_the_encoder_costs(fitted, cells):
    found = fitted.log_prob(cells[:30], refine=True)
    np.testing.assert_allclose(found["gap"], found["log_p"] - found["unrefined"])
    assert found["ess"].median() > fitted.log_prob(cells[:30])["ess"].median()
    np.testing.assert_array_equal(found["trusted"], found["ess"] >= 10)


def test_what_cannot_be_told_is_refused(cells, tmp_path):
    train = celbo.TrainConfig(max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autoencoder = celbo.ExpressionVAE(latent_dim=2, objective="autoencoder", train=train).fit(cells)
        few = celbo.ExpressionVAE(latent_dim=2, train=train).fit(cells[:100].copy())
    for ask in (autoencoder.log_prob, autoencoder.outliers):
        with pytest.raises(celbo.UsageError, match="no p"):
            ask(cells)
    with pytest.raises(celbo.UsageError, match=r"10 cells were held out .* at least 30"):
        few.outliers(cells)
    few.save(tmp_path / "model", keep_reference=False)
    with pytest.raises(celbo.UsageError, match="no reference cells"):
        celbo.load(tmp_path / "model").outliers(cells)
    with pytest.raises(celbo.UsageError, match="n_samples=1"):
        few.log_prob(cells, n_samples=1)


def test_from_the_command_line(known, tmp_path, celbo_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, usual, _ = known
    model.save(tmp_path / "model")
    usual[:60].write_h5ad(tmp_path / "cells.h5ad")

    celbo_score = partial(celbo_command, "score", "model", "cells.h5ad", "-o", "scores.csv")
    done = celbo_score("--n-samples", "50")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "scores.csv", index_col="cell")
    np.testing.assert_allclose(table["log_p"], model.log_prob(usual[:60], n_samples=50)["log_p"], rtol=1e-6)
    done = celbo_score("--outliers")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "scores.csv", index_col="cell")
    assert {"score", "p_value", "q_value", "kind", "top_genes"} <= set(table)
    done = celbo_score("--outliers", "--refine")
    assert done.returncode == 2
    assert "leave one of them out" in done.stderr
    done = celbo_score("--n-samples", "0")
    assert done.returncode == 2
    assert "n_samples=0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("unseen", ["nearest", "marginal", "adapt"])
def test_cells_of_a_batch_never_seen_are_read_as_asked(known, unseen):
    model, usual, _ = known
    new = usual[:60].copy()
    new.obs["batch"] = "batch_9"
    with pytest.raises(celbo.DataError, match="batch_9"):
        model.outliers(new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, log_p = model.outliers(new, unseen=unseen), model.log_prob(new, n_samples=50, unseen=unseen)["log_p"]
    assert (found["p_value"] > 0.01).mean() > 0.8
    as_known = model.log_prob(usual[:60], n_samples=50)["log_p"]
    assert abs(log_p.mean() - as_known.mean()) < 0.05 * abs(as_known.mean())


@pytest.mark.long
@pytest.mark.parametrize("which", ["rarest", "some"])
def test_cells_that_lack_genes_are_as_usual_as_they_are(known, which):
    """Depth is that with the missing genes filled in, and what is said of log p(x) is not compared."""
    model, usual, of_new_type = known
    order = np.argsort(np.asarray(usual.X.sum(0)).ravel())
    lacking = order[:1] if which == "rarest" else np.random.default_rng(0).permutation(order)[:30]
    left = np.setdiff1d(np.arange(usual.n_vars), lacking)
    with pytest.warns(UserWarning, match="fills them in"):
        found, new = (model.outliers(cells[:, left].copy()) for cells in (usual, of_new_type))
    assert kstest(found["p_value"], "uniform").statistic < 0.12
    assert found["unlikely"].isna().all()
    assert (np.abs(found[["distance", "mixture", "ambient"]].mean()) < 0.6).all()
    assert (found["kind"] == "usual").mean() > 0.95
    assert area(found["score"], new["score"]) > 0.75


def test_a_held_out_cell_is_not_compared_with_itself():
    """Each fifth is standardised by the other four, as if it were new cells."""
    rng = np.random.default_rng(0)
    held_out, library = rng.normal(size=(200, 2)) * [1, 3], np.exp(rng.normal(7, 1, 200)).astype(np.float32)
    batch, fold = rng.integers(2, size=200), np.arange(200) % 5
    usual, _ = standardised(held_out, held_out[:1], library=(library, library[:1]), batch=(batch, batch[:1]))
    for own in (fold == number for number in range(5)):
        _, as_new = standardised(
            held_out[~own], held_out[own], library=(library[~own], library[own]), batch=(batch[~own], batch[own])
        )
        np.testing.assert_allclose(usual[own], as_new)
