"""celbo: variational autoencoders for transcriptomics.

Public names load on first use, so that ``import celbo`` and ``celbo.__version__`` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from celbo.comparing import choose, compare
    from celbo.curing import cure
    from celbo.differential import pseudobulk
    from celbo.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
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
    from celbo.likelihoods import LIKELIHOODS
    from celbo.objective import elbo_terms
    from celbo.realism import check_realism
    from celbo.remedies import REMEDIES
    from celbo.simulate import simulate_cells
    from celbo.train import TrainConfig
    from celbo.vae import VAE

_HOME = {
    "CelboError": "errors",
    "DataError": "errors",
    "DivergedError": "errors",
    "ExpressionVAE": "estimator",
    "LIKELIHOODS": "likelihoods",
    "ModelFileError": "errors",
    "NegativeBinomial": "distributions",
    "NotFittedError": "errors",
    "REMEDIES": "remedies",
    "StorageError": "errors",
    "TrainConfig": "train",
    "UsageError": "errors",
    "VAE": "vae",
    "ZeroInflatedNegativeBinomial": "distributions",
    "check_realism": "realism",
    "choose": "comparing",
    "compare": "comparing",
    "cure": "curing",
    "elbo_terms": "objective",
    "load": "estimator",
    "pseudobulk": "differential",
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
        raise AttributeError(f"module 'celbo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"celbo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
