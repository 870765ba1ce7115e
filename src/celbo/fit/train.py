"""The training loop, as a generator of epochs: take a step for each minibatch, measure, yield, decide."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.errors import DivergedError, UsageError
from celbo.fit.remedies import Recipe
from celbo.fit.steps import Patience, TrainingState, averaged, lower_rate, start_training, state_of, take_step
from celbo.fit.words import explained
from celbo.minibatch import Rows, Source
from celbo.model.ablation import UseOfLatent, use_of_latent
from celbo.model.inference import CellTerms, cell_terms, take_filled
from celbo.model.information import ACTIVE
from celbo.model.objective import OBJECTIVES, ElboTerms, Objective
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

__all__ = [
    "Epoch",
    "Interrupted",
    "Plan",
    "Split",
    "Track",
    "TrainConfig",
    "epochs",
    "plan_run",
    "settle_device",
    "split_cells",
]

_STEPS_PER_EPOCH = 8
"""Minibatches of a small data set become smaller, so that an epoch has at least this many steps."""
_LONGER, _MOST_STEPS = 4, 30_000
"""While held-out cells gain, a run lasts up to this many times its plan, and up to this many steps."""
_RISE_STEPS = 100
"""Steps until the learning rate is at its highest; in a short run at most a tenth of the steps."""
_WATCHED_SHARE, _FEWEST_WATCHED, _MOST_WATCHED = 0.02, 32, 512
"""Held-out cells that are watched after each epoch: few enough to cost less than a hundredth of its time."""
_STEPS_TO_FOLLOW = 20
"""The watched cells are looked at after at least this many steps, so not after each short epoch."""
_CELLS_FOR_NORMS = 2048
"""Training cells over which means and variances of batch norms are taken for the averaged weights."""
_NO_REMEDY = Recipe()
_KINDS = {
    **dict.fromkeys(("max_epochs", "batch_size", "patience", "seed", "threads"), "whole numbers"),
    "device": "texts",
}
_TYPES: dict[str, type | tuple[type, ...]] = {"whole numbers": int, "numbers": (int, float), "texts": str}
"""Kinds of the options of `TrainConfig`, and the types of Python that they may have."""


@explained
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Examples
    --------
    >>> TrainConfig(max_epochs=20, seed=1).max_epochs
    20
    """

    max_epochs: int | None = None
    """Largest number of passes over the training cells. None for 100; up to 200 if these are fewer than 1,600 steps,
    and down to 10 if they are more than 8,000 steps. While held-out cells gain, training goes on up to four times as
    long, but for at most 30,000 steps."""
    batch_size: int = 128
    """Cells of a minibatch, approximately: minibatches have even sizes, and never one cell. Fewer if the cells would
    not fill eight minibatches."""
    learning_rate: float = 1e-2
    """Learning rate of Adam. It rises over the first 100 steps."""
    warmup_fraction: float = 0.25
    """Share of the planned run over which the KL weight rises from 0 to 1; at most 0.5."""
    patience: int = 10
    """Epochs without a better held-out ELBO, counted from when the KL weight is 1, after which the learning rate falls
    to 0.3 of itself. It falls twice; the third time training stops."""
    validation_fraction: float = 0.1
    """Share of the cells that are held out, to stop training and to choose the best weights."""
    gradient_clip: float = 1000.0
    """Largest norm of the gradient of the loss (nats per cell)."""
    seed: int = 0
    """Seed, from 0 to 2**63 - 1, of initial weights, held-out cells, minibatches, noise and dropout."""
    device: str = "auto"
    """Device that computes: "auto" (a CUDA device if there is one), or a name that torch knows."""
    threads: int | None = None
    """Processor threads; None for torch's own choice."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refuse ``model.train(...)``, which other tools have."""
        raise UsageError("train holds the options of the training; fit(adata) trains.")

    def __post_init__(self) -> None:
        """Turn numbers of numpy into those of Python; refuse values of a wrong type or out of range, all at once."""
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, option.name, value.item())
            elif isinstance(value, torch.device):
                object.__setattr__(self, option.name, str(value))
        self._check_types()
        rules = {
            "max_epochs": self.max_epochs is None or self.max_epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_fraction": 0 <= self.warmup_fraction <= 0.5,
            "patience": self.patience >= 1,
            "validation_fraction": 0 <= self.validation_fraction < 1,
            "gradient_clip": self.gradient_clip > 0,
            "seed": 0 <= self.seed < 2**63,
            "threads": self.threads is None or self.threads >= 1,
        }
        if broken := [f"{name}={getattr(self, name)!r}" for name, kept in rules.items() if not kept]:
            raise UsageError(
                f"out of range: {', '.join(broken)}. Counts are at least 1, learning_rate and gradient_clip above 0, "
                "validation_fraction from 0 to below 1, warmup_fraction from 0 to 0.5, the seed from 0 to 2**63 - 1."
            )

    def _check_types(self) -> None:
        faults: dict[str, list[str]] = {}
        for option in fields(self):
            value, kind = getattr(self, option.name), _KINDS.get(option.name, "numbers")
            is_right = not isinstance(value, bool) and isinstance(value, _TYPES[kind])
            if not is_right and not (value is None and option.default is None):
                faults.setdefault(kind, []).append(f"{option.name}={value!r}")
        if text := "; ".join(f"not {kind}: {', '.join(named)}" for kind, named in faults.items()):
            raise UsageError(f"{text}.")


class Split(NamedTuple):
    """Cells that a model learns from, and cells that it is measured on."""

    train: Rows
    validation: Rows

    def __repr__(self) -> str:
        """Show how many cells there are of each kind."""
        return f"Split({len(self.train):,} training cells, {len(self.validation):,} held out)"


class Plan(NamedTuple):
    """Plan of a run, fixed before its first step."""

    n_cells: int
    """Training cells."""
    epochs: int
    """Largest number of epochs: up to four times the planned number, if nobody set it."""
    steps_per_epoch: int
    rise_steps: int
    """Steps until the learning rate is at its highest."""
    warmup_steps: int
    """Steps until the KL weight is 1."""
    planned_epochs: int
    """Epochs that the schedules of learning rate and KL weight are planned for."""


@dataclass(frozen=True)
class Epoch:
    """Record of one pass over all training cells. Terms are unweighted means over cells, in nats."""

    epoch: int
    """Number of the epoch, from 1."""
    step: int
    """Optimiser steps taken so far."""
    kl_weight: float
    """Weight of the KL term in the last step."""
    seconds: float
    """Duration of the epoch, validation included."""
    train_elbo: float
    """Over the epoch's minibatches, with dropout, and with the weights of each step."""
    train_reconstruction: float
    train_kl: float
    validation_elbo: float | None
    """Over the held-out cells, without dropout, with the averaged weights; None where no cells are held out."""
    validation_reconstruction: float | None
    validation_kl: float | None
    kl_per_dim: tuple[float, ...]
    """Per latent dimension, of the held-out cells if there are any."""
    active_units: int | None = None
    """Latent dimensions whose posterior mean varies (variance above 0.01) over a fixed sample of held-out cells; None
    if no cells are held out, and for most epochs if epochs are very short."""
    ablation: float | None = None
    """Reconstruction lost, nats per cell, when z is permuted over that sample: how much the decoder uses z."""


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after its first epoch. The model has the best weights of the epochs in `history`."""

    def __init__(self, history: Sequence[Epoch] = ()):  # a pickled exception is made again without arguments
        super().__init__()
        self.history = history


class _Kept(NamedTuple):
    """What is kept if training ends now."""

    history: list[Epoch]
    best: dict[str, Tensor]
    patience: Patience


Track = Callable[[Iterable[Rows], Plan, list[Epoch]], Iterable[Rows]]
"""Watches the minibatches of an epoch, given the plan and the epochs so far; a progress bar, for example."""


def split_cells(
    n_cells: int, validation_fraction: float, seed: int, levels: NDArray[np.float32] | None = None
) -> Split:
    """Choose the held-out cells at random; at least one cell of every level stays to learn from.

    Parameters
    ----------
    n_cells
        How many cells there are.
    validation_fraction
        Largest share of them to hold out.
    seed
        Seed of the choice.
    levels
        Number of the level of each cell in each categorical condition, ``(cells, conditions)``.

    Examples
    --------
    >>> [len(rows) for rows in split_cells(100, 0.1, seed=0)]
    [90, 10]
    """
    order = random_stream(seed, Stream.SPLIT).permutation(n_cells)
    n_validation = min(round(n_cells * validation_fraction), n_cells - 1)
    if levels is not None:  # at least one cell of every level is trained on
        firsts = [np.unique(codes[order], return_index=True)[1] for codes in levels.T]
        kept = np.unique(np.concatenate([np.empty(0, np.intp), *firsts]))
        order = np.concatenate([np.delete(order, kept), order[kept]])
        n_validation = min(n_validation, n_cells - len(kept))
    return Split(np.sort(order[n_validation:]), np.sort(order[:n_validation]))


def plan_run(n_cells: int, config: TrainConfig, recipe: Recipe = _NO_REMEDY) -> Plan:
    """Fix the number of epochs, steps and warm-up steps for this many training cells.

    Examples
    --------
    >>> plan_run(1000, TrainConfig(max_epochs=10, batch_size=100, warmup_fraction=0.2))
    Plan(n_cells=1000, epochs=10, steps_per_epoch=10, rise_steps=10, warmup_steps=20, planned_epochs=10)
    """
    # Minibatches have even sizes: there is never a last one with a single cell.
    batch_size = max(2, min(config.batch_size, n_cells // _STEPS_PER_EPOCH))
    steps_per_epoch = max(1, n_cells // batch_size)
    planned = most = config.max_epochs
    if planned is None or most is None:
        planned = min(200, max(100, 1600 // steps_per_epoch))
        planned = max(10, min(planned, 8000 // steps_per_epoch))
        most = max(planned, min(_LONGER * planned, _MOST_STEPS // steps_per_epoch))
    steps = planned * steps_per_epoch
    warmup_steps = recipe.warmup_steps(config.warmup_fraction, steps)
    return Plan(n_cells, most, steps_per_epoch, min(_RISE_STEPS, steps // 10), warmup_steps, planned)


def usual_epochs(n_cells: int, config: TrainConfig) -> int:
    """Return for how many epochs training is planned if their number is left open.

    Examples
    --------
    >>> usual_epochs(1000, TrainConfig(max_epochs=5))
    200
    """
    return plan_run(n_cells, replace(config, max_epochs=None)).planned_epochs


def settle_device(name: str) -> torch.device:
    """Turn "auto" or the name of a device into the device; raise a `UsageError` if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError("celbo computes on cpu and cuda")
        torch.zeros(1, dtype=torch.float64, device=device)  # the likelihoods compute in float64
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used ({reason}); use 'auto' or 'cpu'.") from error
    return device


def epochs(
    vae: VAE,
    source: Source,
    split: Split,
    config: TrainConfig,
    *,
    objective: Objective = OBJECTIVES["vae"],
    recipe: Recipe = _NO_REMEDY,
    learned: Mapping[str, Tensor] | None = None,
    track: Track | None = None,
) -> Iterator[Epoch]:
    """Train a model, epoch by epoch; after the last epoch the model has its best weights.

    A step is ``loss = mean(weight * KL - reconstruction)``, gradient clipping, Adam (`celbo.fit.steps.take_step`). All
    its random numbers come from ``(seed, epoch, step)``. The weight of the KL term rises linearly to 1 over a number of
    steps that is fixed beforehand, unless a remedy changes that. Only from then on do held-out cells decide which
    weights are best, when the learning rate falls and when training stops: by their ELBO, whatever was trained with.
    Running averages of the weights, over about the last ninth of the steps, are what is measured and kept: with a high
    learning rate the weights themselves never come to rest (polynomial-decay averaging, Shamir & Zhang 2013, arXiv
    1212.1824). The model has the averaged weights while a record is looked at.

    Parameters
    ----------
    vae
        The model, on the device that computes; changed in place.
    source
        The cells.
    split
        Cells to learn from, and cells to hold out.
    config
        Options of the run.
    objective
        What to maximise.
    recipe
        Remedies, combined by `celbo.fit.remedies.combine`.
    learned
        By name of each parameter, which of its numbers are learned (bool, of its shape). The others keep their bits.
        None for all.
    track
        Watches the minibatches.

    Yields
    ------
    Epoch

    Raises
    ------
    DivergedError
        If the loss or its gradient is not finite, and halving the learning rate three times did not help.
    Interrupted
        If a `KeyboardInterrupt` arrives after the first epoch. Before that, the `KeyboardInterrupt` goes on.
    """
    plan = plan_run(len(split.train), config, recipe)
    if recipe.prepare is not None:
        recipe.prepare(vae)
    state = start_training(vae, config.learning_rate, learned)
    kept = _Kept([], state.last_good, Patience())
    watched, follow_every = _watched(split, config.seed), -(-_STEPS_TO_FOLLOW // plan.steps_per_epoch)
    try:
        for epoch in range(plan.epochs):
            started = time.perf_counter()
            minibatches = _minibatches(split.train, plan, config.seed, epoch)
            shown = minibatches if track is None else track(minibatches, plan, kept.history)
            means = _take_steps(state, source, shown, plan, config, objective=objective, recipe=recipe, epoch=epoch)
            with averaged(state):
                _settle_norms(vae, source, split, config.seed)
                held_out = _held_out_terms(vae, source, split, config.seed, objective, state.step)
                use = None
                if len(watched) and (epoch + 1) % follow_every == 0:
                    use = use_of_latent(vae, source, watched, sample=objective.samples_z, seed=config.seed)
                seconds = time.perf_counter() - started
                record = _record(epoch, state.step, state.shown_kl_weight, seconds, means, held_out, use)
                # One assignment: an interrupt finds an epoch either finished or not begun.
                kept, decision = _decide(kept, record, vae, config.patience, counts=state.step >= plan.warmup_steps)
                yield record
            state.last_good = state_of(vae)
            if decision == "fall":
                lower_rate(state)
            elif decision == "stop":
                break
    except KeyboardInterrupt:
        if not kept.history:
            raise
        vae.load_state_dict(kept.best, assign=True)  # copies: half a step has changed nothing in them
        raise Interrupted(kept.history) from None
    vae.load_state_dict(kept.best, assign=True)  # parameters of their own again


def _take_steps(
    state: TrainingState,
    source: Source,
    minibatches: Iterable[Rows],
    plan: Plan,
    config: TrainConfig,
    *,
    objective: Objective,
    recipe: Recipe,
    epoch: int,
) -> list[float]:
    """Take a step for each minibatch; return the mean reconstruction, then the mean KL of each dimension."""
    totals = _Totals(state.vae)
    state.vae.train()
    for rows in minibatches:
        terms = take_step(
            state,
            take_filled(state.vae, source, rows),
            rows,
            objective=objective,
            recipe=recipe,
            warmup_steps=plan.warmup_steps,
            rise_steps=plan.rise_steps,
            gradient_clip=config.gradient_clip,
            seed=config.seed,
            epoch=epoch,
        )
        totals.add(terms, len(rows))
    return totals.means()


def _decide(kept: _Kept, record: Epoch, vae: VAE, patience: int, *, counts: bool) -> tuple[_Kept, str]:
    """Return what is kept after one more epoch, and what follows; before held-out cells count, the last weights are."""
    history, weights = [*kept.history, record], state_of(vae)
    if record.validation_elbo is None or not counts:
        return _Kept(history, weights, kept.patience), "better"
    waited, decision = kept.patience.after(record.validation_elbo, patience)
    return _Kept(history, weights if decision == "better" else kept.best, waited), decision


class _Totals:
    """Sums of the terms over the minibatches of an epoch."""

    def __init__(self, vae: VAE):
        device = next(vae.parameters()).device
        self._sums, self._n = torch.zeros(1 + vae.latent_dim, dtype=torch.float64, device=device), 0

    def add(self, terms: ElboTerms | None, n_cells: int) -> None:
        """Add the terms of a minibatch; None for a step that was taken back."""
        if terms is not None:
            self._sums += torch.cat([terms.reconstruction.detach().sum()[None], terms.kl.detach().sum(0)])
            self._n += n_cells

    def means(self) -> list[float]:
        """Mean reconstruction, then the mean KL of each dimension; NaN without a single good step."""
        means: list[float] = (self._sums / self._n if self._n else torch.full_like(self._sums, math.nan)).tolist()
        return means


def _minibatches(rows: Rows, plan: Plan, seed: int, epoch: int) -> list[Rows]:
    """Shuffle the training cells for this epoch, and cut them into minibatches of even size."""
    order = random_stream(seed, Stream.MINIBATCHES, epoch).permutation(rows)
    return np.array_split(order, plan.steps_per_epoch)


def _held_out_terms(
    vae: VAE, source: Source, split: Split, seed: int, objective: Objective, step: int
) -> CellTerms | None:
    """Terms of the held-out cells; None if there are none, and an error if they are not finite."""
    if not split.validation.size:
        return None
    terms = cell_terms(vae, source, split.validation, seed=seed, objective=objective)
    if not (is_finite := np.isfinite(terms.elbo)).all():
        raise DivergedError(
            f"after step {step} the ELBO of held-out cells is not finite, the first in row "
            f"{split.validation[~is_finite][0]}: look at this cell for extreme values, or lower the learning rate."
        )
    return terms


def _watched(split: Split, seed: int) -> Rows:
    """Choose held-out cells to watch, few beside the training cells."""
    n = min(_MOST_WATCHED, max(_FEWEST_WATCHED, round(_WATCHED_SHARE * len(split.train))))
    return np.sort(random_stream(seed, Stream.WATCHED).permutation(split.validation)[:n])


def _settle_norms(vae: VAE, source: Source, split: Split, seed: int) -> None:
    """Take means and variances of batch norms again, because those of training belong to weights before averaging.

    They are taken over minibatches of a random sample, with z drawn as in training.
    """
    norms = [layer for layer in vae.modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    if not norms:
        return
    momentum = [layer.momentum for layer in norms]
    dropouts = [layer for layer in vae.modules() if isinstance(layer, torch.nn.Dropout)]
    vae.train()
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # plain means from here on
    for dropout in dropouts:
        dropout.eval()
    device = next(vae.parameters()).device
    rows = random_stream(seed, Stream.NORMS).permutation(split.train)[:_CELLS_FOR_NORMS]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for piece in np.array_split(rows, max(1, len(rows) // 512)):
            cells = take_filled(vae, source, piece)
            mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
            eps = torch.randn(mu_z.shape, generator=generator).to(device)
            vae.likelihood(
                vae.reparameterize(mu_z, logvar_z, eps), context=context_of(vae, cells), library=cells.library
            )
    for layer, before in zip(norms, momentum, strict=True):
        layer.momentum = before
    vae.eval()


def _record(
    epoch: int,
    step: int,
    kl_weight: float,
    seconds: float,
    train: list[float],
    held_out: CellTerms | None,
    use: UseOfLatent | None,
) -> Epoch:
    train_reconstruction, *train_kl = train
    reconstruction = kl = None
    if held_out is not None:
        reconstruction = float(held_out.reconstruction.mean(dtype=np.float64))
        kl = held_out.kl.mean(0, dtype=np.float64).tolist()
    return Epoch(
        epoch=epoch + 1,
        step=step,
        kl_weight=kl_weight,
        seconds=seconds,
        train_elbo=train_reconstruction - sum(train_kl),
        train_reconstruction=train_reconstruction,
        train_kl=sum(train_kl),
        validation_elbo=None if reconstruction is None or kl is None else reconstruction - sum(kl),
        validation_reconstruction=reconstruction,
        validation_kl=None if kl is None else sum(kl),
        kl_per_dim=tuple(train_kl if kl is None else kl),
        active_units=None if use is None else int((use.mu_z.var(0) > ACTIVE).sum()),
        ablation=None if use is None else float(use.lost[0].mean()),
    )
