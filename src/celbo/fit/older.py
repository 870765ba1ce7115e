"""Options of models that older versions of celbo saved: read them as today's options."""

from collections.abc import Mapping
from typing import Any

from celbo.fit.remedies import combine, known_remedies

__all__ = ["modern_options"]


def modern_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Turn options that an older version saved into today's options, which make the same model.

    Options that became remedies are turned into these. A remedy always won over an option that contradicted it, so such
    an option goes back to its default. Remedies that were removed changed the training only, and are dropped.

    Parameters
    ----------
    options
        Options of `celbo.ExpressionVAE`, as ``model.json`` and ``run.json`` keep them.
    defaults
        Today's defaults.

    Examples
    --------
    >>> modern_options({"skip": True, "norm": "none", "remedies": ["layer_norm"]}, {"norm": "layer"})
    {'norm': 'layer', 'remedies': ['layer_norm', 'skip']}
    """
    modern = dict(options)
    remedies = list(known_remedies(options.get("remedies") or ()))
    set_by_remedies = combine(remedies).options
    share = modern.pop("decoder_dropout", None)
    candidates = {"decoder_dropout": None if share is None else f"decoder_dropout:{share!r}"}
    for name in ("norm_mu", "skip", "context_skip"):
        candidates[name] = name if modern.pop(name, False) else None
    if candidates["skip"]:  # it includes the conditions
        candidates["context_skip"] = None
    remedies += [text for name, text in candidates.items() if text and name not in set_by_remedies]
    if remedies or "remedies" in modern:
        modern["remedies"] = remedies
    return modern | {name: defaults[name] for name in set_by_remedies if name in defaults and name in modern}
