"""One training step, and everything that training remembers from one step to the next."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from celbo.errors import DivergedError
from celbo.fit.remedies import Recipe, linear_warmup
from celbo.kernels.dispatch import adam
from celbo.kernels.reference import AdamState
from celbo.minibatch import Minibatch, Rows
from celbo.model.classifier import label_loss
from celbo.model.objective import ElboTerms, Objective
from celbo.model.vae import VAE, context_of, draw_noise
from celbo.streams import Stream

__all__ = [
    "Patience",
    "TrainingState",
    "averaged",
    "loss_of",
    "lower_rate",
    "start_training",
    "state_of",
    "take_step",
]

_SECOND_CHANCES = 3
"""How often training may go back after numbers that are not finite, each time with half the learning rate."""
_AVERAGED = 8
"""The running average of the weights covers about the last 1 / (this + 1) of the steps."""
_FALLS, _FALL = 2, 0.3
"""How often the learning rate falls when held-out cells stop gaining, and to which share of itself."""


@dataclass(eq=False)
class TrainingState:
    """Everything that a step changes."""

    vae: VAE
    weights: Tensor
    """All weights in one vector. The model's parameters are views of it, and their gradients of its gradient."""
    adam: AdamState
    """What Adam remembers, and the running average of the weights."""
    learning_rate: float
    """Highest learning rate from here on."""
    last_good: dict[str, Tensor]
    """Weights to go back to after numbers that are not finite."""
    frozen: Tensor | None = None
    """Which numbers of the weights stay as they are, bool; None if all are learned."""
    step: int = 0
    """Steps taken so far."""
    adam_steps: int = 0
    """Steps since Adam began with moments of 0."""
    chances: int = _SECOND_CHANCES
    kl_weight: float = 0.0
    """Weight of the KL in the last step."""
    memory: Tensor | None = None
    """What the penalty remembers, such as the weights of soft free bits."""

    @property
    def shown_kl_weight(self) -> float:
        """Weight of the KL, averaged over latent dimensions if the penalty has a weight for each."""
        return self.kl_weight if self.memory is None else self.kl_weight * float(self.memory.mean())


class Patience(NamedTuple):
    """How long held-out cells have not gained."""

    best_elbo: float = -math.inf
    epochs_since_best: int = 0
    falls_left: int = _FALLS

    def after(self, elbo: float, patience: int) -> tuple["Patience", str]:
        """Return the patience after one more epoch, and what follows from it.

        Parameters
        ----------
        elbo
            Mean ELBO of the held-out cells after this epoch.
        patience
            Epochs without a better ELBO after which the learning rate falls, or training stops.

        Returns
        -------
        tuple
            The new patience; and "better", "wait", "fall" (of the learning rate) or "stop".

        Examples
        --------
        >>> Patience(best_elbo=-5.0, epochs_since_best=9).after(-6.0, patience=10)
        (Patience(best_elbo=-5.0, epochs_since_best=0, falls_left=1), 'fall')
        """
        if elbo > self.best_elbo:
            return Patience(elbo, 0, self.falls_left), "better"
        waited = self.epochs_since_best + 1
        if waited < patience:
            return self._replace(epochs_since_best=waited), "wait"
        if not self.falls_left:
            return self._replace(epochs_since_best=waited), "stop"
        return Patience(self.best_elbo, 0, self.falls_left - 1), "fall"


def start_training(vae: VAE, learning_rate: float, learned: Mapping[str, Tensor] | None = None) -> TrainingState:
    """Lay all weights into one vector, and start Adam and the running average.

    Parameters
    ----------
    vae
        The model, on the device that computes; its parameters become views of the vector.
    learning_rate
        Highest learning rate.
    learned
        By name of each parameter, which of its numbers are learned (bool, of its shape); None for all.
    """
    weights = _as_one(vae)
    frozen = None
    if learned is not None:
        masks = [~_tall(learned[name]).reshape(-1) for name, _ in vae.named_parameters()]
        frozen = torch.cat(masks).to(weights.device)
    return TrainingState(
        vae=vae,
        weights=weights,
        adam=AdamState.of(weights),
        learning_rate=learning_rate,
        last_good=state_of(vae),
        frozen=frozen,
    )


def take_step(
    state: TrainingState,
    minibatch: Minibatch,
    rows: Rows,
    *,
    objective: Objective,
    recipe: Recipe,
    warmup_steps: int,
    rise_steps: int,
    gradient_clip: float,
    seed: int,
    epoch: int,
) -> ElboTerms | None:
    """Take one step: terms, loss, gradient, clipping, Adam, running average.

    If the loss or its gradient is not finite, the model goes back to the last good weights with half the learning rate.

    Parameters
    ----------
    state
        Changed in place.
    minibatch, rows
        The cells, on the device of the model, and their positions in the data.
    objective, recipe
        What to maximise, and how.
    warmup_steps, rise_steps
        Steps until the KL weight, and the learning rate, are at their highest.
    gradient_clip
        Largest norm of the gradient.
    seed, epoch
        All random numbers of the step come from these and the number of the step.

    Returns
    -------
    ElboTerms or None
        The terms of the minibatch; None if the model went back.

    Raises
    ------
    DivergedError
        If the model has gone back too often.
    """
    vae, weights = state.vae, state.weights
    assert weights.grad is not None
    context = context_of(vae, minibatch)
    generator = _step_generator(seed, epoch, state.step)
    noise = draw_noise(vae, len(rows), generator, weights.device)
    terms = objective.terms(vae, minibatch.x, context, minibatch.library, noise, minibatch.observed)
    state.kl_weight = recipe.kl_weight(state.step, warmup_steps)
    loss, memory = loss_of(vae, terms, minibatch, recipe, state.kl_weight, state.memory, generator)
    weights.grad.zero_()
    loss.backward()
    if state.frozen is not None:
        weights.grad.masked_fill_(state.frozen, 0)
    norm = float(weights.grad.norm())
    rate = state.learning_rate * linear_warmup(state.step, rise_steps)
    state.step += 1
    if not math.isfinite(float(loss.detach()) + norm):
        _go_back(state, terms, rows)
        return None
    state.memory, state.adam_steps = memory, state.adam_steps + 1
    factor, share = min(1.0, gradient_clip / (norm + 1e-6)), (_AVERAGED + 1) / (state.step + _AVERAGED)
    adam(weights.data, weights.grad, state.adam, factor=factor, rate=rate, step=state.adam_steps, share=share)
    return terms


def loss_of(
    vae: VAE,
    terms: ElboTerms,
    minibatch: Minibatch,
    recipe: Recipe,
    kl_weight: float,
    memory: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of a minibatch, nats per cell, and what the penalty remembers.

    It is the penalty of the KL minus the reconstruction, plus the pull on z and the loss of labels if there are any.
    """
    penalty, memory = recipe.penalty(terms.kl, kl_weight, memory)
    loss = penalty - terms.reconstruction.mean()
    if terms.z is None:
        return loss, memory
    if recipe.pull is not None:
        loss = loss + recipe.pull(terms.z, context_of(vae, minibatch), generator)
    if vae.classifier is not None and minibatch.labels is not None:
        loss = loss + label_loss(vae.classifier, terms.z, minibatch.labels)
    return loss, memory


@contextmanager
def averaged(state: TrainingState) -> Iterator[None]:
    """Put the running average in the place of the weights for a while."""
    weights = state.weights.detach().clone()
    state.weights.data.copy_(state.adam.average)
    try:
        yield
    finally:
        state.weights.data.copy_(weights)


def state_of(vae: VAE) -> dict[str, Tensor]:
    """Copy the weights and buffers of a model."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in vae.state_dict().items()}


def lower_rate(state: TrainingState) -> None:
    """Let the learning rate fall; Adam keeps its moments."""
    state.learning_rate *= _FALL


def _step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Make the generator of a step; earlier steps do not change it."""
    numbers = np.random.SeedSequence([seed, int(Stream.STEP), epoch, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(numbers[0]))


def _as_one(vae: VAE) -> Tensor:
    """Make one vector of all weights; the model's parameters, and their gradients, become views of it.

    Clipping and Adam then are a few operations, however many parameters there are. A wide matrix is stored by columns:
    the product of sparse counts with the encoder's first layer needs the weights of a gene side by side.
    """
    parameters = list(vae.parameters())
    weights = torch.cat([_tall(parameter.detach()).reshape(-1) for parameter in parameters])
    gradient = torch.zeros_like(weights)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, *vectors in zip(parameters, weights.split(sizes), gradient.split(sizes), strict=True):
        value, grad = (vector.view_as(_tall(parameter)) for vector in vectors)
        is_same_shape = value.shape == parameter.shape
        parameter.data, parameter.grad = (value, grad) if is_same_shape else (value.t(), grad.t())
    weights.requires_grad_().grad = gradient
    return weights


def _tall(parameter: Tensor) -> Tensor:
    """Transpose a wide matrix; leave anything else."""
    return parameter.t() if parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0] else parameter


def _go_back(state: TrainingState, terms: ElboTerms, rows: Rows) -> None:
    """Go back to the last good weights with half the learning rate.

    Adam loses its moments, and the average becomes these weights. The number of steps, which sets the rate of the
    average, and what the penalty remembers stay.
    """
    state.chances, state.learning_rate = state.chances - 1, state.learning_rate / 2
    if state.chances < 0:
        parts = {"reconstruction": terms.reconstruction, "KL": terms.kl.sum(-1)}
        bad = {name: ~torch.isfinite(values) for name, values in parts.items()}
        where = [
            f"the {name} of {int(cells.sum())} of {len(rows)} cells, the first in row {rows[int(cells.nonzero()[0])]}"
            for name, cells in bad.items()
            if cells.any()
        ]
        raise DivergedError(
            f"training diverged at step {state.step}: not finite are {'; '.join(where) or 'the gradients'}. Going back "
            f"with half the learning rate {_SECOND_CHANCES} times ({2 * state.learning_rate:g} at last) did not help. "
            "Start with a lower one (learning_rate, --learning-rate), and look at these cells for extreme values."
        )
    state.vae.load_state_dict(state.last_good)
    state.adam_steps = 0
    for moment in (state.adam.first, state.adam.second):
        moment.zero_()
    state.adam.average.copy_(state.weights.detach())
