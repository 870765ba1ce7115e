"""Telling generated cells from real ones: what is alike, what is not, and what is missing."""

import json

import anndata
import numpy as np
import pytest

import celbo


@pytest.fixture(scope="module")
def cells():
    return celbo.simulate_cells(
        n_cells=600, n_genes=60, n_types=4, n_batches=1, type_strength=3.0, median_library=2000, seed=3
    )


@pytest.fixture(scope="module")
def alike(cells):
    return celbo.check_realism(cells[:300], cells[300:], labels="cell_type")


def test_real_cells_are_not_told_from_real_cells(alike):
    assert abs(alike.auc - 0.5) < 0.1
    assert abs(alike.auc_real - 0.5) < 0.1
    assert alike.missing == ()
    assert "hardly told" in alike.verdict
    assert min(alike.agreement[:3]) > 0.9


@pytest.mark.long
def test_nonsense_is_told_with_certainty(cells):
    """Each gene shuffled over cells: the same means, variances and zeros, and no cell that makes sense."""
    rng, x = np.random.default_rng(0), cells.X.toarray()
    nonsense = anndata.AnnData(np.stack([rng.permutation(gene) for gene in x.T], axis=1), var=cells.var)
    found = celbo.check_realism(nonsense, cells)
    assert found.auc > 0.95
    assert "easily told" in found.verdict
    assert found.agreement.zeros == pytest.approx(1)
    assert found.agreement.correlations < 0.5 < found.agreement_real.correlations


@pytest.mark.long
def test_a_gene_that_is_wrong_is_named(cells):
    wrong = cells[:300].copy()
    counts = wrong.X.toarray()
    counts[:, 7] *= 3
    wrong.X = counts
    found = celbo.check_realism(wrong, cells[300:])
    name = cells.var_names[7]
    assert name in found.genes
    assert found.genes[name] > 0


@pytest.mark.long
@pytest.mark.parametrize("labels", ["cell_type", None])
def test_a_type_that_is_missing_is_noticed(cells, labels):
    half = cells[:300]
    lacking = half[(half.obs["cell_type"] != "type_1").to_numpy()]
    found = celbo.check_realism(lacking, cells[300:], labels=labels)
    assert found.missing
    assert "missing" in found.verdict
    if labels:
        assert found.missing == ("type_1",)
        real, generated = found.types["type_1"]
        assert real > 0.1 > generated


@pytest.mark.long
def test_depth_alone_gives_cells_away(cells):
    """The same cells with twice the counts: proportions agree, depth does not."""
    deep = cells[:300].copy()
    deep.X = deep.X * 2
    assert celbo.check_realism(deep, cells[300:]).aucs["trees, depth and components"] > 0.8


@pytest.mark.long
def test_genes_are_matched_by_name_and_results_repeat(cells, alike):
    again = celbo.check_realism(cells[:300], cells[300:][:, ::-1].copy(), labels="cell_type")
    assert again == alike
    assert celbo.check_realism(cells[:300], cells[300:], labels="cell_type", seed=1) != alike


def test_it_prints_its_verdict_first_and_is_plain_json(alike):
    assert str(alike).splitlines()[0] == alike.verdict
    assert json.loads(json.dumps(alike.to_json()))["auc"] == alike.auc
    assert alike.to_json()["agreement"]["means"] == alike.agreement.means


@pytest.mark.long
def test_real_numbers_are_compared_as_they_are():
    rng = np.random.default_rng(0)
    one, two, moved = (anndata.AnnData(rng.normal(mean, 1, (300, 10))) for mean in (0, 0, 1))
    assert celbo.check_realism(one, two).auc < 0.6
    assert celbo.check_realism(moved, two).auc > 0.95


def test_what_cannot_be_compared_is_refused(cells):
    with pytest.raises(celbo.DataError, match="the real cells lack 20 of 60 genes"):
        celbo.check_realism(cells[:100], cells[:, :40])
    with pytest.raises(celbo.DataError, match="names of genes occur more than once"):
        celbo.check_realism(cells[:100], cells[:, [0, 0]])
    with pytest.raises(celbo.DataError, match="5 generated and 100 real cells"):
        celbo.check_realism(cells[:5], cells[:100])
    with pytest.raises(celbo.UsageError, match="labels='tissue' is no column of obs"):
        celbo.check_realism(cells[:100], cells[100:200], labels="tissue")


@pytest.mark.long
def test_counts_are_looked_for_where_they_are(cells):
    real = cells[300:].copy()
    real.layers["counts"] = real.X.copy()
    real.X = np.log1p(real.X.toarray())
    with pytest.raises(celbo.UsageError, match="name the layer of their counts"):
        celbo.check_realism(cells[:300], real)
    assert celbo.check_realism(cells[:300], real, layer="counts").auc < 0.6
    with pytest.raises(celbo.UsageError, match="layer='raw' is none of the real cells; they have 'counts'"):
        celbo.check_realism(cells[:300], real, layer="raw")
