"""One offline HTML file about a trained model, as a pure function of a JSON summary.

Anything shown can be recomputed from the summary, and the same summary gives the same bytes. A summary is what
``json.loads`` returns: an object with these entries, where any number may be ``null`` (shown as a dash) and a part
that does not apply is ``null`` or absent. ELBO terms are unweighted, nats per cell.

``title``, ``verdict``, ``celbo_version``, ``notes``
    Strings; the verdict is one sentence and comes first, ``notes`` is a list of warnings.
``metrics``
    ``n_cells, n_genes, likelihood, latent_dim, epochs, steps, seconds, cells_per_second, peak_memory_mb,
    elbo_train, elbo_validation, reconstruction_validation, kl_validation, kl_per_dim, active_units,
    kl_weight_final, ablation``.
``diagnosis``
    ``findings`` (each ``name, verdict, meaning, try_next``) and ``remedies`` (each ``command, why``).
``run``
    ``options``, ``versions`` and ``data`` (objects), ``seed``.
``history``
    A list of ``epoch, step, kl_weight, train_elbo, validation_elbo``, and what else training recorded.
``latent``
    ``method``, ``xy`` (a pair per cell shown), ``n_cells_shown``, ``n_cells``, and ``colours``: by column name,
    ``kind`` (``"categorical"`` or ``"continuous"``) and ``values`` (one per cell shown; ``null`` is a missing value).
``recovery``
    For simulated data, a list of ``name, value, reference, meaning``: how well the truth was found again.

Names load on first use, so that ``import celbo.report`` costs neither matplotlib nor scikit-learn, and never torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celbo.report.figures import history_figure, kl_figure, latent_figure, to_png
    from celbo.report.latent import Layout, layout
    from celbo.report.page import render

_HOME = {
    "Layout": "latent",
    "history_figure": "figures",
    "kl_figure": "figures",
    "latent_figure": "figures",
    "layout": "latent",
    "render": "page",
    "to_png": "figures",
}

__all__ = ["Layout", "history_figure", "kl_figure", "latent_figure", "layout", "render", "to_png"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module the first time somebody asks for it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'celbo.report' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"celbo.report.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
