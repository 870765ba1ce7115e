import json
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from celbo.errors import DataError, UsageError
from celbo.simulate import simulate_cells, true_share


@pytest.fixture(scope="module")
def default():
    return simulate_cells()


@pytest.fixture(scope="module")
def small():
    return simulate_cells(600, 80, keep_mean=True)


def expected_counts(adata):
    return adata.obs["library"].to_numpy()[:, None] * true_share(adata)


def log_change(after, before):
    """Log ratio of shares per cell and gene, less the constant of each cell (its median over genes)."""
    ratio = np.log(after) - np.log(before)
    return ratio - np.median(ratio, axis=1, keepdims=True)


def same(a, b):
    return (a.X != b.X).nnz == 0


# --- what comes back


def test_counts_are_integers_in_sorted_csr_float32(default):
    assert sparse.issparse(default.X)
    assert default.X.format == "csr"
    assert default.X.dtype == np.float32
    assert default.X.has_sorted_indices
    assert (default.X.data >= 1).all()
    assert (default.X.data % 1 == 0).all()


def test_cells_and_genes_have_names_and_levels(default):
    assert list(default.obs_names[:2]) == ["cell_0", "cell_1"]
    assert list(default.var_names[:2]) == ["gene_0", "gene_1"]
    assert list(default.obs["cell_type"].cat.categories) == [f"type_{i}" for i in range(6)]
    assert list(default.obs["batch"].cat.categories) == ["batch_0", "batch_1"]
    assert list(default.obs["treatment"].cat.categories) == ["ctrl", "treated"]


def test_about_four_in_five_counts_are_zero_by_default(default):
    zeros = 1 - default.X.nnz / default.X.shape[0] / default.X.shape[1]
    assert 0.75 < zeros < 0.9


def test_options_are_plain_json(default):
    options = json.loads(json.dumps(default.uns["simulation"]))
    assert options["treated_types"] == ["type_0", "type_2", "type_4"]
    assert options["seed"] == 0


def test_numpy_numbers_are_options_too():
    adata = simulate_cells(np.int64(20), 10, batch_strength=np.float32(0.5), type_proportions=np.full(6, 1 / 6))
    assert json.loads(json.dumps(adata.uns["simulation"]))["batch_strength"] == 0.5


@pytest.mark.parametrize("options", [{}, {"n_programmes": 0, "n_batches": 1, "treated_types": []}])
def test_truth_survives_a_file(tmp_path, options):
    adata = simulate_cells(50, 30, **options)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert np.allclose(true_share(read, treatment="treated"), true_share(adata, treatment="treated"), rtol=1e-12)


# --- randomness


def test_same_seed_same_cells_whatever_the_threads(default):
    assert same(default, simulate_cells(threads=1))
    assert not same(default, simulate_cells(seed=1))


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ({"batch_strength": 0}, "batch_lfc"),
        ({"treatment_strength": 0}, "treatment_lfc"),
        ({"type_strength": 0}, "type_lfc"),
        ({"programme_strength": 0}, "programme_lfc"),
    ],
)
def test_switching_one_ingredient_off_leaves_the_others(small, option, changes):
    without = simulate_cells(600, 80, **option)
    pd.testing.assert_frame_equal(without.obs, small.obs)
    assert np.array_equal(without.obsm["programme"], small.obsm["programme"])
    assert not np.any(without.varm[changes])
    for key in {"batch_lfc", "treatment_lfc", "type_lfc", "programme_lfc"} - {changes}:
        assert np.array_equal(without.varm[key], small.varm[key])


def test_other_responding_types_leave_the_effects_of_the_rest(small):
    other = simulate_cells(600, 80, treated_types=["type_2", "type_3"])
    assert np.array_equal(other.varm["treatment_lfc"]["type_2"], small.varm["treatment_lfc"]["type_2"])
    assert other.varm["treatment_lfc"].any().sum() == 2


def test_zinb_is_nb_with_some_counts_set_to_zero(default):
    gate = 0.3
    zinb = simulate_cells(likelihood="zinb", gate=gate)
    kept = zinb.X > 0
    assert (default.X.multiply(kept) != zinb.X).nnz == 0
    standard_error = np.sqrt(gate * (1 - gate) / default.X.nnz)
    assert 1 - zinb.X.nnz / default.X.nnz == pytest.approx(gate, abs=4 * standard_error)


# --- counts follow their distribution


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_counts_have_the_true_mean_and_variance(likelihood):
    adata = simulate_cells(4000, 200, likelihood=likelihood, median_library=1000.0)
    x, mu = adata.X.toarray(), expected_counts(adata)
    variance = mu + mu**2 / adata.var["theta"].to_numpy()
    z = (x - mu).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert np.abs(z).max() < 4.5  # of 200 standard normals
    assert z.std() == pytest.approx(1, abs=0.2)
    well_seen = mu.mean(axis=0) > 0.5  # where squared residuals are not dominated by a few counts
    squared = ((x - mu) ** 2 / variance)[:, well_seen]
    z = (squared.mean(axis=0) - 1) / (squared.std(axis=0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5


def test_nb_zeros_are_as_frequent_as_they_should_be(default):
    mu, theta = expected_counts(default), default.var["theta"].to_numpy()
    p_zero = (theta / (theta + mu)) ** theta
    standard_error = np.sqrt((p_zero * (1 - p_zero)).sum())
    assert mu.size - default.X.nnz == pytest.approx(p_zero.sum(), abs=4 * standard_error)


def test_poisson_has_infinite_theta_and_nb_a_spread_around_its_median():
    assert np.isinf(simulate_cells(10, 50, likelihood="poisson").var["theta"]).all()
    theta = simulate_cells(10, 2000, median_theta=2.0).var["theta"]
    assert theta.median() == pytest.approx(2.0, rel=0.1)
    assert np.log(theta).std() == pytest.approx(0.7, rel=0.1)


def test_libraries_are_log_normal_around_a_depth_per_batch():
    adata = simulate_cells(6000, 10, n_batches=3, batch_depth=0.5, median_library=800.0, library_sd=0.3)
    log_library = np.log(adata.obs["library"]).groupby(adata.obs["batch"], observed=True)
    assert np.allclose(log_library.median(), np.log(800) + np.array([-0.5, 0, 0.5]), atol=0.04)
    assert np.allclose(log_library.std(), 0.3, atol=0.02)


def test_mean_layer_is_what_the_counts_are_expected_to_be(small):
    assert np.allclose(small.layers["mean"], expected_counts(small), rtol=1e-6)
    zinb = simulate_cells(600, 80, likelihood="zinb", gate=0.25, keep_mean=True)
    assert np.allclose(zinb.layers["mean"], 0.75 * expected_counts(small), rtol=1e-6)


# --- the truth


def test_base_share_and_true_shares_sum_to_one(small):
    assert small.var["base_share"].sum() == pytest.approx(1)
    assert np.allclose(true_share(small, batch="batch_0").sum(axis=1), 1)


def test_without_effects_every_cell_has_the_base_share():
    off = {f"{name}_strength": 0 for name in ("type", "programme", "batch", "treatment")}
    adata = simulate_cells(20, 40, **off)
    assert np.allclose(true_share(adata), adata.var["base_share"].to_numpy())
    assert not adata.var[["is_marker", "treatment_gene"]].any(axis=None)


def test_treatment_changes_shares_by_the_stored_effect(small):
    change = log_change(true_share(small, treatment="treated"), true_share(small, treatment="ctrl"))
    assert np.allclose(change, small.varm["treatment_lfc"][small.obs["cell_type"].astype(str)].T, atol=1e-9)


def test_batch_changes_shares_by_the_stored_effect(small):
    change = log_change(true_share(small, batch="batch_1"), true_share(small, batch="batch_0"))
    effect = small.varm["batch_lfc"]["batch_1"] - small.varm["batch_lfc"]["batch_0"]
    assert np.allclose(change, effect - effect.median(), atol=1e-9)


def test_treatment_takes_little_from_the_genes_it_leaves_alone(default):
    untouched = ~default.var["treatment_gene"].to_numpy()
    ratio = true_share(default, treatment="treated") / true_share(default, treatment="ctrl")
    assert np.abs(np.log(ratio[:, untouched])).max() < 0.1


def test_treatment_effect_is_recovered_from_many_cells():
    adata = simulate_cells(8000, 100, n_types=2, n_batches=1, n_programmes=0, median_library=3000.0)
    shares = {
        level: np.asarray(adata[(adata.obs["cell_type"] == "type_0") & (adata.obs["treatment"] == level)].X.sum(axis=0))
        for level in ("ctrl", "treated")
    }
    change = np.log(shares["treated"] / shares["ctrl"]).ravel()
    change -= np.median(change)
    seen = shares["ctrl"].ravel() > 5000
    assert seen.sum() > 50
    assert np.allclose(change[seen], adata.varm["treatment_lfc"]["type_0"][seen], atol=0.12)


def test_subsets_keep_their_truth(small):
    cells = small[(small.obs["cell_type"] == "type_3") & (small.obs["batch"] == "batch_1")].copy()
    rows = small.obs_names.get_indexer(cells.obs_names)
    assert np.allclose(true_share(cells), true_share(small)[rows], rtol=1e-12)
    kept = true_share(small)[:, :30]
    assert np.allclose(true_share(small[:, :30]), kept / kept.sum(axis=1, keepdims=True))


def test_treatment_genes_are_partly_shared_among_responding_types():
    lfc = simulate_cells(10, 1000, treatment_fraction=0.1, treatment_shared=0.3).varm["treatment_lfc"]
    assert list(lfc.columns[lfc.any()]) == ["type_0", "type_2", "type_4"]
    assert (lfc[["type_0", "type_2", "type_4"]] != 0).sum().tolist() == [100, 100, 100]
    common = (lfc["type_0"] == lfc["type_2"]) & (lfc["type_2"] == lfc["type_4"]) & (lfc["type_0"] != 0)
    assert common.sum() == 30
    sizes = lfc.to_numpy()[lfc != 0]
    assert np.abs(sizes).min() >= 0.5
    assert np.abs(sizes).max() <= 1.5


def test_a_treatment_can_do_the_same_to_all_types():
    lfc = simulate_cells(10, 200, treated_types="all", treatment_shared=1.0).varm["treatment_lfc"]
    assert lfc.any().all()
    assert lfc.eq(lfc["type_0"], axis=0).all(axis=None)


# --- the design


def test_treatment_is_balanced_in_every_type_and_batch(default):
    strata = default.obs["cell_type"].str.cat(default.obs["batch"], sep=" ")
    sizes = pd.crosstab(strata, default.obs["treatment"])
    assert len(sizes) == 12
    assert (sizes["ctrl"] - sizes["treated"]).abs().max() <= 1
    assert default.obs["batch"].value_counts().tolist() == [1500, 1500]


def test_types_come_in_the_proportions_asked_for():
    adata = simulate_cells(1000, 10, n_types=3, type_proportions=[0.5, 0.3, 0.2])
    assert adata.obs["cell_type"].value_counts(sort=False).tolist() == [500, 300, 200]


def test_default_proportions_are_unequal_but_not_tiny(default):
    shares = default.obs["cell_type"].value_counts(normalize=True)
    assert shares["type_0"] == pytest.approx(3 * shares["type_5"], rel=0.02)
    assert shares.min() > 0.05


def test_types_of_a_lineage_are_closer_than_the_rest(default):
    correlation = default.varm["type_lfc"].corr().to_numpy()
    pairs = np.kron(np.eye(3), np.ones((2, 2))) - np.eye(6) > 0
    assert correlation[pairs].min() > correlation[~pairs & ~np.eye(6, dtype=bool)].max() + 0.2


def test_types_can_be_told_apart_by_pca_and_neighbours(default):
    x = default.X.toarray()
    x = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    components = PCA(20, random_state=0).fit_transform(x)
    accuracy = cross_val_score(KNeighborsClassifier(15), components, default.obs["cell_type"], cv=3).mean()
    assert 0.88 < accuracy < 0.99  # measured 0.945: clear, yet not trivial


# --- size


def test_memory_stays_far_below_the_dense_counts():
    tracemalloc.start()
    adata = simulate_cells(20_000, 1000, median_library=100.0, threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dense = 20_000 * 1000 * 8
    sparse_size = adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
    assert peak - sparse_size < dense / 2


@pytest.mark.parametrize("shape", [(1, 2), (1, 50), (3, 2)])
def test_the_smallest_data_sets_work(shape):
    adata = simulate_cells(*shape, likelihood="zinb", treatment_fraction=0.5)
    assert true_share(adata).shape == adata.shape == shape


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_cells": 0}, "n_cells is 0, expected an integer from 1"),
        ({"n_cells": 10.5}, r"n_cells is 10\.5, expected an integer"),
        ({"batch_strength": -1}, "batch_strength is -1, expected a number from 0"),
        ({"median_theta": float("nan")}, "median_theta is nan"),
        ({"likelihood": "normal", "seed": -3}, "seed is -3.*likelihood is 'normal', expected one of nb, poisson, zinb"),
        ({"treated_types": ["type_1", "B cell"]}, r"treated_types is \['type_1', 'B cell'\].*type_0, type_1, type_2"),
        ({"treated_types": "type_1"}, "treated_types is 'type_1', expected 'half', 'all' or a list"),
        ({"type_proportions": [0.5, 0.5]}, "expected 6 positive shares that sum to 1"),
        ({"n_types": 2, "type_proportions": [0.5, 0.6]}, "expected 2 positive shares that sum to 1"),
        ({"n_types": 2, "type_proportions": [1.0, 0.0]}, "expected 2 positive shares that sum to 1"),
        ({"gate": 0.1}, "gate is 0.1, but likelihood 'nb' has none; use 'zinb'"),
        ({"likelihood": "zinb", "gate": 1.0}, "gate is 1.0, expected a number from 0 to 0.999"),
        ({"median_library": 9e5}, "lower median_library"),
    ],
)
def test_impossible_options_are_explained(options, message):
    with pytest.raises(UsageError, match=message):
        simulate_cells(**{"n_cells": 100, "n_genes": 20, **options})


def test_levels_that_were_not_simulated_are_refused(small):
    with pytest.raises(UsageError, match="treatment stim was not simulated; choose among ctrl, treated"):
        true_share(small, treatment="stim")
    with pytest.raises(UsageError, match="batch batch_9 was not simulated; choose among batch_0, batch_1"):
        true_share(small, batch="batch_9")


def test_true_share_needs_simulated_cells():
    with pytest.raises(DataError, match=r"lacks varm\['type_lfc'\].*expected one made by simulate_cells"):
        true_share(anndata.AnnData(np.ones((3, 2), np.float32)))
