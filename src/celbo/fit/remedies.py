"""Remedies for posterior collapse, by name: schedules of the KL weight, penalties, starts, options of the model.

A remedy is a row of `REMEDIES`. Remedies that change different parts of a training can be combined; `combine` makes one
`Recipe` of them. Everything is counted in steps. Remedies do not change what is reported: the unweighted terms of the
bound.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from celbo.errors import UsageError
from celbo.model.vae import VAE

__all__ = [
    "REMEDIES",
    "REMOVED",
    "Recipe",
    "Remedy",
    "combine",
    "contradictions",
    "known_remedies",
    "linear_warmup",
    "recipe_for",
    "refuse_unfit",
    "remedy_table",
    "without_annealing",
]

_WARMUP_FRACTION = 0.25
"""Share of the planned run for a schedule that is asked for by name while ``warmup_fraction`` is 0."""
_CAPACITY_PULL = 10.0
"""Weight gamma of the distance between the KL and its capacity."""
_SOFT_STEP, _SOFT_BAND, _LEAST_WEIGHT = 0.1, 1.05, 1e-2
"""Soft free bits: relative change of a weight in a step; top of the band in which the KL is held; lowest weight."""

Schedule = Callable[[float], float]
"""Function from the share of the annealing, 0 to 1, to the KL weight."""
Penalty = Callable[[Tensor, float, Tensor | None], tuple[Tensor, Tensor | None]]
"""Function from ``(kl (cells, latent_dim), weight, memory)`` to a loss, and the memory for the next step."""
Pull = Callable[[Tensor, Tensor | None, Generator], Tensor]
"""Function from ``(z (cells, latent_dim), context, generator)`` to a loss."""


# Schedules: the KL weight at a share of the annealing.


def linear(share: float) -> float:
    """Rise in equal steps (Sonderby 2016, arXiv 1602.02282)."""
    return share


def sigmoid(share: float) -> float:
    """Rise slowly at the start and at the end (Bowman 2016, arXiv 1511.06349), from exactly 0 to exactly 1."""
    low, high = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(-6))
    return (1 / (1 + math.exp(6 - 12 * share)) - low) / (high - low)


def cosine(share: float) -> float:
    """Rise along half a cosine wave."""
    return (1 - math.cos(math.pi * share)) / 2


def cyclical(share: float, cycles: float) -> float:
    """Rise in the first half of each cycle and stay at 1 in the second (Fu 2019, arXiv 1903.10145)."""
    return 1.0 if share >= 1 else min(1.0, 2 * (share * cycles % 1))


def silence_then_linear(share: float) -> float:
    """Stay at 0 for a third of the annealing, as an autoencoder with noise; then rise linearly."""
    return max(0.0, (share - 1 / 3) * 1.5)


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Rise linearly from near 0 to 1, then stay at 1; every rise that is counted in steps uses it.

    Parameters
    ----------
    step
        Optimiser steps taken so far.
    warmup_steps
        Steps until it is 1; 0 for 1 from the start.

    Returns
    -------
    float
        Above 0 and at most 1.

    Examples
    --------
    >>> [linear_warmup(step, 4) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / max(1, warmup_steps))


# Penalties: the cost of the KL of a minibatch.


def plain_kl(kl: Tensor, weight: float, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``weight * sum_j KL_j``: the ELBO's own penalty, if the weight is 1."""
    return weight * kl.sum(-1).mean(), memory


def free_bits(kl: Tensor, weight: float, memory: Tensor | None, floor: float) -> tuple[Tensor, Tensor | None]:
    """``weight * sum_j max(floor, mean KL_j)`` (Kingma 2016, arXiv 1606.04934): the first nats are free."""
    return weight * kl.mean(0).clamp(min=floor).sum(), memory


def free_bits_together(kl: Tensor, weight: float, memory: Tensor | None, floor: float) -> tuple[Tensor, Tensor | None]:
    """``weight * max(floor, sum_j mean KL_j)``: free bits for all dimensions as one group."""
    return weight * kl.mean(0).sum().clamp(min=floor), memory


def soft_free_bits(kl: Tensor, weight: float, memory: Tensor | None, floor: float) -> tuple[Tensor, Tensor | None]:
    """Give each dimension a weight of its own, which moves by a tenth to hold its KL above the floor.

    A weight falls where ``mean KL_j < floor``, rises where it is above ``1.05 floor``, and is never above 1 (Chen 2017,
    arXiv 1611.02731, here for each dimension).
    """
    weights = kl.new_ones(kl.shape[1]) if memory is None else memory
    mean = kl.mean(0)
    with torch.no_grad():
        step = 1 + _SOFT_STEP * ((mean > _SOFT_BAND * floor).to(mean) - (mean < floor).to(mean))
        moved = (weights * step).clamp(_LEAST_WEIGHT, 1.0)
    return weight * (weights * mean).sum(), moved


def capacity(kl: Tensor, weight: float, memory: Tensor | None, nats: float) -> tuple[Tensor, Tensor | None]:
    """``10 |KL - C|``, C rising with the schedule to ``nats`` (Burgess 2018, arXiv 1804.03599)."""
    return _CAPACITY_PULL * (kl.sum(-1).mean() - nats * weight).abs(), memory


def mmd(z: Tensor, context: Tensor | None, generator: Generator, weight: float) -> Tensor:
    """``weight * MMD**2(z, N(0, I))`` over a minibatch, kernel ``C / (C + |z - z'|**2)`` (InfoVAE, Zhao 2019)."""
    prior = torch.randn(z.shape, generator=generator).to(z.device)
    n = len(z)
    off_diagonal = (_kernel(z, z) + _kernel(prior, prior)).sum() - 2 * n  # a point has distance 0 to itself
    return weight * (off_diagonal / max(1, n * (n - 1)) - 2 * _kernel(z, prior).mean())


def match_levels(z: Tensor, context: Tensor | None, generator: Generator, weight: float) -> Tensor:
    """``weight * sum_l (n_l / n) MMD**2(z of level l, z of the others)`` over a minibatch (trVAE, Lotfollahi 2020).

    Over the levels of all categorical conditions that at least two cells have and two have not; the kernel of `mmd`.
    """
    if context is None:
        return z.new_zeros(())
    n_cells = context.sum(0)
    one_hot = ((context == 0) | (context == 1)).all(0) & (n_cells >= 2) & (n_cells <= len(z) - 2)
    has, n = context[:, one_hot].T, n_cells[one_hot]
    others = len(z) - n
    near = _kernel(z, z) - torch.eye(len(z), device=z.device)
    of_level = has @ near
    within = (of_level * has).sum(1)
    across = of_level.sum(1) - within
    among_others = near.sum() - within - 2 * across
    squared = within / (n * (n - 1)) + among_others / (others * (others - 1)) - 2 * across / (n * others)
    return weight * (n / len(z) * squared).sum()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    scale = 2.0 * a.shape[1]
    return scale / (scale + (a[:, None] - b[None]).square().sum(-1))


def start_narrow(vae: VAE) -> None:
    """Start with narrow posteriors, ``logvar_z`` near -4: the decoder gets a clear signal from the first step."""
    with torch.no_grad():
        vae.fc_logvar.bias.fill_(-4.0)


class Remedy(NamedTuple):
    """A row of `REMEDIES`."""

    name: str
    part: str
    """The part of a training that it changes; two remedies for one part contradict each other."""
    number: float | None
    """Default of the number after the colon; None if it takes no number."""
    meaning: str
    """One line for people."""
    source: str
    schedule: Callable[..., float] | None = None
    stretch: float = 1.0
    """Length of the annealing, in units of the warm-up."""
    penalty: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    pull: Callable[..., Tensor] | None = None
    prepare: Callable[[VAE], None] | None = None
    options: Callable[[float], Mapping[str, Any]] | None = None
    """Options of the model that it sets, if it changes the model."""
    is_bound: bool = True
    """Whether training still ends on the ELBO itself."""


_INTO_DECODER = "skip connections"

REMEDIES: dict[str, Remedy] = {
    row.name: row
    for row in (
        Remedy("linear", "schedule", None, "KL weight rises in equal steps", "Sonderby 2016", schedule=linear),
        Remedy("sigmoid", "schedule", None, "KL weight rises along a sigmoid", "Bowman 2016", schedule=sigmoid),
        Remedy("cosine", "schedule", None, "KL weight rises along half a wave", "", schedule=cosine),
        Remedy(
            *("cyclical", "schedule", 4, "KL weight rises again and again, this many times", "Fu 2019"),
            schedule=cyclical,
            stretch=2.0,
        ),
        Remedy(
            *("autoencoder_start", "schedule", None, "no KL at the start, and narrow posteriors", ""),
            schedule=silence_then_linear,
            stretch=1.5,
            prepare=start_narrow,
        ),
        Remedy(
            *("free_bits", "penalty", 0.05, "the first nats of each dimension cost nothing", "Kingma 2016"),
            penalty=free_bits,
            is_bound=False,
        ),
        Remedy(
            *("free_bits_together", "penalty", 1.0, "the first nats of all dimensions together cost nothing", ""),
            penalty=free_bits_together,
            is_bound=False,
        ),
        Remedy(
            *("soft_free_bits", "penalty", 0.1, "each dimension keeps a KL of at least this many nats", "Chen 2017"),
            penalty=soft_free_bits,
            is_bound=False,
        ),
        Remedy(
            *("capacity", "penalty", 10.0, "the KL is held at this many nats", "Burgess 2018"),
            penalty=capacity,
            is_bound=False,
        ),
        Remedy(
            *("mmd", "pull", 10.0, "all cells together are pulled to the prior, with this weight", "Zhao 2019"),
            pull=mmd,
            is_bound=False,
        ),
        Remedy(
            *("match_levels", "pull", 10.0, "cells of each level are pulled to cells of the others", "Lotfollahi 2020"),
            pull=match_levels,
            is_bound=False,
        ),
        Remedy("beta", "scale", 1.0, "weight of the KL at the end of its rise", "Higgins 2017", is_bound=False),
        Remedy(
            *("norm_mu", "norm of mu_z", None, "posterior means are normalised: every dimension varies", "Zhu 2020"),
            options=lambda _: {"norm_mu": True},
        ),
        Remedy(
            *("layer_norm", "norm", None, "hidden layers are normalised", "Ba 2016"),
            options=lambda _: {"norm": "layer"},
        ),
        Remedy(
            *("skip", _INTO_DECODER, None, "z goes into every layer of the decoder", "Dieng 2019"),
            options=lambda _: {"skip": True},
        ),
        Remedy(
            *("context_skip", _INTO_DECODER, None, "conditions go into every layer of the decoder", ""),
            options=lambda _: {"context_skip": True},
        ),
        Remedy(
            *("shallow", "decoder", 128, "one hidden layer of this width on either side, with layer norm", ""),
            options=lambda width: {
                "hidden_dims": (int(width),),
                "decoder_dims": None,
                "norm": "layer",
                "skip": False,
                "context_skip": False,
            },
        ),
        Remedy(
            *("linear_decoder", "decoder", None, "a decoder without hidden layers", "Svensson 2020"),
            options=lambda _: {"decoder_dims": ()},
        ),
        Remedy(
            *("narrow_decoder", "decoder", 32, "a decoder with one hidden layer of this width", ""),
            options=lambda width: {"decoder_dims": (int(width),)},
        ),
        Remedy(
            *("decoder_dropout", "dropout of the decoder", 0.5, "share of the decoder's units zeroed in training", ""),
            options=lambda share: {"decoder_dropout": share},
        ),
        Remedy(
            *("learned_sigma", "sigma", None, "the Gaussian's sigma is learned for each gene", "Rybkin 2021"),
            options=lambda _: {"dispersion": "gene"},
        ),
        Remedy(
            *("vamp_prior", "prior", 100, "prior of this many learned pseudo-cells", "Tomczak 2018"),
            options=lambda size: {"prior": f"vamp:{int(size)}"},
        ),
        Remedy(
            *("mixture_prior", "prior", 20, "prior of this many normal distributions", ""),
            options=lambda size: {"prior": f"mixture:{int(size)}"},
        ),
        Remedy(
            *("conditional_prior", "prior", None, "prior that depends on the conditions", "Sohn 2015"),
            options=lambda _: {"prior": "conditional"},
        ),
    )
}
"""Every remedy by name; ``free_bits:0.1`` gives it a number."""

REMOVED = {"aggressive": "it never helped in our own tables (docs/collapse.md), and lengthened training"}
"""Remedies of older versions, and why they were removed."""

_WHOLE = {"cyclical", "shallow", "narrow_decoder", "vamp_prior", "mixture_prior"}


class Recipe(NamedTuple):
    """Remedies of a run, combined. Without remedies it is a linear warm-up of the plain KL."""

    schedule: Schedule = linear
    stretch: float = 1.0
    has_schedule: bool = False
    """Whether a schedule was asked for by name."""
    beta: float = 1.0
    penalty: Penalty = plain_kl
    pull: Pull | None = None
    prepare: Callable[[VAE], None] | None = None
    options: Mapping[str, Any] = {}
    is_bound: bool = True

    def warmup_steps(self, fraction: float, steps: int) -> int:
        """Return the steps until the KL weight has its final value: at most half of the planned steps."""
        fraction = fraction or (_WARMUP_FRACTION if self.has_schedule else 0.0)
        return int(min(0.5, self.stretch * fraction) * steps)

    def kl_weight(self, step: int, warmup_steps: int) -> float:
        """Return the KL weight at a step, for a warm-up of this many steps."""
        return self.beta * self.schedule(linear_warmup(step, warmup_steps))


def without_annealing(recipe: Recipe) -> Recipe:
    """Keep what a recipe maximises, for weights that are trained already: no schedule, and no start of its own.

    Examples
    --------
    >>> without_annealing(Recipe(beta=4.0, prepare=start_narrow)).prepare is None
    True
    """
    return recipe._replace(schedule=linear, has_schedule=False, prepare=None)


def combine(remedies: Sequence[str]) -> Recipe:
    """Combine remedies into one recipe.

    Parameters
    ----------
    remedies
        Names of `REMEDIES`, with a number after a colon if they take one: ``"cyclical"``, ``"free_bits:0.1"``.

    Raises
    ------
    UsageError
        If a name is not known, a number cannot be used, or two remedies contradict each other. It lists the table.

    Examples
    --------
    >>> recipe = combine(["cyclical", "free_bits:0.1", "skip"])
    >>> recipe.options
    {'skip': True}
    >>> [round(recipe.kl_weight(step, warmup_steps=8), 2) for step in (0, 1, 2, 3, 100)]
    [1.0, 0.0, 1.0, 0.0, 1.0]
    """
    if isinstance(remedies, str):
        raise UsageError(f"remedies is the text {remedies!r}; give a list: [{remedies!r}].")
    chosen: dict[str, tuple[Remedy, float]] = {}
    for text in remedies:
        row, number = _parse(text)
        if row.part in chosen:
            other = chosen[row.part][0].name
            both = "twice" if other == row.name else f"and {other!r}, both of which change the {row.part}"
            raise UsageError(f"remedies have {row.name!r} {both}; choose one of them.\n{remedy_table()}")
        chosen[row.part] = row, number
    changed: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for row, number in chosen.values():
        if row.schedule is not None:
            changed |= {"schedule": _with(row.schedule, row, number), "stretch": row.stretch, "has_schedule": True}
        if row.penalty is not None:
            changed["penalty"] = _with(row.penalty, row, number)
        if row.pull is not None:
            changed["pull"] = _with(row.pull, row, number)
        if row.prepare is not None:
            changed["prepare"] = row.prepare
        if row.name == "beta":
            changed["beta"] = number
        if row.options is not None:
            options |= row.options(number)
    is_bound = all(row.is_bound or (row.name == "beta" and number == 1) for row, number in chosen.values())
    return Recipe(**changed, options=options, is_bound=is_bound)


def recipe_for(remedies: Sequence[str], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Recipe:
    """Combine the remedies of a model; raise a `UsageError` if they do not go with its other options.

    Parameters
    ----------
    remedies
        As `combine` takes them.
    options
        Options of `celbo.ExpressionVAE`, and ``has_conditions``: whether there is a condition or a nuisance.
    defaults
        Defaults of the options.
    """
    recipe = combine(remedies)
    refuse_unfit(
        remedies,
        objective=options["objective"],
        likelihood=options["likelihood"],
        prior=recipe.options.get("prior", options["prior"]),
        has_conditions=options["has_conditions"],
    )
    if clashes := contradictions(remedies, options, defaults):
        raise UsageError(" ".join(clashes))
    return recipe


def known_remedies(remedies: Sequence[str]) -> tuple[str, ...]:
    """Drop remedies that older versions had and that were removed; they changed the training only.

    Examples
    --------
    >>> known_remedies(["aggressive:5", "skip"])
    ('skip',)
    """
    return tuple(text for text in remedies if str(text).partition(":")[0] not in REMOVED)


def contradictions(remedies: Sequence[str], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Say which options that were changed from their defaults a remedy would override with another value.

    Examples
    --------
    >>> contradictions(["layer_norm"], {"norm": "none"}, {"norm": "layer"})
    ["remedy 'layer_norm' sets norm='layer', and norm='none' is given; leave one of them out."]
    """
    clashes = []
    for text in remedies:
        row, number = _parse(text)
        for name, value in (row.options(number) if row.options else {}).items():
            if name not in defaults or _plain(options[name]) in (_plain(defaults[name]), _plain(value)):
                continue
            clashes.append(
                f"remedy {text!r} sets {name}={value!r}, and {name}={options[name]!r} is given; leave one of them out."
            )
    return clashes


def refuse_unfit(remedies: Sequence[str], *, objective: str, likelihood: str, prior: str, has_conditions: bool) -> None:
    """Raise a `UsageError` with the table of remedies if a remedy has no meaning for a model.

    Parameters
    ----------
    remedies
        As `combine` takes them.
    objective, likelihood, prior
        Names of the objective, the likelihood, and the prior (which a remedy may have set).
    has_conditions
        Whether the model has a condition or a nuisance.
    """
    rows = {row.name: row for row, _ in map(_parse, remedies)}
    if objective == "autoencoder" and any(row.options is None for row in rows.values()):
        reason = "objective='autoencoder' has no KL for remedies to act on; leave out those that change the training."
    elif "learned_sigma" in rows and likelihood != "gaussian":
        reason = f"remedy 'learned_sigma' is for likelihood='gaussian', not {likelihood!r}."
    elif "mmd" in rows and prior != "normal":
        reason = "remedy 'mmd' pulls all cells to the standard normal, and the prior is another; leave one of them out."
    elif "match_levels" in rows and not has_conditions:
        reason = "remedy 'match_levels' needs a condition or a nuisance whose levels are matched."
    else:
        return
    raise UsageError(f"{reason}\n{remedy_table()}")


def remedy_table() -> str:
    """Return the table of remedies, one in a line: name, default number, meaning, source."""
    lines = [
        f"  {row.name + ('' if row.number is None else f':{row.number:g}'):<23}{row.meaning}"
        + (f" ({row.source})" if row.source else "")
        for row in REMEDIES.values()
    ]
    return "\n".join(["Remedies, with their numbers:", *lines])


def _parse(text: str) -> tuple[Remedy, float]:
    name, colon, number = str(text).partition(":")
    row = REMEDIES.get(name)
    if name in REMOVED:
        raise UsageError(f"remedy {name!r} was removed: {REMOVED[name]}.\n{remedy_table()}")
    if row is None:
        raise UsageError(f"there is no remedy {name!r}.\n{remedy_table()}")
    if not colon:
        return row, math.nan if row.number is None else row.number
    if row.number is None:
        raise UsageError(f"remedy {name!r} takes no number, and was given {number!r}.\n{remedy_table()}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    most = 0.99 if name == "decoder_dropout" else 1e4
    least_is_zero = name == "decoder_dropout"
    if not (0 < value <= most or (least_is_zero and value == 0)) or (name in _WHOLE and value != int(value)):
        kind = "a whole number" if name in _WHOLE else "a number"
        least = "from 0" if least_is_zero else "above 0"
        raise UsageError(f"remedy {text!r} needs {kind} {least}, {most:g} at most.\n{remedy_table()}")
    return row, value


def _with(function: Callable[..., Any], row: Remedy, number: float) -> Callable[..., Any]:
    """Fix the function's last argument to the number, if it takes one."""
    return function if row.number is None else lambda *arguments: function(*arguments, number)


def _plain(value: Any) -> Any:
    """Make a list a tuple, so that the two compare as equal."""
    return tuple(value) if isinstance(value, list) else value
