"""The training loop, as a generator of epochs: encode, decode, terms, penalty, step, yield."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.errors import DivergedError, UsageError
from celbo.fit.remedies import Recipe, linear_warmup
from celbo.minibatch import Rows, Source
from celbo.model.ablation import UseOfLatent, use_of_latent
from celbo.model.classifier import label_loss
from celbo.model.inference import CellTerms, cell_terms
from celbo.model.information import ACTIVE, mutual_information
from celbo.model.objective import OBJECTIVES, ElboTerms, Objective
from celbo.model.vae import VAE, context_of, draw_noise
from celbo.streams import Stream, random_stream

__all__ = ["Epoch", "Plan", "Split", "TrainConfig", "epochs", "plan_run", "settle_device", "split_cells"]

# How often training may come back from numbers that are not finite, each time with half the learning rate.
_SECOND_CHANCES = 3
# Fewer steps than this in an epoch, and the minibatches of a small data set are made smaller.
_STEPS_PER_EPOCH = 8
# How many times the planned run may last where held-out cells gain by it, and up to how many steps.
_LONGER, _MOST_STEPS = 4, 30_000
# How often the learning rate falls where they do not, and to which share of itself.
_FALLS, _FALL = 2, 0.3
# Steps until the learning rate is the highest; of a short run, a tenth at most.
_RISE_STEPS = 100
# The average of the weights reaches back over about a share 1 / (this + 1) of the steps.
_AVERAGED = 8
# Of the held-out cells, as many are watched after each epoch as keep that below a hundredth of its time.
_WATCHED_SHARE, _FEWEST_WATCHED, _MOST_WATCHED = 0.02, 32, 512
# Steps after which they are looked at, at least: short epochs pass by unwatched.
_STEPS_TO_FOLLOW = 20
# Training cells over which means and variances of batch norms are taken for the averaged weights.
_CELLS_FOR_NORMS = 2048
# Nats by which the mutual information must rise for another epoch of steps of the encoder alone.
_RISE_OF_INFORMATION = 0.01
_NO_REMEDY = Recipe()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Examples
    --------
    >>> TrainConfig(max_epochs=20, seed=1).max_epochs
    20
    """

    max_epochs: int | None = None
    """Passes over the training cells at most. None for 100, but up to 200 where they are fewer than 1,600 steps, and
    down to 10 where they are more than 8,000; and as long as held-out cells gain by it four times as many, though not
    more than 30,000 steps."""
    batch_size: int = 128
    """Cells of a minibatch, about: all are of even size, never of one cell; fewer where cells would not fill eight."""
    learning_rate: float = 1e-2
    """Of Adam, after a rise over the first 100 steps."""
    warmup_fraction: float = 0.25
    """Share of the planned run over which the KL weight rises from 0 to 1; at most a half."""
    patience: int = 10
    """Epochs without a better held-out ELBO, counted once the KL weight is 1, after which the learning rate falls to
    .3 of what it was, twice, and then training stops."""
    validation_fraction: float = 0.1
    """Share of the cells held out, for stopping and for choosing the best weights."""
    gradient_clip: float = 1000.0
    """Largest norm of the gradient of the loss (nats per cell)."""
    seed: int = 0
    """Of initial weights, held-out cells, minibatches, noise and dropout."""
    device: str = "auto"
    """Where to compute: "auto" (a CUDA device if there is one), or torch's name of a device."""
    threads: int | None = None
    """Processor threads; None for torch's own choice."""

    def __post_init__(self) -> None:
        """Refuse values out of range, all of them at once."""
        whole = {name: getattr(self, name) for name in ("batch_size", "patience", "seed")}
        if self.max_epochs is not None:
            whole["max_epochs"] = self.max_epochs
        if wrong := [f"{name}={value!r}" for name, value in whole.items() if not isinstance(value, int)]:
            raise UsageError(f"not whole numbers: {', '.join(wrong)}.")
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
                "validation_fraction from 0 to below 1, warmup_fraction from 0 to 0.5, the seed at least 0."
            )


class Split(NamedTuple):
    """Which cells a model learns from, and which it is measured on."""

    train: Rows
    validation: Rows


class Plan(NamedTuple):
    """The planned run, fixed before its first step."""

    n_cells: int
    """Training cells."""
    epochs: int
    steps_per_epoch: int
    rise_steps: int
    """Until the learning rate is the highest."""
    warmup_steps: int
    """Until the KL weight is 1."""


@dataclass(frozen=True)
class Epoch:
    """Record of one pass over all training cells. Terms are unweighted means over cells, in nats."""

    epoch: int
    """From 1."""
    step: int
    """Optimiser steps taken so far."""
    kl_weight: float
    """Weight of the KL term in the last step."""
    seconds: float
    """Of this epoch, validation included."""
    train_elbo: float
    """Over the epoch's minibatches as they came, with dropout, and with the weights of each step."""
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
    where nothing is held out, and in epochs so short that only some of them are looked at."""
    ablation: float | None = None
    """Reconstruction lost, nats per cell, when z is permuted over that sample: what the decoder hears of z."""


Track = Callable[[Iterable[Rows], Plan, list[Epoch]], Iterable[Rows]]
"""Watches the minibatches of an epoch go by, given the plan and the epochs so far; a progress bar, for example."""


def split_cells(
    n_cells: int, validation_fraction: float, seed: int, levels: NDArray[np.float32] | None = None
) -> Split:
    """Choose the held-out cells at random; at least one cell, and one of every level, is left to learn from.

    Parameters
    ----------
    n_cells
        How many cells there are.
    validation_fraction
        Share of them to hold out, at most.
    seed
        Of the choice.
    levels
        Number of the level of each cell in each categorical condition, ``(cells, conditions)``.

    Examples
    --------
    >>> [len(rows) for rows in split_cells(100, 0.1, seed=0)]
    [90, 10]
    """
    order = random_stream(seed, Stream.SPLIT).permutation(n_cells)
    n_validation = min(round(n_cells * validation_fraction), n_cells - 1)
    if levels is not None:  # of every level one cell at least is trained on
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
    Plan(n_cells=1000, epochs=10, steps_per_epoch=10, rise_steps=10, warmup_steps=20)
    """
    # Minibatches are even and at least this large: there is never a last one of a single cell.
    batch_size = max(2, min(config.batch_size, n_cells // _STEPS_PER_EPOCH))
    steps_per_epoch = max(1, n_cells // batch_size)
    planned = most = config.max_epochs
    if planned is None or most is None:
        planned = min(200, max(100, 1600 // steps_per_epoch))
        planned = max(10, min(planned, 8000 // steps_per_epoch))
        most = max(planned, min(_LONGER * planned, _MOST_STEPS // steps_per_epoch))
    steps = planned * steps_per_epoch
    warmup_steps = recipe.warmup_steps(config.warmup_fraction, steps)
    return Plan(n_cells, most, steps_per_epoch, min(_RISE_STEPS, steps // 10), warmup_steps)


def settle_device(name: str) -> torch.device:
    """Turn "auto" or a device's name into the device; a `UsageError` if it is not there."""
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
    """Train a model, epoch by epoch; when the last has been taken, the model has its best weights.

    A step is ``loss = mean(weight * KL - reconstruction)``, gradient clipping, Adam. All its randomness comes from
    ``(seed, epoch, step)``. The weight of the KL term rises linearly to 1 over a number of steps fixed beforehand, if
    no remedy changes that; only from then on do held-out cells decide which weights are best, when the learning rate
    falls and when to stop, by their ELBO, whatever was trained with. What is measured and kept are
    running averages of the weights, over about the last tenth of the steps: with a high learning rate the weights
    themselves never come to rest (polynomial-decay averaging, Shamir & Zhang 2013, arXiv 1212.1824). The model has
    them while a record is looked at.

    Parameters
    ----------
    vae
        The model, on the device that is to compute; changed in place.
    source
        The cells.
    split
        Which of them to learn from, and which to hold out.
    config
        Of the run.
    objective
        What to maximise.
    recipe
        Remedies, as `celbo.fit.remedies.combine` makes them one.
    learned
        By name of each parameter, which of its numbers are learned (bool, of its shape); the others stay as they are,
        to the bit. None for all.
    track
        Watches the minibatches go by.

    Yields
    ------
    Epoch

    Raises
    ------
    DivergedError
        If the loss or its gradient is not finite, and halving the learning rate three times did not help.
    """
    plan = plan_run(len(split.train), config, recipe)
    device = next(vae.parameters()).device
    if recipe.prepare is not None:
        recipe.prepare(vae)
    weights = _as_one(vae)
    stays = (
        None
        if learned is None
        else torch.cat([~_tall(learned[n]).reshape(-1) for n, _ in vae.named_parameters()]).to(device)
    )
    optimizer = torch.optim.Adam([weights], fused=True)
    average = weights.detach().clone()
    last_good, best, best_elbo, epochs_since_best = _weights(vae), _weights(vae), -math.inf, 0
    step, chances, kl_weight, highest_rate, history = 0, _SECOND_CHANCES, 0.0, config.learning_rate, list[Epoch]()
    falls = _FALLS
    watched, follow_every = _watched(split, config.seed), -(-_STEPS_TO_FOLLOW // plan.steps_per_epoch)
    memory: Tensor | None = None  # of the penalty
    encoder_first, most_information = recipe.encoder_steps, 0.0

    for epoch in range(plan.epochs):
        started = time.perf_counter()
        totals, n_seen = torch.zeros(1 + vae.latent_dim, dtype=torch.float64, device=device), 0
        vae.train()
        minibatches = _minibatches(split.train, plan, config.seed, epoch)
        for rows in minibatches if track is None else track(minibatches, plan, history):
            minibatch = source.take(rows).to(device)
            x, context, library = minibatch.x, context_of(vae, minibatch), minibatch.library
            generator = _generator(config.seed, epoch, step)
            noise = draw_noise(vae, len(rows), generator, device)
            terms = objective.terms(vae, x, context, library, noise, minibatch.observed)
            kl_weight = recipe.kl_weight(step, plan.warmup_steps)
            penalty, remembered = recipe.penalty(terms.kl, kl_weight, memory)
            loss = penalty - terms.reconstruction.mean()
            if recipe.pull is not None and terms.z is not None:
                loss = loss + recipe.pull(terms.z, context, generator)
            if vae.classifier is not None and minibatch.labels is not None and terms.z is not None:
                loss = loss + label_loss(vae.classifier, terms.z, minibatch.labels)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            if stays is not None and weights.grad is not None:
                weights.grad.masked_fill_(stays, 0)
            norm = torch.nn.utils.clip_grad_norm_(weights, config.gradient_clip)
            optimizer.param_groups[0]["lr"] = highest_rate * linear_warmup(step, plan.rise_steps)
            step += 1
            if not torch.isfinite(loss + norm):
                chances, highest_rate = chances - 1, highest_rate / 2
                _go_back(vae, last_good, terms, rows, step, chances, highest_rate)
                optimizer.state.clear()
                average.copy_(weights.detach())
                continue
            memory = remembered
            with _encoder_alone(vae, optimizer, step % (encoder_first + 1) != 0):
                optimizer.step()
            average.lerp_(weights.detach(), (_AVERAGED + 1) / (step + _AVERAGED))
            totals += torch.cat([terms.reconstruction.detach().sum()[None], terms.kl.detach().sum(0)])
            n_seen += len(rows)

        with _lent(average, weights):
            _settle_norms(vae, source, split, config.seed)
            held_out = None
            if split.validation.size:
                held_out = cell_terms(vae, source, split.validation, seed=config.seed, objective=objective)
            if held_out is not None and not np.isfinite(held_out.elbo).all():
                row = split.validation[~np.isfinite(held_out.elbo)][0]
                raise DivergedError(
                    f"after step {step} the ELBO of held-out cells is not finite, the first in row {row}: "
                    "look at this cell for extreme values, or lower the learning rate."
                )
            train = totals / n_seen if n_seen else torch.full_like(totals, math.nan)
            use = None
            if len(watched) and (encoder_first or (epoch + 1) % follow_every == 0):
                sample = objective.samples_z
                use = use_of_latent(vae, source, watched, sample=sample, seed=config.seed)
            shown_weight = kl_weight if memory is None else kl_weight * float(memory.mean())
            seconds = time.perf_counter() - started
            record = _record(epoch, step, shown_weight, seconds, train.tolist(), held_out, use)
            history.append(record)
            yield record
            averaged = _weights(vae)

        if encoder_first:  # as long as it tells the encoder more
            information = math.inf if use is None else mutual_information(use.mu_z, use.logvar_z)
            rises = information > most_information + _RISE_OF_INFORMATION
            encoder_first = encoder_first if rises and step < plan.warmup_steps else 0
            most_information = most_information if use is None else information
        last_good = _weights(vae)
        if record.validation_elbo is None or step < plan.warmup_steps:
            best = averaged
            continue
        epochs_since_best += 1
        if record.validation_elbo > best_elbo:
            best, best_elbo, epochs_since_best = averaged, record.validation_elbo, 0
        if epochs_since_best >= config.patience:
            if not falls:
                break
            falls, highest_rate, epochs_since_best = falls - 1, highest_rate * _FALL, 0

    vae.load_state_dict(best, assign=True)  # parameters of their own again


def _minibatches(rows: Rows, plan: Plan, seed: int, epoch: int) -> list[Rows]:
    """Cut the training cells, in an order of this epoch's own, into minibatches of even size."""
    order = random_stream(seed, Stream.MINIBATCHES, epoch).permutation(rows)
    return np.array_split(order, plan.steps_per_epoch)


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """All randomness of a step, whatever came before it."""
    state = np.random.SeedSequence([seed, int(Stream.STEP), epoch, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _as_one(vae: VAE) -> Tensor:
    """One vector of all weights, of which the model's parameters become views; so do their gradients.

    Clipping and Adam then are a few operations, however many parameters there are. A wide matrix is laid down by
    columns: the product of sparse counts with the encoder's first wants the weights of a gene side by side.
    """
    parameters = list(vae.parameters())
    weights = torch.cat([_tall(parameter.detach()).reshape(-1) for parameter in parameters])
    gradient = torch.zeros_like(weights)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, *vectors in zip(parameters, weights.split(sizes), gradient.split(sizes), strict=True):
        value, grad = (vector.view_as(_tall(parameter)) for vector in vectors)
        as_it_was = value.shape == parameter.shape
        parameter.data, parameter.grad = (value, grad) if as_it_was else (value.t(), grad.t())
    weights.requires_grad_().grad = gradient
    return weights


def _tall(parameter: Tensor) -> Tensor:
    """A wide matrix transposed; anything else as it is."""
    return parameter.t() if parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0] else parameter


def _watched(split: Split, seed: int) -> Rows:
    """A sample of the held-out cells, small beside the training cells."""
    n = min(_MOST_WATCHED, max(_FEWEST_WATCHED, round(_WATCHED_SHARE * len(split.train))))
    return np.sort(random_stream(seed, Stream.WATCHED).permutation(split.validation)[:n])


@contextmanager
def _encoder_alone(vae: VAE, optimizer: torch.optim.Optimizer, wanted: bool) -> Iterator[None]:
    """Let a step of the optimiser move the encoder only, where that is wanted: the rest stays, moments included."""
    if not wanted:
        yield
        return
    (weights,) = optimizer.param_groups[0]["params"]
    rest = sum(value.numel() for name, value in vae.named_parameters() if not name.startswith(_OF_ENCODER))
    others = slice(len(weights) - rest, None)  # parameters come in the order in which the model has them
    names = ("exp_avg", "exp_avg_sq")
    kept = weights.detach()[others].clone()
    moments = {name: optimizer.state[weights][name][others].clone() for name in names if optimizer.state[weights]}
    yield
    weights.detach()[others] = kept
    for name in names:
        optimizer.state[weights][name][others] = moments.get(name, 0.0)


_OF_ENCODER = ("embed_context.", "encoder.", "fc_mu.", "fc_logvar.", "norm_mu.")


def _settle_norms(vae: VAE, source: Source, split: Split, seed: int) -> None:
    """Take means and variances of batch norms anew: those they ran with belong to weights before averaging.

    Of minibatches of a random sample, whatever the order of the cells, with z drawn as in training.
    """
    norms = [layer for layer in vae.modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    if not norms:
        return
    momentum = [layer.momentum for layer in norms]
    dropouts = [layer for layer in vae.modules() if isinstance(layer, torch.nn.Dropout)]
    vae.train()
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # plain means over what follows
    for dropout in dropouts:
        dropout.eval()
    device = next(vae.parameters()).device
    rows = random_stream(seed, Stream.NORMS).permutation(split.train)[:_CELLS_FOR_NORMS]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for piece in np.array_split(rows, max(1, len(rows) // 512)):
            cells = source.take(piece).to(device)
            mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
            eps = torch.randn(mu_z.shape, generator=generator).to(device)
            vae.likelihood(
                vae.reparameterize(mu_z, logvar_z, eps), context=context_of(vae, cells), library=cells.library
            )
    for layer, before in zip(norms, momentum, strict=True):
        layer.momentum = before
    vae.eval()


@contextmanager
def _lent(average: Tensor, weights: Tensor) -> Iterator[None]:
    """Put the average in the place of the weights for a while."""
    kept = weights.detach().clone()
    weights.data.copy_(average)
    try:
        yield
    finally:
        weights.data.copy_(kept)


def _weights(vae: VAE) -> dict[str, Tensor]:
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in vae.state_dict().items()}


def _go_back(
    vae: VAE,
    last_good: dict[str, Tensor],
    terms: ElboTerms,
    rows: Rows,
    step: int,
    chances: int,
    learning_rate: float,
) -> None:
    """Go back to the weights before this epoch; `DivergedError` when out of chances."""
    if chances < 0:
        parts = {"reconstruction": terms.reconstruction, "KL": terms.kl.sum(-1)}
        bad = {name: ~torch.isfinite(values) for name, values in parts.items()}
        where = [
            f"the {name} of {int(cells.sum())} of {len(rows)} cells, the first in row {rows[int(cells.nonzero()[0])]}"
            for name, cells in bad.items()
            if cells.any()
        ]
        raise DivergedError(
            f"training diverged at step {step}: not finite are {'; '.join(where) or 'the gradients'}. "
            f"Going back with half the learning rate {_SECOND_CHANCES} times ({2 * learning_rate:g} at last) did not "
            "help: start with a lower one (learning_rate, --learning-rate), and look at these cells for extreme values."
        )
    vae.load_state_dict(last_good)


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
