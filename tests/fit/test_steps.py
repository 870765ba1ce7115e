"""One step, with the state that it changes."""

import math

import numpy as np
import pytest
import torch

import celbo
from celbo.data.checks import check_adata
from celbo.data.sources import open_source
from celbo.fit.remedies import Recipe, combine
from celbo.fit.steps import Patience, averaged, lower_rate, start_training, take_step
from celbo.kernels.dispatch import adam
from celbo.model.objective import OBJECTIVES, ElboTerms, elbo_terms

ROWS = np.arange(40)


@pytest.fixture
def source(cells):
    return open_source(cells, check_adata(cells).accept())


def started(source, *, learned=None, **options):
    torch.manual_seed(0)
    vae = celbo.VAE(source.n_genes, 3, [16], likelihood=celbo.LIKELIHOODS["nb"], **options)
    return start_training(vae, 1e-2, learned)


def step(state, source, *, recipe=None, objective=OBJECTIVES["vae"], clip=1e9, warmup_steps=0):
    return take_step(
        state,
        source.take(ROWS),
        ROWS,
        objective=objective,
        recipe=recipe or Recipe(),
        warmup_steps=warmup_steps,
        rise_steps=0,
        gradient_clip=clip,
        seed=0,
        epoch=0,
    )


@pytest.fixture
def rates(monkeypatch):
    """Learning rates of the steps that are taken."""
    seen = []

    def watched(*arguments, rate, **options):
        seen.append(rate)
        adam(*arguments, rate=rate, **options)

    monkeypatch.setattr("celbo.fit.steps.adam", watched)
    return seen


def falling(*arguments):
    terms = elbo_terms(*arguments)
    return ElboTerms(terms.reconstruction * float("nan"), terms.kl)


FALLING = OBJECTIVES["vae"]._replace(terms=falling)


def test_the_gradient_is_clipped_to_its_largest_norm(source):
    free, clipped = started(source), started(source)
    step(free, source)
    step(clipped, source, clip=0.5)
    assert free.weights.grad.norm() > 1
    assert (10 * free.adam.first).norm() == pytest.approx(float(free.weights.grad.norm()), rel=1e-4)
    assert (10 * clipped.adam.first).norm() == pytest.approx(0.5, rel=1e-4)


def test_the_weights_average_follows_the_weights(source):
    """``average += (k + 1) / (t + k) (weights - average)`` with k = 8."""
    state = started(source)
    average = state.weights.detach().double()
    for t in range(1, 5):
        step(state, source)
        average += 9 / (t + 8) * (state.weights.detach().double() - average)
        torch.testing.assert_close(state.adam.average.double(), average, rtol=0, atol=1e-6)
    weights = state.weights.detach().clone()
    with averaged(state):
        assert torch.equal(state.weights.detach(), state.adam.average)
    assert torch.equal(state.weights.detach(), weights)


def test_soft_free_bits_remember_their_weights(source):
    """Each step moves a weight by a tenth: without its memory the remedy would start at 1 in every step."""
    state, recipe = started(source), combine(["soft_free_bits:50"])
    for n_steps in (1, 2, 3):
        step(state, source, recipe=recipe)
        torch.testing.assert_close(state.memory, torch.full((3,), 0.9**n_steps))
    assert state.shown_kl_weight == pytest.approx(0.9**3)


def test_going_back_restores_weights_halves_the_rate_and_clears_adam(source):
    state = started(source)
    good = {name: value.clone() for name, value in state.last_good.items()}
    step(state, source)
    assert state.adam.first.any()
    memory = state.memory
    assert step(state, source, objective=FALLING) is None
    assert all(torch.equal(value, good[name]) for name, value in state.vae.state_dict().items())
    assert (state.learning_rate, state.chances, state.step) == (5e-3, 2, 2)
    assert state.adam_steps == 0
    assert not state.adam.first.any()
    assert not state.adam.second.any()
    assert torch.equal(state.adam.average, state.weights.detach())
    assert state.memory is memory


def test_a_step_that_is_taken_back_leaves_the_memory_of_the_penalty(source):
    state, recipe = started(source), combine(["soft_free_bits:50"])
    step(state, source, recipe=recipe)
    step(state, source, recipe=recipe, objective=FALLING)
    torch.testing.assert_close(state.memory, torch.full((3,), 0.9))


def test_a_lower_rate_keeps_adams_moments(source, rates):
    state = started(source)
    step(state, source)
    moments = state.adam.first.clone()
    lower_rate(state)
    assert state.learning_rate == pytest.approx(3e-3)
    assert torch.equal(state.adam.first, moments)
    step(state, source)
    assert rates == pytest.approx([1e-2, 3e-3])
    assert state.adam_steps == 2


def test_numbers_that_are_not_learned_keep_their_bits(source):
    torch.manual_seed(0)
    vae = celbo.VAE(source.n_genes, 3, [16], likelihood=celbo.LIKELIHOODS["nb"])
    learned = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in vae.named_parameters()}
    learned["fc_mu.weight"][1] = True
    learned["encoder.0.weight"][:, 5] = True
    state = start_training(vae, 1e-2, learned)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    for _ in range(2):
        step(state, source)
    for name, value in vae.named_parameters():
        assert torch.equal(value[~learned[name]], before[name][~learned[name]]), name
        assert (value[learned[name]] != before[name][learned[name]]).any() or not learned[name].any(), name


def test_the_learning_rate_and_the_weight_of_the_kl_rise_over_their_steps(source, rates):
    state = started(source)
    weights = []
    for _ in range(5):
        take_step(
            state,
            source.take(ROWS),
            ROWS,
            objective=OBJECTIVES["vae"],
            recipe=Recipe(),
            warmup_steps=2,
            rise_steps=4,
            gradient_clip=1e9,
            seed=0,
            epoch=0,
        )
        weights.append(state.kl_weight)
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    assert weights == [0.5, 1, 1, 1, 1]


def test_patience_falls_twice_and_then_stops():
    patience, decisions = Patience(), []
    for elbo in [-9.0, -8.0, -8.0, -8.5, -7.0, *[-7.0] * 6]:
        patience, decision = patience.after(elbo, patience=2)
        decisions.append(decision)
    expected = ["better", "better", "wait", "fall", "better", "wait", "fall", "wait", "stop", "stop", "stop"]
    assert decisions == expected
    assert Patience().after(-math.inf, 3)[1] == "wait"
