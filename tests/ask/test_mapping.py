"""New levels of conditions: surgery on a fitted model, and conditions of very many levels."""

import os
import subprocess
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import celbo
from celbo.ask.mapping import _copy_weights
from celbo.data.conditions import Condition
from celbo.data.schema import Schema
from celbo.data.sources import open_source
from celbo.fit.cells import open_cells
from celbo.fit.start import make_vae, split_of_fit
from celbo.fit.train import split_cells
from celbo.model.inference import take_filled

TRAIN = celbo.TrainConfig(max_epochs=30, seed=0)


@pytest.fixture(scope="module")
def many():
    return celbo.simulate_cells(
        n_cells=1200, n_genes=150, n_types=4, n_batches=3, type_strength=1.5, median_library=1500, seed=1
    )


def of_batch(cells, *names):
    return cells[cells.obs["batch"].isin(names).to_numpy()].copy()


def fitted(cells, **options):
    options = {"latent_dim": 4, "conditions": ["batch", "treatment"], "train": TRAIN} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celbo.ExpressionVAE(**options).fit(cells)


@pytest.fixture(scope="module")
def reference(many):
    return fitted(of_batch(many, "batch_0", "batch_1"))


@pytest.fixture(scope="module")
def mapped(reference, many):
    return reference.map_query(of_batch(many, "batch_2"))


def test_the_reference_does_not_move_by_a_bit(reference, mapped, many):
    known = of_batch(many, "batch_0", "batch_1")
    assert mapped is not reference
    assert mapped.schema_.conditions[0].levels == ("batch_0", "batch_1", "batch_2")
    assert reference.schema_.conditions[0].levels == ("batch_0", "batch_1")
    for before, after in zip(reference.posterior(known), mapped.posterior(known), strict=True):
        np.testing.assert_array_equal(before, after)


def test_means_over_batches_are_over_those_of_fit(reference, mapped, many, tmp_path):
    """So that what a correction or a comparison says of known cells stays; the new level is decoded if asked for."""
    known = of_batch(many, "batch_0", "batch_1")[:200].copy()
    mapped.save(tmp_path / "mapped")
    for model in (mapped, celbo.load(tmp_path / "mapped")):
        before, after = (each.expected_expression(known, over=["batch"]) for each in (reference, model))
        np.testing.assert_array_equal(before, after)
        for names in (pd.Index(["batch"]), np.array(["batch"]), (name for name in ["batch"])):
            np.testing.assert_array_equal(model.expected_expression(known, over=names), after)
        tables = [
            each.differential_expression(known, groupby="cell_type", over=["batch"]) for each in (reference, model)
        ]
        pd.testing.assert_frame_equal(*tables)
        unknown = known.copy()
        unknown.obs["batch"] = "batch_9"
        with pytest.warns(UserWarning, match="all levels of fit in equal parts"):
            marginal = [each.embed(unknown, unseen="marginal") for each in (reference, model)]
        np.testing.assert_array_equal(*marginal)
        new = model.expected_expression(known, given={"batch": "batch_2"})
        assert np.abs(np.log(new / before)).mean() > 0.01


def test_the_only_cell_of_a_new_level_is_trained_on(reference, many):
    """Were it held out, as chance would have it, its level would stay as it started, the mean of the known."""
    for row in split_cells(60, TRAIN.validation_fraction, TRAIN.seed).validation[:3]:
        new = of_batch(many, "batch_2")[:60].copy()
        new.obs["batch"] = np.where(np.arange(60) == row, "alone", "batch_2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = reference.map_query(new)
        number = model.schema_.conditions[0].levels.index("alone")
        context = model.vae_.encoder[0].weight.detach()[:, -model.schema_.context_dim :]
        assert (context[:, number] != context[:, :2].mean(1)).any(), row


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_dims": (16, 12), "remedies": ["skip"]},
        {"hidden_dims": (16, 12), "remedies": ["context_skip"], "prior": "conditional"},
        {"dispersion": "gene-condition", "encode_context": False},
        {"interactions": ["batch:treatment"]},
        {"hidden_dims": ()},
        {"likelihood": "zinb", "prior": "vamp:8"},
    ],
)
def test_every_kind_of_model_takes_new_levels(options, many):
    known, new = of_batch(many, "batch_0", "batch_1")[::4].copy(), of_batch(many, "batch_2")[::4].copy()
    model = fitted(known, train=celbo.TrainConfig(max_epochs=2), **options)
    before = model.expected_expression(known)
    taken = model.map_query(new)
    np.testing.assert_array_equal(model.embed(known), taken.embed(known))
    np.testing.assert_allclose(before, taken.expected_expression(known), rtol=1e-5)
    assert np.isfinite(taken.embed(new)).all()


def test_only_weights_of_the_new_level_are_new(reference, mapped):
    before, after = reference.vae_.state_dict(), mapped.vae_.state_dict()
    wider = [name for name in before if before[name].shape != after[name].shape]
    assert wider == ["encoder.0.weight", "decoder.0.weight"]
    assert all((before[name] == after[name]).all() for name in before if name not in wider)
    # genes, three batches, two treatments: the third batch is the third from behind
    for name in wider:
        kept = np.delete(after[name].numpy(), -3, axis=1)
        np.testing.assert_array_equal(before[name].numpy(), kept)
        mean = before[name].numpy()[:, -4:-2].mean(1)
        assert np.abs(after[name].numpy()[:, -3] - mean).max() > 0.01  # it learned


def test_training_the_new_level_explains_its_cells_better_than_any_known_one(reference, mapped, many):
    new = of_batch(many, "batch_2")
    told, renamed = mapped.elbo(new)["elbo"], new.copy()
    for name in ("batch_0", "batch_1"):
        renamed.obs["batch"] = name
        gained = told - reference.elbo(renamed)["elbo"]
        assert gained.mean() > 3 * gained.sem()


def test_a_batch_of_the_reference_mapped_as_if_new_lands_where_it_was(many):
    """Farther from itself by less than cells of one type are from each other."""
    model = fitted(many)
    again = of_batch(many, "batch_1")
    was = model.embed(again)
    again.obs["batch"] = "another"
    lands = model.map_query(again).embed(again)
    shift = np.linalg.norm(lands - was, axis=1)
    types = again.obs["cell_type"].to_numpy()
    spread = np.concatenate([np.linalg.norm(was[types == t] - was[types == t].mean(0), axis=1) for t in set(types)])
    assert np.median(shift) < np.median(spread)


def test_known_levels_need_no_training(reference, many):
    assert reference.map_query(of_batch(many, "batch_0")) is reference


def test_missing_genes_are_filled_in_while_mapping(reference, many):
    new = of_batch(many, "batch_2")
    fewer = new[:, 10:].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = reference.map_query(fewer)
        found = taken.embed(fewer)
    whole = reference.map_query(new).embed(new)
    apart = np.linalg.norm(found - whole, axis=1)
    assert np.median(apart) < 0.5 * np.median(np.linalg.norm(whole - whole.mean(0), axis=1))


def test_what_is_to_be_known_of_cells_is_said_once_where_they_are_adapted_to(reference, many):
    lacking = of_batch(many, "batch_2")[:60, 5:].copy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference.embed(lacking, unseen="adapt")
    assert sum("fills them in" in str(each.message) for each in caught) == 1


def test_what_cannot_be_mapped_is_refused(reference, many):
    new, few = of_batch(many, "batch_2"), of_batch(many, "batch_0", "batch_1")[::4].copy()
    with pytest.raises(celbo.DataError, match="no column 'batch'"):
        reference.map_query(_without(new))
    normed = fitted(few, norm="batch", train=celbo.TrainConfig(max_epochs=1))
    with pytest.raises(celbo.UsageError, match="normalises over minibatches"):
        normed.map_query(new)


def _without(cells):
    cells = cells.copy()
    del cells.obs["batch"]
    return cells


def test_a_mapped_model_is_saved_and_loaded(mapped, many, tmp_path):
    mapped.save(tmp_path / "model")
    np.testing.assert_array_equal(celbo.load(tmp_path / "model").embed(many), mapped.embed(many))


def test_the_command_line_maps(reference, many, tmp_path, celbo_command):
    reference.save(tmp_path / "run" / "model")
    of_batch(many, "batch_2").write_h5ad(tmp_path / "new.h5ad")
    done = celbo_command("map", tmp_path / "run", tmp_path / "new.h5ad", "-o", tmp_path / "mapped")
    assert done.returncode == 0, done.stderr
    assert "cells mapped" in done.stderr
    assert (tmp_path / "mapped" / "embedding.h5ad").exists()
    loaded = celbo.load(tmp_path / "mapped")
    assert loaded.schema_.conditions[0].levels == ("batch_0", "batch_1", "batch_2")


def test_no_run_and_no_model_folder_is_mapped_over(reference, many, tmp_path, celbo_command):
    for name in ("run", "other"):
        reference.save(tmp_path / name / "model")
    (tmp_path / "other" / "run.json").write_text("{}")
    of_batch(many, "batch_2").write_h5ad(tmp_path / "new.h5ad")
    before = sorted(tmp_path.rglob("*"))
    for output, said in (
        ("other", "has a run that celbo fit wrote"),
        ("run/model", "model folder"),
        ("run/model/a", "in one"),
    ):
        done = celbo_command("map", tmp_path / "run", tmp_path / "new.h5ad", "-o", tmp_path / output)
        assert done.returncode == 2
        assert said in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_levels_are_added_after_the_known_ones_and_nowhere_else(many):
    model = fitted(many[::10].copy(), conditions=["treatment"], train=celbo.TrainConfig(max_epochs=1))
    known = model.schema_.conditions[0].levels
    wider = model.schema_.with_levels_of(pd.DataFrame({"treatment": ["z", "treated", "a"]}))
    assert wider.conditions[0].levels == (*known, "a", "z")
    assert model.schema_.with_levels_of(pd.DataFrame({"treatment": ["treated"]})) == model.schema_


# Conditions of very many levels


def test_new_levels_of_few_cells_are_doubted_together_and_those_of_the_same_cells_too(many, reference):
    new = of_batch(many, "batch_2")[:60].copy()

    def doubts():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reference.map_query(new)
        return [str(each.message) for each in caught]

    new.obs["batch"] = [f"cell {number}" for number in range(60)]
    (said,) = doubts()
    assert "60 new levels have fewer than 20 cells" in said
    assert len(said) < 400
    new.obs["batch"], new.obs["treatment"] = "batch_2", "another"
    (said,) = doubts()
    assert "batch=batch_2 and treatment=another have the same cells" in said
    new.obs["treatment"] = ["another", "ctrl"] * 30
    assert doubts() == []


def test_a_condition_of_many_levels_becomes_a_few_learned_numbers(many):
    cells = many.copy()
    cells.obs["donor"] = pd.Categorical([f"d{n % 60}" for n in range(cells.n_obs)])
    model = fitted(cells, conditions=["batch", "donor"], train=celbo.TrainConfig(max_epochs=2))
    assert model.schema_.context_dim == 63
    assert model.vae_.encoder[0].in_features == 150 + 3 + 10
    assert model.vae_.embed_context.levels[0].shape == (60, 10)


@pytest.mark.long
def test_levels_that_differ_are_told_apart_by_what_is_learned(many):
    """Half of 60 donors express the first 20 genes fourfold: decoding a cell under either shows it."""
    cells, rng = many.copy(), np.random.default_rng(0)
    donor = rng.integers(60, size=cells.n_obs)
    x = cells.X.toarray()
    x[:, :20] *= np.where(donor[:, None] < 30, 4, 1).astype(x.dtype)
    cells.X, cells.obs["donor"] = x, pd.Categorical([f"d{n:02d}" for n in donor])
    model = fitted(cells, conditions=["donor"], train=celbo.TrainConfig(max_epochs=60))
    some = cells[:200].copy()
    decoded = {name: model.expected_expression(some, given={"donor": name}, library=1000) for name in ("d05", "d45")}
    high, low = (decoded[name][:, :20].sum() for name in decoded)
    assert high > 1.5 * low
    with pytest.raises(celbo.DataError, match="no level 'd99' in fit"):
        model.expected_expression(some, given={"donor": "d99"})


def test_a_mapped_level_of_many_learns_its_own_numbers(many):
    cells = many.copy()
    cells.obs["donor"] = pd.Categorical([f"d{n % 60}" for n in range(cells.n_obs)])
    model = fitted(cells, conditions=["donor"], train=celbo.TrainConfig(max_epochs=2))
    new = cells[:100].copy()
    new.obs["donor"] = "another"
    taken = model.map_query(new)
    np.testing.assert_array_equal(model.embed(cells), taken.embed(cells))
    before, after = model.vae_.embed_context.levels[0], taken.vae_.embed_context.levels[0]
    assert after.shape == (61, 10)
    assert (after[:60] == before).all()
    assert (after[60] != before.mean(0)).any()


@pytest.mark.long
def test_23_ten_thousand_levels_cost_memory_by_level_and_not_by_level_and_cell():
    """10,000 cells of as many donors and 30 genes, in a process of its own: all of it below a one-hot matrix alone."""
    program = """
import ctypes, resource, sys, warnings
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which count what nobody asked for
import numpy as np, anndata, celbo
from celbo.estimator import ExpressionVAE
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
cells = anndata.AnnData(rng.poisson(2.0, size=(10_000, 30)).astype(np.float32))
cells.obs["donor"] = [f"d{n}" for n in range(10_000)]
few = cells[:100].copy()
few.obs["donor"] = [str(n % 2) for n in range(100)]
ExpressionVAE(latent_dim=3, conditions=["donor"], train=celbo.TrainConfig(max_epochs=1, threads=1)).fit(few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = ExpressionVAE(latent_dim=3, conditions=["donor"], train=celbo.TrainConfig(max_epochs=2, threads=1)).fit(cells)
model.embed(cells)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    options = {"capture_output": True, "text": True, "check": False, "timeout": 300, "env": one_arena}
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10_000 * 10_000 * 4 / 2**20


def test_levels_that_read_nearly_as_known_ones_are_doubted(many):
    """Case, spaces and separators; but not other numbers. The same number is the known level, however it is written."""
    known = many.copy()
    names = np.array(["Donor_1", "donor_11", "10", "+"])
    known.obs["batch"] = names[np.arange(known.n_obs) % 4]
    model = celbo.ExpressionVAE(latent_dim=2, conditions=["batch"], train=celbo.TrainConfig(max_epochs=1)).fit(known)
    for level, like in (("donor 1", "Donor_1"), ("10.0", None), ("1.0", None), ("donor_1_1", None), ("-", None)):
        query = known[:40].copy()
        query.obs["batch"] = level
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.map_query(query)
        doubts = [str(each.message) for each in caught if "taken for a new level" in str(each.message)]
        assert [f"if {like!r} is meant" in doubt for doubt in doubts] == ([True] if like else [])


@pytest.mark.parametrize("n_levels", [3, 60])
def test_a_new_level_starts_as_the_mean_of_the_known_ones(n_levels):
    """One-hot levels have columns of weights; of very many levels each has a row of learned numbers."""
    known = tuple(f"level_{number}" for number in range(n_levels))
    before = Schema(("a", "b"), (Condition("batch", known, embedded=n_levels > 50),))
    after = before.with_levels_of(pd.DataFrame({"batch": [*known, "new"]}))
    architecture = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(5,), embedding_dim=3)._parts()["architecture"]
    old, new = (make_vae(architecture, schema, celbo.LIKELIHOODS["nb"]) for schema in (before, after))
    learned = _copy_weights(old, new, before, after)
    if n_levels > 50:
        name, weights = "embed_context.levels.0", (old.embed_context.levels[0], new.embed_context.levels[0].detach())
        known_rows, new_row = weights[0].detach(), weights[1][-1]
    else:
        name = "encoder.0.weight"
        known_rows, new_row = old.encoder[0].weight.detach()[:, 2:].T, new.encoder[0].weight.detach()[:, -1]
    torch.testing.assert_close(new_row, known_rows.mean(0))
    assert learned[name].sum() == new_row.numel()


def test_missing_genes_are_filled_in_once_while_mapping(reference, many):
    """The ELBO that ends training and chooses weights is that of the mapped model: genes are not filled in twice."""
    query = of_batch(many, "batch_2")[:, 25:].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = reference.map_query(query)
        split = split_of_fit(open_source(query, mapped.schema_), mapped.schema_, mapped.train)
        elbo = mapped.elbo(query, seed=mapped.train.seed)["elbo"].iloc[split.validation].mean()
    best = max(epoch.validation_elbo for epoch in mapped.history_)
    assert best == pytest.approx(elbo, abs=1e-3)
    cells = open_cells(mapped.fitted_, query)
    filled = take_filled(mapped.vae_, cells.source, cells.rows)
    again = cells.encoded.library
    np.testing.assert_allclose(filled.library[:, 0].numpy(), again, rtol=1e-4)


@pytest.mark.long
def test_mapping_keeps_what_the_remedies_maximise(many):
    known, query = of_batch(many, "batch_0", "batch_1"), of_batch(many, "batch_2")
    train = celbo.TrainConfig(max_epochs=10, seed=0)
    model = fitted(known, remedies=["beta:4", "cyclical"], train=train)
    assert model.map_query(query).history_[-1].kl_weight == 4.0
    plain = fitted(known, remedies=["cyclical"], train=train)
    assert [epoch.kl_weight for epoch in plain.map_query(query).history_] == [1.0] * len(
        plain.map_query(query).history_
    )
    narrow = fitted(known, remedies=["autoencoder_start"], train=train)
    mapped = narrow.map_query(query)
    for before, after in zip(narrow.posterior(known), mapped.posterior(known), strict=True):
        np.testing.assert_array_equal(before, after)


def test_cells_with_counts_of_unknown_genes_only_are_named_empty(reference, many):
    query = of_batch(many, "batch_0")[:20].copy()
    query.X = query.X.toarray()
    query.X[:3] = 0
    unknown = ad.AnnData(np.full((20, 2), 7.0, np.float32), obs=query.obs, var=pd.DataFrame(index=["new_1", "new_2"]))
    both = ad.concat([query, unknown], axis=1, merge="same")
    both.obs = query.obs
    with pytest.warns(UserWarning, match="3 of 20 cells have no counts of the model's genes"):
        log_p = reference.log_prob(both, n_samples=10)
    assert log_p["log_p"].isna().tolist() == [True] * 3 + [False] * 17
    both.X[:, : query.n_vars] = 0
    with pytest.raises(celbo.DataError, match="no counts of the model's genes"):
        reference.embed(both)
    check = celbo.data.checks.check_query(query, reference.schema_)
    assert [problem.name for problem in check.problems] == ["empty-cells"]
