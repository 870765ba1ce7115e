"""Show the progress of training on stderr: a bar on a terminal, elsewhere a line every half minute."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from celbo.fit.train import Epoch, Plan, Track
from celbo.minibatch import Rows

__all__ = ["shown_progress"]

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def shown_progress(console: Console) -> Iterator[Track]:
    """Show after each minibatch how far training is, and the most time that it can still take."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left at most"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def track(minibatches: Iterable[Rows], plan: Plan, history: list[Epoch]) -> Iterator[Rows]:
            bar.update(task, description=_describe(plan, history), total=plan.epochs * plan.steps_per_epoch)
            for rows in minibatches:
                yield rows
                bar.advance(task)

        yield track


def _lines(console: Console) -> Track:
    started = last_line = time.monotonic()

    def track(minibatches: Iterable[Rows], plan: Plan, history: list[Epoch]) -> Iterator[Rows]:
        nonlocal last_line
        for step, rows in enumerate(minibatches, start=1):
            yield rows
            now = time.monotonic()
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
