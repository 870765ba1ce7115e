"""Show the progress of training on stderr: a bar in a terminal or a notebook, elsewhere a line every half minute."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from celbo.fit.train import Epoch, Plan, Track
from celbo.minibatch import Rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["shown_progress", "watched"]

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_BARS = 0.2
"""The bar is drawn again after this time at the earliest."""
_one_bar = threading.Lock()
"""A process shows one bar at a time; two would overwrite each other."""


def watched(progress: bool, track: Track | None) -> AbstractContextManager[Track | None]:
    """Choose what watches a training.

    Parameters
    ----------
    progress
        Whether to show the progress (`shown_progress`).
    track
        Watches the minibatches instead, if it is given; see `celbo.fit.train.epochs`.

    Returns
    -------
    context manager
        It gives the ``track`` of `celbo.fit.train.epochs`; None if nothing is to watch.
    """
    return shown_progress() if progress and track is None else nullcontext(track)


@contextmanager
def shown_progress() -> Iterator[Track]:
    """Show after each minibatch how far training is, and the most time that it can still take.

    A terminal or a notebook shows a bar, if this process does not show one already. Elsewhere a line appears every half
    minute. Nothing is written to stdout.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    has_bar = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
    if not (has_bar and _one_bar.acquire(blocking=False)):
        yield _lines(console)
        return
    try:
        with _bar(console) as track:
            yield track
    finally:
        _one_bar.release()


@contextmanager
def _bar(console: "Console") -> Iterator[Track]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    left = (TimeElapsedColumn(), TextColumn("left at most"), TimeRemainingColumn())
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), *left),
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
    )
    task, drawn = bar.add_task("preparing", total=None), time.monotonic()
    with _in_notebook(bar) if console.is_jupyter else _in_terminal(bar) as draw:

        def track(minibatches: Iterable[Rows], plan: Plan, history: list[Epoch]) -> Iterator[Rows]:
            nonlocal drawn
            bar.update(task, description=_describe(plan, history), total=plan.epochs * plan.steps_per_epoch)
            for rows in minibatches:
                yield rows
                bar.advance(task)
                if time.monotonic() - drawn >= _SECONDS_BETWEEN_BARS:
                    drawn = time.monotonic()
                    draw()

        yield track


@contextmanager
def _in_terminal(bar: "Progress") -> Iterator[Callable[[], None]]:
    """Show the bar in the last line of a terminal, and remove it in the end. Give the function that draws it again."""
    with bar:
        yield bar.refresh


@contextmanager
def _in_notebook(bar: "Progress") -> Iterator[Callable[[], None]]:
    """Show the bar as one output of a notebook's cell, which stays. Give the function that draws it again.

    The notebook's own display needs no widgets; rich's own does.
    """
    from IPython.display import display

    output = display(bar, display_id=True)
    try:
        yield lambda: output.update(bar)
    finally:
        output.update(bar)


def _lines(console: "Console") -> Track:
    started = last_line = 0.0

    def track(minibatches: Iterable[Rows], plan: Plan, history: list[Epoch]) -> Iterator[Rows]:
        nonlocal started, last_line
        for step, rows in enumerate(minibatches, start=1):
            yield rows
            now = time.monotonic()
            if not started:  # after the first step, which also loads and compiles
                started = last_line = now
            if now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = now
                done = (len(history) * plan.steps_per_epoch + step) / (plan.epochs * plan.steps_per_epoch)
                left = (now - started) * (1 - done) / done
                line = f"{_describe(plan, history)}, {done:.0%} of the plan, at most {left / 60:.1f} min left"
                console.print(line, soft_wrap=True)

    return track


def _describe(plan: Plan, history: list[Epoch]) -> str:
    text = f"epoch {len(history) + 1} of at most {plan.epochs}"
    if history and history[-1].validation_elbo is not None:
        text += f", held-out ELBO {history[-1].validation_elbo:,.1f} nats per cell"
    return text
