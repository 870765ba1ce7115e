import hashlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import celbo
from celbo import UsageError
from celbo.data.variable_genes import select_genes

SCANPY = json.loads((Path(__file__).parents[1] / "recorded" / "genes_scanpy.json").read_text())
SIMULATED = [entry for entry in SCANPY["sets"] if entry["name"] == "simulated"]
REAL = [entry for entry in SCANPY["sets"] if "first" in entry["stable"]]
WIDER_SPAN = next(entry for entry in SCANPY["sets"] if "at span 0.3" in entry)


def label(entry):
    return f"{entry['name']}-{entry['batch']}"


def in_blocks(x, rows=1000):
    x = sp.csr_matrix(x)
    return lambda: (x[start : start + rows] for start in range(0, x.shape[0], rows))


def levels_of(adata, batch):
    return None if batch is None else np.unique(adata.obs[batch].astype(str), return_inverse=True)[1]


def chosen_from(adata, entry):
    return select_genes(in_blocks(adata.X), entry["n_top_genes"], levels_of(adata, entry["batch"]))


@pytest.fixture
def stable_ties(monkeypatch):
    """Equal scores fall by position, as in the numbers recorded so: numpy's default sort depends on the processor."""
    monkeypatch.setattr(np, "argsort", partial(np.argsort, kind="stable"))


@pytest.fixture
def ties_as_recorded():
    probe = np.argsort(np.random.default_rng(3).integers(0, 5, 5000).astype(float))
    if hashlib.sha256(probe.tobytes()).hexdigest() != SCANPY["ties"]:
        pytest.skip("numpy orders equal numbers differently on this processor than where scanpy was recorded")


@pytest.fixture(scope="module")
def simulated():
    return celbo.simulate_cells(600, 400, n_batches=3, seed=0)


@pytest.fixture(scope="module")
def x():
    """Counts of 90 cells and 120 genes, each of them seen."""
    rng = np.random.default_rng(0)
    return rng.poisson(rng.gamma(2.0, 2.0, 120), (90, 120)) + (np.arange(90)[:, None] == np.arange(120) % 90)


@pytest.fixture
def levels():
    return np.arange(90) % 3


def assert_names_are(adata, positions, recorded):
    names = sorted(adata.var_names[positions])
    assert names[:20] == recorded["first"]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == recorded["sha256"]


def test_the_simulated_counts_are_those_scanpy_was_given(simulated):
    counts = hashlib.sha256(simulated.X.toarray().astype(np.int64).tobytes()).hexdigest()
    assert {entry["counts"] for entry in SIMULATED} == {counts}, "record again: tests/recorded/README.md"


@pytest.mark.usefixtures("stable_ties")
@pytest.mark.parametrize("entry", SIMULATED, ids=label)
def test_the_genes_of_simulated_cells_are_those_scanpy_chooses(entry, simulated):
    assert chosen_from(simulated, entry).tolist() == entry["stable"]["positions"]


@pytest.mark.usefixtures("stable_ties")
@pytest.mark.parametrize("entry", REAL, ids=label)
def test_the_genes_of_real_cells_are_those_scanpy_chooses(entry, real_data):
    adata = real_data(entry["name"])
    assert_names_are(adata, chosen_from(adata, entry), entry["stable"])


@pytest.mark.usefixtures("ties_as_recorded")
@pytest.mark.parametrize("entry", SIMULATED, ids=label)
def test_on_the_same_processor_simulated_ties_fall_as_in_scanpy(entry, simulated):
    assert chosen_from(simulated, entry).tolist() == entry["default"]["positions"]


@pytest.mark.usefixtures("ties_as_recorded")
@pytest.mark.parametrize("entry", REAL, ids=label)
def test_on_the_same_processor_real_ties_fall_as_in_scanpy(entry, real_data):
    adata = real_data(entry["name"])
    assert_names_are(adata, chosen_from(adata, entry), entry["default"])


def test_where_scanpy_is_singular_the_genes_are_nearly_those_of_its_wider_span(real_data):
    assert "singularities" in WIDER_SPAN["at span 0.3"]
    chosen = chosen_from(real_data(WIDER_SPAN["name"]), WIDER_SPAN)
    assert len(chosen) == WIDER_SPAN["n_top_genes"]
    shared = np.intersect1d(chosen, WIDER_SPAN["stable"]["positions"])
    assert len(shared) >= 0.95 * len(chosen)


@pytest.mark.parametrize("rows", [1, 7, 89, 1000])
@pytest.mark.parametrize("batch", [None, "batch"])
def test_the_size_of_blocks_does_not_matter(rows, batch, simulated):
    levels = levels_of(simulated, batch)
    expected = select_genes(in_blocks(simulated.X), 100, levels)
    np.testing.assert_array_equal(select_genes(in_blocks(simulated.X, rows), 100, levels), expected)


@pytest.mark.parametrize("batch", [None, "batch"])
def test_the_order_of_cells_does_not_matter(batch, simulated):
    levels, order = levels_of(simulated, batch), np.random.default_rng(0).permutation(simulated.n_obs)
    shuffled = select_genes(in_blocks(simulated.X[order]), 100, None if levels is None else levels[order])
    np.testing.assert_array_equal(shuffled, select_genes(in_blocks(simulated.X), 100, levels))


def test_the_numbers_of_batches_do_not_matter(x, levels):
    expected = select_genes(in_blocks(x), 20, levels)
    np.testing.assert_array_equal(select_genes(in_blocks(x), 20, 2 - levels), expected)
    np.testing.assert_array_equal(select_genes(in_blocks(x), 20, 2 * levels), expected)  # numbers that no cell has


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, np.float64])
def test_how_counts_are_stored_does_not_matter(dtype, x, levels):
    expected = select_genes(in_blocks(x.astype(np.float64)), 20, levels)
    np.testing.assert_array_equal(select_genes(in_blocks(x.astype(dtype)), 20, levels), expected)


def test_the_counts_given_stay_as_they_are(x, levels):
    blocks = [sp.csr_matrix(x.astype(np.float64))]
    select_genes(lambda: blocks, 20, levels)
    np.testing.assert_array_equal(blocks[0].toarray(), x)


def test_large_counts_keep_their_variance(x):
    chosen = select_genes(in_blocks(x.astype(np.int64) * 10**6), 20)
    assert len(chosen) == 20
    np.testing.assert_array_equal(select_genes(in_blocks(x.astype(np.float64) * 10**6), 20), chosen)


def test_a_gene_that_varies_more_at_the_same_mean_is_chosen(x):
    more = x.astype(np.int64)
    more[:, 30] = np.where(np.arange(90) % 2, 12, 0)
    more[:, 31] = 6 + (np.arange(90) % 2)
    chosen = select_genes(in_blocks(more), 10)
    assert 30 in chosen
    assert 31 not in chosen


def test_a_gene_that_only_differs_between_batches_is_not_chosen_within_them(x, levels):
    shifted = x.copy()
    shifted[:, 5] = 1 + 30 * (levels == 0) + (np.arange(90) // 3 % 2)
    assert 5 in select_genes(in_blocks(shifted), 10)
    assert 5 not in select_genes(in_blocks(shifted), 10, levels)


def test_positions_increase_and_are_as_many_as_asked_for(x, levels):
    for n_top_genes in (1, 2, 50, 119):
        chosen = select_genes(in_blocks(x), n_top_genes, levels)
        assert len(chosen) == n_top_genes
        assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize("n_top_genes", [120, 121, 5000])
def test_as_many_as_there_are_or_more_means_all_genes(n_top_genes, x, levels):
    np.testing.assert_array_equal(select_genes(in_blocks(x), n_top_genes, levels), np.arange(120))


@pytest.mark.parametrize("value", [0, 5])
def test_genes_without_variance_come_after_all_others(value, x, levels):
    x = x.copy()
    x[:, :40] = value
    assert select_genes(in_blocks(x), 80).min() == 40
    assert select_genes(in_blocks(x), 80, levels).min() == 40
    assert set(select_genes(in_blocks(x), 90)) > set(range(40, 120))


def test_batches_of_one_or_two_cells_are_left_out(x, levels):
    with_rare = np.concatenate([x, 1000 * x[:3]])
    rare_levels = np.concatenate([levels, [3, 4, 4]])
    np.testing.assert_array_equal(
        select_genes(in_blocks(with_rare), 20, rare_levels), select_genes(in_blocks(x), 20, levels)
    )


@pytest.mark.parametrize("n_cells", [2, 3, 5])
def test_a_handful_of_cells_is_enough(n_cells, x):
    assert x[:n_cells, select_genes(in_blocks(x[:n_cells]), 5)].var(0).min() > 0


@pytest.mark.parametrize("n_genes", [1, 2, 5, 20])
def test_too_few_genes_for_a_local_fit_are_still_ranked(n_genes, x):
    few = x[:, :n_genes].copy()
    few[:, -1] = np.where(np.arange(90) % 9, 0, 60)
    assert n_genes - 1 in select_genes(in_blocks(few), 1)


def test_genes_of_one_mean_are_ranked_by_their_variance():
    spread = np.array([1, 2, 3, 9, 4, 5])
    x = np.where(np.arange(60)[:, None] % 2, 10 + spread, 10 - spread)
    np.testing.assert_array_equal(select_genes(in_blocks(x), 2), [3, 5])


def test_less_than_one_gene_is_refused(x):
    with pytest.raises(UsageError, match=re.escape("n_top_genes=0; choose at least one gene")):
        select_genes(in_blocks(x), 0)


def test_the_compiled_loess_is_loaded_only_when_genes_are_chosen():
    code = "import sys, celbo.data.variable_genes; sys.exit('skmisc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
