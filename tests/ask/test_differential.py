"""Genes that differ between groups: known truths of simulated cells."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

import celbo
from celbo.ask.differential import Sums, fold_changes, shrink
from celbo.simulate import true_share

LEAST = 0.25


@pytest.fixture(scope="module")
def known():
    adata = celbo.simulate_cells(n_cells=1500, n_genes=400, n_types=3, treated_types="all", median_library=800, seed=3)
    options = {"latent_dim": 5, "conditions": ["treatment"], "nuisance": ["batch"]}
    return celbo.ExpressionVAE(**options, train=celbo.TrainConfig(max_epochs=60)).fit(adata), adata


def truth(adata, groupby, group, reference):
    share, labels = true_share(adata), adata.obs[groupby].to_numpy()
    return np.log2(share[labels == group].mean(0) / share[labels == reference].mean(0))


def compare(model, adata, groupby, group, reference, **options):
    found = model.differential_expression(adata, groupby=groupby, group=group, reference=reference, **options)
    return found.loc[list(adata.var_names)]


@pytest.mark.parametrize(
    ("groupby", "group", "reference"), [("cell_type", "type_0", "type_1"), ("treatment", "treated", "ctrl")]
)
def test_known_changes_are_found_and_false_ones_are_as_few_as_is_said(known, groupby, group, reference):
    model, adata = known
    change = truth(adata, groupby, group, reference)
    found = compare(model, adata, groupby, group, reference)
    changed, called = np.abs(change) >= LEAST, (found["fdr"] <= 0.1).to_numpy()
    assert called.sum() >= 10
    assert (~changed[called]).mean() <= 0.15
    assert called[changed].mean() > 0.5
    assert pearsonr(change, found["log2_fold_change"])[0] > 0.85
    assert (np.sign(found["log2_fold_change"]) == np.sign(change))[called & changed].all()
    inside = ((change >= found["lower"]) & (change <= found["upper"])).mean()
    assert 0.82 < inside < 0.98


def test_halves_of_one_type_do_not_differ(known):
    model, adata = known
    some = adata[(adata.obs["cell_type"] == "type_0").to_numpy() & (adata.obs["treatment"] == "ctrl").to_numpy()].copy()
    called = 0
    for seed in range(4):
        some.obs["half"] = np.random.default_rng(seed).permutation(np.arange(some.n_obs) % 2).astype(str)
        called += (compare(model, some, "half", "0", "1")["fdr"] <= 0.1).sum()
    assert called <= 4  # of 1,600


def test_a_batch_that_goes_with_the_groups_is_taken_out(known):
    model, adata = known
    is_first, in_a = (
        (adata.obs[name] == level).to_numpy() for name, level in (("cell_type", "type_0"), ("batch", "batch_0"))
    )
    one_type = adata[is_first].copy()
    rng = np.random.default_rng(0)
    skewed = np.where(in_a[is_first], 0.9, 0.1) > rng.random(one_type.n_obs)
    one_type.obs["site"] = np.where(skewed, "near", "far")
    corrected = compare(model, one_type, "site", "near", "far")["log2_fold_change"]
    as_it_is = compare(model, one_type, "site", "near", "far", over=[])["log2_fold_change"]
    assert corrected.std() < 0.5 * as_it_is.std()


def test_more_cells_make_surer(known):
    model, adata = known
    few = adata[:300].copy()
    widths = [
        (found["upper"] - found["lower"]).median()
        for found in (compare(model, cells, "cell_type", "type_0", "type_1") for cells in (few, adata))
    ]
    assert widths[0] > 1.2 * widths[1]


def test_each_group_against_the_rest_and_within_pairs(known):
    model, adata = known
    every = model.differential_expression(adata, groupby="cell_type")
    assert every["group"].value_counts().to_dict() == {f"type_{number}": 400 for number in range(3)}
    assert set(every["reference"]) == {"rest"}
    one = model.differential_expression(adata, groupby="cell_type", group="type_2")
    pd.testing.assert_frame_equal(every[every["group"] == "type_2"], one)
    change = truth(adata, "treatment", "treated", "ctrl")
    paired = compare(model, adata, "treatment", "treated", "ctrl", pair_by="cell_type")
    assert pearsonr(change, paired["log2_fold_change"])[0] > 0.8
    mean = compare(model, adata, "treatment", "treated", "ctrl")[["mean_group", "mean_reference"]].sum()
    np.testing.assert_allclose(mean, 1, atol=0.02)


def test_the_same_seed_gives_the_same_table(known):
    model, adata = known
    ask = {"groupby": "cell_type", "group": "type_0", "seed": 4}
    pd.testing.assert_frame_equal(
        model.differential_expression(adata, **ask), model.differential_expression(adata, **ask)
    )


def test_shrinkage_recovers_a_known_mixture():
    rng = np.random.default_rng(0)
    true = np.where(rng.random(4000) < 0.1, rng.normal(0, 1.5, 4000), 0) + 0.1
    variance = rng.uniform(0.01, 0.4, 4000)
    found = shrink(true + rng.normal(size=4000) * np.sqrt(variance), variance, LEAST)
    called = found["fdr"] <= 0.1
    changed = np.abs(true) >= LEAST
    assert 0.03 < (~changed[called]).mean() < 0.15
    likely = (found["probability"] > 0.5).to_numpy()
    assert abs(found["probability"][likely].mean() - changed[likely].mean()) < 0.05
    assert np.mean((found["log2_fold_change"] - true) ** 2) < 0.3 * variance.mean()


def test_pseudobulk_adds_up_exactly(known):
    _, adata = known
    found = celbo.pseudobulk(adata, ["batch", "treatment"])
    assert found.shape == (4, 400)
    row = found.obs_names.get_loc("batch_1 | treated")
    its = (adata.obs["batch"] == "batch_1").to_numpy() & (adata.obs["treatment"] == "treated").to_numpy()
    np.testing.assert_array_equal(found.X[row].toarray()[0], np.asarray(adata.X[its].sum(0)).ravel())
    assert found.obs["n_cells"].sum() == adata.n_obs
    with pytest.raises(celbo.DataError, match="donor"):
        celbo.pseudobulk(adata, ["donor"])


@pytest.mark.parametrize("values", [[True, False], [0, 1], [0.5, 2.0], ["a", None]])
def test_groups_may_be_named_by_anything(known, values):
    model, adata = known
    adata = adata[:100].copy()
    adata.obs["own"] = pd.Series(values * 50, index=adata.obs_names, dtype=object)
    adata.obs["text"] = adata.obs["own"].map(str)
    first, second = (str(value) for value in values)
    if values[1] is None:  # a missing value is no group
        with pytest.raises(celbo.UsageError, match="single group"):
            model.differential_expression(adata, groupby="own")
        return
    found = model.differential_expression(adata, groupby="own", group=second, reference=first)
    pd.testing.assert_frame_equal(
        found, model.differential_expression(adata, groupby="text", group=second, reference=first)
    )


def test_what_cannot_be_compared_is_refused(known, cells):
    model, adata = known
    adata = adata[:200].copy()
    adata.obs["one"] = "a"
    adata.obs["each"] = adata.obs_names
    adata.obs["rare"] = ["b"] + ["a"] * 199
    for options, reason in (
        ({"groupby": "nothing"}, "no column of obs"),
        ({"groupby": "cell_type", "group": "type_9"}, "has no 'type_9'; it has 'type_0'"),
        ({"groupby": "cell_type", "group": "type_0", "reference": "type_0"}, "are both"),
        ({"groupby": "one"}, "single group"),
        ({"groupby": "rare", "group": "b"}, "fewer than 2 cells"),
        ({"groupby": "cell_type", "pair_by": "donor"}, "pair_by='donor'"),
        ({"groupby": "batch", "pair_by": "batch"}, "a single cell, or none, in each level of 'batch'"),
        ({"groupby": "rare"}, "'a', or what it is compared with, has a single cell[.]"),
        ({"groupby": "each"}, "none of the 200 groups of 'each' has 2 cells"),
        ({"groupby": "cell_type", "n_samples": 0}, "n_samples=0"),
    ):
        with pytest.raises(celbo.UsageError, match=reason):
            model.differential_expression(adata, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=2)
        gaussian = celbo.ExpressionVAE(latent_dim=2, likelihood="gaussian", train=train).fit(cells)
    with pytest.raises(celbo.UsageError, match="of counts"):
        gaussian.differential_expression(cells, groupby="cell_type")


def test_from_the_command_line(known, tmp_path, celbo_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, adata = known
    model.save(tmp_path / "model")
    adata[:400].write_h5ad(tmp_path / "cells.h5ad")
    ask = ["de", "model", "cells.h5ad", "-o", "de.csv", "--groupby"]
    done = celbo_command(*ask, "cell_type", "--group", "type_0")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "de.csv", index_col="gene")
    expected = model.differential_expression(adata[:400].copy(), groupby="cell_type", group="type_0")
    np.testing.assert_allclose(table["log2_fold_change"], expected["log2_fold_change"], atol=1e-5)
    done = celbo_command(*ask, "cell_tipe")
    assert done.returncode == 2
    assert "cell_tipe" in done.stderr
    assert "Traceback" not in done.stderr


def test_groups_are_no_numbers_and_cells_without_one_are_counted(known):
    model, cells = known
    cells = cells.copy()
    cells.obs["dose"] = np.linspace(0, 1, cells.n_obs)
    with pytest.raises(celbo.UsageError, match="floating-point numbers, which are no groups"):
        model.differential_expression(cells, groupby="dose")
    cells.obs["known"] = cells.obs["cell_type"].astype(object).where(np.arange(cells.n_obs) >= 7, None)
    with pytest.warns(UserWarning, match="7 cells have no 'known'"):
        model.differential_expression(cells, groupby="known", n_samples=1)


def test_fold_changes_are_shrunk_to_their_median_and_not_to_zero():
    rng = np.random.default_rng(0)
    change, variance = 0.1 * rng.standard_normal(200), np.full(200, 0.01)
    change[:5] += 3
    around_zero, shifted = (shrink(change + middle, variance, 0.25, seed=1) for middle in (0.0, 1.0))
    np.testing.assert_allclose(shifted["log2_fold_change"], around_zero["log2_fold_change"] + 1, atol=1e-6)
    assert abs(shifted["log2_fold_change"].iloc[5:].mean() - 1) < 0.02


def test_two_pairs_have_half_the_variance_of_one():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(6), size=(5, 4))
    counted = rng.poisson(50.0, (4, 6)).astype(float)
    counted[2:], share[:, 2:] = counted[:2], share[:, :2]
    sums = Sums(share, counted, counted + 1, counted + 2, np.array([10, 20, 10, 20]))
    change, variance, *_ = fold_changes(sums, [([0], [1])])
    of_two, variance_of_two, *_ = fold_changes(sums, [([0], [1]), ([2], [3])])
    np.testing.assert_allclose(of_two, change)
    np.testing.assert_allclose(variance_of_two, variance / 2)
