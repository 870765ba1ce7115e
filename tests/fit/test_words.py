"""Options and methods that celbo does not have: the message says celbo's word. Signatures stay what they are."""

import copy
import inspect
import pickle
import re
from dataclasses import fields

import pandas as pd
import pytest
from sklearn.base import clone

import celbo
from celbo import ExpressionVAE, TrainConfig, UsageError
from celbo.fit import words


def of_class(cls):
    return {option.name for option in fields(cls) if option.init}


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("n_latent", "calls it latent_dim."),
        ("n_hidden", r"hidden_dims=\[128, 128\]"),
        ("n_layers", r"hidden_dims=\[128, 128\]"),
        ("gene_likelihood", "calls it likelihood"),
        ("dropout_rate", "calls it dropout"),
        ("batch_key", "calls it nuisance"),
        ("labels_key", "calls it labels"),
        ("max_epochs", r"train=celbo.TrainConfig\(max_epochs=...\)"),
        ("n_epochs", r"train=celbo.TrainConfig\(max_epochs=...\)"),
        ("lr", r"train=celbo.TrainConfig\(learning_rate=...\)"),
        ("random_state", r"train=celbo.TrainConfig\(seed=...\)"),
        ("latent_dims", "latent_dim"),
        ("hiden_dims", r"did you mean 'hidden_dims'\?$"),
        ("nothing_like_it", "it has 'latent_dim', 'hidden_dims'"),
    ],
)
def test_an_option_of_another_tool_is_refused_with_the_name_in_celbo(foreign, ours):
    for refused in (lambda: ExpressionVAE(**{foreign: 10}), lambda: ExpressionVAE().set_params(**{foreign: 10})):
        with pytest.raises(UsageError, match=ours) as error:
            refused()
        assert f"ExpressionVAE has no option '{foreign}'" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"lr": 0.1}, "TrainConfig has no option 'lr'; celbo calls it learning_rate"),
        ({"early_stopping_patience": 3}, "calls it patience"),
        ({"early_stopping": True}, "calls it patience: patience=10, epochs without a better held-out ELBO"),
        ({"max_epoch": 3}, "calls it max_epochs"),
        ({"n_latent": 3}, r"celbo.ExpressionVAE\(latent_dim=...\)"),
        ({"sed": 3}, "did you mean 'seed'"),
    ],
)
def test_so_it_is_with_options_of_the_training(options, ours):
    with pytest.raises(UsageError, match=ours):
        TrainConfig(**options)


def test_all_unknown_options_are_named_at_once():
    with pytest.raises(UsageError, match=r"'n_latent'; .*'batch_key'; .*'foo'; it has"):
        ExpressionVAE(n_latent=10, batch_key="batch", foo=1)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda m, a: m.counterfactual(a, batch="batch_0"), r"'batch' is a condition of this model: given=\{'batch':"),
        (lambda m, a: m.counterfactual(a, treatment="treated"), r"celbo calls it given: \{'treatment': 'treated'\}"),
        (lambda m, a: m.counterfactual(a), r"counterfactual needs given: give the conditions to change"),
        (lambda m, a: m.sample(5, batch="batch_0"), r"conditions=\{'batch': \.\.\.\}"),
        (lambda m, a: m.sample(5, given={}), "celbo calls it conditions"),
        (lambda m, a: m.sample(), r"sample needs n: give the number of cells to draw, as sample\(1000\)"),
        (
            lambda m, a: m.differential_expression(groupby="cell_type", group1="type_0", group2="type_1"),
            "calls it group; .*calls it reference; .*needs adata: give cells",
        ),
        (lambda m, a: m.differential_expression(a, "cell_type"), "without a name.*groupby=..., group=..."),
        (lambda m, a: m.differential_expression(a), "needs groupby: give a column of obs"),
        (lambda m, a: m.expected_expression(a, library_size=1), "calls it library"),
        (lambda m, a: m.expected_expression(a, transform_batch="b"), r"calls it given: {'treatment': 'treated'}"),
        (lambda m, a: m.fit(a, batch="b"), r"calls it nuisance.*celbo.ExpressionVAE\(nuisance=\[...\]\)"),
        (lambda m, a: m.fit(a, max_epochs=3), r"train=celbo.TrainConfig\(max_epochs=...\)"),
        (lambda m, a: m.fit(), "fit needs adata: give cells, as an AnnData or the path"),
        (lambda m, a: m.embed(a, genes_presnt=0.5), r"did you mean 'genes_present'\?"),
        (lambda m, a: m.train(max_epochs=3), r"fit\(adata\) trains"),
        (lambda m, a: ExpressionVAE(a), r"by name only, as ExpressionVAE\(latent_dim=...\); cells are for fit"),
    ],
)
def test_a_call_with_other_arguments_is_explained_in_a_line(cells, fitted, ask, says):
    before = fitted.fitted_
    with pytest.raises(UsageError, match=says) as error:
        ask(fitted, cells)
    assert "\n" not in str(error.value)
    assert fitted.fitted_ is before


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda m, a: m.fit("nothing.h5ad"), "nothing.h5ad does not exist; give an .h5ad file"),
        (lambda m, a: m.embed(a.X), "found a csr_matrix. Give the AnnData itself"),
        (lambda m, a: m.fit(a.X), "found a csr_matrix. Give the AnnData itself"),
        (lambda m, a: m.fit(a.X.toarray()), "found a ndarray"),
        (lambda m, a: m.fit(pd.DataFrame(a.X.toarray())), r"found a DataFrame.*anndata.AnnData\(counts\) makes one"),
        (lambda m, a: celbo.load("counts.h5ad"), r"name the folder that .*Cells are given to the model: fit\(path\)"),
        (lambda m, a: celbo.load(a), "a model is read from the path of its folder; found a AnnData"),
        (lambda m, a: celbo.load(m), "found a ExpressionVAE"),
    ],
)
def test_cells_in_a_wrong_place_are_explained_in_a_line(cells, fitted, ask, says):
    before = fitted.fitted_
    with pytest.raises(celbo.CelboError, match=says) as error:
        ask(fitted, cells)
    assert "\n" not in str(error.value)
    assert fitted.fitted_ is before


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_cells_that_exist_are_no_model(cells, tmp_path, suffix):
    path = tmp_path / f"counts{suffix}"
    cells.write_h5ad(path) if suffix == ".h5ad" else cells.write_zarr(path)
    with pytest.raises(celbo.ModelFileError, match=r"Cells are given to the model: fit\(path\), embed\(path\)"):
        celbo.load(path)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("get_latent_representation", r"embed\(adata\)"),
        ("get_normalized_expression", r"expected_expression\(adata\)"),
        ("setup_anndata", r"ExpressionVAE\(nuisance=\[...\]"),
        ("get_elbo", r"elbo\(adata\)"),
        ("get_likelihood_parameters", r"vae_.likelihood"),
        ("transform", r"embed\(adata\)"),
        ("fit_transform", r"fit\(adata\).embed\(adata\)"),
        ("history", "history_"),
        ("embedd", "did you mean 'embed'"),
        ("nothing_like_it", "has no attribute 'nothing_like_it'$"),
        ("_repr_mimebundle_", "has no attribute '_repr_mimebundle_'$"),
    ],
)
def test_a_method_of_another_tool_is_named_as_celbo_names_it(fitted, foreign, ours):
    for model in (fitted, ExpressionVAE(), ExpressionVAE):
        assert not hasattr(model, foreign)
        with pytest.raises(AttributeError, match=ours):
            getattr(model, foreign)


def test_every_word_of_the_tables_is_one_of_celbo():
    questions = [function for name, function in vars(ExpressionVAE).items() if inspect.isfunction(function)]
    asked = {name for question in questions for name in inspect.signature(question).parameters}
    assert set(words._MODEL) == of_class(ExpressionVAE)
    assert set(words._TRAIN) == of_class(TrainConfig)
    assert set(words._QUESTION) <= asked
    assert set(words._AS) <= of_class(ExpressionVAE) | of_class(TrainConfig) | asked
    for table, own in ((words._MODEL, of_class(ExpressionVAE)), (words._TRAIN, of_class(TrainConfig))):
        assert not own.intersection(words._words(table)), "a word of another tool that is an option of celbo"
    for call in words._ATTRIBUTES:
        assert call.partition("(")[0] in {*dir(ExpressionVAE), "vae_", "history_", "fitted_"}
    assert set(words._MODULE) <= set(celbo.__all__)


def test_signatures_are_those_of_the_options():
    assert list(inspect.signature(ExpressionVAE).parameters) == [option.name for option in fields(ExpressionVAE)][:-1]
    assert inspect.signature(ExpressionVAE).parameters["latent_dim"].default == 10
    assert set(inspect.signature(TrainConfig).parameters) == of_class(TrainConfig)
    assert list(inspect.signature(ExpressionVAE.counterfactual).parameters)[:3] == ["self", "adata", "given"]
    assert ExpressionVAE.counterfactual.__doc__.startswith("Predict what")
    assert "latent_dim: int = 10" in str(inspect.signature(ExpressionVAE))


def test_models_are_cloned_copied_and_pickled_as_before(cells, fitted):
    model = ExpressionVAE(latent_dim=3, conditions=["batch"], train=TrainConfig(seed=3))
    assert clone(model).get_params() == model.get_params()
    for other in (copy.copy(fitted), copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert repr(other) == repr(fitted)
        assert (other.embed(cells) == fitted.embed(cells)).all()
    assert pickle.loads(pickle.dumps(model.train)) == copy.deepcopy(model.train) == model.train


@pytest.mark.parametrize(
    ("command", "option", "ours"),
    [
        ("fit", "--batch-key", "--nuisance"),
        ("fit", "--n-latent", "--latent-dim"),
        ("fit", "--n-latent=3", "--latent-dim"),
        ("fit", "--max-epochs", "--epochs"),
        ("fit", "--conditions", "--condition"),
        ("fit", "--lr", "--learning-rate"),
        ("counterfactual", "--given", "--set"),
        ("sample", "--conditions", "--given"),
        ("de", "--group1", "--group"),
    ],
)
def test_the_command_line_says_its_own_name_of_an_option(celbo_command, command, option, ours):
    done = celbo_command(command, "nothing.h5ad", option, "batch", "-o", "nowhere")
    assert done.returncode == UsageError.exit_code
    assert done.stderr == (
        f"error: celbo {command} has no option {option.partition('=')[0]}; celbo calls it {ours} (celbo {command} "
        "--help).\n"
    )


@pytest.mark.parametrize(("option", "says"), [("--batchsize", "--batch-size"), ("--zzz", "No such option: --zzz")])
def test_other_unknown_options_get_the_nearest_name(celbo_command, option, says):
    done = celbo_command("fit", "nothing.h5ad", option, "3", "-o", "nowhere")
    assert done.returncode == UsageError.exit_code
    assert says in done.stderr


def test_values_are_not_taken_for_options(celbo_command):
    assert "does not exist" in celbo_command("fit", "-o", "nowhere", "--layer=--n-latent", "--", "nothing").stderr
    assert "does not exist" in celbo_command("fit", "-o", "nowhere", "--", "--n-latent").stderr


def test_so_does_a_config_file(celbo_command, tmp_path):
    (tmp_path / "run.toml").write_text("n_latent = 3\n[train]\nlr = 0.1\n")
    (tmp_path / "cells.h5ad").write_bytes(b"")
    options = ["-o", tmp_path / "run", "--config", tmp_path / "run.toml"]
    done = celbo_command("fit", tmp_path / "cells.h5ad", *options)
    assert done.returncode == UsageError.exit_code
    assert "'n_latent' (did you mean 'latent_dim'?)" in done.stderr
    assert "'train.lr' (did you mean 'learning_rate'?)" in done.stderr


@pytest.mark.parametrize(
    ("foreign", "says"),
    [
        ("SCVI", "celbo calls it ExpressionVAE"),
        ("SCANVI", "celbo calls it ExpressionVAE, with labels="),
        ("setup_anndata", "there is no set-up: name columns of obs when you make the model"),
        ("settings", "train=celbo.TrainConfig"),
        ("read_h5ad", "anndata.read_h5ad"),
        ("ExpresionVAE", "did you mean 'ExpressionVAE'?"),
        ("zzz", "it has LIKELIHOODS, REMEDIES"),
    ],
)
def test_a_name_of_another_package_is_explained(foreign, says):
    with pytest.raises(AttributeError, match=f"module 'celbo' has no attribute '{foreign}'; .*{re.escape(says)}"):
        getattr(celbo, foreign)


@pytest.mark.parametrize(
    ("call", "option", "says"),
    [
        ("save", "overwrite", "it replaces a model that is there already"),
        ("save", "save_anndata", "it writes the model without cells"),
        ("embed", "give_mean", "posterior"),
        ("expected_expression", "gene_list", "all genes of the model"),
    ],
)
def test_an_option_that_celbo_does_not_need_is_explained(fitted, tmp_path, call, option, says):
    with pytest.raises(UsageError, match=rf"{call} has no option '{option}'; .*{says}"):
        getattr(fitted, call)(tmp_path / "model", **{option: True})


@pytest.mark.parametrize("second", [["--groupby", "b"], ["--groupby=b"], ["--layer", "x"]])
def test_a_second_value_of_an_option_is_refused(celbo_command, tmp_path, second):
    """The last value would be taken, and the first dropped without a word."""
    done = celbo_command("check", tmp_path / "cells.h5ad", "--groupby", "a", "--layer", "y", *second)
    assert done.returncode == UsageError.exit_code
    assert re.search(r"celbo check takes --(groupby|layer) once, and it is given 2 times", done.stderr)


def test_options_that_take_several_values_and_switches_may_recur(celbo_command, tmp_path):
    options = ["--condition", "a", "--condition", "b", "--nuisance", "c", "--nuisance", "d", "--on-disk", "--on-disk"]
    assert "cells.h5ad does not exist" in celbo_command("check", tmp_path / "cells.h5ad", *options).stdout
