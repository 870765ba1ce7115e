"""The training loop: planned, deterministic, watched on held-out cells, and able to come back from a fall."""

from functools import partial

import numpy as np
import pytest
import torch

import celbo
from celbo import DivergedError, TrainConfig, UsageError
from celbo.data.checks import check_adata
from celbo.data.sources import open_source
from celbo.fit.steps import Patience
from celbo.fit.train import Plan, epochs, plan_run, settle_device, split_cells
from celbo.model.inference import CellTerms, cell_terms, decoded_blocks, encode, posterior
from celbo.model.objective import OBJECTIVES, ElboTerms, elbo_terms


def source_of(cells, conditions=()):
    return open_source(cells, check_adata(cells, conditions=conditions).accept())


def small_vae(source, likelihood="nb", seed=0, **options):
    torch.manual_seed(seed)
    context_dim = source.take(np.arange(1)).context.shape[1]
    return celbo.VAE(
        source.n_genes, 3, [16], likelihood=celbo.LIKELIHOODS[likelihood], context_dim=context_dim, **options
    )


def test_the_plan_has_even_minibatches_and_none_of_a_single_cell():
    for n_cells in [1, 2, 3, 5, 9, 10, 127, 128, 129, 255, 256, 257, 1025]:
        for batch_size in (1, 2, 128):
            plan = plan_run(n_cells, TrainConfig(batch_size=batch_size))
            sizes = [len(rows) for rows in np.array_split(np.arange(n_cells), plan.steps_per_epoch)]
            assert sum(sizes) == n_cells
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 1 or n_cells == 1


def test_the_kl_weight_is_one_by_half_of_the_plan_at_the_latest():
    plan = plan_run(10_000, TrainConfig(max_epochs=10, warmup_fraction=0.5))
    assert plan.warmup_steps == plan.epochs * plan.steps_per_epoch // 2
    with pytest.raises(UsageError, match=r"warmup_fraction=0\.6"):
        TrainConfig(warmup_fraction=0.6)


@pytest.mark.parametrize(
    ("n_cells", "planned", "most"),
    [(2, 200, 800), (1_000, 200, 800), (3_000, 100, 400), (20_000, 51, 192), (100_000, 10, 38), (1_000_000, 10, 10)],
)
def test_a_run_that_nobody_planned_is_shorter_the_more_cells_there_are(n_cells, planned, most):
    plan = plan_run(n_cells, TrainConfig())
    assert (plan.epochs, plan.planned_epochs) == (most, planned)
    assert plan.warmup_steps == plan_run(n_cells, TrainConfig(max_epochs=planned)).warmup_steps


def test_options_out_of_range_are_all_named_at_once():
    with pytest.raises(UsageError, match=r"max_epochs=0, batch_size=0, learning_rate=-1"):
        TrainConfig(max_epochs=0, batch_size=0, learning_rate=-1)


def test_held_out_cells_are_apart_from_the_others_and_together_they_are_all():
    train, validation = split_cells(103, 0.2, seed=1)
    assert len(validation) == 21
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(103))
    assert not np.array_equal(validation, split_cells(103, 0.2, seed=2).validation)
    assert [len(rows) for rows in split_cells(1, 0.5, seed=0)] == [1, 0]


def test_an_epoch_sees_every_training_cell_once_in_an_order_of_its_own(cells):
    source = source_of(cells)
    split = split_cells(source.n_cells, 0.1, seed=0)
    seen = []

    def track(minibatches, plan, history):
        seen.append(np.concatenate(minibatches))
        return minibatches

    records = list(epochs(small_vae(source), source, split, TrainConfig(max_epochs=2), track=track))
    assert [record.epoch for record in records] == [1, 2]
    for order in seen:
        np.testing.assert_array_equal(np.sort(order), split.train)
    assert not np.array_equal(*seen)


def test_the_weight_rises_to_one_and_stays(cells):
    source = source_of(cells)
    split = split_cells(source.n_cells, 0.1, seed=0)
    config = TrainConfig(max_epochs=8, warmup_fraction=0.5)
    records = list(epochs(small_vae(source), source, split, config))
    np.testing.assert_allclose([record.kl_weight for record in records], [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_training_improves_the_held_out_elbo_and_keeps_the_best_weights(cells):
    source = source_of(cells, ["batch"])
    split = split_cells(source.n_cells, 0.2, seed=0)
    config = TrainConfig(max_epochs=30, learning_rate=3e-3, patience=3, seed=4)
    vae = small_vae(source)
    before = cell_terms(vae, source, split.validation).elbo.mean()
    records = list(epochs(vae, source, split, config))
    after = cell_terms(vae, source, split.validation, seed=4).elbo.mean(dtype=np.float64)
    counted = [record.validation_elbo for record in records if record.kl_weight == 1]
    assert after > before + 5
    assert after == pytest.approx(max(counted), abs=1e-4)


def test_training_stops_when_held_out_cells_no_longer_gain(cells):
    source = source_of(cells)
    split = split_cells(source.n_cells, 0.2, seed=0)
    config = TrainConfig(max_epochs=200, learning_rate=0.02, patience=4, warmup_fraction=0.05)
    records = list(epochs(small_vae(source), source, split, config))
    elbos = [record.validation_elbo for record in records if record.kl_weight == 1]
    assert len(records) < 200
    assert len(elbos) - 1 - int(np.argmax(elbos)) in (4, 8, 12)  # and as many after each fall of the rate


@pytest.mark.long
def test_lower_rates_gain_where_a_high_one_no_longer_does(cells, monkeypatch):
    source = source_of(cells)
    split = split_cells(source.n_cells, 0.2, seed=0)
    config = TrainConfig(max_epochs=300, learning_rate=0.05, patience=4, warmup_fraction=0.03)
    elbos = []
    for falls in (0, 2):
        monkeypatch.setattr("celbo.fit.train.Patience", partial(Patience, falls_left=falls))
        elbos.append([record.validation_elbo for record in epochs(small_vae(source), source, split, config)])
    without, falling = elbos
    assert falling[: len(without)] == without
    assert max(falling) > max(without)


def test_patience_is_counted_from_the_end_of_the_warm_up(cells, monkeypatch):
    """Held-out cells get worse from the first epoch on: twenty epochs of warm-up, the first that counts, three more."""
    source = source_of(cells)
    split = split_cells(source.n_cells, 0.2, seed=0)
    elbos = iter(range(0, -100, -1))

    def worse_and_worse(vae, source, rows, **options):
        n = len(rows)
        return CellTerms(np.full(n, next(elbos), np.float32), np.zeros((n, 3), np.float32))

    monkeypatch.setattr("celbo.fit.train.cell_terms", worse_and_worse)
    config = TrainConfig(max_epochs=40, patience=1, warmup_fraction=0.5)
    records = list(epochs(small_vae(source), source, split, config))
    assert [record.kl_weight for record in records].index(1.0) == 19
    assert len(records) == 23


def test_without_held_out_cells_every_epoch_is_run(cells):
    source = source_of(cells)
    records = list(epochs(small_vae(source), source, split_cells(300, 0.0, 0), TrainConfig(max_epochs=5, patience=1)))
    assert len(records) == 5
    assert records[-1].validation_elbo is None
    assert len(records[-1].kl_per_dim) == 3


def test_the_records_terms_add_up(cells):
    source = source_of(cells)
    record = list(epochs(small_vae(source), source, split_cells(300, 0.2, 0), TrainConfig(max_epochs=2)))[-1]
    assert record.train_elbo == pytest.approx(record.train_reconstruction - record.train_kl)
    assert record.validation_elbo == pytest.approx(record.validation_reconstruction - record.validation_kl)
    assert sum(record.kl_per_dim) == pytest.approx(record.validation_kl)


def test_the_same_seed_gives_the_same_weights_to_the_bit(cells):
    def trained(seed):
        source = source_of(cells, ["batch"])
        vae = small_vae(source, seed=0)
        torch.rand(seed + 1)  # the global generator plays no part
        list(epochs(vae, source, split_cells(300, 0.1, 0), TrainConfig(max_epochs=3, seed=seed)))
        return torch.cat([value.flatten() for value in vae.state_dict().values()])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_a_step_is_the_gradient_of_the_weighted_bound(cells):
    source = source_of(cells[:2])
    vae = small_vae(source, dropout=0.0)
    reference = small_vae(source, dropout=0.0)
    plan = Plan(2, 1, 1, 0, 0, 1)
    assert plan_run(2, TrainConfig(max_epochs=1, warmup_fraction=0)) == plan
    seen = {}

    def objective(vae, x, context, library, noise, observed):
        seen["noise"], seen["x"], seen["library"] = noise, x, library
        return elbo_terms(vae, x, context, library, noise)

    config = TrainConfig(max_epochs=1, warmup_fraction=0)
    list(epochs(vae, source, split_cells(2, 0.0, 0), config, objective=OBJECTIVES["vae"]._replace(terms=objective)))
    optimizer = torch.optim.Adam(reference.parameters(), lr=config.learning_rate)
    (-elbo_terms(reference, seen["x"], None, seen["library"], seen["noise"]).elbo.mean()).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1000.0)
    optimizer.step()
    for trained, expected in zip(vae.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, atol=1e-6, rtol=0)


def test_an_autoencoder_reports_no_kl(cells):
    source = source_of(cells)
    config = TrainConfig(max_epochs=2)
    records = list(
        epochs(small_vae(source), source, split_cells(300, 0.1, 0), config, objective=OBJECTIVES["autoencoder"])
    )
    assert records[-1].train_kl == records[-1].validation_kl == 0


def test_a_fall_is_survived_from_the_last_good_weights(cells):
    source = source_of(cells)
    falls = iter([False, False, True, False, True] + [False] * 100)

    def objective(*arguments):
        terms = elbo_terms(*arguments)
        return ElboTerms(terms.reconstruction * float("nan"), terms.kl) if next(falls) else terms

    vae = small_vae(source)
    split = split_cells(300, 0.0, 0)
    records = list(
        epochs(vae, source, split, TrainConfig(max_epochs=4), objective=OBJECTIVES["vae"]._replace(terms=objective))
    )
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())
    assert records[-1].train_elbo > records[0].train_elbo


def test_training_that_cannot_come_back_says_where_it_fell(cells):
    source = source_of(cells)

    def objective(*arguments):
        terms = elbo_terms(*arguments)
        broken = terms.reconstruction.clone()
        broken[5] = float("inf")
        return ElboTerms(broken, terms.kl)

    with pytest.raises(DivergedError, match=r"at step 4: .*the reconstruction of 1 of \d+ cells, the first in row \d+"):
        list(
            epochs(
                small_vae(source),
                source,
                split_cells(300, 0, 0),
                TrainConfig(max_epochs=2),
                objective=OBJECTIVES["vae"]._replace(terms=objective),
            )
        )


def test_a_learning_rate_far_too_high_ends_in_words_or_in_numbers(cells):
    source = source_of(cells)
    vae = small_vae(source, likelihood="gaussian")
    config = TrainConfig(max_epochs=20, learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"half the learning rate 3 times.*Start with a lower one"):
        list(epochs(vae, source, split_cells(300, 0.1, 0), config))


def test_devices_that_are_not_there_are_refused_in_words():
    assert settle_device("cpu") == torch.device("cpu")
    assert settle_device("auto").type in {"cpu", "cuda"}
    for name in ["tpu9", "xla:0", *([] if torch.cuda.is_available() else ["cuda"])]:
        with pytest.raises(UsageError, match=f"device '{name}' cannot be used"):
            settle_device(name)


@pytest.mark.parametrize("function", ["posterior", "terms", "expected"])
def test_inference_does_not_depend_on_the_chunk(cells, monkeypatch, function):
    source = source_of(cells, ["batch"])
    vae = small_vae(source).train()
    compute = {
        "posterior": lambda: posterior(vae, source)[0],
        "terms": lambda: cell_terms(vae, source, seed=3).elbo,
        "expected": lambda: np.concatenate([*decoded_blocks(vae, encode(vae, source), [source.contexts])]),
    }[function]
    whole = compute()
    monkeypatch.setattr("celbo.model.inference.CHUNK", 37)
    np.testing.assert_allclose(compute(), whole, rtol=1e-4, atol=1e-5)
    assert vae.training


def test_a_held_out_elbo_that_is_not_finite_is_said_with_its_row(cells):
    wild = cells.copy()
    split = split_cells(300, 0.1, seed=0)
    row = split.validation[3]
    wild.layers["real"] = wild.X.toarray() / 2
    wild.layers["real"][row, 0] = 1e21
    source = open_source(wild, check_adata(wild, values="real", layer="real").accept())
    with pytest.raises(DivergedError, match=f"held-out cells is not finite, the first in row {row}"):
        list(epochs(small_vae(source, likelihood="gaussian"), source, split, TrainConfig(max_epochs=2)))


def test_an_epoch_without_a_good_step_has_no_elbo(cells):
    source = source_of(cells[:4])
    falls = iter([True, True] + [False] * 10)

    def objective(*arguments):
        terms = elbo_terms(*arguments)
        return ElboTerms(terms.reconstruction * float("nan"), terms.kl) if next(falls) else terms

    split = split_cells(4, 0.0, 0)
    records = list(
        epochs(
            small_vae(source),
            source,
            split,
            TrainConfig(max_epochs=2),
            objective=OBJECTIVES["vae"]._replace(terms=objective),
        )
    )
    assert np.isnan(records[0].train_elbo)
    assert np.isfinite(records[1].train_elbo)
