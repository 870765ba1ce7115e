"""Options of `celbo.ExpressionVAE` as plain values, and the objects that a fit makes of them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from celbo.errors import NotFittedError, UsageError, check_names, chosen_row
from celbo.fit.fitted import Fitted
from celbo.fit.history import History
from celbo.fit.remedies import Recipe, recipe_for
from celbo.fit.start import DATA_OPTIONS, Architecture
from celbo.fit.train import TrainConfig
from celbo.fit.words import no_option, sentence
from celbo.model.likelihoods import LIKELIHOODS
from celbo.model.objective import OBJECTIVES

__all__ = [
    "MADE_BY_FIT",
    "check_options",
    "data_options",
    "defaults_of",
    "made_by_fit",
    "parts_of",
    "plain_options",
    "recipe_of",
]

MADE_BY_FIT = ("fitted_", "schema_", "vae_", "history_", "split_", "reference_")
"""Attributes of a fitted `celbo.ExpressionVAE`."""
_OF_NETWORK = (
    *("latent_dim", "hidden_dims", "dispersion", "encode_context", "norm", "dropout", "decoder_dims", "prior"),
    *("embedding_dim", "interactions"),
)
_LISTS_OF_NAMES = ("conditions", "nuisance", "interactions", "remedies")


def defaults_of(model: Any) -> dict[str, Any]:
    """Return the defaults of the options of a model, which is a dataclass or an instance of one."""
    return {option.name: option.default for option in fields(model) if option.init}


def check_options(params: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise a `UsageError` for options that ExpressionVAE does not have."""
    if unknown := sorted(params.keys() - known.keys()):
        raise UsageError(sentence("; ".join(no_option("ExpressionVAE", name, known) for name in unknown)))


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn options into values that JSON has: numbers and texts of Python, and lists of them.

    Examples
    --------
    >>> plain_options({"latent_dim": np.int64(3), "hidden_dims": (np.int32(8), 8), "unlabelled": "?"})
    {'latent_dim': 3, 'hidden_dims': [8, 8], 'unlabelled': '?'}
    """
    plain = {
        name: asdict(value) if isinstance(value, TrainConfig) else _plain(value) for name, value in options.items()
    }
    return plain | {"unlabelled": str(plain["unlabelled"])}


def _plain(value: Any) -> Any:
    """Turn a number or text of numpy, or a list of them, into plain values."""
    if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return value
    return [_plain(part) for part in value]


def data_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kind of values that the likelihood takes, and the options that say how cells are read."""
    values = chosen_row("likelihood", options["likelihood"], LIKELIHOODS).values
    return {"values": values, **{name: _plain(options[name]) for name in DATA_OPTIONS}}


def recipe_of(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Recipe:
    """Combine the remedies of a model into one training recipe; raise a `UsageError` if they cannot be used."""
    has_conditions = bool((*options["conditions"], *options["nuisance"]))
    return recipe_for(options["remedies"], {**options, "has_conditions": has_conditions}, defaults)


def parts_of(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Turn options into the objects that `celbo.fit.fitted.fit_model` takes, and refuse options that cannot be used."""
    if not isinstance(options["train"], TrainConfig):
        raise UsageError(f"train is a {type(options['train']).__name__}; give a celbo.TrainConfig.")
    options = {name: _plain(value) for name, value in options.items()}
    check_names({name: options[name] for name in _LISTS_OF_NAMES})
    parts = {
        "likelihood": chosen_row("likelihood", options["likelihood"], LIKELIHOODS),
        "objective": chosen_row("objective", options["objective"], OBJECTIVES),
        "config": options["train"],
        "remedies": options["remedies"],
    }
    recipe = recipe_of(options, defaults)
    network = {name: options[name] for name in _OF_NETWORK}
    return {**parts, "recipe": recipe, "architecture": Architecture(**{**network, **recipe.options})}


def made_by_fit(fitted: Fitted | None, name: str) -> Any:
    """Return an attribute of `MADE_BY_FIT`; raise a `NotFittedError` if there is none."""
    if fitted is None:
        raise NotFittedError(f"this model is not fitted (it has no {name}): call fit first, or celbo.load one.")
    value = getattr(fitted, name[:-1])
    if name == "split_" and value is None:
        raise NotFittedError("this model has no split_: it was loaded or mapped, and only fit makes it.")
    return History(value) if name == "history_" else value
