"""A fitted model as the contents of a model folder, and back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from celbo import checkpoint
from celbo.data.schema import Schema
from celbo.errors import ModelFileError
from celbo.fit.fitted import Fitted
from celbo.fit.reference import n_readings, reference_arrays, reference_from
from celbo.fit.remedies import Recipe
from celbo.fit.start import Architecture, make_vae
from celbo.fit.train import Epoch, TrainConfig
from celbo.model.likelihoods import Likelihood
from celbo.model.objective import Objective

__all__ = ["read_fitted", "take_weights", "without_nan", "write_fitted"]


def write_fitted(path: str | Path, fitted: Fitted, *, keep_reference: bool) -> None:
    """Write the model folder; parameters are those of `celbo.ExpressionVAE.save`."""
    document = {
        "options": dict(fitted.options),
        "schema": fitted.schema.to_json(),
        "history": [without_nan(asdict(epoch)) for epoch in fitted.history],
        **({} if fitted.stopped is None else {"stopped": fitted.stopped}),
    }
    weights = {name: value.cpu().numpy() for name, value in fitted.vae.state_dict().items()}
    reference = fitted.reference if keep_reference else None
    checkpoint.write_folder(path, document, weights, None if reference is None else reference_arrays(reference))


def read_fitted(
    folder: checkpoint.ModelFolder,
    *,
    likelihood: Likelihood,
    objective: Objective,
    architecture: Architecture,
    config: TrainConfig,
    recipe: Recipe,
    remedies: tuple[str, ...],
) -> Fitted:
    """Make a `Fitted` from a folder, with weights that are not allocated yet; `take_weights` gives them their values.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the document does not describe a model.
    """
    schema = Schema.from_json(folder.document["schema"])
    if len(architecture.hidden_dims) > len(folder.weights):
        raise ValueError(f"{len(architecture.hidden_dims)} hidden layers, but {len(folder.weights)} tensors")
    with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit
        vae = make_vae(architecture, schema, likelihood)
    fitted = Fitted(
        vae=vae.eval(),
        schema=schema,
        likelihood=likelihood,
        objective=objective,
        architecture=architecture,
        config=config,
        recipe=recipe,
        remedies=tuple(remedies),
        history=[_epoch(record) for record in folder.document["history"]],
        stopped=_stopped(folder.document.get("stopped")),
    )
    if folder.reference is None:
        return fitted
    n_conditions = len(schema.conditions)
    reference = reference_from(folder.reference, vae.latent_dim, n_conditions, n_readings(fitted.is_counts))
    return replace(fitted, reference=reference)


def _stopped(reason: Any) -> str | None:
    """Read why training ended early."""
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"stopped is {reason!r}, and not a text")
    return reason


def _epoch(record: Mapping[str, Any]) -> Epoch:
    """Read the record of an epoch; None among the KL terms was no number."""
    kl_per_dim = tuple(math.nan if kl is None else kl for kl in record["kl_per_dim"])
    return Epoch(**{**record, "kl_per_dim": kl_per_dim})


def take_weights(fitted: Fitted, folder: checkpoint.ModelFolder, path: str | Path) -> None:
    """Give a model its weights; raise a `ModelFileError` if they do not fit it."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in fitted.vae.state_dict().items()}
    weights = {name: torch.from_numpy(value) for name, value in folder.weights.items()}
    saved = {name: (tuple(value.shape), value.dtype) for name, value in weights.items()}
    if expected != saved:
        names = sorted(set(expected) ^ set(saved)) or [name for name in expected if expected[name] != saved[name]]
        raise ModelFileError(
            f"{path}: the weights do not fit the model that model.json describes ({', '.join(names[:5])}); "
            "save the model again."
        )
    fitted.vae.load_state_dict(weights, assign=True)


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON lacks by None, also inside; an epoch without a single good step has them.

    Examples
    --------
    >>> without_nan({"elbo": float("nan"), "kl_per_dim": (1.0, float("inf"))})
    {'elbo': None, 'kl_per_dim': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
