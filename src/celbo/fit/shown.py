"""Options and states of models as people read them: a line of text, and a small table for notebooks."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import Any

from celbo.fit.fitted import Fitted
from celbo.fit.train import TrainConfig

__all__ = ["is_same", "shown_model", "shown_table", "shown_value"]


def is_same(value: Any, other: Any) -> bool:
    """Return whether two values of an option mean the same; lists, tuples and arrays do if their items do.

    Examples
    --------
    >>> is_same([128], (128,)), is_same([128], (64,))
    (True, False)
    """
    value, other = (tuple(part) if _is_list(part) else part for part in (value, other))
    return bool(value == other)


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | Mapping)


def shown_value(value: Any) -> str:
    """Show the value of an option; of a training configuration only what differs from its defaults.

    Examples
    --------
    >>> shown_value(TrainConfig(seed=3))
    'TrainConfig(seed=3)'
    """
    if not isinstance(value, TrainConfig):
        return repr(value)
    values = {option.name: getattr(value, option.name) for option in fields(value)}
    defaults = {option.name: option.default for option in fields(value)}
    changed = [f"{name}={part!r}" for name, part in values.items() if part != defaults[name]]
    return f"TrainConfig({', '.join(changed)})"


def shown_model(options: Mapping[str, Any], defaults: Mapping[str, Any], fitted: Fitted | None) -> str:
    """Show the options that differ from the defaults, and what the model was fitted to, in a line."""
    chosen = ", ".join(f"{name}={shown_value(value)}" for name, value in _changed(options, defaults).items())
    return f"ExpressionVAE({chosen}{'; ' * bool(chosen)}{_state(fitted)})"


def shown_table(options: Mapping[str, Any], defaults: Mapping[str, Any], fitted: Fitted | None) -> str:
    """Show the same as an HTML table of options, with the state as its caption."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(shown_value(value))}</td></tr>"
        for name, value in _changed(options, defaults).items()
    )
    return f"<table><caption>ExpressionVAE ({escape(_state(fitted))})</caption>{rows}</table>"


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not is_same(value, defaults[name])}


def _state(fitted: Fitted | None) -> str:
    """Say whether a model is fitted, and to what."""
    if fitted is None:
        return "not fitted"
    cells = "" if fitted.split is None else f"{sum(map(len, fitted.split)):,} cells x "
    stopped = "" if fitted.stopped is None else f", {fitted.stopped}"
    return f"fitted: {cells}{len(fitted.schema.genes):,} genes, {len(fitted.history)} epochs{stopped}"
