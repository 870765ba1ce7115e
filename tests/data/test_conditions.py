"""One latent space across batches: against simulated truth."""

import warnings

import anndata
import numpy as np
import pandas as pd
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
        near = NearestNeighbors(n_neighbors=15).fit(z[here]).kneighbors(return_distance=False)
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


@pytest.mark.long
def test_a_batch_effect_is_removed_as_if_there_had_been_none(embedded):
    without_effect = mixing(embedded[0.0, False][2], embedded[0.0, False][0])
    cells, _, z = embedded[1.0, True]
    assert mixing(embedded[1.0, False][2], cells) < without_effect - 0.3  # there is something to remove
    assert abs(mixing(z, cells) - without_effect) < 0.05


@pytest.mark.long
def test_types_are_kept(embedded):
    cells, _, z = embedded[1.0, True]
    clusters = KMeans(4, n_init=10, random_state=0).fit_predict(z)
    assert adjusted_rand_score(cells.obs["cell_type"], clusters) >= 0.9


@pytest.mark.long
def test_expression_corrected_over_batches_forgets_them(embedded):
    cells, model, _ = embedded[1.0, True]
    own = model.expected_expression(cells, library=1000)
    corrected = model.expected_expression(cells, over=["batch"], library=1000)
    batch = (cells.obs["batch"] == "batch_0").to_numpy()

    def apart(x):
        logged = np.log1p(x)
        return np.abs(logged[batch].mean(0) - logged[~batch].mean(0)).mean()

    assert apart(corrected) < 0.25 * apart(own)


@pytest.mark.long
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
    near = NearestNeighbors(n_neighbors=15).fit(z).kneighbors(return_distance=False)
    is_it = (cells.obs["cell_type"] == "type_3").to_numpy()
    assert is_it[near[is_it]].mean() > 0.9


def with_an_interaction():
    """Treatment triples the first ten of 60 genes, but only in batch b."""
    rng = np.random.default_rng(0)
    batch, treatment = rng.integers(2, size=1500), rng.integers(2, size=1500)
    mean = np.tile(rng.uniform(2, 6, 60), (1500, 1)) * rng.gamma(4, 0.25, (1500, 1))
    mean[:, 10:20] *= np.where(batch, 2.0, 1.0)[:, None]
    mean[:, :10] *= np.where(batch & treatment, 3.0, 1.0)[:, None]
    names = {"batch": np.array(["a", "b"])[batch], "treatment": np.array(["ctrl", "treated"])[treatment]}
    return anndata.AnnData(rng.poisson(mean).astype(np.float32), obs=pd.DataFrame(names).set_index(names_of(1500)))


def names_of(n):
    return pd.Index([f"cell_{number}" for number in range(n)])


def log_fold_changes(model, cells):
    """Of the first ten genes under treatment, in batch a and in batch b."""
    shares = {
        (batch, treatment): np.log(
            model.expected_expression(cells, given={"batch": batch, "treatment": treatment}, library=1000)[:, :10]
        ).mean()
        for batch in "ab"
        for treatment in ("ctrl", "treated")
    }
    return [shares[batch, "treated"] - shares[batch, "ctrl"] for batch in "ab"]


@pytest.mark.long
def test_an_interaction_is_what_a_combination_does_beyond_its_parts():
    """A linear decoder adds up what its conditions do: it cannot say otherwise without the interaction."""
    cells = with_an_interaction()
    options = {"latent_dim": 2, "conditions": ["batch", "treatment"], "decoder_dims": (), "norm": "none"}
    train = celbo.TrainConfig(max_epochs=150, learning_rate=3e-3)
    counts = cells.to_df().to_numpy()
    shares = counts / counts.sum(1, keepdims=True)
    group = (cells.obs["batch"] + cells.obs["treatment"]).to_numpy()
    of_group = {name: np.log(shares[group == name].mean(0)[:10]).mean() for name in set(group)}
    truth = [of_group[f"{batch}treated"] - of_group[f"{batch}ctrl"] for batch in "ab"]
    assert truth[1] > truth[0] + 0.8
    found = {}
    for interactions in ([], ["treatment:batch"]):
        model = celbo.ExpressionVAE(**options, interactions=interactions, train=train).fit(cells)
        found[bool(interactions)] = log_fold_changes(model, cells[:300].copy())
    np.testing.assert_allclose(found[True], truth, atol=0.1)
    assert abs(found[False][1] - found[False][0]) < 0.3


def test_a_combination_never_seen_is_no_more_than_its_parts():
    cells = with_an_interaction()
    seen = cells[~((cells.obs["batch"] == "b") & (cells.obs["treatment"] == "treated")).to_numpy()].copy()
    model = celbo.ExpressionVAE(
        latent_dim=2, conditions=["batch", "treatment"], interactions=["batch:treatment"],
        train=celbo.TrainConfig(max_epochs=5),
    ).fit(seen)  # fmt: skip
    (learned,) = model.vae_.embed_context.combinations
    assert (learned[1, 1] == 0).all()
    assert all((learned[one, other] != 0).all() for one, other in ((0, 0), (0, 1), (1, 0)))


def test_interactions_are_kept_with_the_model(tmp_path):
    cells = with_an_interaction()[:200].copy()
    model = celbo.ExpressionVAE(
        latent_dim=2, conditions=["batch", "treatment"], interactions=["batch:treatment"],
        train=celbo.TrainConfig(max_epochs=2),
    ).fit(cells)  # fmt: skip
    model.save(tmp_path / "model")
    again = celbo.load(tmp_path / "model")
    assert again.interactions == ["batch:treatment"]
    np.testing.assert_array_equal(model.expected_expression(cells), again.expected_expression(cells))


@pytest.mark.parametrize("text", ["batch", "batch:donor", "batch:batch", "batch*treatment", ""])
def test_what_is_no_interaction_is_refused_before_training(text):
    cells = with_an_interaction()[:50].copy()
    model = celbo.ExpressionVAE(conditions=["batch", "treatment"], interactions=[text])
    with pytest.raises(celbo.UsageError, match="two conditions of this model"):
        model.fit(cells)


def test_an_interaction_with_too_many_levels_is_refused():
    cells = with_an_interaction()[:300].copy()
    cells.obs["donor"] = [f"d{number % 60}" for number in range(300)]
    model = celbo.ExpressionVAE(conditions=["batch", "donor"], interactions=["batch:donor"])
    with pytest.raises(celbo.UsageError, match="too many levels"):
        model.fit(cells)
