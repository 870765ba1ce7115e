"""The cells of fit are told from others by what is in them."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import celbo
from celbo.data.read import read_adata
from celbo.fit.cells import open_cells
from celbo.fit.fitted import split_again

QUICK = celbo.TrainConfig(max_epochs=2, seed=0)


def with_reals(n_cells, seed):
    cells = celbo.simulate_cells(n_cells=n_cells, n_genes=40, n_types=3, median_library=200, seed=seed)
    cells.layers["real"] = np.random.default_rng(seed).normal(size=cells.shape)  # float64: rounded by the model
    return cells


@pytest.fixture(scope="module", params=["gaussian of a layer", "nb", "gaussian of counts", "bernoulli"])
def fit(request):
    options = {
        "gaussian of a layer": {"likelihood": "gaussian", "layer": "real"},
        "nb": {"conditions": ["batch"]},
        "gaussian of counts": {"likelihood": "gaussian"},
        "bernoulli": {"likelihood": "bernoulli", "nuisance": ["batch"]},
    }[request.param]
    cells = with_reals(220, 0)
    return celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=QUICK, **options).fit(cells), cells


def is_known(model, cells):
    return split_again(model.fitted_, open_cells(model.fitted_, cells)) is not None


def test_the_cells_of_fit_are_known_in_any_form(fit, tmp_path):
    model, cells = fit
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells.write_zarr(tmp_path / "cells.zarr")
    other = cells[:, ::-1].copy()
    narrow, sparse = cells.copy(), cells.copy()
    narrow.layers["real"] = narrow.layers["real"].astype(np.float32)
    narrow.X = narrow.X.astype(np.int64)
    sparse.X, sparse.layers["real"] = sparse.X.toarray().astype(np.float64), sp.csc_matrix(sparse.layers["real"])
    more = anndata.concat([cells, anndata.AnnData(np.ones((220, 1)), obs=cells.obs[[]])], axis=1, merge="first")
    more.layers["real"] = np.hstack([cells.layers["real"], np.ones((220, 1))])
    more.obs = cells.obs
    model.save(tmp_path / "model")
    for asked in (model, celbo.load(tmp_path / "model")):
        for same in (
            cells,
            other,
            narrow,
            sparse,
            more,
            read_adata(tmp_path / "cells.zarr", on_disk=True, layer=model.layer),
        ):
            assert is_known(asked, same)
        assert is_known(asked, read_adata(tmp_path / "cells.h5ad", on_disk=True, layer=model.layer))


def test_other_cells_are_not(fit):
    model, cells = fit
    assert not is_known(model, with_reals(220, 1))
    assert not is_known(model, cells[::-1].copy())
    assert not is_known(model, cells[:219].copy())
    changed = cells.copy()
    x = changed.X.toarray()
    x[5, [0, 1, 2, 3]] = x[5, [3, 2, 1, 0]] + [1, 0, 0, 0]
    changed.X, changed.layers["real"][5, 0] = x, changed.layers["real"][5, 0] + 1e-3
    assert not is_known(model, changed)
    if model.schema_.conditions:
        swapped = cells.copy()
        swapped.obs["batch"] = swapped.obs["batch"].map({"batch_0": "batch_1", "batch_1": "batch_0"})
        assert not is_known(model, swapped)


def test_counts_that_change_places_within_a_cell_are_other_counts(fit):
    """The library sizes are the same."""
    model, cells = fit
    moved = cells.copy()
    moved.X = sp.csr_matrix(np.roll(moved.X.toarray(), 1, axis=1))
    moved.layers["real"] = np.roll(moved.layers["real"], 1, axis=1)
    assert not is_known(model, moved)


def test_a_model_of_an_older_version_compares_library_sizes(fit):
    model, cells = fit
    older = replace(model.fitted_, reference=model.fitted_.reference._replace(checksums=None))
    other = with_reals(220, 1)
    same_library = model.schema_.values == "real"
    assert (split_again(older, open_cells(older, other)) is not None) == same_library
    assert split_again(older, open_cells(older, cells)) is not None


@pytest.mark.long
def test_other_reals_are_measured_as_a_whole_and_called_other(tmp_path):
    cells, others = with_reals(220, 0), with_reals(220, 1)
    options = {"likelihood": "gaussian", "layer": "real", "latent_dim": 2, "train": QUICK}
    model = celbo.ExpressionVAE(**options).fit(cells)
    second = celbo.ExpressionVAE(**{**options, "latent_dim": 3}).fit(cells)
    models = {"one": model, "two": second}
    with pytest.warns(UserWarning, match="only 22 cells"):
        assert celbo.compare(models, cells, n_samples=20).held_out
    assert not celbo.compare(models, others, n_samples=20).held_out
    with pytest.raises(celbo.UsageError, match="these are not the cells"):
        celbo.cure(model, others)
    assert json.dumps(model.diagnose(others).to_json()) != json.dumps(model.diagnose(cells).to_json())
