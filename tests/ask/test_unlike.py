"""Cells that are unlike the cells of fit are flagged by the questions that would otherwise answer and say nothing."""

import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import celbo
from celbo.ask.unlike import unlike, warn_of_unlike
from celbo.fit.cells import open_cells

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {"n_genes": 120, "n_types": 4, "median_library": 800}


@pytest.fixture(scope="module")
def all_cells():
    cells = celbo.simulate_cells(n_cells=900, seed=0, **OPTIONS)
    cells.obs["known_type"] = cells.obs["cell_type"].astype(str)
    return cells


@pytest.fixture(scope="module")
def fresh(all_cells):
    """A tenth of the cells, kept out of fit altogether."""
    return all_cells[:90].copy()


@pytest.fixture(scope="module")
def other():
    cells = celbo.simulate_cells(n_cells=200, seed=9, **OPTIONS)
    cells.obs["known_type"] = "unknown"
    return cells


@pytest.fixture(scope="module")
def model(all_cells):
    train = celbo.TrainConfig(max_epochs=30, seed=0)
    options = {"conditions": ["treatment"], "nuisance": ["batch"], "labels": "known_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celbo.ExpressionVAE(latent_dim=4, train=train, **options).fit(all_cells[90:].copy())


def unlike_of(model, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unlike(model.fitted_, open_cells(model.fitted_, cells, **options))


def test_cells_of_another_simulation_are_unlike_and_fresh_cells_are_not(model, all_cells, fresh, other):
    assert unlike_of(model, other).mean() > 0.9
    assert unlike_of(model, fresh).mean() <= 0.02
    assert unlike_of(model, all_cells[90:]).mean() <= 0.02


def test_genes_that_the_cells_lack_change_nothing_about_it(model, fresh, other):
    assert unlike_of(model, other[:, 20:]).mean() > 0.9
    assert unlike_of(model, fresh[:, 20:]).mean() <= 0.02


def test_each_question_warns_and_flags(model, fresh, other):
    for cells, is_other in ((other, True), (fresh, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [
                model.embed(cells),
                model.predict(cells)["unlike"],
                model.counterfactual(cells, {"treatment": "treated"}, n_samples=2).support["unlike"],
                model.map_query(cells),
            ]
        said = [str(one.message) for one in caught if "are unlike the cells of fit" in str(one.message)]
        assert len(said) == (4 if is_other else 0)
        if is_other:
            assert f"of {cells.n_obs} cells" in said[0]
            assert "means little for most cells" in said[0]
        for flags in answers[1:3]:
            assert flags.dtype == bool
            assert flags.mean() > 0.9 if is_other else flags.mean() <= 0.02


def test_a_few_other_cells_among_many_are_named_by_number(model, fresh, other):
    mixed = ad.concat([fresh, other[:20]])
    mixed.obs_names_make_unique()
    with pytest.warns(UserWarning, match=r"of 110 cells .* means little for these cells"):
        model.embed(mixed)
    flags = unlike_of(model, mixed)
    assert flags[90:].mean() > 0.9
    assert flags[:90].mean() <= 0.02


def test_a_deep_or_shallow_sequencing_run_is_matched_by_depth(model, fresh):
    shallow = fresh.copy()
    rng = np.random.default_rng(0)
    shallow.X.data = rng.binomial(shallow.X.data.astype(int), 0.5).astype(np.float32)
    shallow.X.eliminate_zeros()
    assert unlike_of(model, shallow).mean() <= 0.05


def test_cells_without_a_count_are_never_unlike(model, other):
    cells = other[:30].copy()
    cells.X = cells.X.toarray()
    cells.X[:10] = 0
    flags = unlike_of(model, cells)
    assert not flags[:10].any()
    assert flags[10:].all()


def test_models_that_cannot_tell_say_nothing(model, fresh, tmp_path):
    model.save(tmp_path / "without", keep_reference=False)
    assert unlike_of(celbo.load(tmp_path / "without"), fresh) is None
    reference = model.fitted_.reference
    older = replace(model.fitted_, reference=reference._replace(surprise=np.zeros_like(reference.surprise)))
    few = replace(model.fitted_, reference=reference._replace(held_out=np.arange(len(reference.held_out)) < 29))
    for fitted in (older, few):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert warn_of_unlike(fitted, open_cells(fitted, fresh)) is None
    assert (celbo.load(GOLDEN / "format-1-nb" / "model").fitted_.reference.surprise == 0).all()


def test_the_command_line_writes_the_flags(model, other, fresh, tmp_path, celbo_command):
    model.save(tmp_path / "model")
    for name, cells in (("other", other), ("fresh", fresh)):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    embed = celbo_command("embed", tmp_path / "model", tmp_path / "other.h5ad", "-o", tmp_path / "embedded.h5ad")
    assert embed.returncode == 0
    assert "unlike the cells of fit" in embed.stderr
    assert ad.read_h5ad(tmp_path / "embedded.h5ad").obs["celbo_unlike"].mean() > 0.9
    embed = celbo_command("embed", tmp_path / "model", tmp_path / "fresh.h5ad", "-o", tmp_path / "fine.h5ad")
    assert "unlike" not in embed.stderr
    assert ad.read_h5ad(tmp_path / "fine.h5ad").obs["celbo_unlike"].mean() <= 0.02
    check = celbo_command("check", tmp_path / "other.h5ad", "--model", tmp_path / "model")
    assert check.returncode == 0
    assert "warning (unlike): " in check.stdout
    assert "unlike" not in celbo_command("check", tmp_path / "fresh.h5ad", "--model", tmp_path / "model").stdout
    answer = ["counterfactual", tmp_path / "model", tmp_path / "other.h5ad", "--set", "treatment=treated"]
    assert celbo_command(*answer, "-o", tmp_path / "treated.h5ad").returncode == 0
    assert ad.read_h5ad(tmp_path / "treated.h5ad").obs["celbo_unlike"].mean() > 0.9
    mapped = celbo_command("map", tmp_path / "model", tmp_path / "other.h5ad", "-o", tmp_path / "mapped")
    assert mapped.stderr.count("unlike the cells of fit") == 1
    assert ad.read_h5ad(tmp_path / "mapped" / "embedding.h5ad").obs["celbo_unlike"].mean() > 0.9
    table = celbo_command("predict", tmp_path / "model", tmp_path / "other.h5ad", "-o", tmp_path / "labels.csv")
    assert table.returncode == 0
    assert (tmp_path / "labels.csv").read_text().splitlines()[0].startswith("cell,label,probability,p_known,unlike,")


@pytest.mark.long
@pytest.mark.parametrize("likelihood", ["zinb", "bernoulli", "gaussian"])
def test_every_likelihood_can_tell(all_cells, fresh, other, likelihood):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = celbo.TrainConfig(max_epochs=20, seed=0)
        model = celbo.ExpressionVAE(latent_dim=4, likelihood=likelihood, train=train).fit(all_cells[90:].copy())
    assert unlike_of(model, other).mean() > 0.9
    assert unlike_of(model, fresh).mean() <= 0.03
