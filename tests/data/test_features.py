"""Which features are genes, and which genomes they are from."""

import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import celbo
from celbo.data.checks import check_adata
from celbo.data.features import choose_features, describe_genomes

QUICK = {"latent_dim": 2, "hidden_dims": (8,), "train": celbo.TrainConfig(max_epochs=2, seed=0)}
N_GENES, N_OTHERS = 40, 5


@pytest.fixture(scope="module")
def genes():
    return celbo.simulate_cells(n_cells=200, n_genes=N_GENES, n_types=3, median_library=200, seed=0)


def mixed(genes, column="feature_types", types=("Gene Expression", "Antibody Capture"), values=None):
    """Cells with five further features between the genes, which have the names of genes."""
    counts = np.random.default_rng(0).poisson(500, (genes.n_obs, N_OTHERS)) if values is None else values
    x = sp.csr_matrix(sp.hstack([genes.X, sp.csr_matrix(counts.astype(np.float32))]))
    kinds = [types[0]] * N_GENES + [types[1]] * N_OTHERS
    var = pd.DataFrame({column: kinds}, index=[*genes.var_names, *genes.var_names[:N_OTHERS]])
    order = np.random.default_rng(1).permutation(N_GENES + N_OTHERS)
    order = np.array(sorted(order, key=lambda at: (at >= N_GENES, at)))
    order = np.concatenate([order[:7], order[N_GENES:], order[7:N_GENES]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")
        return anndata.AnnData(x[:, order], obs=genes.obs.copy(), var=var.iloc[order])


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def found(check, name):
    return [problem for problem in check.problems if problem.name == name]


@pytest.mark.parametrize(
    ("column", "types"),
    [
        ("feature_types", ("Gene Expression", "Antibody Capture")),
        ("feature_type", ("gene_expression", "CRISPR Guide Capture")),
        ("modality", ("rna", "prot")),
        ("modality", ("GEX", "ADT")),
    ],
)
def test_a_model_of_genes_is_the_same_whatever_stands_beside_them(genes, column, types, tmp_path):
    cells = mixed(genes, column, types)
    (problem,) = found(celbo.ExpressionVAE(**QUICK).check(cells), "features")
    assert problem.severity == "warning"
    assert f"'{types[0]}' ({N_GENES}), '{types[1]}' ({N_OTHERS})" in problem.message
    alone = quietly(celbo.ExpressionVAE(conditions=["batch"], **QUICK).fit, genes)
    model = quietly(celbo.ExpressionVAE(conditions=["batch"], **QUICK).fit, cells)
    assert model.schema_.genes == alone.schema_.genes
    assert model.schema_.selection == f"40 of 45 features, those of type '{types[0]}' in var['{column}']"
    np.testing.assert_array_equal(np.sort(model.reference_.library), np.sort(alone.reference_.library))
    model.save(tmp_path / "model")
    again = celbo.load(tmp_path / "model")
    assert again.schema_ == model.schema_
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (model, again, alone):
            for query in (cells, genes):
                np.testing.assert_array_equal(one.embed(query), alone.embed(genes))


@pytest.mark.parametrize(
    ("suffix", "on_disk"),
    [
        (".h5ad", False),
        *(pytest.param(*kind, marks=pytest.mark.long) for kind in ((".h5ad", True), (".zarr", False), (".zarr", True))),
    ],
)
def test_commands_take_the_genes_of_a_file(genes, tmp_path, celbo_command, suffix, on_disk):
    path, cells = tmp_path / f"cells{suffix}", mixed(genes)
    cells.write_h5ad(path) if suffix == ".h5ad" else cells.write_zarr(path)
    reading = ["--on-disk"] if on_disk else []
    checked = celbo_command("check", path, "--json", *reading)
    document = json.loads(checked.stdout)
    assert document["n_genes"] == N_GENES
    assert [problem["name"] for problem in document["problems"]] == ["features"]
    fit = ["--epochs", "2", "--hidden-dim", "8", "--latent-dim", "2", "--n-top-genes", "20"]
    done = celbo_command("fit", path, "-o", tmp_path / "run", *fit, *reading)
    assert done.returncode == 0, done.stderr
    assert "'Antibody Capture' (5)" in done.stderr
    alone = quietly(celbo.ExpressionVAE(n_top_genes=20, **QUICK).fit, genes)
    model = celbo.load(tmp_path / "run")
    assert model.schema_.genes == alone.schema_.genes
    assert model.schema_.selection.endswith("of these 20 of 40, the most variable (seurat_v3)")
    np.testing.assert_array_equal(model.embed(genes), alone.embed(genes))
    assert celbo_command("embed", tmp_path / "run", path, "-o", tmp_path / "z.h5ad", *reading).returncode == 0
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "z.h5ad").obsm["X_celbo"], alone.embed(genes))
    ready = celbo_command("check", path, "--model", tmp_path / "run", *reading)
    assert (ready.returncode, ready.stdout.splitlines()[1:]) == (0, ["ready to embed"])
    again = celbo_command("fit", path, "-o", tmp_path / "again", "--config", tmp_path / "run" / "run.json")
    assert "not those of the run" not in again.stderr
    weights = [tmp_path / run / "model" / "weights.safetensors" for run in ("run", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_type_can_be_asked_for(genes, tmp_path, celbo_command):
    cells = mixed(genes)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    done = celbo_command("check", tmp_path / "cells.h5ad", "--features", "antibody capture")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["ready to fit"])
    assert "200 cells x 5 genes" in done.stdout
    model = quietly(celbo.ExpressionVAE(features="Antibody Capture", **QUICK).fit, cells)
    assert model.schema_.genes == tuple(genes.var_names[:N_OTHERS])
    protein = cells[:, (cells.var["feature_types"] == "Antibody Capture").to_numpy()].copy()
    np.testing.assert_array_equal(quietly(model.embed, cells), quietly(model.embed, protein))
    (tmp_path / "run.toml").write_text('features = "Antibody Capture"\n')
    done = celbo_command("check", tmp_path / "cells.h5ad", "--config", tmp_path / "run.toml")
    assert "200 cells x 5 genes" in done.stdout
    named = cells.copy()
    named.var_names_make_unique()
    everything = quietly(celbo.ExpressionVAE(features="all", **QUICK).fit, named)
    assert (len(everything.schema_.genes), everything.schema_.selection) == (45, None)
    assert found(celbo.ExpressionVAE(features="all").check(cells), "duplicate-genes")


@pytest.mark.parametrize("wanted", ["Peaks", "Gene", ""])
def test_a_type_that_is_not_there_is_an_error_that_lists_the_types(genes, tmp_path, celbo_command, wanted):
    check = celbo.ExpressionVAE(features=wanted).check(mixed(genes))
    assert [(problem.name, problem.severity) for problem in check.problems] == [("features", "error")]
    assert "'Gene Expression' (40), 'Antibody Capture' (5)" in check.problems[0].message
    genes.write_h5ad(tmp_path / "genes.h5ad")
    done = celbo_command("fit", tmp_path / "genes.h5ad", "-o", tmp_path / "run", "--features", wanted)
    assert done.returncode == 3
    assert "var has no column of types" in done.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_an_option_that_is_no_type_is_refused(genes):
    with pytest.raises(celbo.UsageError, match=r"features=\['rna'\]"):
        celbo.ExpressionVAE(features=["rna"]).check(genes)
    cells = quietly(celbo.ExpressionVAE(**QUICK).prepare, mixed(genes))
    with pytest.raises(celbo.UsageError, match=r"other options \(features\)"):
        celbo.ExpressionVAE(features="Antibody Capture", **QUICK).fit(cells)


@pytest.mark.parametrize("bad", [0.5, np.nan, -1.0])
def test_values_of_features_that_are_left_out_do_not_matter(genes, bad):
    cells = mixed(genes, values=np.full((200, N_OTHERS), bad))
    assert not celbo.ExpressionVAE().check(cells).errors
    assert celbo.ExpressionVAE(features="Antibody Capture").check(cells).errors


def test_size_factors_and_choice_of_genes_ignore_features_that_are_left_out(genes):
    cells = mixed(genes)
    genes.obs["size"] = cells.obs["size"] = np.linspace(0.5, 2, 200)
    for options in ({"size_factor": "size"}, {"size_factor": "size", "n_top_genes": 15}):
        alone, beside = (quietly(celbo.ExpressionVAE(**QUICK, **options).prepare, each) for each in (genes, cells))
        assert beside.schema.genes == alone.schema.genes
        assert beside.schema.library_scale == alone.schema.library_scale
        np.testing.assert_array_equal(beside.source.library, alone.source.library)


@pytest.mark.parametrize(
    "types",
    [
        ["Gene Expression"] * 40,
        ["protein_coding"] * 30 + ["lncRNA"] * 10,
        ["Gene Expression"] * 39 + [None],
        ["RNA"] * 20 + ["GEX"] * 20,
        ["gene"] * 30 + ["pseudogene"] * 10,
        [True] * 30 + [False] * 10,
    ],
)
def test_nothing_is_said_or_left_out_where_all_may_be_genes(genes, types):
    cells = genes.copy()
    cells.var["feature_type"] = types
    check = check_adata(cells)
    assert check.problems == []
    assert (check.schema.genes, check.schema.selection) == (tuple(genes.var_names), None)


def test_types_without_genes_are_all_modelled_and_named():
    var = pd.DataFrame({"feature_types": ["Antibody Capture", "Custom", "Custom"]})
    chosen = choose_features(var)
    assert chosen.positions is None
    assert "'Custom' (2), 'Antibody Capture' (1). None of them reads as genes" in chosen.doubt


@pytest.mark.parametrize(
    ("genome", "said"),
    [
        (["GRCh38"] * 30 + ["mm10"] * 10, "var['genome'] has 'GRCh38' (30), 'mm10' (10)"),
        (["hg19"] * 20 + ["SARS-CoV-2"] * 20, "'hg19' (20), 'SARS-CoV-2' (20)"),
        (["GRCm39"] * 39 + ["custom"], "'GRCm39' (39), 'custom' (1)"),
        (["GRCh38-2020-A"] * 20 + ["GRCh38-3.0.0"] * 20, ""),
        (["GRCh38"] * 39 + [""], ""),
        (["GRCh38"] * 39 + [None], ""),
    ],
)
def test_genomes_of_a_column_are_named_with_their_numbers(genes, genome, said):
    cells = genes.copy()
    cells.var["genome"] = genome
    problems = check_adata(cells).problems
    assert [(problem.name, said in problem.message) for problem in problems] == ([("genomes", True)] if said else [])


@pytest.mark.parametrize(
    ("first", "second"), [("GRCh38_", "mm10___"), ("hg19_", "mm10_"), ("HUMAN_", "MOUSE_"), ("GRCh38-", "GRCm39---")]
)
def test_genomes_of_prefixes_are_named_with_their_numbers(genes, first, second, tmp_path, celbo_command):
    cells = genes.copy()
    cells.var_names = [(first if at < 30 else second) + name for at, name in enumerate(genes.var_names)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    done = celbo_command("check", tmp_path / "cells.h5ad")
    said = f"names of genes begin with '{first.strip('_-')}' (30), '{second.strip('_-')}' (10)"
    assert said in done.stdout
    assert "warning (genomes)" in done.stdout
    cells.var_names = [first + name for name in genes.var_names]
    assert check_adata(cells).problems == []


def test_genomes_of_ensembl_ids_are_named():
    ids = [f"ENSG{at:011}" for at in range(3)] + [f"ENSMUSG{at:011}" for at in range(2)]
    assert describe_genomes(pd.DataFrame(index=ids)) == "names of genes begin with 'ENSG' (3), 'ENSMUSG' (2)"
    assert describe_genomes(pd.DataFrame(index=[*ids[:3], "TP53", "hg19", "mm10-like"])) == ""


@pytest.mark.parametrize("name", ["pbmc3k", "cellmix_tech", "brain10k", "paul15", "yeast_bulk48", "luad_laughney"])
def test_nothing_is_said_about_features_of_real_cells(real_data, name):
    var = real_data(name).var
    assert describe_genomes(var) == ""
    assert choose_features(var).positions is None


def test_generated_genes_are_compared_with_the_genes_of_real_cells(genes):
    real = mixed(genes)
    assert str(celbo.check_realism(genes[:60], real)) == str(celbo.check_realism(genes[:60], genes))
