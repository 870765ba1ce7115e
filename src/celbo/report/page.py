"""Render a JSON summary as one HTML file that needs no other file."""

import base64
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure

from celbo.report.figures import Level, history_figure, kl_figure, latent_figure, legend, numbers, to_png
from celbo.report.text import DASH, clean, duration, number, shorten

__all__ = ["render"]

LIKELIHOODS = {
    "gaussian": "Gaussian",
    "bernoulli": "Bernoulli",
    "poisson": "Poisson",
    "nb": "negative binomial",
    "zinb": "zero-inflated negative binomial",
}
"""Full names of likelihoods; others are shown unchanged."""


class Card(NamedTuple):
    """One key figure."""

    label: str
    value: str
    unit: str
    detail: str


class Picture(NamedTuple):
    """A figure embedded in the page."""

    title: str
    source: str
    """``data:`` URL of the PNG."""
    width: int
    """Width in pixels; ``height`` likewise."""
    height: int
    alt: str
    levels: list[Level]
    """Lines of the legend; empty without a legend."""


class Recovered(NamedTuple):
    """A measure of how well the model recovers the truth of simulated data."""

    name: str
    value: str
    reference: str
    meaning: str


class Facts(NamedTuple):
    """A table of names and values."""

    title: str
    rows: list[tuple[str, str]]


def render(summary: Mapping[str, Any]) -> str:
    """Render the page.

    Parameters
    ----------
    summary
        See `celbo.report`.

    Returns
    -------
    str
        HTML without scripts or external URLs, the same text for the same summary. Write it as UTF-8.

    Raises
    ------
    DataError
        If a colour does not have one value for each cell shown.

    Examples
    --------
    >>> page = render({"title": "PBMC <3k>", "verdict": "The latent space is in good use."})
    >>> "<h1>PBMC &lt;3k&gt;</h1>" in page
    True
    """
    latent, history = summary.get("latent") or {}, summary.get("history") or []
    # `clean` removes lone surrogates, so that the page can be written as UTF-8.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    template = environment.from_string(files("celbo.report").joinpath("template.html").read_text(encoding="utf-8"))
    return template.render(
        title=summary.get("title") or "celbo report",
        verdict=summary.get("verdict") or "",
        version=summary.get("celbo_version") or "",
        notes=summary.get("notes") or [],
        cards=cards(summary.get("metrics") or {}),
        latent_pictures=latent_pictures(summary) if latent.get("xy") else [],
        latent_method=latent.get("method") or "",
        n_cells_shown=number(latent.get("n_cells_shown")),
        n_cells=number(latent.get("n_cells")),
        training_pictures=[*history_pictures(history), *kl_pictures(summary.get("metrics") or {})],
        diagnosis=diagnosis(summary),
        recovery=recovery(summary),
        facts=facts(summary.get("run") or {}),
    )


def cards(metrics: Mapping[str, Any]) -> list[Card]:
    """Choose the key figures and their units.

    Examples
    --------
    >>> cards({"elbo_validation": -812.34, "elbo_train": -800})[0]
    Card(label='ELBO, held-out cells', value='−812.3', unit='nats per cell', detail='training cells: −800')
    """
    get = metrics.get
    likelihood = str(get("likelihood") or DASH)
    return [
        Card(
            "ELBO, held-out cells",
            number(get("elbo_validation")),
            "nats per cell",
            f"training cells: {number(get('elbo_train'))}",
        ),
        Card(
            "Reconstruction, held-out cells",
            number(get("reconstruction_validation")),
            "nats per cell",
            f"likelihood: {LIKELIHOODS.get(likelihood, likelihood)}",
        ),
        Card(
            "KL, held-out cells",
            number(get("kl_validation")),
            "nats per cell",
            f"weight at the end of training: {number(get('kl_weight_final'))}",
        ),
        Card(
            "Latent dimensions that vary",
            number(get("active_units")),
            f"of {number(get('latent_dim'))}",
            f"without z the decoder loses {number(get('ablation'))} nats per cell",
        ),
        Card("Data", number(get("n_cells")), "cells", f"{number(get('n_genes'))} genes"),
        Card("Training", duration(get("seconds")), "", f"{number(get('epochs'))} epochs, {number(get('steps'))} steps"),
        Card("Speed", number(get("cells_per_second"), whole=True), "cells per second", "during training"),
        Card("Memory", number(get("peak_memory_mb"), whole=True), "MB", "at the peak"),
    ]


def latent_pictures(summary: Mapping[str, Any]) -> list[Picture]:
    """Draw a picture of the cells for each column of colours."""
    latent = summary["latent"]
    colours = latent.get("colours") or {}
    n_cells = number(len(latent["xy"]))
    if not colours:
        return [
            picture("", latent_figure(summary, labels=False), f"Scatter plot of {n_cells} cells in the latent space.")
        ]
    pictures = []
    for name, colour in colours.items():
        categorical = colour["kind"] == "categorical"
        levels = legend(colour["values"]).levels if categorical else []
        key = f"{len(levels)} groups, listed below" if categorical else f"a scale {span(colour['values'])}"
        alt = f"Scatter plot of {n_cells} cells in the latent space, coloured by {shorten(name)}: {key}."
        pictures.append(picture(shorten(name), latent_figure(summary, [name], labels=False), alt, levels))
    return pictures


def history_pictures(history: list[Mapping[str, Any]]) -> list[Picture]:
    """Draw the training curve, if the summary has one."""
    if not history:
        return []
    train, validation = ([epoch.get(key) for epoch in history] for key in ("train_elbo", "validation_elbo"))
    alt = (
        f"Line plot of the ELBO, nats per cell, over {number(len(history))} epochs: on training cells from "
        f"{number(train[0])} to {number(train[-1])}, on held-out cells from {number(validation[0])} to "
        f"{number(validation[-1])}. Below it the KL weight, {number(history[-1].get('kl_weight'))} at the end."
    )
    return [picture("ELBO during training", history_figure({"history": history}), alt)]


def kl_pictures(metrics: Mapping[str, Any]) -> list[Picture]:
    """Draw the KL of each latent dimension, if the summary has it."""
    kl = metrics.get("kl_per_dim")
    if not kl:
        return []
    alt = f"Bar chart of the KL, nats per cell, of each latent dimension: {', '.join(number(value) for value in kl)}."
    return [picture("KL by latent dimension", kl_figure({"metrics": metrics}), alt)]


def picture(title: str, figure: Figure, alt: str, levels: list[Level] | None = None) -> Picture:
    """Embed a figure as a ``data:`` URL, at twice the resolution of the page."""
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    source = "data:image/png;base64," + base64.b64encode(to_png(figure)).decode()
    return Picture(title, source, width, height, alt, levels or [])


def recovery(summary: Mapping[str, Any]) -> list[Recovered]:
    """Return how well the model recovers the truth of simulated data."""
    return [
        Recovered(row["name"], number(row.get("value")), number(row.get("reference")), row.get("meaning") or "")
        for row in summary.get("recovery") or []
    ]


def diagnosis(summary: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Return the findings about the latent space, and the remedies; empty if there is no diagnosis."""
    document = summary.get("diagnosis") or {}
    columns = {"findings": ("name", "verdict", "meaning", "try_next"), "remedies": ("command", "why")}
    return {
        part: [{name: str(row.get(name) or "") for name in names} for row in document.get(part) or []]
        for part, names in columns.items()
    }


def facts(run: Mapping[str, Any]) -> list[Facts]:
    """Return tables of everything needed to repeat the run.

    Examples
    --------
    >>> facts({"seed": 0, "options": {"train": {"max_epochs": 40}}})
    [Facts(title='Options', rows=[('seed', '0'), ('train.max_epochs', '40')])]
    """
    options = {"seed": run.get("seed")} | (run.get("options") or {})
    tables = {"Options": options, "Data": run.get("data") or {}, "Versions": run.get("versions") or {}}
    return [Facts(title, list(flat(table))) for title, table in tables.items() if table]


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values of nested tables, with names joined by dots.

    Examples
    --------
    >>> list(flat({"a": {"b": 1, "c": [True, "x"]}}))
    [('a.b', '1'), ('a.c', '[true, "x"]')]
    """
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            text = DASH if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield shorten(f"{prefix}{name}", 120), shorten(text, 300)


def span(values: list[float | None]) -> str:
    """Format the range of the values that are not missing.

    Examples
    --------
    >>> span([2.0, None, 1.0]), span([None])
    ('from 1 to 2', 'without values')
    """
    known = numbers(values)
    known = known[np.isfinite(known)]
    return f"from {number(known.min())} to {number(known.max())}" if len(known) else "without values"
