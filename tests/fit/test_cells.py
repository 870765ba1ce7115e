"""Cells of a model, and what fit keeps of them."""

import numpy as np
import pandas as pd
import pytest

import celbo
from celbo.fit.cells import open_cells
from celbo.fit.fitted import Fitted
from celbo.fit.start import split_of_fit


@pytest.mark.parametrize("n_rows", [40, 200])
def test_posteriors_of_some_cells_are_theirs_in_the_order_asked_for(fitted, cells, n_rows):
    rows = np.random.default_rng(0).permutation(cells.n_obs)[:n_rows]
    of_all = open_cells(fitted.fitted_, cells).encoded
    of_some = open_cells(fitted.fitted_, cells).encoded_at(rows)
    for part, whole in zip(of_some, of_all, strict=True):
        np.testing.assert_allclose(part, whole[rows], rtol=1e-5, atol=1e-6)


def test_cells_are_the_same_object_for_the_same_model_and_another_for_another(fitted, cells):
    opened = open_cells(fitted.fitted_, cells)
    assert opened.seen_by(fitted.fitted_) is opened
    again = celbo.ExpressionVAE(**fitted.get_params()).fit(cells)
    view = opened.seen_by(again.fitted_)
    assert view.vae is again.vae_
    assert opened.seen_by(again.fitted_) is view
    np.testing.assert_array_equal(view.encoded.mu_z, again.posterior(cells)[0])


def test_typical_positions_are_those_of_training_cells(fitted):
    reference = fitted.fitted_.reference
    moved = reference.mu_z + np.where(reference.held_out, 1e6, 0)[:, None].astype(np.float32)
    fields = {name: value for name, value in vars(fitted.fitted_).items() if name != "centres"}
    far = Fitted(**{**fields, "reference": reference._replace(mu_z=moved)})
    np.testing.assert_array_equal(far.centres, fitted.fitted_.centres)


def test_at_least_one_cell_of_each_level_is_learned_from(cells):
    rare = cells.copy()
    rare.obs["batch"] = pd.Categorical(np.where(np.arange(rare.n_obs) == 7, "rare", "common"))
    prepared = celbo.ExpressionVAE(conditions=["batch"]).prepare(rare)
    for seed in range(30):
        config = celbo.TrainConfig(validation_fraction=0.5, seed=seed)
        assert 7 in split_of_fit(prepared.source, prepared.schema, config).train


def test_genes_are_chosen_within_the_nuisance_if_there_is_one(cells):
    options = {"conditions": ["treatment"], "n_top_genes": 20}
    both = celbo.ExpressionVAE(nuisance=["batch"], **options).prepare(cells).schema
    assert "within levels of 'batch'" in both.selection
    assert "within levels of 'treatment'" in celbo.ExpressionVAE(**options).prepare(cells).schema.selection


@pytest.mark.parametrize("n", [60, 250], ids=["few cells", "most cells"])
def test_surprise_is_computed_where_it_is_asked_for(fitted, cells, monkeypatch, n):
    monkeypatch.setattr("celbo.model.inference.CHUNK", 50)
    opened = open_cells(fitted.fitted_, cells)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(cells.n_obs)[:n])
    wanted = rng.random(n) < 0.3
    found = opened.encoded_at(rows, surprise_of=wanted).surprise
    np.testing.assert_allclose(found[wanted], opened.surprise[rows][wanted], rtol=1e-4, atol=1e-4)
    assert np.isnan(found[~wanted]).all()
