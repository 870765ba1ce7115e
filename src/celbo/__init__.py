"""celbo: variational autoencoders for transcriptomics.

Public names load on first use, so that ``import celbo`` and ``celbo.__version__`` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celbo.version import __version__

if TYPE_CHECKING:
    from celbo.ask.differential import pseudobulk
    from celbo.errors import (
        CelboError,
        DataError,
        DivergedError,
        ModelFileError,
        NotFittedError,
        StorageError,
        UsageError,
    )
    from celbo.estimator import ExpressionVAE, load
    from celbo.fit.remedies import REMEDIES
    from celbo.fit.train import TrainConfig
    from celbo.model.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
    from celbo.model.likelihoods import LIKELIHOODS
    from celbo.model.objective import elbo_terms
    from celbo.model.vae import VAE
    from celbo.simulate import simulate_cells
    from celbo.trials.comparing import choose, compare
    from celbo.trials.curing import cure
    from celbo.trust.realism import check_realism

_HOME = {
    "CelboError": "errors",
    "DataError": "errors",
    "DivergedError": "errors",
    "ExpressionVAE": "estimator",
    "LIKELIHOODS": "model.likelihoods",
    "ModelFileError": "errors",
    "NegativeBinomial": "model.distributions",
    "NotFittedError": "errors",
    "REMEDIES": "fit.remedies",
    "StorageError": "errors",
    "TrainConfig": "fit.train",
    "UsageError": "errors",
    "VAE": "model.vae",
    "ZeroInflatedNegativeBinomial": "model.distributions",
    "check_realism": "trust.realism",
    "choose": "trials.comparing",
    "compare": "trials.comparing",
    "cure": "trials.curing",
    "elbo_terms": "model.objective",
    "load": "estimator",
    "pseudobulk": "ask.differential",
    "simulate_cells": "simulate",
}

__all__ = [
    "LIKELIHOODS",
    "REMEDIES",
    "VAE",
    "CelboError",
    "DataError",
    "DivergedError",
    "ExpressionVAE",
    "ModelFileError",
    "NegativeBinomial",
    "NotFittedError",
    "StorageError",
    "TrainConfig",
    "UsageError",
    "ZeroInflatedNegativeBinomial",
    "__version__",
    "check_realism",
    "choose",
    "compare",
    "cure",
    "elbo_terms",
    "load",
    "pseudobulk",
    "simulate_cells",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module the first time somebody asks for it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(import_module("celbo.fit.words").no_public_name(name, __all__))
    return getattr(import_module(f"celbo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
