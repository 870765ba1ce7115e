"""Words of other tools and what celbo calls them, for messages about options and attributes that do not exist."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from celbo.errors import UsageError, listed

__all__ = ["Hinted", "celbo_words", "explained", "no_attribute", "no_option", "no_public_name", "sentence"]

_MODEL = {
    "latent_dim": "n_latent n_latents latent_size latent_dims z_dim n_dims n_dimensions n_components",
    "hidden_dims": "n_hidden n_layers hidden_dim hidden_size hidden_sizes hidden_layers hidden_layer_sizes layer_sizes",
    "likelihood": "gene_likelihood distribution recon_loss reconstruction_loss loss",
    "conditions": "condition condition_key condition_keys treatment treatment_key perturbation_key",
    "nuisance": "batch batch_key batch_keys batches nuisances covariates categorical_covariate_keys "
    "continuous_covariate_keys",
    "labels": "label label_key labels_key cell_type_key",
    "unlabelled": "unlabeled unlabeled_category unlabelled_category unknown_label",
    "size_factor": "size_factor_key size_factors",
    "layer": "layer_key counts_layer",
    "n_top_genes": "n_hvg n_hvgs n_genes n_top n_highly_variable",
    "dropout": "dropout_rate dropout_p",
    "norm": "use_batch_norm use_layer_norm batch_norm layer_norm",
    "encode_context": "encode_covariates",
    "prior": "latent_distribution",
    "remedies": "remedy beta kl_weight",
    **dict.fromkeys(
        [
            "allow_noninteger",
            "features",
            "mask_absent",
            "dispersion",
            "objective",
            "decoder_dims",
            "interactions",
            "embedding_dim",
        ],
        "",
    ),
    "train": "train_config plan_kwargs trainer_kwargs plan_config trainer_config",
}
_TRAIN = {
    "max_epochs": "epochs epoch n_epochs num_epochs max_epoch",
    "learning_rate": "lr learn_rate step_size",
    "patience": "early_stopping early_stopping_patience",
    "validation_fraction": "validation_size validation_split val_size test_size train_size",
    "warmup_fraction": "warmup n_epochs_kl_warmup n_steps_kl_warmup kl_warmup",
    "gradient_clip": "gradient_clip_val clip_norm max_norm",
    "batch_size": "minibatch_size",
    "seed": "random_state random_seed",
    "device": "use_gpu use_cuda gpu cuda accelerator devices",
    "threads": "n_jobs n_threads num_threads num_workers",
}
_MODULE = {
    "ExpressionVAE": "models SCVI LinearSCVI CVAE",
    "simulate_cells": "synthetic_iid simulate",
    "pseudobulk": "get_pseudobulk",
    "LIKELIHOODS": "distributions likelihoods",
    "check_realism": "criticism PosteriorPredictiveCheck ppc",
    "choose": "autotune",
}
"""Public names of celbo: those of other tools."""
_QUESTION = {
    "adata": "data cells anndata x",
    "given": "condition conditions treatment transform_batch",
    "conditions": "given",
    "group": "group1 groups test_group",
    "reference": "group2 ref_group control",
    "groupby": "group_by groupby_key",
    "pair_by": "pairby pair paired_by",
    "least_change": "delta lfc_threshold logfc_threshold",
    "over": "batch_correction",
    "library": "library_size",
    "n": "n_cells n_obs size",
    "path": "dir_path filename",
}
"""celbo's options, of `celbo.ExpressionVAE`, of `celbo.TrainConfig` and of the questions: the words of other tools."""

_AS = {
    "hidden_dims": ("hidden_dims=[128, 128]", "a width for each layer"),
    "conditions": ("conditions=[...]", "names of columns of obs"),
    "nuisance": ("nuisance=[...]", "names of columns of obs"),
    "labels": ("labels=...", "the name of a column of obs"),
    "norm": ("norm='layer'", "or 'batch' or 'none'"),
    "patience": (
        "patience=10",
        "epochs without a better held-out ELBO; then the learning rate falls, and after two falls training stops",
    ),
    "train": ("train=celbo.TrainConfig(...)", "options of the training, when you make the model"),
    "remedies": ("remedies=['beta:0.5']", "names in celbo.REMEDIES"),
    "validation_fraction": ("validation_fraction=0.1", "the share of cells to hold out"),
    "warmup_fraction": ("warmup_fraction=0.25", "a share of the training"),
    "given": ("{'treatment': 'treated'}", "a value for each condition"),
    "over": ("over=[...]", "conditions over whose levels to take the mean"),
    "groupby": ("groupby=...", "a column of obs, or a group for each cell"),
}
"""How an option is written, and what that means, where its name does not say it."""

_NEEDED = {
    "adata": "give cells, as an AnnData or the path of an .h5ad file or .zarr folder",
    "given": "give the conditions to change, as given={'treatment': 'treated'}",
    "n": "give the number of cells to draw, as sample(1000)",
    "groupby": "give a column of obs, or a group for each cell",
    "path": "give the folder to write to",
    "start": "give the cells to start from",
    "end": "give the cells to end at",
}
"""Arguments without a default."""

_ATTRIBUTES = {
    "embed(adata)": "get_latent_representation transform encode get_latent encode_cells",
    "expected_expression(adata)": "get_normalized_expression get_denoised_samples decode reconstruct impute "
    "inverse_transform",
    "fit(adata)": "train fit_model",
    "fit(adata).embed(adata)": "fit_transform",
    "elbo(adata)": "get_elbo get_reconstruction_error score_samples",
    "log_prob(adata)": "get_marginal_ll score",
    "outliers(adata)": "get_outliers is_outlier",
    "predict(adata)": "predict_proba classify",
    "map_query(adata)": "load_query_data map_query_data partial_fit",
    "sample(n)": "posterior_predictive_sample generate",
    "counterfactual(adata, given={...})": "predict_counterfactual perturb",
    "differential_expression(adata, groupby=...)": "differential de rank_genes_groups",
    "vae_": "module",
    "history_": "history",
    "fitted_": "is_trained is_trained_ is_fitted",
}
"""What a model of celbo offers for the methods and attributes of other tools."""
_SENTENCES = {
    "setup_anndata": "there is no set-up: name columns of obs when you make the model, as "
    "ExpressionVAE(nuisance=[...], conditions=[...], layer=...), then call fit(adata)",
    "get_likelihood_parameters": "expected_expression(adata) gives the means, and vae_.likelihood the distribution",
    "load": "celbo.load(path) reads a model",
    "to_device": "the device is an option of the training: train=celbo.TrainConfig(device=...)",
}
_OPTIONS_OF_CALLS = {
    ("save", "overwrite"): "it replaces a model that is there already",
    ("save", "save_anndata"): "it writes the model without cells; adata.write_h5ad(path) writes cells",
    ("embed", "give_mean"): "it returns the means; posterior(adata) returns means and log-variances",
    ("expected_expression", "gene_list"): "it returns all genes of the model, in the order of schema_.genes",
    ("expected_expression", "n_samples"): "it decodes the mean of z, and draws no samples",
    ("expected_expression", "return_mean"): "it decodes the mean of z, and draws no samples",
}
"""Answers about options of other tools that celbo does not need."""
_SENTENCES_OF_MODULE = {
    "SCANVI": "celbo calls it ExpressionVAE, with labels='...', the name of a column of obs",
    "setup_anndata": _SENTENCES["setup_anndata"],
    "settings": "a seed is an option: train=celbo.TrainConfig(seed=...), and seed=... of a question",
    "read_h5ad": "read cells with anndata.read_h5ad, or give their path",
}

Class = TypeVar("Class", bound=type)


def _words(table: Mapping[str, str]) -> dict[str, list[str]]:
    """Turn a table from celbo's words to other words around."""
    words: dict[str, list[str]] = {}
    for ours, others in table.items():
        for other in others.split():
            words.setdefault(other, []).append(ours)
    return words


def celbo_words(name: str) -> list[str]:
    """Return what celbo calls an option of another tool; a name that celbo has comes first.

    Examples
    --------
    >>> celbo_words("n_latent"), celbo_words("latent_dim")
    (['latent_dim'], ['latent_dim'])
    """
    own = [name] if any(name in table for table in (_MODEL, _TRAIN, _QUESTION)) else []
    return [*own, *(word for table in (_MODEL, _TRAIN, _QUESTION) for word in _words(table).get(name, ()))]


def no_option(call: str, name: str, known: Collection[str], conditions: Iterable[str] = ()) -> str:
    """Say that a call has no option of this name, and which one is meant.

    Parameters
    ----------
    call
        Name of the class or method.
    name
        The name that was given.
    known
        Names of its options.
    conditions
        Conditions of the model that is asked.

    Examples
    --------
    >>> no_option("ExpressionVAE", "n_latent", ["latent_dim", "hidden_dims"])
    "ExpressionVAE has no option 'n_latent'; celbo calls it latent_dim"
    """
    no, words = f"{call} has no option {name!r}", celbo_words(name)
    if name in conditions and (option := next((word for word in ("given", "conditions") if word in known), None)):
        return f"{no}; {name!r} is a condition of this model: {option}={{{name!r}: ...}}"
    if here := [word for word in words if word in known]:
        is_question = "nuisance" not in known  # whose conditions have values
        example = _AS.get("given" if here[0] == "conditions" and is_question else here[0], ())
        return f"{no}; celbo calls it {here[0]}{': ' * bool(example)}{', '.join(example)}"
    if (call, name) in _OPTIONS_OF_CALLS:
        return f"{no}; {_OPTIONS_OF_CALLS[call, name]}"
    for word in words:
        its = "it" if name == word else f"celbo calls it {word}, which"
        written = _AS.get(word, (f"{word}=...",))[0]
        if word in _TRAIN:
            return f"{no}; {its} is an option of the training: train=celbo.TrainConfig({written})"
        if word in _MODEL:
            return f"{no}; {its} is an option of the model: celbo.ExpressionVAE({written})"
    if close := difflib.get_close_matches(name, known, 1):
        return f"{no}; did you mean {close[0]!r}?"
    return f"{no}; it has {listed(known, 40)}"


def sentence(text: str) -> str:
    """End a text with a full stop, unless it is a question."""
    return text if text.endswith("?") else f"{text}."


def no_attribute(cls: type, name: str) -> str:
    """Say that a model has no attribute of this name, and which one is meant."""
    no = f"{cls.__name__} has no attribute {name!r}"
    if name.startswith("_"):
        return no
    if name in _SENTENCES:
        return f"{no}; {_SENTENCES[name]}."
    if words := _words(_ATTRIBUTES).get(name):
        return f"{no}; celbo calls it {words[0]}."
    close = difflib.get_close_matches(name, [known for known in dir(cls) if not known.startswith("_")], 1)
    return f"{no}; did you mean {close[0]!r}?" if close else no


def no_public_name(name: str, known: Collection[str]) -> str:
    """Say that celbo has no public name like this, and which one is meant.

    Examples
    --------
    >>> no_public_name("SCVI", ["ExpressionVAE"])
    "module 'celbo' has no attribute 'SCVI'; celbo calls it ExpressionVAE."
    """
    no = f"module 'celbo' has no attribute {name!r}"
    if name in _SENTENCES_OF_MODULE:
        return f"{no}; {_SENTENCES_OF_MODULE[name]}."
    if words := _words(_MODULE).get(name):
        return f"{no}; celbo calls it {words[0]}."
    if close := difflib.get_close_matches(name, known, 1):
        return f"{no}; did you mean {close[0]!r}?"
    return f"{no}; it has {', '.join(known)}."


class Hinted(type):
    """Class of a class that says which attribute is meant by one that it does not have."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(no_attribute(cls, name))


def explained(cls: Class) -> Class:
    """Make a class, and its public methods, refuse arguments that they do not have with a `UsageError` that helps.

    Signatures stay what they are.
    """
    for name, function in list(vars(cls).items()):
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            setattr(cls, name, _with_explanations(function, cls.__name__ if name == "__init__" else name))
    return cls


def _with_explanations(function: Callable[..., Any], call: str) -> Callable[..., Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]  # without self

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        if fault := _fault(self, call, parameters, args, options):
            raise UsageError(sentence(fault))
        return function(self, *args, **options)

    return checked


def _fault(
    model: Any, call: str, parameters: list[inspect.Parameter], args: tuple[Any, ...], options: Mapping[str, Any]
) -> str:
    """Say what is wrong with the arguments of a call; "" if nothing is."""
    kinds = {parameter.kind for parameter in parameters}
    known = {parameter.name: parameter for parameter in parameters}
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return ""
    fitted = vars(model).get("fitted_")
    of_model = [] if fitted is None else [condition.name for condition in fitted.schema.conditions]
    unknown = [name for name in options if name not in known]
    by_place = [name for name, parameter in known.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(args) > len(by_place) and not by_place:
        cells = "; cells are for fit" if "latent_dim" in known else ""
        return f"{call} takes options by name only, as {call}({next(iter(known), '')}=...){cells}"
    if len(args) > len(by_place):
        rest = ", ".join(f"{name}=..." for name in known if name not in by_place)
        advice = f"give the others by name: {rest}" if rest else "leave out the others"
        return f"{call} takes {', '.join(by_place)} without a name, and was given {len(args)} values; {advice}"
    given = {*by_place[: len(args)], *options, *(word for name in unknown for word in celbo_words(name))}
    given |= {"given"} if any(name in of_model for name in unknown) else set()
    missing = [n for n, parameter in known.items() if parameter.default is inspect.Parameter.empty and n not in given]
    faults = [no_option(call, name, known, of_model) for name in unknown]
    return "; ".join([*faults, *(f"{call} needs {name}: {_NEEDED.get(name, 'give a value')}" for name in missing)])
