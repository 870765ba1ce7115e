"""ExpressionVAE: fit, query, save and load, the same answer each time."""

import dataclasses
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
from sklearn.base import clone

import celbo
from celbo import DataError, ExpressionVAE, ModelFileError, NotFittedError, TrainConfig, UsageError, checkpoint
from celbo.ask.scoring import posterior
from celbo.data.sources import CellSource
from celbo.fit.cells import Cells, open_cells

QUICK = TrainConfig(max_epochs=3)


def weights(model):
    return torch.cat([value.flatten() for value in model.vae_.state_dict().values()])


@pytest.mark.parametrize("likelihood", celbo.LIKELIHOODS)
def test_every_likelihood_fits_embeds_and_decodes(cells, likelihood):
    model = ExpressionVAE(latent_dim=3, likelihood=likelihood, conditions=["batch"], train=QUICK).fit(cells)
    assert model.embed(cells).shape == (300, 3)
    assert np.isfinite(model.elbo(cells)).all(axis=None)
    assert model.expected_expression(cells).shape == (300, 60)


@pytest.mark.parametrize("dispersion", ["gene", "gene-condition", "gene-cell"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_theta_by_gene_level_or_cell(cells, likelihood, dispersion):
    model = ExpressionVAE(likelihood=likelihood, dispersion=dispersion, conditions=["batch"], train=QUICK).fit(cells)
    assert np.isfinite(model.elbo(cells)["elbo"]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_dims": ()},
        {"hidden_dims": (16, 8), "remedies": ["skip"]},
        {"norm": "layer"},
        {"norm": "batch"},
        {"encode_context": False},
        {"objective": "autoencoder"},
        {"size_factor": "library"},
    ],
    ids=str,
)
def test_every_option_survives_saving(cells, tmp_path, options):
    model = ExpressionVAE(conditions=["batch"], train=QUICK, **options).fit(cells)
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.options() == model.options()
    np.testing.assert_array_equal(loaded.embed(cells), model.embed(cells))


def test_the_same_seed_gives_the_same_model_to_the_bit(cells, fitted):
    again = ExpressionVAE(latent_dim=4, hidden_dims=(16,), conditions=["batch"], train=fitted.train).fit(cells)
    assert torch.equal(weights(fitted), weights(again))
    np.testing.assert_array_equal(fitted.embed(cells), again.embed(cells))


def test_fitting_and_asking_leave_the_anndata_and_torchs_generator_alone(cells):
    mine, before = cells.copy(), torch.random.get_rng_state()
    model = ExpressionVAE(conditions=["batch"], train=QUICK).fit(mine)
    model.embed(mine), model.elbo(mine), model.expected_expression(mine, given={"batch": "batch_0"})
    assert torch.equal(before, torch.random.get_rng_state())
    assert (mine.X != cells.X).nnz == 0
    pd.testing.assert_frame_equal(mine.obs, cells.obs)
    assert set(mine.obsm) == set(cells.obsm)


def test_no_counts_and_no_anndata_stay_with_the_model(fitted):
    kept = [*vars(fitted).values(), *vars(fitted.fitted_).values()]
    assert not [value for value in kept if isinstance(value, anndata.AnnData | Cells | CellSource)]
    assert {*vars(fitted.fitted_)} >= {"schema", "vae", "history", "reference", "split"}
    assert all(value.shape[1] != 60 for value in fitted.reference_ if value.ndim == 2)


def test_genes_in_another_order_give_the_same_embedding_to_the_bit(cells, fitted):
    order = np.random.default_rng(0).permutation(cells.n_vars)
    np.testing.assert_array_equal(fitted.embed(cells[:, order]), fitted.embed(cells))
    np.testing.assert_array_equal(fitted.embed(cells[:, order].copy()), fitted.embed(cells))


def test_genes_beyond_the_models_change_nothing(cells, fitted):
    more = cells[:, [*range(60), 3, 4]].copy()
    more.var_names = [*cells.var_names, "other_1", "other_2"]
    np.testing.assert_array_equal(fitted.embed(more), fitted.embed(cells))


def test_cells_keep_their_order(cells, fitted):
    order = np.random.default_rng(0).permutation(cells.n_obs)
    np.testing.assert_allclose(fitted.embed(cells[order]), fitted.embed(cells)[order], atol=1e-5)


def test_renamed_genes_are_refused_not_guessed(cells, fitted):
    renamed = cells.copy()
    renamed.var_names = [f"ENSG{i:011d}" for i in range(60)]
    with pytest.raises(DataError, match=r"60 of the model's 60 genes.*'gene_0'.*'ENSG00000000000'"):
        fitted.embed(renamed)


def test_posterior_is_mean_and_standard_deviation(cells, fitted):
    mu_z, sd_z = fitted.posterior(cells)
    np.testing.assert_array_equal(mu_z, fitted.embed(cells))
    assert mu_z.shape == sd_z.shape == (300, 4)
    assert (sd_z > 0).all()


def test_elbo_adds_up_by_cell(cells, fitted):
    elbo = fitted.elbo(cells)
    assert list(elbo.index) == list(cells.obs_names)
    np.testing.assert_allclose(elbo["elbo"], elbo["reconstruction"] - elbo["kl"], rtol=1e-5)
    np.testing.assert_allclose(elbo["kl"], elbo[[f"kl_{j}" for j in range(4)]].sum(axis=1), rtol=1e-5)
    pd.testing.assert_frame_equal(elbo, fitted.elbo(cells))


def test_expected_expression_has_the_cells_library_or_the_given_one(cells, fitted):
    np.testing.assert_allclose(fitted.expected_expression(cells).sum(1), np.asarray(cells.X.sum(1)).ravel(), rtol=1e-4)
    np.testing.assert_allclose(fitted.expected_expression(cells, library=1.0).sum(1), 1, rtol=1e-4)


def test_expected_expression_under_a_given_batch_is_what_the_decoder_says(cells, fitted):
    corrected = fitted.expected_expression(cells, given={"batch": "batch_1"}, library=100.0)
    z, context = torch.from_numpy(fitted.embed(cells)), torch.tensor([[0.0, 1.0]]).expand(300, 2)
    with torch.no_grad():
        expected = fitted.vae_.decode(z, context, torch.full((300, 1), 100.0))
    np.testing.assert_allclose(corrected, expected, rtol=1e-4)
    own = fitted.expected_expression(cells, library=100.0)
    in_batch_1 = (cells.obs["batch"] == "batch_1").to_numpy()
    np.testing.assert_allclose(corrected[in_batch_1], own[in_batch_1], rtol=1e-5)
    assert np.abs(np.log(corrected[~in_batch_1] / own[~in_batch_1])).max() > 0.01


def test_a_library_that_means_nothing_is_refused(cells, fitted):
    for library in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="a library size is a finite number above 0"):
            fitted.expected_expression(cells, library=library)
    detection = ExpressionVAE(likelihood="bernoulli", train=QUICK).fit(cells)
    with pytest.raises(UsageError, match="has no meaning for 'bernoulli'"):
        detection.expected_expression(cells, library=1.0)


def test_history_has_a_record_per_epoch(fitted):
    frame = fitted.history_.to_frame()
    assert len(fitted.history_) == len(frame) == 4
    assert fitted.history_[-1].epoch == 4
    assert {"validation_elbo", "kl_weight", "kl_0", "kl_3"} <= set(frame)


def test_an_unfitted_model_says_so():
    with pytest.raises(NotFittedError, match=r"is not fitted .* call fit first"):
        ExpressionVAE().embed("nowhere.h5ad")
    assert not hasattr(ExpressionVAE(), "vae_")


def test_a_misspelt_name_of_a_fitted_model_is_no_want_of_fitting(fitted):
    with pytest.raises(AttributeError, match="has no attribute 'latent_'"):
        _ = fitted.latent_


def test_options_that_do_not_exist_list_those_that_do(cells):
    with pytest.raises(UsageError, match="'nbb'; choose one of gaussian, bernoulli, poisson, nb, zinb"):
        ExpressionVAE(likelihood="nbb").fit(cells)
    with pytest.raises(UsageError, match="choose one of vae, autoencoder"):
        ExpressionVAE(objective="gan").fit(cells)
    with pytest.raises(UsageError, match="needs a condition"):
        ExpressionVAE(dispersion="gene-condition").fit(cells)
    with pytest.raises(UsageError, match="latent_dim"):
        ExpressionVAE(latent_dim=0).fit(cells)
    with pytest.raises(UsageError, match="hidden_dims"):
        ExpressionVAE(hidden_dims=(16, -1)).fit(cells)
    with pytest.raises(UsageError, match="give a list of widths"):
        ExpressionVAE(hidden_dims=16).fit(cells)
    with pytest.raises(UsageError, match="hidden_dims at least two widths"):
        ExpressionVAE(remedies=["skip"]).fit(cells)
    with pytest.raises(UsageError, match=r"not whole numbers: max_epochs=2\.5"):
        TrainConfig(max_epochs=2.5)
    with pytest.raises(UsageError, match="cpu and cuda"):
        ExpressionVAE(train=TrainConfig(device="meta")).fit(cells)
    with pytest.raises(UsageError, match="conditions"):
        ExpressionVAE(conditions="batch").fit(cells)


@pytest.mark.parametrize("n_cells", [1, 2, 3, 5])
def test_very_few_cells_are_trained(cells, n_cells):
    model = ExpressionVAE(latent_dim=10, train=QUICK).fit(cells[:n_cells])
    assert np.isfinite(model.embed(cells[:n_cells])).all()


def test_empty_cells_and_empty_genes_are_survived(cells):
    holes = cells.copy()
    x = holes.X.toarray()
    x[5], x[:, 7] = 0, 0
    holes.X = x
    for likelihood in celbo.LIKELIHOODS:
        model = ExpressionVAE(likelihood=likelihood, train=QUICK).fit(holes)
        assert np.isfinite(model.embed(holes)).all()
        assert np.isfinite(model.elbo(holes)["elbo"]).all()


def test_a_new_process_loads_the_same_embedding(cells, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    code = f"""
import celbo, numpy, torch
torch.set_num_threads(1)
numpy.save(r"{tmp_path}/z.npy", celbo.load(r"{tmp_path}/model").embed(r"{tmp_path}/cells.h5ad"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), fitted.embed(cells))


def test_history_and_reference_come_back_and_the_reference_can_be_left_out(fitted, tmp_path):
    fitted.save(tmp_path / "with")
    fitted.save(tmp_path / "without", keep_reference=False)
    loaded = celbo.load(tmp_path / "with")
    assert loaded.history_ == fitted.history_
    for found, expected in zip(loaded.reference_, fitted.reference_, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert fitted.reference_.held_out.sum() == 30
    assert celbo.load(tmp_path / "without").reference_ is None


def test_a_folder_with_more_tensors_in_its_reference_is_read(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    folder = checkpoint.read_folder(tmp_path / "model")
    more = {**folder.reference, "log_p": np.zeros(300, np.float32)}
    checkpoint.write_folder(tmp_path / "model", folder.document, folder.weights, more)
    assert celbo.load(tmp_path / "model").reference_.mu_z.shape == (300, 4)


def forged(change_document=lambda document: None, change_weights=lambda weights: None):
    def write(path, model):
        model.save(path)
        folder = checkpoint.read_folder(path)
        change_document(folder.document)
        change_weights(folder.weights)
        checkpoint.write_folder(path, folder.document, folder.weights, folder.reference)

    return write


FORGERIES = {
    "absurd width": forged(lambda document: document["options"].update(hidden_dims=[10**12])),
    "negative width": forged(lambda document: document["options"].update(latent_dim=-3)),
    "text for a width": forged(lambda document: document["options"].update(latent_dim="many")),
    "unknown option": forged(lambda document: document["options"].update(run="rm")),
    "unknown likelihood": forged(lambda document: document["options"].update(likelihood="__import__")),
    "missing option": forged(lambda document: document.pop("options")),
    "genes that are numbers": forged(lambda document: document["schema"].update(genes=[1] * 60)),
    "fewer genes": forged(lambda document: document["schema"]["genes"].pop()),
    "sd of zero": forged(lambda document: document["schema"].update(library_scale="1")),
    "another shape": forged(change_weights=lambda w: w.update({"fc_mu.bias": np.zeros(7, np.float32)})),
    "another type": forged(change_weights=lambda w: w.update({"fc_mu.bias": np.zeros(4, np.float64)})),
    "a missing tensor": forged(change_weights=lambda w: w.pop("fc_mu.bias")),
    "one tensor more": forged(change_weights=lambda w: w.update(extra=np.zeros(2, np.float32))),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_whole_folder_that_describes_no_model_is_refused(fitted, tmp_path, forgery):
    FORGERIES[forgery](tmp_path / "model", fitted)
    with pytest.raises(ModelFileError, match="save the model again"):
        celbo.load(tmp_path / "model")


def test_the_reference_fits_the_model_it_comes_with(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    folder = checkpoint.read_folder(tmp_path / "model")
    folder.reference["mu_z"] = folder.reference["mu_z"][:, :2].copy()
    checkpoint.write_folder(tmp_path / "model", folder.document, folder.weights, folder.reference)
    with pytest.raises(ModelFileError, match="reference"):
        celbo.load(tmp_path / "model")


def test_weights_of_the_wrong_kind_never_become_a_model(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "weights.safetensors")
    (tmp_path / "model" / "weights.safetensors").write_bytes(safetensors.numpy.save({**tensors, "x": np.ones(1)}))
    with pytest.raises(ModelFileError, match="bytes"):
        celbo.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "conditions"),
    [("pbmc_3tech", ["batch"]), ("zeisel_1464", []), ("kang_ifnb", ["condition"]), ("yeast_bulk48", [])],
)
def test_real_counts_are_fitted(real_data, name, conditions):
    cells = real_data(name)[:200]
    model = ExpressionVAE(conditions=conditions if name != "kang_ifnb" else [], train=QUICK).fit(cells)
    records = model.history_
    assert records[-1].validation_elbo > records[0].validation_elbo
    assert np.isfinite(model.embed(cells)).all()


def test_an_autoencoder_may_keep_any_epoch(cells):
    config = TrainConfig(max_epochs=12, warmup_fraction=0.5, patience=2, learning_rate=0.03)
    model = ExpressionVAE(objective="autoencoder", dropout=0.0, train=config).fit(cells)
    assert all(epoch.kl_weight == 1 for epoch in model.history_)


def test_threads_are_given_back(cells):
    before = torch.get_num_threads()
    ExpressionVAE(train=TrainConfig(max_epochs=1, threads=before + 1)).fit(cells)
    assert torch.get_num_threads() == before


def test_a_number_of_genes_may_be_numpys(cells, tmp_path):
    model = ExpressionVAE(n_top_genes=np.int64(20), train=QUICK).fit(cells)
    model.save(tmp_path / "model")
    assert celbo.load(tmp_path / "model").n_top_genes == 20


def test_letting_estimated_counts_through_is_for_likelihoods_of_counts(cells):
    with pytest.raises(DataError, match=r"allow_noninteger .* Leave it out"):
        ExpressionVAE(likelihood="gaussian", allow_noninteger=True).fit(cells)


def test_log_normalised_cells_that_lack_abundant_genes_stay_where_they_are():
    cells = celbo.simulate_cells(n_cells=600, n_genes=100, n_types=3, median_library=2000, seed=1)
    train = TrainConfig(max_epochs=30, seed=0)
    model = ExpressionVAE(likelihood="gaussian", latent_dim=3, hidden_dims=(32,), train=train).fit(cells)
    whole = model.embed(cells)
    abundant = np.argsort(-np.asarray(cells.X.sum(0)).ravel())[3:13]
    query = cells[:, np.delete(np.arange(100), abundant)].copy()
    assert 0.6 * cells.X.sum() < query.X.sum() < 0.85 * cells.X.sum()
    with pytest.warns(UserWarning, match="fills them in"):
        lacking = model.embed(query)
    apart = np.sqrt(((lacking - whole) ** 2).sum(1).mean())
    spread = np.sqrt(((whole - whole.mean(0)) ** 2).sum(1).mean())
    assert apart < 0.5 * spread, (apart, spread)  # .55 where the counts that were not measured are left out of account


def test_expected_expression_over_levels_is_the_mean_of_each(cells, fitted):
    each = [fitted.expected_expression(cells, given={"batch": level}) for level in fitted.schema_.conditions[0].levels]
    np.testing.assert_allclose(fitted.expected_expression(cells, over=["batch"]), np.mean(each, axis=0), rtol=1e-5)
    for wrong in (["nothing"], "batch"):
        with pytest.raises(celbo.UsageError, match=r"over is the text|categorical conditions that are not given"):
            fitted.expected_expression(cells, over=wrong)
    with pytest.raises(celbo.UsageError, match="categorical conditions that are not given"):
        fitted.expected_expression(cells, given={"batch": "batch_0"}, over=["batch"])
    with pytest.raises(celbo.UsageError, match="give each condition its value"):
        fitted.expected_expression(cells, given=["batch"])


def test_warnings_name_the_callers_line(cells):
    odd = cells[:40].copy()
    odd.obs["batch"] = "only"
    train = celbo.TrainConfig(max_epochs=1)
    with pytest.warns(UserWarning, match="'batch' is 'only'") as said:
        celbo.ExpressionVAE(conditions=["batch"], n_top_genes=20, train=train).fit(odd)
    assert {str(warning.filename) for warning in said} == {__file__}


def test_a_model_shows_what_differs_from_the_defaults_and_whether_it_is_fitted(cells, fitted, tmp_path):
    plain = ExpressionVAE()
    assert repr(plain) == "ExpressionVAE(not fitted)"
    options = "latent_dim=4, hidden_dims=(16,), conditions=['batch'], train=TrainConfig(max_epochs=4)"
    assert repr(fitted) == f"ExpressionVAE({options}; fitted: 300 cells x 60 genes, 4 epochs)"
    fitted.save(tmp_path / "model")
    loaded = repr(celbo.load(tmp_path / "model"))
    assert loaded == f"ExpressionVAE({options.replace('(16,)', '[16]')}; fitted: 60 genes, 4 epochs)"
    assert repr(fitted.history_).startswith("History(4 epochs, held-out ELBO -")
    assert repr(fitted.split_) == "Split(270 training cells, 30 held out)"
    assert repr(fitted.schema_) == "Schema(60 genes, batch (2 levels); counts of X)"
    html = ExpressionVAE(conditions=["<batch>"])._repr_html_()
    assert html.startswith("<table><caption>ExpressionVAE (not fitted)</caption>")
    assert "&lt;batch&gt;" in html
    assert "<batch>" not in html


def test_scikit_learns_manners(cells, fitted):
    copied = clone(fitted)
    assert copied.get_params() == fitted.get_params()
    assert repr(copied).endswith("; not fitted)")
    assert copied.set_params(latent_dim=7, prior="vamp:5") is copied
    assert (copied.latent_dim, copied.prior, fitted.latent_dim) == (7, "vamp:5", 4)
    with pytest.raises(UsageError, match="ExpressionVAE has no option 'latent_dims'; celbo calls it latent_dim"):
        copied.set_params(latent_dims=3)
    copied.set_params(latent_dim=4, prior="normal").fit(cells)
    np.testing.assert_array_equal(copied.embed(cells), fitted.embed(cells))


def test_a_fit_that_is_interrupted_leaves_the_model_as_it_was(cells):
    model = ExpressionVAE(latent_dim=2, train=QUICK).fit(cells)
    before = model.embed(cells)

    def stop(minibatches, plan, history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(cells, track=stop)
    np.testing.assert_array_equal(model.embed(cells), before)
    with pytest.raises(KeyboardInterrupt):
        (new := ExpressionVAE()).fit(cells, track=stop)
    assert repr(new) == "ExpressionVAE(not fitted)"


def test_cells_that_were_prepared_once_give_the_same_fits_and_answers(cells, fitted):
    prepared = fitted.prepare(cells)
    again = clone(fitted).fit(prepared)

    def embed(model):
        return posterior(model.fitted_, prepared.seen_by(model.fitted_))[0]

    np.testing.assert_array_equal(embed(again), fitted.embed(cells))
    other = ExpressionVAE(latent_dim=2, hidden_dims=(8,), conditions=["batch"], train=QUICK).fit(prepared)
    assert embed(other).shape == (300, 2)
    np.testing.assert_array_equal(embed(again), fitted.embed(cells))
    z = embed(again)
    z -= 100  # it is the caller's own
    np.testing.assert_array_equal(embed(again), fitted.embed(cells))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"conditions": ["treatment"]}, "conditions"),
        ({"conditions": ["batch"], "n_top_genes": 20}, "n_top_genes"),
        ({"conditions": ["batch"], "likelihood": "gaussian"}, "likelihood"),
        ({"conditions": ["batch"], "labels": "cell_type"}, "labels"),
    ],
)
def test_cells_prepared_for_other_options_are_refused(cells, fitted, options, name):
    prepared = fitted.prepare(cells)
    with pytest.raises(UsageError, match=rf"prepared for a model with other options \(.*{name}"):
        ExpressionVAE(**options, train=QUICK).fit(prepared)


def test_cells_opened_for_a_question_are_not_fitted_to(cells, fitted):
    with pytest.raises(UsageError, match="opened for a question"):
        clone(fitted).fit(open_cells(fitted.fitted_, cells[:, :50]))


@pytest.mark.parametrize("name", ["conditions", "nuisance", "interactions", "remedies"])
@pytest.mark.parametrize("value", [None, {"free_bits": 1}, 3])
def test_options_that_are_not_lists_of_names_are_refused(cells, name, value):
    for ask in ("fit", "check", "prepare"):
        with pytest.raises(celbo.UsageError, match=f"{name}=.*give a list of names"):
            getattr(ExpressionVAE(**{name: value}), ask)(cells)


def test_a_history_without_a_good_step_is_saved_and_loaded(cells, fitted, tmp_path):
    model = clone(fitted).fit(cells)
    nan = float("nan")
    record = dataclasses.replace(model.history_[0], train_elbo=nan, kl_per_dim=(nan,) * 4)
    model.fitted_ = dataclasses.replace(model.fitted_, history=[record])
    model.save(tmp_path / "model")
    (loaded,) = celbo.load(tmp_path / "model").history_
    assert loaded.train_elbo is None
    assert np.isnan(loaded.kl_per_dim).all()


def test_options_that_are_changed_after_the_fit_do_not_reach_the_files(cells, fitted, tmp_path):
    model = clone(fitted).fit(cells)
    model.set_params(latent_dim=9, objective="autoencoder", nuisance=["treatment"], train=None)
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.latent_dim == 4
    for saved, own in zip(loaded.posterior(cells), fitted.posterior(cells), strict=True):
        np.testing.assert_array_equal(saved, own)


def test_numbers_of_numpy_and_arrays_are_options_too(cells, tmp_path):
    model = ExpressionVAE(
        latent_dim=np.int64(3), hidden_dims=np.array([8]), dropout=np.float32(0.1), conditions=pd.Index(["batch"]),
        encode_context=np.True_, train=QUICK,
    )  # fmt: skip
    model.fit(cells).save(tmp_path / "model")
    assert "fitted: 300 cells" in repr(model)
    np.testing.assert_array_equal(celbo.load(tmp_path / "model").embed(cells), model.embed(cells))


@pytest.mark.parametrize("options", [{"prior": None}, {"prior": {}}, {"dropout": None}, {"dropout": "a"}])
def test_options_of_another_type_are_refused(cells, options):
    with pytest.raises(UsageError, match=f"{next(iter(options))}.*(give the name|is the share)"):
        ExpressionVAE(**options, train=QUICK).fit(cells)


def test_prepared_cells_are_for_fit_alone(cells, fitted):
    with pytest.raises(UsageError, match="for fit alone; give the AnnData"):
        fitted.embed(fitted.prepare(cells))
