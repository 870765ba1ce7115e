"""Levels of a nuisance with groups of cells of their own, from counts alone."""

import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import celbo
from celbo.trust.findings import condition_leakage
from celbo.trust.overlap import Overlap, choose_levels, level_overlap, overlap_of

COLUMN_OF_TYPES = {"pbmc3k": "cell_type", "pbmc_3tech": "cell_type", "cellmix_tech": "cell_type"}


def overlap(x, codes, **options):
    x, rows = sp.csr_matrix(x), choose_levels(codes)
    return overlap_of("batch", x[rows], codes[rows], [f"level {n}" for n in range(codes.max() + 1)], **options)


def codes_of(cells, column):
    return np.unique(cells.obs[column].astype(str), return_inverse=True)[1]


def with_batch_effect(x, codes, strength, seed):
    """Counts of which each is kept with a probability by gene and level: a batch effect on real counts."""
    rng, x = np.random.default_rng(seed), sp.csr_matrix(x).copy()
    factor = np.exp(strength * rng.standard_normal((codes.max() + 1, x.shape[1])))
    factor = np.minimum(factor / np.quantile(factor, 0.95, axis=1, keepdims=True), 1)
    rows = np.repeat(codes, np.diff(x.indptr))
    x.data = rng.binomial(x.data.astype(int), factor[rows, x.indices]).astype(np.float32)
    return x


def simulated(n_levels, strength, *, own_types, seed=0, n_cells=None, **options):
    """Cells with a batch effect; with ``own_types`` type t occurs in level t % n_levels only."""
    n_cells = n_cells or (600 * n_levels * (n_levels if own_types else 1))
    cells = celbo.simulate_cells(
        n_cells=n_cells, n_genes=800, n_batches=n_levels, batch_strength=strength, seed=seed, **options
    )
    types, batch = codes_of(cells, "cell_type"), codes_of(cells, "batch")
    keep = types % n_levels == batch if own_types else np.ones(n_cells, bool)
    return cells[keep].copy()


@pytest.mark.parametrize("strength", [0, 0.3, 0.6])
@pytest.mark.parametrize("n_levels", [2, 6])
def test_levels_with_types_of_their_own_are_apart(n_levels, strength):
    cells = simulated(n_levels, strength, own_types=True)
    found = overlap(cells.X, codes_of(cells, "batch"))
    assert found.apart
    assert found.levels == n_levels


@pytest.mark.long
@pytest.mark.parametrize("strength", [0, 0.3, 0.6])
@pytest.mark.parametrize("n_levels", [2, 6])
@pytest.mark.parametrize("options", [{}, {"batch_depth": 0.8}, {"n_types": 3}], ids=["usual", "depth", "few"])
def test_a_batch_effect_on_shared_types_leaves_levels_together(n_levels, strength, options):
    """With a depth of +-0.8, the deepest level has five times the counts of the shallowest."""
    cells = simulated(n_levels, strength, own_types=False, **options)
    assert not overlap(cells.X, codes_of(cells, "batch")).apart


@pytest.mark.long
@pytest.mark.parametrize("strength", [0, 0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unequal_shares_of_types_leave_levels_together(strength, seed):
    """80 % of one level and 20 % of the other are of the first three types."""
    cells = celbo.simulate_cells(n_cells=4000, n_genes=1000, batch_strength=strength, seed=seed)
    types, batch = codes_of(cells, "cell_type"), codes_of(cells, "batch")
    share = np.where((types < 3) == (batch == 0), 0.8, 0.2)
    keep = np.random.default_rng(seed).random(4000) < share
    assert not overlap(cells.X[keep], batch[keep]).apart


@pytest.mark.parametrize(
    "name", ["pbmc3k", *(pytest.param(name, marks=pytest.mark.long) for name in ("pbmc_3tech", "cellmix_tech"))]
)
def test_types_of_real_cells_that_are_split_between_levels_are_noticed(name, real_data):
    cells = real_data(name)
    types = codes_of(cells, COLUMN_OF_TYPES[name])
    for seed in range(2):
        rng = np.random.default_rng(seed)
        level = rng.permutation(np.arange(types.max() + 1) % 2)[types]
        assert overlap(cells.X, level).apart
        assert overlap(with_batch_effect(cells.X, level, 0.5, seed), level).apart


@pytest.mark.parametrize(
    "name",
    [
        "pbmc3k",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("pbmc_3tech", "cellmix_tech", "kang_ifnb", "paul15", "zeisel_1464")
        ),
    ],
)
def test_random_parts_of_real_cells_are_together(name, real_data):
    cells = real_data(name)
    for n_levels in (2, 6):
        level = np.random.default_rng(n_levels).integers(n_levels, size=cells.n_obs)
        assert not overlap(cells.X, level).apart
        assert not overlap(with_batch_effect(cells.X, level, 0.5, 0), level).apart


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("kang_ifnb", "condition"),
        ("papalexi_thp1", "batch"),
        ("gbm_panobinostat", "condition"),
        ("pbmc_3tech", "batch"),
        ("cellmix_tech", "batch"),
        ("luad_laughney", "batch"),
    ],
)
def test_real_batches_that_share_types_are_together(name, column, real_data):
    cells = real_data(name)
    assert not overlap(cells.X, codes_of(cells, column)).apart


def test_values_that_are_no_counts_are_compared_too():
    for own_types in (True, False):
        cells = simulated(2, 0.5, own_types=own_types)
        values = np.log1p(cells.X.toarray() / cells.X.sum(1).A1[:, None] * 500) - 0.2
        assert overlap(values, codes_of(cells, "batch"), is_counts=False).apart == own_types


def test_the_order_of_genes_and_names_of_levels_change_nothing():
    cells = simulated(2, 0.6, own_types=False)
    codes = codes_of(cells, "batch")
    genes = np.random.default_rng(0).permutation(cells.n_vars)
    assert overlap(cells.X, codes) == overlap(cells.X, codes) == overlap(cells.X[:, genes], codes)


def test_cells_without_variation_are_together():
    x = np.ones((300, 12))
    assert not overlap(x, np.arange(300) % 2).apart
    x[::2, 0] = 9  # each level is one point: no groups
    assert overlap(x, np.arange(300) % 2).levels == 2


def test_few_cells_are_not_compared_and_many_levels_are_not_all_compared():
    assert not len(choose_levels(np.repeat([0, 1], [5000, 99])))
    assert not len(choose_levels(np.full(500, -1)))
    chosen = choose_levels(np.repeat(np.arange(8), 200 + 100 * np.arange(8)))
    codes = np.repeat(np.arange(8), 200 + 100 * np.arange(8))[chosen]
    assert np.bincount(codes, minlength=8).tolist() == [0, 0, 400, 500, 600, 666, 666, 666]
    assert (np.diff(chosen) > 0).all()


def test_half_of_the_levels_decide():
    alone = [Overlap("b", (("a", "b", "c"), ("d",), ("e",)), True), Overlap("b", (("a", "b"), ("c", "d")), True)]
    assert [each.apart for each in alone] == [False, True]
    assert (alone[0].doubt, alone[0].warning) == ("", "")
    assert "the 4 levels compared do not overlap in the counts; at most 2 of them overlap" in alone[1].warning
    assert "--groupby COLUMN" in alone[1].warning
    assert [level_overlap(each).verdict for each in alone] == ["good", "watch"]
    assert "form no groups" in Overlap("b", (("a",), ("b",)), False).doubt


def fit_quietly(cells, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train = celbo.TrainConfig(max_epochs=2)
        model = celbo.ExpressionVAE(latent_dim=3, nuisance=["batch"], train=train, **options).fit(cells)
    return model, [str(warning.message) for warning in said if "do not overlap" in str(warning.message)]


@pytest.mark.long
@pytest.mark.parametrize("likelihood", ["nb", "bernoulli", "gaussian"])
def test_fit_and_diagnosis_say_that_levels_do_not_overlap(likelihood):
    cells = simulated(2, 0.3, own_types=True)
    model, said = fit_quietly(cells, likelihood=likelihood)
    assert len(said) == 1
    assert said[0].startswith("nuisance 'batch': the 2 levels compared do not overlap in the counts")
    found = model.diagnose(cells).finding("overlap of batch")
    assert found.verdict == "watch"
    assert found.try_next.startswith("name a column of cell types")
    shared = simulated(2, 0.3, own_types=False)
    model, said = fit_quietly(shared, likelihood=likelihood)
    assert not said
    assert model.diagnose(shared).finding("overlap of batch").verdict == "good"


def test_conditions_that_are_studied_are_not_doubted():
    cells = simulated(2, 0.3, own_types=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        celbo.ExpressionVAE(latent_dim=3, conditions=["batch"], train=celbo.TrainConfig(max_epochs=1)).fit(cells)
    assert not [each for each in said if "overlap" in str(each.message)]


@pytest.mark.long
def test_the_report_of_a_run_has_the_doubt(tmp_path, celbo_command):
    simulated(2, 0.3, own_types=True).write_h5ad(tmp_path / "cells.h5ad")
    done = celbo_command("fit", tmp_path / "cells.h5ad", "-o", tmp_path / "run", "--nuisance", "batch", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "do not overlap in the counts" in done.stderr
    assert "do not overlap in the counts" in (tmp_path / "run" / "report.html").read_text()


def test_leakage_within_types_that_go_with_the_levels_says_so():
    rng = np.random.default_rng(0)
    types = np.repeat(["T", "B"], 200)
    found = condition_leakage("batch", rng.standard_normal((400, 2)), (types == "T").astype(int), types, nuisance=True)
    assert found.value is None
    assert "2 of 2 types (100% of the cells) occur in one level of 'batch' only" in found.meaning
    few = condition_leakage("batch", rng.standard_normal((12, 2)), np.arange(12) % 2, np.repeat(["T", "B"], 6))
    assert "in fewer than 10 cells of a level" in few.meaning


def test_cells_from_memory_and_from_disk_give_the_same_doubt(tmp_path):
    cells = simulated(2, 0.3, own_types=True)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    on_disk = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert fit_quietly(on_disk)[1] == fit_quietly(cells)[1] != []
