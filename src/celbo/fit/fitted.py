"""Fitted: everything that fitting makes and that a question to the model needs; and the function that makes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from celbo.data.schema import Schema
from celbo.errors import UsageError, listed
from celbo.fit.cells import Cells
from celbo.fit.progress import watched
from celbo.fit.reference import Reference, n_readings, reference_rows
from celbo.fit.remedies import Recipe, remedy_table
from celbo.fit.start import Architecture, split_of_fit, start_vae
from celbo.fit.train import Epoch, Interrupted, Split, Track, TrainConfig, epochs, plan_run, settle_device
from celbo.kernels.threads import threads
from celbo.minibatch import Rows
from celbo.model.classifier import calibrate
from celbo.model.likelihoods import Likelihood
from celbo.model.objective import Objective
from celbo.model.vae import VAE
from celbo.streams import Stream, random_stream

__all__ = [
    "Fitted",
    "cells_to_measure",
    "doubts_of_training",
    "fit_model",
    "in_spite_of_an_interrupt",
    "split_again",
]

T = TypeVar("T")

_CENTRES = 15
"""Typical positions in the latent space that cells are compared with."""
_CELLS_TO_MEASURE = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A fitted model. Questions are functions of it and of `celbo.fit.cells.Cells`."""

    vae: VAE
    schema: Schema
    """Genes, conditions and labels, and how they are encoded."""
    likelihood: Likelihood
    objective: Objective
    architecture: Architecture
    config: TrainConfig
    recipe: Recipe
    """The remedies, combined."""
    remedies: tuple[str, ...] = ()
    """Names of the remedies."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `celbo.ExpressionVAE` at the fit, as plain values; files keep these."""
    history: Sequence[Epoch] = ()
    stopped: str | None = None
    """Why training ended early: "interrupted"; None if it came to its own end."""
    split: Split | None = None
    """Which cells were held out; None for a loaded or a mapped model."""
    reference: Reference | None = None
    """Latent positions of the cells of fit; None if they were not kept."""

    @property
    def seed(self) -> int:
        """Seed of the fit."""
        return self.config.seed

    @property
    def threads(self) -> int | None:
        """Processor threads; None for torch's own choice."""
        return self.config.threads

    @property
    def is_counts(self) -> bool:
        """Whether the likelihood is of counts."""
        return self.likelihood.values == "counts"

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """Typical positions of training cells, ``(15 at most, latent_dim)``: k-means centres of mu_z."""
        reference = self.needed_reference()
        known = reference.mu_z[~reference.held_out]
        n_centres = min(_CENTRES, len(np.unique(known, axis=0)))
        centres = KMeans(n_centres, n_init=1, random_state=0).fit(known).cluster_centers_
        return np.asarray(centres, np.float32)

    def needed_reference(self) -> Reference:
        """Return the reference cells, or raise a `UsageError` if they were not kept."""
        if self.reference is None:
            raise UsageError(
                "the model keeps no reference cells, and this question needs them. Fit the model again, and save it "
                "with them (keep_reference=True; --keep-reference)."
            )
        return self.reference


def fit_model(
    cells: Cells,
    *,
    likelihood: Likelihood,
    objective: Objective,
    architecture: Architecture,
    config: TrainConfig,
    recipe: Recipe,
    remedies: Sequence[str] = (),
    progress: bool = True,
    track: Track | None = None,
) -> Fitted:
    """Train a model on cells, and keep where the cells lie in its latent space.

    The first interrupt (Ctrl-C) in training, after the first epoch, ends training: the model has the best weights so
    far. The first interrupt after training loses nothing: the fit comes to its end. Any other interrupt goes on.

    Parameters
    ----------
    cells
        As `celbo.fit.start.cells_to_fit` makes them.
    likelihood, objective, architecture, config, recipe, remedies
        Of the model and its training; see `Fitted`.
    progress, track
        As `celbo.fit.progress.watched` takes them.

    Returns
    -------
    Fitted

    Raises
    ------
    DivergedError
        If training produced numbers that are not finite, and could not recover.
    """
    device = settle_device(config.device)
    split = split_of_fit(cells.source, cells.schema, config)
    try:
        vae = start_vae(architecture, cells, likelihood, split, config.seed).to(device)
    except UsageError as error:
        if not recipe.options:
            raise
        raise UsageError(f"remedies {listed(remedies)} do not fit this model: {error}\n{remedy_table()}") from error
    # A plain autoencoder has no KL, so there is nothing to warm up, and every epoch counts.
    training = config if objective.samples_z else replace(config, warmup_fraction=0.0)
    stopped = None
    with threads(config.threads), watched(progress, track) as watch:
        try:
            history = list(epochs(vae, cells.source, split, training, objective=objective, recipe=recipe, track=watch))
        except Interrupted as interrupt:
            history, stopped = list(interrupt.history), "interrupted"
    fitted = Fitted(
        vae=vae.eval(),
        schema=cells.schema,
        likelihood=likelihood,
        objective=objective,
        architecture=architecture,
        config=config,
        recipe=recipe,
        remedies=tuple(remedies),
        history=history,
        stopped=stopped,
        split=split,
    )
    reference = in_spite_of_an_interrupt(lambda: _reference_of(fitted, cells.seen_by(fitted), split), stopped)
    if vae.classifier is not None:
        calibrate(vae.classifier, reference.mu_z[reference.held_out], reference.labels[reference.held_out])
    return replace(fitted, reference=reference)


def in_spite_of_an_interrupt(work: Callable[[], T], stopped: str | None) -> T:
    """Do work that follows training. The first interrupt starts it again, so that no trained model is lost.

    Parameters
    ----------
    work
        The work.
    stopped
        Why training ended early. If an interrupt ended it, another one goes on.
    """
    try:
        return work()
    except KeyboardInterrupt:
        if stopped:
            raise
    return work()


def doubts_of_training(fitted: Fitted) -> list[str]:
    """Return the warning about a model whose training was interrupted just now."""
    assert fitted.split is not None
    most = plan_run(len(fitted.split.train), fitted.config, fitted.recipe).epochs
    return [
        f"training was interrupted after {len(fitted.history):,} of at most {most:,} epochs. The model has the best "
        "weights so far (the last ones, if the KL weight was still rising), and can be used, but training did not come "
        "to its end. To train the model to the end, fit it "
        "again: training then starts from the beginning."
    ]


def _reference_of(fitted: Fitted, cells: Cells, split: Split) -> Reference:
    """Keep the positions of all held-out cells, and of as many training cells as a reference has."""
    rows, source = reference_rows(split, fitted.seed), cells.source
    held_out = np.isin(rows, split.validation)
    encoded = cells.encoded_at(rows, surprise_of=held_out)
    return Reference(
        mu_z=encoded.mu_z,
        logvar_z=encoded.logvar_z,
        library=source.library[rows],
        conditions=source.codes[rows],
        held_out=held_out,
        labels=np.full(len(rows), -1, np.int32) if source.labels is None else source.labels[rows],
        was_read=np.zeros(len(rows), bool),
        readings=np.zeros((len(rows), n_readings(fitted.is_counts))),
        surprise=np.nan_to_num(encoded.surprise),
        absent_level=source.absent_level[rows].astype(np.int32),
        checksums=source.checksums(rows),
    )


def split_again(fitted: Fitted, cells: Cells) -> Split | None:
    """Return how fit split these cells; None if they are not the cells of fit.

    The split is drawn again from the seed, and the cells that would then be reference cells are compared with them: by
    library size, conditions and checksums of values. Models of older versions have no checksums; there library sizes
    alone are compared.
    """
    reference, source = fitted.reference, cells.source
    if reference is None:
        return None
    split = split_of_fit(source, fitted.schema, fitted.config)
    rows = reference_rows(split, fitted.seed)
    if len(rows) != len(reference.library) or not np.array_equal(source.library[rows], reference.library):
        return None
    if reference.checksums is None:
        return split
    is_same = np.array_equal(source.codes[rows], reference.conditions)
    return split if is_same and np.array_equal(source.checksums(rows), reference.checksums) else None


def cells_to_measure(fitted: Fitted, cells: Cells) -> tuple[Rows, Rows]:
    """Choose the cells to measure a model on, and the cells that simpler models may learn from.

    If these are the cells of fit, the first are held-out cells and the second training cells. Else both are all cells;
    so are the first if fewer than two cells were held out. The first are at most 10,000.
    """
    split = split_again(fitted, cells)
    held_out = cells.rows if split is None or len(split.validation) < 2 else split.validation
    rows: NDArray[Any] = random_stream(fitted.seed, Stream.MEASURED).permutation(held_out)[:_CELLS_TO_MEASURE]
    return np.sort(rows), cells.rows if split is None else split.train
