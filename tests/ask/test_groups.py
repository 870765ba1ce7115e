"""Groups to compare: how they are named, and whether they can be told apart from a nuisance."""

import warnings

import numpy as np
import pandas as pd
import pytest

import celbo

QUICK = celbo.TrainConfig(max_epochs=2, seed=0)


@pytest.fixture(scope="module")
def asked():
    adata = celbo.simulate_cells(n_cells=240, n_genes=40, n_batches=3, n_types=3, seed=0)
    rng = np.random.default_rng(0)
    batch = adata.obs["batch"].astype(str)
    adata.obs["site"] = np.where(batch == "batch_0", "near", "far")
    adata.obs["lane"] = batch.str.upper()
    adata.obs["half"] = rng.permutation(np.arange(adata.n_obs) % 2).astype(str)
    adata.obs["shuffled"] = rng.permutation(batch)
    adata.obs["mostly"] = np.where(rng.random(adata.n_obs) < 0.02, "batch_0", batch)
    adata.obs["depth"] = rng.random(adata.n_obs)
    options = {"latent_dim": 3, "hidden_dims": (8,), "conditions": ["treatment"], "nuisance": ["batch", "depth"]}
    return celbo.ExpressionVAE(**options, train=QUICK).fit(adata), adata


def said(model, adata, **ask):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = model.differential_expression(adata, **ask)
    assert len(table)
    return [str(warning.message) for warning in caught if "nuisance" in str(warning.message)]


@pytest.mark.parametrize(
    ("ask", "groups"),
    [
        ({"groupby": "site"}, ["'far', 'near'", "the cells they are compared with"]),
        ({"groupby": "site", "group": "near", "reference": "far"}, ["'near'", "'far'"]),
        ({"groupby": "lane", "group": "BATCH_1"}, ["'BATCH_1'", "the cells it is compared with"]),
        ({"groupby": "lane", "reference": "BATCH_0"}, ["'BATCH_1', 'BATCH_2'", "'BATCH_0'"]),
        ({"groupby": "site", "pair_by": "cell_type"}, ["'far', 'near'", "within a level of 'cell_type'"]),
        ({"groupby": "site", "over": []}, ["'far', 'near'"]),
    ],
    ids=str,
)
def test_groups_that_share_no_level_of_a_nuisance_get_a_warning(asked, ask, groups):
    (message,) = said(*asked, **ask)
    assert "no level of the nuisance 'batch' with" in message
    assert all(group in message for group in groups)


def test_the_groups_that_share_a_level_are_not_named(asked):
    """ "b" shares levels with "c", but "a" with neither."""
    model, adata = asked
    adata = adata.copy()
    adata.obs["own"] = np.where(adata.obs["site"] == "near", "a", np.where(adata.obs["half"] == "0", "b", "c"))
    (message,) = said(model, adata, groupby="own")
    assert "group 'a' shares no level of the nuisance 'batch' with the cells it is compared with" in message
    assert not said(model, adata, groupby="own", group="b", reference="c")


@pytest.mark.parametrize(
    "ask",
    [
        {"groupby": "half"},
        {"groupby": "shuffled"},
        {"groupby": "mostly"},
        {"groupby": "cell_type"},
        {"groupby": "treatment", "pair_by": "batch"},
        {"groupby": "batch"},
    ],
    ids=str,
)
def test_groups_that_share_levels_get_none(asked, ask):
    assert not said(*asked, **ask)


def test_a_studied_condition_that_goes_with_the_groups_gets_none(cells, fitted):
    cells = cells.copy()
    cells.obs["lane"] = cells.obs["batch"].astype(str).str.upper()
    assert not said(fitted, cells, groupby="lane")


@pytest.mark.parametrize(
    ("name", "nuisance", "level", "groupby"),
    [("pbmc_3tech", "batch", "5p", "cell_type"), ("gbm_panobinostat", "donor", "PW032", "condition")],
)
def test_real_groups_that_share_levels_get_none(real_data, name, nuisance, level, groupby):
    adata = real_data(name)[::4, :100]
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    model = celbo.ExpressionVAE(latent_dim=3, nuisance=[nuisance], hidden_dims=(8,), train=QUICK).fit(adata)
    assert not said(model, adata, groupby=groupby)
    (message,) = said(model, adata, groupby=adata.obs[nuisance] == level)
    assert "'False', 'True'" in message


def test_the_command_line_says_it_too(asked, tmp_path, celbo_command):
    model, adata = asked
    model.save(tmp_path / "model")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    ask = ["de", tmp_path / "model", tmp_path / "cells.h5ad", "-o", tmp_path / "genes.csv", "--groupby"]
    done = celbo_command(*ask, "site")
    assert done.returncode == 0
    assert "no level of the nuisance 'batch' with" in done.stderr
    assert "nuisance" not in celbo_command(*ask, "half").stderr


def test_groups_may_be_values_in_place_of_a_column(asked):
    model, adata = asked
    types = adata.obs["cell_type"]
    ask = {"group": "type_0", "reference": "type_1"}
    column = model.differential_expression(adata, groupby="cell_type", **ask)
    for given in (types, types.iloc[::-1], list(types), types.to_numpy(), pd.Categorical(types)):
        pd.testing.assert_frame_equal(model.differential_expression(adata, groupby=given, **ask), column)
    whole = model.differential_expression(adata, groupby="batch")
    pd.testing.assert_frame_equal(model.differential_expression(adata, groupby=adata.obs["batch"]), whole)


def test_a_mask_compares_its_cells_with_the_others(asked):
    model, adata = asked
    mask = (adata.obs["cell_type"] == "type_0").to_numpy()
    by_name = model.differential_expression(adata, groupby="cell_type", group="type_0").drop(columns="group")
    by_mask = model.differential_expression(adata, groupby=mask, group=True)
    assert set(by_mask.pop("group")) == {"True"}
    np.testing.assert_allclose(by_mask["log2_fold_change"], by_name["log2_fold_change"].loc[by_mask.index], atol=0.01)


def test_pairs_and_known_types_may_be_values_too(asked):
    model, adata = asked
    ask = {"groupby": "treatment", "group": "treated"}
    paired = model.differential_expression(adata, pair_by="cell_type", **ask)
    by_values = model.differential_expression(adata, pair_by=adata.obs["cell_type"].to_numpy(), **ask)
    pd.testing.assert_frame_equal(by_values, paired)
    by_column = model.diagnose(adata, groupby="cell_type").to_json()
    assert model.diagnose(adata, groupby=list(adata.obs["cell_type"])).to_json() == by_column
    for ask in (model.diagnose, model.differential_expression):
        with pytest.raises(celbo.UsageError, match="2 values for 240 cells"):
            ask(adata, groupby=["a", "b"])


def test_a_list_of_values_names_the_way_to_take_a_mean(asked):
    model, adata = asked
    given = {"batch": ["batch_0", "batch_1"]}
    with pytest.raises(celbo.UsageError, match=r"'batch' is given a list.* over=\['batch'\] takes the mean over all"):
        model.expected_expression(adata, given=given)
    assert model.expected_expression(adata, over=["batch"]).shape == adata.shape
    for ask in (
        lambda: model.counterfactual(adata, given),
        lambda: model.sample(5, conditions=given),
        lambda: model.interpolate(adata[:1], adata[1:2], given=given),
    ):
        with pytest.raises(celbo.UsageError, match=r"'batch' is given a list of values.* ask once for each") as refused:
            ask()
        assert "over=" not in str(refused.value)
