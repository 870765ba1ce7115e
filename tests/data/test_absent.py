"""Genes that were not measured in some samples: noticed in the counts, and masked where a user asks for it."""

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import celbo
from celbo.data.absent import Absent, CellsWithGene, columns_to_watch, find_lacking_levels
from celbo.data.checks import check_query
from celbo.data.schema import Schema
from celbo.data.sources import open_source
from celbo.minibatch import gene_moments

N_LACKED = 30


@pytest.fixture(scope="module")
def complete():
    cells = celbo.simulate_cells(n_cells=600, n_genes=150, n_types=4, median_library=800, seed=0)
    cells.obs["sample"] = np.random.default_rng(0).choice(["s1", "s2", "s3"], cells.n_obs)
    return cells


@pytest.fixture(scope="module")
def lacked(complete):
    return list(np.random.default_rng(1).choice(complete.var_names, N_LACKED, replace=False))


@pytest.fixture(scope="module")
def joined(complete, lacked):
    """The same cells, joined as anndata joins samples with other genes: absent genes are zeros."""
    parts = [complete[complete.obs["sample"] == name] for name in ("s1", "s2", "s3")]
    parts[2] = parts[2][:, ~parts[2].var_names.isin(lacked)]
    cells = ad.concat([part.copy() for part in parts], join="outer")
    return cells[complete.obs_names, complete.var_names].copy()


def absent_problems(cells, **options):
    return [found for found in celbo.ExpressionVAE(**options).check(cells).problems if found.name == "absent-genes"]


def test_missing_values_of_a_dense_join_get_advice_that_works(complete, lacked):
    """anndata.concat fills dense matrices with NaN."""
    parts = [complete[complete.obs["sample"] == name].copy() for name in ("s1", "s2", "s3")]
    parts[2] = parts[2][:, ~parts[2].var_names.isin(lacked)].copy()
    for part in parts:
        part.X = part.X.toarray()
    cells = ad.concat(parts, join="outer")
    (found,) = celbo.ExpressionVAE().check(cells).problems
    assert (found.name, found.severity) == ("not-finite", "error")
    assert "numpy.nan_to_num), and name the column of samples as mask_absent (--mask-absent)" in found.message
    cells.X = np.nan_to_num(cells.X)
    assert "absent-genes" not in [
        found.name for found in celbo.ExpressionVAE(mask_absent="sample").check(cells).problems
    ]


@pytest.mark.parametrize("lacking", [np.s_[3, :10], np.s_[:, :10], np.s_[5:9, :], np.s_[[3, 8], :10], np.s_[50, :]])
def test_other_missing_values_are_not_called_a_join(complete, lacking):
    cells = complete.copy()
    cells.X = cells.X.toarray()
    cells.X[lacking] = np.nan
    (found,) = celbo.ExpressionVAE().check(cells).problems
    assert "Counts are never missing" in found.message


def test_missing_values_of_a_join_get_other_advice_where_nothing_can_be_masked(complete):
    cells = complete.copy()
    cells.X = cells.X.toarray()
    cells.X[100:200, :20] = np.nan
    model = celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=1)).fit(complete, progress=False)
    (found,) = check_query(cells, model.schema_).problems
    assert "mask" not in found.message
    assert "leave out these genes, or ask for each sample by itself" in found.message
    cells.layers["real"] = cells.X
    problems = celbo.ExpressionVAE(layer="real", likelihood="gaussian").check(cells).problems
    (message,) = (found.message for found in problems if found.name == "not-finite")
    assert "mask" not in message


@pytest.mark.parametrize("options", [{}, {"nuisance": ["sample"]}, {"conditions": ["batch"]}])
def test_absent_genes_are_named_with_their_level(joined, options):
    (found,) = absent_problems(joined, **options)
    assert found.severity == "warning"
    n_cells = (joined.obs["sample"] == "s3").sum()
    assert f"{N_LACKED} of 150 in 's3' ({n_cells} cells)" in found.message
    assert "mask_absent='sample' (--mask-absent sample)" in found.message


def test_nothing_is_said_of_random_columns_and_cell_types(complete):
    cells, rng = complete.copy(), np.random.default_rng(2)
    cells.obs["few"] = np.where(np.arange(cells.n_obs) < 4, "four cells", "others")
    for number in range(6):
        cells.obs[f"half_{number}"] = rng.permutation(cells.obs["sample"].to_numpy())
    for column in ("sample", "cell_type", "few", *(f"half_{number}" for number in range(6))):
        assert not absent_problems(cells, nuisance=[column])
    assert not absent_problems(cells)


def test_shallow_cells_do_not_lack_genes(complete):
    """A sample with few counts has many genes without one by chance."""
    cells = complete.copy()
    x, is_shallow = cells.X.toarray(), (cells.obs["sample"] == "s3").to_numpy()
    x[is_shallow] = np.random.default_rng(3).binomial(x[is_shallow].astype(int), 0.003)
    cells.X = sp.csr_matrix(x)
    assert ((x[is_shallow].sum(0) == 0) & (x[~is_shallow].sum(0) > 0)).sum() > 10
    assert not absent_problems(cells, nuisance=["sample"])


def test_a_small_sample_that_lacks_many_genes_is_named_and_masked(complete, lacked):
    """Two dozen cells say little of one gene, and enough of many."""
    cells, rng = complete.copy(), np.random.default_rng(5)
    for level in ("lacks", "complete"):
        small = rng.permutation(cells.n_obs)[:24]
        cells.obs["part"] = "others"
        cells.obs.iloc[small, cells.obs.columns.get_loc("part")] = level
        x = complete.X.toarray()
        genes = np.flatnonzero(rng.random(150) < 0.4)
        if level == "lacks":
            x[np.ix_(small, genes)] = 0
        cells.X = sp.csr_matrix(x)
        found = absent_problems(cells, nuisance=["part"])
        assert len(found) == (level == "lacks")
        if found:
            assert "in 'lacks' (24 cells)" in found[0].message
            schema = celbo.ExpressionVAE(mask_absent="part").prepare(cells).schema
            masked = set(dict(schema.absent.genes)["lacks"])
            common = {complete.var_names[g] for g in genes if (complete.X[:, g] > 0).mean() > 0.2}
            assert common <= masked <= {complete.var_names[g] for g in genes}


def test_a_sample_too_small_to_judge_is_named_where_a_mask_is_asked_for(joined):
    cells = joined.copy()
    cells.obs["sample"] = cells.obs["sample"].astype(str)
    cells.obs.iloc[0, cells.obs.columns.get_loc("sample")] = "one cell"
    messages = [found.message for found in absent_problems(cells, mask_absent="sample")]
    assert any("'one cell' of 'sample' have too few counts to tell which genes they lack" in text for text in messages)


def test_a_panel_and_a_numbered_sample_are_seen_too(complete):
    """Other cases of the kind: a sample measured with a small panel of genes; samples named by whole numbers."""
    panel = complete.copy()
    panel.obs["run"] = np.where(panel.obs["sample"] == "s1", 1, 2)
    x = panel.X.toarray()
    x[np.ix_(panel.obs["run"] == 2, np.arange(100))] = 0
    panel.X = sp.csr_matrix(x)
    del panel.obs["sample"]
    (found,) = absent_problems(panel)
    assert "in '2'" in found.message
    assert "--mask-absent run" in found.message


def test_values_on_disk_and_stored_zeros_give_the_same(joined, tmp_path):
    joined.write_h5ad(tmp_path / "joined.h5ad")
    dense = joined.copy()
    dense.X = dense.X.toarray()
    dense.write_zarr(tmp_path / "joined.zarr")
    (expected,) = absent_problems(joined)
    for path in (tmp_path / "joined.h5ad", tmp_path / "joined.zarr"):
        (found,) = absent_problems(celbo.data.read.read_adata(path, on_disk=True))
        assert found.message == expected.message


def test_the_schema_keeps_exactly_the_genes_that_are_absent(joined, lacked):
    cells = celbo.ExpressionVAE(mask_absent="sample").prepare(joined)
    schema = cells.schema
    assert schema.absent.column == "sample"
    assert schema.absent.levels == ("s1", "s2", "s3")
    assert [set(genes) for _, genes in schema.absent.genes] == [set(), set(), set(lacked)]
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert "genes masked by sample" in repr(schema)


def test_a_gene_that_is_rare_is_absent_only_where_others_are():
    """A gene of few counts says nothing by itself; where a third of the other genes are absent, it says enough."""
    n = 400
    x = np.random.default_rng(4).poisson(2.0, (n, 31))
    x[:, 30] = 0
    x[:6, 30] = 1
    level = np.repeat(["with", "without"], n // 2)
    for absent in (0, 10):
        x[n // 2 :, :absent] = 0
        cells = CellsWithGene(pd.DataFrame({"sample": level}), ["sample"], 31)
        cells.add(sp.csr_matrix(x))
        found = find_lacking_levels(cells, x.sum(1).astype(float), ["sample"])["sample"]
        assert [one.level for one in found] == (["without"] if absent else [])
    assert found[0].lacking[:10].all()
    assert found[0].lacking[30]
    assert not found[0].lacking[10:30].any()


def test_columns_of_many_levels_or_real_numbers_are_not_looked_at():
    obs = pd.DataFrame(
        {"cell": [str(n) for n in range(200)], "score": np.linspace(0, 1, 200), "half": ["a", "b"] * 100}
    )
    assert columns_to_watch(obs, ["score"]) == ["half"]


def test_a_mask_by_a_column_without_absences_is_doubted_and_one_of_no_column_refused(complete, joined):
    (found,) = absent_problems(complete, mask_absent="batch")
    assert found.severity == "warning"
    assert "nothing is masked" in found.message
    (found,) = absent_problems(joined, mask_absent="nothing")
    assert found.severity == "error"
    assert "'nothing'" in found.message
    assert not absent_problems(joined, mask_absent="sample")
    assert [found.severity for found in absent_problems(joined, mask_absent="batch")] == ["warning", "warning"]


def test_moments_are_those_of_the_cells_that_have_a_gene(joined, lacked):
    cells = celbo.ExpressionVAE(mask_absent="sample").prepare(joined)
    moments = gene_moments(cells.source, cells.rows, chunk=100)
    has_it = (joined.obs["sample"] != "s3").to_numpy()
    x, library = joined.X.toarray(), np.asarray(joined.X.sum(1)).ravel()
    gene = list(joined.var_names).index(lacked[0])
    share = float(moments.x[gene] / moments.library)
    assert share == pytest.approx(x[has_it, gene].sum() / library[has_it].sum(), rel=1e-9)
    other = int(np.flatnonzero(~joined.var_names.isin(lacked))[0])
    assert float(moments.x[other]) == pytest.approx(x[:, other].sum())


@pytest.fixture(scope="module")
def masked(joined):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=40, seed=0)
        return celbo.ExpressionVAE(latent_dim=4, nuisance=["batch"], mask_absent="sample", train=train).fit(joined)


def test_a_masked_cell_is_read_as_a_cell_without_these_genes(masked, joined, lacked):
    """Whether genes are absent by their level or missing in the file: the same likelihood, and the same position."""
    third = joined[joined.obs["sample"] == "s3"]
    missing = third[:, ~third.var_names.isin(lacked)].copy()
    missing.obs["sample"] = "another"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(masked.embed(third), masked.embed(missing, genes_present=0.5))
        pd.testing.assert_frame_equal(
            masked.log_prob(third[:20], n_samples=50), masked.log_prob(missing[:20], n_samples=50, genes_present=0.5)
        )


def test_cells_that_lack_other_genes_do_not_move_each_other(masked, joined):
    together = masked.embed(joined)
    elbo = masked.elbo(joined)
    for level in ("s1", "s2", "s3"):
        rows = (joined.obs["sample"] == level).to_numpy()
        np.testing.assert_allclose(masked.embed(joined[rows]), together[rows], atol=1e-4)
    source = open_source(joined, masked.schema_)
    observed = source.take(np.arange(joined.n_obs)).observed
    assert observed.shape == joined.shape
    assert (~observed.numpy()).sum() == N_LACKED * (joined.obs["sample"] == "s3").sum()
    assert np.isfinite(elbo.to_numpy()).all()


def test_a_masked_model_does_not_learn_the_sample(masked, joined, complete, lacked):
    """Cells of the third sample mix with the others, and the genes they lack are expected as in the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = celbo.ExpressionVAE(latent_dim=4, nuisance=["batch"], train=celbo.TrainConfig(max_epochs=40, seed=0))
        plain.fit(joined)
    is_third = (joined.obs["sample"] == "s3").to_numpy()

    def share_of_neighbours(z):
        distance = ((z[is_third][:, None] - z[None]) ** 2).sum(-1)
        nearest = np.argsort(distance, axis=1)[:, 1:16]
        return is_third[nearest].mean() / is_third.mean()

    assert share_of_neighbours(masked.embed(joined)) < 1.3
    assert share_of_neighbours(plain.embed(joined)) > 1.5
    genes = joined.var_names.isin(lacked)
    truth = complete.X[is_third].toarray()
    expected = masked.expected_expression(joined, library=1.0)[is_third][:, genes].mean(0)
    true_share = (truth[:, genes].sum(0) / truth.sum()).clip(1e-6)
    assert np.corrcoef(np.log(expected), np.log(true_share))[0, 1] > 0.95


def test_a_masked_model_is_saved_and_answers_every_question(masked, joined, tmp_path):
    masked.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.schema_ == masked.schema_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(loaded.embed(joined), masked.embed(joined))
        outliers = loaded.outliers(joined)
        assert (outliers["kind"] == "usual").mean() > 0.9
        assert np.isfinite(outliers["p_value"]).all()
        assert not loaded.diagnose(joined).collapsed
        table = loaded.differential_expression(joined, groupby="sample", group="s3", reference="s1")
        assert (table["fdr"] > 0.05).all()  # samples do not differ: nothing is claimed of the genes that one lacks
        assert loaded.sample(20).n_obs == 20
    without = joined.copy()
    del without.obs["sample"]
    with pytest.warns(UserWarning, match="obs has no column 'sample'"):
        loaded.embed(without)


def test_absent_refuses_a_document_of_another_form():
    document = Schema(("a", "b"), absent=Absent("sample", (("s1", ("b",)),))).to_json()
    document = json.loads(json.dumps(document))
    assert Schema.from_json(document).absent.masks(("a", "b")).tolist() == [[False, True], [False, False]]
    document["absent"]["genes"] = [["s1", "b"]]
    with pytest.raises(TypeError):
        Schema.from_json(document)


@pytest.mark.parametrize("likelihood", ["poisson", "zinb", "bernoulli", "gaussian"])
def test_every_likelihood_takes_a_mask(joined, likelihood):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"likelihood": likelihood, "mask_absent": "sample", "prior": "vamp:10"}
        model = celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=3, seed=0), **options).fit(joined)
        assert np.isfinite(model.embed(joined)).all()
        assert np.isfinite(model.history_[-1].validation_elbo)


def test_levels_that_are_numbers_are_known_however_they_are_written(joined):
    cells = joined.copy()
    cells.obs["sample"] = cells.obs["sample"].map({"s1": 0, "s2": 1, "s3": 2}).astype(int)
    schema = celbo.ExpressionVAE(mask_absent="sample").prepare(cells).schema
    for kind in (int, float, str):
        written = cells.obs.assign(sample=cells.obs["sample"].astype(kind))
        assert schema.absent.codes(written).tolist() == cells.obs["sample"].tolist()


def test_new_cells_of_a_sample_that_fit_did_not_see_are_doubted(masked, joined):
    new = joined[:50].copy()
    new.obs["sample"] = "S3"
    with pytest.warns(UserWarning, match=r"50 cells have levels of 'sample' that fit did not see \('S3'\)"):
        masked.embed(new)


@pytest.mark.parametrize(("column", "why"), [("depth", "floating-point numbers"), ("one", "a single level")])
def test_a_mask_by_a_column_that_cannot_be_of_samples_is_refused_with_the_reason(joined, column, why):
    cells = joined.copy()
    cells.obs["depth"], cells.obs["one"] = np.linspace(0, 1, cells.n_obs), "x"
    (found,) = absent_problems(cells, mask_absent=column)
    assert found.severity == "error"
    assert why in found.message
    with pytest.raises(celbo.UsageError, match="one column of obs"):
        celbo.ExpressionVAE(mask_absent=[column]).check(cells)


def test_columns_of_lists_are_passed_over(complete):
    cells = complete.copy()
    cells.obs["list"] = [[1, 2]] * cells.n_obs
    assert not absent_problems(cells)


def test_models_with_other_masks_are_not_compared(masked, joined):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=2)).fit(joined)
    with pytest.raises(celbo.UsageError, match="mask_absent"):
        celbo.compare({"masked": masked, "plain": plain}, joined)


def test_samples_without_a_gene_in_common_are_fitted_and_not_compared_gene_by_gene(complete):
    """No gene is measured in both samples: there is nothing to compare levels or groups by."""
    cells = complete.copy()
    x, first = cells.X.toarray(), (cells.obs["sample"] == "s1").to_numpy()
    x[np.ix_(first, np.arange(75))] = 0
    x[np.ix_(~first, np.arange(75, 150))] = 0
    cells.X, cells.obs["part"] = sp.csr_matrix(x), np.where(first, "a", "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=3, seed=0)
        model = celbo.ExpressionVAE(latent_dim=2, nuisance=["part"], mask_absent="part", train=train).fit(cells)
        assert np.isfinite(model.embed(cells)).all()
        with pytest.raises(celbo.UsageError, match="no gene that was measured in both"):
            model.differential_expression(cells, groupby="part", group="a", reference="b")


def test_questions_about_genes_leave_out_what_a_group_lacks(masked, joined, lacked, tmp_path, celbo_command):
    third = joined[joined.obs["sample"] == "s3"].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = masked.differential_expression(joined, groupby="sample", group="s3", reference="s1")
        assert not set(table.index) & set(lacked)
        assert len(table) == 150 - N_LACKED
        genes = masked.counterfactual(third, {"batch": "batch_1"}, n_samples=2).genes
        assert genes.loc[lacked, "fdr"].isna().all()
    masked.save(tmp_path / "model")
    third.write_h5ad(tmp_path / "third.h5ad")
    joined.write_h5ad(tmp_path / "all.h5ad")
    for name in ("third", "all"):
        files = [tmp_path / "model", tmp_path / f"{name}.h5ad", "-o", tmp_path / f"{name}_x.h5ad"]
        assert celbo_command("express", *files).returncode == 0
    measured = ad.read_h5ad(tmp_path / "third_x.h5ad").var["celbo_measured"]
    assert set(measured.index[~measured]) == set(lacked)
    assert "celbo_measured" not in ad.read_h5ad(tmp_path / "all_x.h5ad").var


def test_masks_go_with_chosen_genes_size_factors_labels_and_data_on_disk(joined, lacked, tmp_path):
    cells = joined.copy()
    cells.obs["factor"] = np.asarray(cells.X.sum(1)).ravel()
    cells.obs["known"] = cells.obs["cell_type"].astype(str)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    options = {"n_top_genes": 80, "size_factor": "factor", "labels": "known", "mask_absent": "sample"}
    train = celbo.TrainConfig(max_epochs=3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celbo.ExpressionVAE(latent_dim=2, train=train, **options).fit(cells)
        on_disk = celbo.data.read.read_adata(tmp_path / "cells.h5ad", on_disk=True)
        again = celbo.ExpressionVAE(latent_dim=2, train=train, **options).fit(on_disk)
        assert set(dict(model.schema_.absent.genes)["s3"]) == set(lacked) & set(model.schema_.genes)
        np.testing.assert_array_equal(model.embed(cells), again.embed(cells))
        assert len(model.predict(cells)) == cells.n_obs
        mapped = model.map_query(cells[:60])
        assert mapped.schema_.absent == model.schema_.absent
