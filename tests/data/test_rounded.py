"""Whole numbers that are no counts: scaled to a common total, and rounded."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import celbo
from celbo.data.checks import check_adata, check_query

REAL = [
    *("brain10k", "cellmix_tech", "gbm_panobinostat", "kang_ifnb", "luad_laughney", "papalexi_thp1", "paul15"),
    *("pbmc3k", "pbmc_3tech", "yeast_bulk48", "zeisel_1464"),
]


@pytest.fixture(scope="module")
def counts():
    return sp.csr_matrix(
        celbo.simulate_cells(n_cells=300, n_genes=300, median_library=3000, seed=0).X, dtype=np.float64
    )


def scaled(counts, total):
    library = np.asarray(counts.sum(axis=1)).ravel()
    x = sp.csr_matrix(sp.diags(np.divide(total, library, where=library > 0, out=np.ones_like(library))) @ counts)
    x.data = np.rint(x.data)
    x.eliminate_zeros()
    return x


def downsampled(counts, total, seed=0):
    rng, x = np.random.default_rng(seed), sp.csr_matrix(counts, copy=True)
    for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        cell = x.data[start:stop].astype(np.int64)
        if cell.sum() > total:
            x.data[start:stop] = rng.multivariate_hypergeometric(cell, total, method="marginals")
    x.eliminate_zeros()
    return x


def bulk_tpm(n_samples, noise=0.2, seed=0):
    """Reads of genes of different length, per kilobase and million."""
    rng = np.random.default_rng(seed)
    length = rng.lognormal(0, 0.8, 8000)
    share = rng.lognormal(1, 2.2, 8000) * np.exp(noise * rng.standard_normal((n_samples, 8000)))
    reads = rng.poisson(share / share.sum(axis=1, keepdims=True) * 2e7) / length
    return np.rint(reads / reads.sum(axis=1, keepdims=True) * 1e6)


def said(x, **options):
    """What a check says about these values, without empty genes."""
    x = sp.csr_matrix(x)
    x = x[:, np.asarray((x > 0).sum(axis=0)).ravel() > 0]
    problems = check_adata(anndata.AnnData(x.astype(np.float32)), **options).problems
    assert all(problem.severity == "warning" for problem in problems)
    return "".join(problem.message for problem in problems if problem.name == "rounded")


@pytest.mark.parametrize(
    ("total", "kind"),
    [
        (1_000_000, "TPM or CPM that were rounded"),
        (10_000, "counts that were scaled to a common total and rounded"),
        (100_000, "counts that were scaled to a common total and rounded"),
        (12_345, "counts that were scaled to a common total and rounded"),
    ],
)
def test_scaled_counts_that_were_rounded_are_told(counts, total, kind):
    message = said(scaled(counts, total))
    assert f"X holds whole numbers, but they look like {kind}" in message
    assert "celbo models raw counts" in message


@pytest.mark.parametrize("n_samples", [6, 20, 100])
def test_rounded_tpm_of_bulk_samples_are_told(n_samples):
    """Their genes differ in length, so that values are no multiples of one; small values are rounded to 0."""
    tpm = bulk_tpm(n_samples)
    assert tpm.sum(axis=1).max() < 1_000_000
    assert "TPM or CPM that were rounded" in said(tpm)
    even = tpm.copy()
    even[:, 0] += 1_000_000 - np.rint(tpm.sum(axis=1).mean())
    assert abs(even.sum(axis=1) - 1_000_000).max() < 150
    assert "TPM or CPM that were rounded" in said(even)


def test_a_layer_with_the_counts_is_named(counts, tmp_path, celbo_command):
    cells = anndata.AnnData(sp.csr_matrix(scaled(counts, 1e6)))
    cells.layers["counts"] = counts
    cells.write_h5ad(tmp_path / "cells.h5ad")
    done = celbo_command("check", tmp_path / "cells.h5ad")
    assert done.returncode == 0
    assert "warning (rounded): X holds whole numbers" in done.stdout
    assert "use layer='counts'" in done.stdout
    assert "rounded" not in celbo_command("check", tmp_path / "cells.h5ad", "--layer", "counts").stdout


def test_new_cells_of_a_model_are_looked_at_too(counts):
    schema = check_adata(anndata.AnnData(counts)).schema
    names = [problem.name for problem in check_query(anndata.AnnData(scaled(counts, 1e6)), schema).problems]
    assert names == ["rounded"]


@pytest.mark.parametrize("values", ["detected", "real"])
def test_likelihoods_that_do_not_read_counts_have_no_fault(counts, values):
    assert said(scaled(counts, 1e6), values=values) == ""


@pytest.mark.parametrize("total", [500, 1000, 3000, 10_000])
def test_counts_drawn_to_a_common_total_stay_silent(counts, total):
    drawn = downsampled(counts, total)
    assert said(drawn) == ""
    n_cells = np.asarray((drawn > 0).sum(axis=0)).ravel()
    for least in (10, 50, 100):  # genes left out afterwards take some counts from each cell
        assert said(drawn[:, n_cells >= least]) == ""


@pytest.mark.parametrize("library", [1000, 10_000, 1_000_000])
@pytest.mark.parametrize("n_cells", [6, 50, 400])
def test_simulated_counts_of_one_library_size_stay_silent(library, n_cells):
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 2, 1000) * rng.gamma(5, 0.2, (n_cells, 1000))
    share /= share.sum(axis=1, keepdims=True)
    assert said(rng.poisson(library * share)) == ""
    assert said(np.stack([rng.multinomial(library, of_cell) for of_cell in share])) == ""


@pytest.mark.parametrize("name", REAL)
def test_real_counts_stay_silent(real_data, name):
    x = sp.csr_matrix(real_data(name).X)
    assert said(x) == ""
    assert said(2 * x) == ""
    without_ones = x.copy()
    without_ones.data[without_ones.data == 1] = 0
    assert said(without_ones) == ""
    if x.shape[0] > 200:
        third = x.shape[0] // 3
        assert "TPM or CPM" in said(sp.vstack([scaled(x[:third].astype(np.float64), 1e6), x[third:]]))
    some = x[: min(x.shape[0], 500)].astype(np.float64)
    library = np.asarray(some.sum(axis=1)).ravel()
    for total in {int(np.median(library)), int(np.quantile(library, 0.1)), 10_000, 1_000_000}:
        drawn = downsampled(some, total)
        n_cells = np.asarray((drawn > 0).sum(axis=0)).ravel()
        for least in (1, 3, 30):
            assert said(drawn[:, n_cells >= least]) == "", (total, least)


@pytest.mark.parametrize("name", REAL)
def test_real_counts_per_million_that_were_rounded_are_told(real_data, name):
    x = sp.csr_matrix(real_data(name).X).astype(np.float64)[:500]
    assert "TPM or CPM that were rounded" in said(scaled(x, 1e6))


@pytest.mark.parametrize("of_rounded", [0.5, 0.3, 0.15])
def test_rounded_tpm_of_some_samples_are_told_with_their_number(of_rounded):
    """Samples with counts were joined with others that have TPM."""
    counts = sp.csr_matrix(celbo.simulate_cells(n_cells=600, n_genes=300, median_library=3000, seed=1).X, dtype=float)
    n = int(600 * of_rounded)
    message = said(sp.vstack([scaled(counts[:n], 1e6), counts[n:]]))
    assert "TPM or CPM that were rounded" in message
    assert f"nine in ten of {n} cells" in message
    assert said(sp.vstack([downsampled(counts[:n], 1000), counts[n:]])) == ""
