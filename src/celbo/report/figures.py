"""Draw the figures of a report with matplotlib, from a summary."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from celbo.errors import DataError
from celbo.report.text import natural, number, shorten

__all__ = ["Legend", "Level", "history_figure", "kl_figure", "latent_figure", "legend", "numbers", "to_png"]

PALETTE = (
    # The first are from Okabe & Ito (2008). Each other one is farthest in OKLab from those before it and both greys,
    # for viewers with full colour vision and for viewers who do not see red or green.
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#78003C", "#3C1E96", "#A6E070", "#695A3C"),
    *("#8778F0", "#A53C87", "#87C387", "#5A3C69", "#2CDDE8", "#4B4BC3", "#B41E0F", "#692D00", "#006969", "#D8CC1F"),
)
OTHER = "#7D7D7D"
MISSING = "#C4C4C4"
INK = "#30343B"

DEAD_KL = 0.01
"""A latent dimension with less KL than this, in nats per cell, has no information about the cells."""
WEAK_KL = 0.1
"""A latent dimension with less KL than this, in nats per cell, has little information about the cells."""

HUGE = 1e100
"""matplotlib cannot draw larger numbers, because squares and axis limits overflow."""

STYLE: dict[str, Any] = {
    "axes.edgecolor": "#9AA0A8",
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a gene or cell type may be called "$x$"
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}
"""Settings that override matplotlib's defaults; the user's matplotlibrc has no effect."""


class Level(NamedTuple):
    """One line of a legend."""

    label: str
    colour: str
    n_cells: int


class Legend(NamedTuple):
    """Colours and levels of a categorical column."""

    levels: list[Level]
    codes: NDArray[np.intp]
    """Position of the level of each cell, ``(cells,)``."""


def legend(values: Sequence[str | None]) -> Legend:
    """Assign colours to levels: one to each of the twenty largest, one to all others, grey to missing values.

    Parameters
    ----------
    values
        The level of each cell; None is a missing value.

    Returns
    -------
    Legend
        Levels by name, then ``other`` and ``missing``.

    Examples
    --------
    >>> [(level.label, level.n_cells) for level in legend(["T cell", "B cell", None, "T cell"]).levels]
    [('B cell', 1), ('T cell', 2), ('missing', 1)]
    """
    names = [None if value is None or value != value else str(value) for value in values]  # NaN differs from itself
    counts = Counter(name for name in names if name is not None)
    largest = sorted(counts, key=lambda name: (-counts[name], natural(name)))
    own = sorted(largest[: len(PALETTE)], key=natural)
    rest = largest[len(PALETTE) :]
    levels = [Level(shorten(name, 60), colour, counts[name]) for name, colour in zip(own, PALETTE, strict=False)]
    position: dict[str | None, int] = {name: i for i, name in enumerate(own)}
    if rest:
        position |= dict.fromkeys(rest, len(levels))
        levels.append(Level(f"other ({len(rest)} levels)", OTHER, sum(counts[name] for name in rest)))
    if n_missing := len(names) - counts.total():
        position[None] = len(levels)
        levels.append(Level("missing", MISSING, n_missing))
    return Legend(levels, np.array([position[name] for name in names], dtype=np.intp))


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Convert numbers to an array; missing ones, and those that cannot be drawn, become NaN.

    Examples
    --------
    >>> numbers([1, None, float("inf")])
    array([ 1., nan, nan])
    """
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.abs(array) < HUGE, array, np.nan)


@style.context(["default", STYLE])
def latent_figure(summary: Mapping[str, Any], columns: Sequence[str] | None = None, *, labels: bool = True) -> Figure:
    """Draw the cells in the plane, with a panel for each column of colours.

    Parameters
    ----------
    summary
        See `celbo.report`; it must have ``latent``.
    columns
        The columns to draw; None for all. Without columns, the figure has one panel in one colour.
    labels
        Whether to write names and legends into the figure.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with `to_png`.

    Raises
    ------
    DataError
        If a column does not have one value for each cell.

    Examples
    --------
    >>> colours = {"cell type": {"kind": "categorical", "values": ["T", "B"]}}
    >>> len(latent_figure({"latent": {"xy": [[0, 0], [1, 1]], "colours": colours}}).axes)
    1
    """
    latent = summary["latent"]
    xy = numbers([value for point in latent["xy"] for value in point]).reshape(-1, 2)
    colours: Mapping[str, Any] = latent.get("colours") or {}
    names = list(colours) if columns is None else list(columns)
    for name in names:
        if (n_values := len(colours[name]["values"])) != len(xy):
            raise DataError(f"the colour {name!r} has {n_values} values for {len(xy)} cells shown; give each cell one.")
    n_panels = max(1, len(names))
    n_columns = min(2, n_panels)
    n_rows = -(-n_panels // n_columns)
    figure = Figure(figsize=((6.4 if labels else 4.4) * n_columns, 4.4 * n_rows))
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    # Each panel draws the cells in the same random order, so that no level covers the others.
    order = np.random.default_rng(0).permutation(len(xy))
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", "datalim")
        axes.spines[:].set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        if colours[name]["kind"] == "categorical":
            _draw_levels(axes, xy, order, legend(colours[name]["values"]), labels=labels)
        else:
            _draw_values(axes, xy, order, numbers(colours[name]["values"]))
        if labels:
            axes.set_title(shorten(name), loc="left", fontweight="bold")
    if not names:
        _scatter(grid[0], xy, order, color=PALETTE[0])
    return figure


def _scatter(axes: Axes, xy: NDArray[np.float64], rows: NDArray[np.intp], **colour: Any) -> Any:
    size = np.clip(12000 / max(len(xy), 1), 5, 40)
    return axes.scatter(xy[rows, 0], xy[rows, 1], s=size, linewidths=0, alpha=0.85, **colour)


def _draw_levels(axes: Axes, xy: NDArray[np.float64], order: NDArray[np.intp], legend: Legend, *, labels: bool) -> None:
    if not legend.levels:
        return
    missing = legend.levels[-1].colour == MISSING
    if missing:  # draw missing values first, below the others
        order = order[np.argsort(legend.codes[order] != len(legend.levels) - 1, kind="stable")]
    palette = np.array([level.colour for level in legend.levels])
    _scatter(axes, xy, order, color=palette[legend.codes[order]])
    if labels:
        dots = [Line2D([], [], color=level.colour, marker="o", linestyle="", markersize=6) for level in legend.levels]
        texts = [shorten(level.label, 28) for level in legend.levels]
        axes.legend(dots, texts, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.2)


def _draw_values(axes: Axes, xy: NDArray[np.float64], order: NDArray[np.intp], values: NDArray[np.float64]) -> None:
    known = np.isfinite(values[order])
    _scatter(axes, xy, order[~known], color=MISSING)
    if not known.any():
        return
    shown = order[known]
    # The full range would give most cells one colour if a few are extreme.
    low, high = np.percentile(values[shown], [1, 99])
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    beyond = bool(values[shown].min() < low), bool(values[shown].max() > high)
    dots = _scatter(axes, xy, shown, c=values[shown], cmap="viridis", vmin=low, vmax=high)
    bar = axes.figure.colorbar(dots, ax=axes, location="bottom", shrink=0.6, aspect=30, extend=extend[beyond])
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.formatter = FuncFormatter(_tick)
    bar.update_ticks()


def _tick(value: float, _: int | None) -> str:
    return number(value)


@style.context(["default", STYLE])
def history_figure(summary: Mapping[str, Any]) -> Figure:
    """Draw the ELBO of training and held-out cells, and the weight of the KL term, by training step.

    Parameters
    ----------
    summary
        See `celbo.report`.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels over the same steps.

    Examples
    --------
    >>> epochs = [{"step": 10, "train_elbo": -9.0}, {"step": 20, "train_elbo": -7.0, "validation_elbo": -8.0}]
    >>> len(history_figure({"history": epochs}).axes)
    2
    """
    history = summary["history"]
    series = {key: numbers([epoch.get(key) for epoch in history]) for key in ("train_elbo", "validation_elbo")}
    step = numbers([epoch.get("step") for epoch in history])
    weight = numbers([epoch.get("kl_weight") for epoch in history])
    figure = Figure(figsize=(5.2, 3.9))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    marker = "." if len(history) <= 30 else ""
    upper.plot(step, series["train_elbo"], marker=marker, color=OTHER, label="training cells")
    upper.plot(step, series["validation_elbo"], marker=marker, color=PALETTE[0], label="held-out cells")
    upper.set_ylabel("ELBO, nats per cell")
    _cut_low_values(upper, np.concatenate(list(series.values())))
    upper.legend(loc="lower right")
    lower.plot(step, weight, marker=marker, color=PALETTE[5])
    lower.set(xlabel="training step", ylabel="KL weight")
    if np.isfinite(weight).any():
        top = max(np.nanmax(weight), 1e-9)
        lower.set(ylim=(0, 1.15 * top), yticks=[0, top])
    upper.margins(x=0.02)
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(_tick)
        axes.xaxis.set_major_formatter(_tick)
        axes.grid(axis="y", color="#E8EAED", linewidth=0.8)
    lower.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _cut_low_values(axes: Axes, values: NDArray[np.float64]) -> None:
    """Exclude a few values far below all others from the axis, and say so in a note."""
    values = values[np.isfinite(values)]
    if len(values) < 10:
        return
    low, high = np.quantile(values, 0.1), values.max()
    bottom = low - 0.3 * (high - low)
    if below := int((values < bottom).sum()):
        axes.set_ylim(bottom, high + 0.08 * (high - low))
        note = f"below the axis: {below} of {len(values)} values, down to {number(values.min())}"
        axes.set_title(note, loc="left", fontsize=8.5, color="#6B7280")


@style.context(["default", STYLE])
def kl_figure(summary: Mapping[str, Any]) -> Figure:
    """Draw the KL term of each latent dimension, with the limits of weak and dead dimensions.

    Parameters
    ----------
    summary
        See `celbo.report`.

    Returns
    -------
    matplotlib.figure.Figure
        One bar per latent dimension; the axis is logarithmic above 0.01 nats.

    Examples
    --------
    >>> len(kl_figure({"metrics": {"kl_per_dim": [2.0, 0.05, 0.001]}}).axes[0].patches)
    3
    """
    kl = numbers(summary["metrics"].get("kl_per_dim") or [])
    figure = Figure(figsize=(5.2, 3.9))
    axes = figure.subplots()
    # The axis is linear up to the lower limit, so that bars begin at zero.
    axes.set_yscale("symlog", linthresh=DEAD_KL, linscale=0.5)
    colour = np.select([kl < DEAD_KL, kl < WEAK_KL], [OTHER, PALETTE[1]], PALETTE[0])
    axes.bar(np.arange(1, len(kl) + 1), kl, color=colour, width=0.75)
    top = 2 * max(1.0, np.nanmax(kl, initial=0.0))
    axes.set(ylim=(min(0.0, np.nanmin(kl, initial=0.0)), top), xlabel="latent dimension", ylabel="KL, nats per cell")
    ticks = [0.0, *(10.0**power for power in range(-2, 100) if 10.0**power < top)]
    axes.set_yticks(ticks, [number(tick) for tick in ticks])
    axes.yaxis.minorticks_off()
    axes.set_xlim(0.3, max(len(kl), 1) + 0.7)
    axes.set_xticks(range(1, len(kl) + 1, 1 + len(kl) // 16))
    for line, word in ((WEAK_KL, "weak"), (DEAD_KL, "dead")):
        axes.axhline(line, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f" {word}\n below", (1, line), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    return figure


@style.context(["default", STYLE])
def to_png(figure: Figure, *, scale: float = 2.0) -> bytes:
    r"""Convert a figure to PNG; the same figure gives the same bytes.

    Parameters
    ----------
    figure
        A figure of this module.
    scale
        Pixels of the PNG per pixel on the page, which has 100 pixels per inch.

    Returns
    -------
    bytes
        The PNG, for ``path.write_bytes``.

    Examples
    --------
    >>> to_png(history_figure({"history": []}))[:4]
    b'\x89PNG'
    """
    FigureCanvasAgg(figure)  # whatever backend pyplot has
    buffer = BytesIO()
    with warnings.catch_warnings():
        # matplotlib draws boxes for scripts that its font lacks; the page has the names as text.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|Matplotlib currently does not support", UserWarning)
        figure.savefig(buffer, format="png", dpi=100 * scale, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
