"""Decoding under another condition: simulated truth, support, refusals, and the command."""

import os
import subprocess
import sys

import anndata
import numpy as np
import pytest

import celbo

TRAIN = celbo.TrainConfig(seed=0)


@pytest.fixture(scope="module")
def cells():
    """All types respond alike to the treatment."""
    return celbo.simulate_cells(
        n_cells=1500, n_genes=300, n_types=4, n_programmes=0, n_batches=1, treated_types="all", treatment_shared=1.0,
        treatment_fraction=0.2, median_library=3000, type_strength=1.5, seed=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def left_out(cells):
    """Fitted without the treated cells of type 0."""
    hidden = ((cells.obs["cell_type"] == "type_0") & (cells.obs["treatment"] == "treated")).to_numpy()
    model = celbo.ExpressionVAE(latent_dim=6, conditions=["treatment"], train=TRAIN).fit(cells[~hidden].copy())
    return model, hidden


@pytest.fixture(scope="module")
def whole(cells):
    return celbo.ExpressionVAE(latent_dim=6, conditions=["treatment"], train=TRAIN).fit(cells)


def controls(cells, name):
    return cells[((cells.obs["cell_type"] == name) & (cells.obs["treatment"] == "ctrl")).to_numpy()].copy()


def test_a_held_out_type_changes_as_it_truly_does(cells, left_out):
    model, _ = left_out
    asked = controls(cells, "type_0")
    found = model.counterfactual(asked, {"treatment": "treated"})
    level = list(cells.uns["simulation"]["types"]).index("type_0") if "types" in cells.uns["simulation"] else 0
    truth = np.asarray(cells.varm["treatment_lfc"])[:, level]
    shown = found.genes["before"] > 0.5
    responding = np.abs(truth) > 0
    told = np.corrcoef(found.genes["log2_fold_change"][shown & responding], truth[shown & responding])[0, 1]
    assert told > 0.9


def test_the_same_conditions_change_nothing_and_say_so(cells, whole):
    asked = controls(cells, "type_1")
    with pytest.warns(UserWarning, match="hardly changes these cells"):
        found = whole.counterfactual(asked, {"treatment": "ctrl"})
    np.testing.assert_allclose(found.genes["log2_fold_change"], 0, atol=1e-6)


def test_means_are_within_their_interval_and_near_expected_expression(cells, whole):
    asked = controls(cells, "type_1")[:40].copy()
    found = whole.counterfactual(asked, {"treatment": "treated"}, n_samples=100)
    assert (found.lower <= found.upper).all()
    assert ((found.lower <= found.mean) & (found.mean <= found.upper)).mean() > 0.99
    plain = whole.expected_expression(asked, given={"treatment": "treated"})
    assert np.corrcoef(np.log1p(plain).ravel(), np.log1p(found.mean).ravel())[0, 1] > 0.98
    np.testing.assert_allclose(found.mean.sum(1), np.asarray(asked.X.sum(1)).ravel(), rtol=1e-4)  # its own library
    again = whole.counterfactual(asked, {"treatment": "treated"}, n_samples=100)
    np.testing.assert_array_equal(found.mean, again.mean)


def test_sampled_counts_have_the_right_mean_and_variance(cells, whole):
    asked = controls(cells, "type_1")[:1].copy()
    asked = anndata.concat([asked] * 3000, index_unique="-")
    found = whole.counterfactual(asked, {"treatment": "treated"}, n_samples=4)
    drawn = found.sample(seed=3)
    assert list(drawn.var_names) == list(whole.schema_.genes)
    assert set(drawn.obs["treatment"]) == {"treated"}
    x = drawn.X.toarray()
    assert (x == np.round(x)).all()
    mean = found.mean.mean(0)
    theta = whole.vae_.head.log_theta.detach().exp().numpy()
    of_mean = found.mean.var(0) * 4  # what z moves between draws, about
    variance = mean + mean**2 / theta + of_mean
    shown = mean > 1
    assert np.median(x.mean(0)[shown] / mean[shown]) == pytest.approx(1, abs=0.03)
    assert np.median(x.var(0)[shown] / variance[shown]) == pytest.approx(1, abs=0.15)
    np.testing.assert_array_equal(found.sample(seed=3).X.toarray(), x)


def test_a_combination_left_out_of_fit_is_never_supported(cells, left_out):
    model, _ = left_out
    seen = model.counterfactual(controls(cells, "type_1"), {"treatment": "treated"}).support
    unseen = model.counterfactual(controls(cells, "type_0"), {"treatment": "treated"}).support
    assert (seen["verdict"] == "supported").mean() > 0.5
    assert (seen["verdict"] == "extrapolation").mean() < 0.1
    assert (unseen["verdict"] == "supported").mean() < 0.02
    assert (unseen["verdict"] == "extrapolation").mean() > 0.9
    assert unseen["distance"].median() > 1.5 > seen["distance"].median()


def test_a_condition_nested_in_another_is_warned_of(cells):
    nested = cells.copy()
    nested.obs["donor"] = nested.obs["treatment"].astype(str) + np.where(np.arange(len(nested)) % 2, "_1", "_2")
    train = celbo.TrainConfig(max_epochs=5, seed=0)
    model = celbo.ExpressionVAE(latent_dim=4, conditions=["treatment", "donor"], train=train).fit(nested)
    with pytest.warns(UserWarning, match="'treatment' is nested in the others"):
        model.counterfactual(nested[:20].copy(), {"treatment": "treated"})


def test_a_dose_can_be_asked_for(cells):
    dosed = cells.copy()
    dosed.obs["dose"] = np.where(dosed.obs["treatment"] == "treated", 2.0, 0.0) + np.linspace(0, 0.1, len(dosed))
    model = celbo.ExpressionVAE(latent_dim=6, conditions=["dose"], train=TRAIN).fit(dosed)
    asked = controls(dosed, "type_1")
    high = model.counterfactual(asked, {"dose": 2.0})
    assert (high.support["verdict"] == "supported").mean() > 0.5
    far = model.counterfactual(asked, {"dose": 1.0})
    assert (far.support["verdict"] == "extrapolation").all()  # no cell had it


def test_cells_that_lack_genes_are_filled_in_first(cells, whole):
    asked = controls(cells, "type_1")[:40].copy()
    abundant = np.argsort(-np.asarray(cells.X.sum(0)).ravel())[:10]
    lacking = asked[:, np.delete(np.arange(cells.n_vars), abundant)].copy()
    with pytest.warns(UserWarning, match="fills them in"):
        found = whole.counterfactual(lacking, {"treatment": "treated"})
    full = whole.counterfactual(asked, {"treatment": "treated"})
    assert found.mean.sum() == pytest.approx(full.mean.sum(), rel=0.1)
    assert found.sample(seed=0).X.sum() == pytest.approx(full.mean.sum(), rel=0.1)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, celbo.UsageError, "names no condition"),
        ({"dose": 1}, celbo.UsageError, "'dose' is not a condition"),
        ({"treatment": "gene therapy"}, celbo.DataError, "gene therapy"),
    ],
)
def test_what_cannot_be_asked_is_refused(cells, whole, given, error, said):
    with pytest.raises(error, match=said):
        whole.counterfactual(cells[:5].copy(), given)


def test_a_condition_with_one_level_is_refused(cells):
    train = celbo.TrainConfig(max_epochs=2, seed=0)
    only = cells[(cells.obs["treatment"] == "ctrl").to_numpy()].copy()
    with pytest.warns(UserWarning, match="treatment"):
        model = celbo.ExpressionVAE(latent_dim=3, conditions=["treatment"], train=train).fit(only)
    with pytest.raises(celbo.UsageError, match="'treatment' had a single level in fit"):
        model.counterfactual(only, {"treatment": "treated"})


def test_a_model_without_reference_says_so(cells, whole, tmp_path):
    whole.save(tmp_path / "model", keep_reference=False)
    with pytest.raises(celbo.UsageError, match="keep_reference"):
        celbo.load(tmp_path / "model").counterfactual(cells[:5].copy(), {"treatment": "treated"})


def test_the_command_writes_means_intervals_support_and_genes(cells, whole, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", "from celbo.cli import main; main()", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    whole.save(tmp_path / "model")
    controls(cells, "type_1").write_h5ad(tmp_path / "cells.h5ad")
    ask = ["counterfactual", tmp_path / "model", tmp_path / "cells.h5ad", "--set", "treatment=treated"]
    done = run(*ask, "-o", tmp_path / "treated.h5ad")
    assert done.returncode == 0, done.stderr
    assert "supported" in done.stderr
    found = anndata.read_h5ad(tmp_path / "treated.h5ad")
    assert set(found.layers) == {"lower", "upper"}
    assert {"celbo_share", "celbo_distance", "celbo_verdict"} <= set(found.obs)
    assert {"before", "after", "log2_fold_change", "lower", "upper"} <= set(found.var)
    assert set(found.obs["treatment"]) == {"treated"}
    assert run(*ask, "-o", tmp_path / "treated.h5ad", "--sample").returncode == 0  # its own file may be replaced
    assert (anndata.read_h5ad(tmp_path / "treated.h5ad").X.data % 1 == 0).all()
    for arguments, said in (
        (["--set", "treatment"], "write it as CONDITION=VALUE"),
        (["--set", "dose=1"], "'dose' is not a condition"),
    ):
        bad = run(*ask[:3], *arguments, "-o", tmp_path / "bad.h5ad")
        assert bad.returncode == 2
        assert said in bad.stderr
    refused = run(*ask, "-o", tmp_path / "cells.h5ad")
    assert refused.returncode == 2
    assert "name another file" in refused.stderr
