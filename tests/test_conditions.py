"""One latent space across batches: against simulated truth."""

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

import celbo


def simulated(batch_strength):
    return celbo.simulate_cells(
        n_cells=2000, n_genes=300, n_types=4, n_batches=2, n_programmes=1, batch_strength=batch_strength,
        type_strength=1.5, median_library=2000, seed=5,
    )  # fmt: skip


def mixing(z, cells):
    """Share of the 15 neighbours within a type that are of the other batch."""
    types, batch, shares = cells.obs["cell_type"].to_numpy(), cells.obs["batch"].to_numpy(), []
    for name in np.unique(types):
        here = types == name
        near = NearestNeighbors(n_neighbors=16).fit(z[here]).kneighbors(return_distance=False)[:, 1:]
        shares.append((batch[here][near] != batch[here][:, None]).mean())
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def embedded():
    found = {}
    for strength in (0.0, 1.0):
        cells = simulated(strength)
        for removed in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nuisance = ["batch"] if removed else []
                model = celbo.ExpressionVAE(latent_dim=8, nuisance=nuisance, train=celbo.TrainConfig(seed=0)).fit(cells)
            found[strength, removed] = cells, model, model.embed(cells)
    return found


def test_a_batch_effect_is_removed_as_if_there_had_been_none(embedded):
    without_effect = mixing(embedded[0.0, False][2], embedded[0.0, False][0])
    cells, _, z = embedded[1.0, True]
    assert mixing(embedded[1.0, False][2], cells) < without_effect - 0.3  # there is something to remove
    assert abs(mixing(z, cells) - without_effect) < 0.05


def test_types_are_kept(embedded):
    cells, _, z = embedded[1.0, True]
    clusters = KMeans(4, n_init=10, random_state=0).fit_predict(z)
    assert adjusted_rand_score(cells.obs["cell_type"], clusters) >= 0.9


def test_expression_corrected_over_batches_forgets_them(embedded):
    cells, model, _ = embedded[1.0, True]
    own = model.expected_expression(cells, library=1000)
    corrected = model.expected_expression(cells, over=["batch"], library=1000)
    batch = (cells.obs["batch"] == "batch_0").to_numpy()

    def apart(x):
        logged = np.log1p(x)
        return np.abs(logged[batch].mean(0) - logged[~batch].mean(0)).mean()

    assert apart(corrected) < 0.25 * apart(own)


def test_a_type_that_a_batch_lacks_is_not_merged_into_another():
    cells = simulated(1.0)
    rare = (cells.obs["cell_type"] == "type_3").to_numpy() & (cells.obs["batch"] == "batch_1").to_numpy()
    cells = cells[~rare].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = (
            celbo.ExpressionVAE(latent_dim=8, nuisance=["batch"], train=celbo.TrainConfig(seed=0))
            .fit(cells)
            .embed(cells)
        )
    near = NearestNeighbors(n_neighbors=16).fit(z).kneighbors(return_distance=False)[:, 1:]
    is_it = (cells.obs["cell_type"] == "type_3").to_numpy()
    assert is_it[near[is_it]].mean() > 0.9
