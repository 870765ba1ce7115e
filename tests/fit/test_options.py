"""Options as numbers of numpy, and seeds of every size."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import celbo
from celbo import TrainConfig, UsageError
from celbo.streams import short_seed

NUMPY = {
    "latent_dim": np.int64(3),
    "hidden_dims": np.array([8, 6]),
    "decoder_dims": (np.int32(6), np.int8(8)),
    "likelihood": np.str_("nb"),
    "conditions": np.array(["treatment"]),
    "nuisance": pd.Index(["batch"]),
    "n_top_genes": np.int32(40),
    "labels": np.str_("cell_type"),
    "allow_noninteger": np.bool_(False),
    "encode_context": np.bool_(True),
    "dropout": np.float32(0.25),
    "embedding_dim": np.int16(4),
    "prior": np.str_("mixture:3"),
}
PLAIN = {
    "latent_dim": 3,
    "hidden_dims": [8, 6],
    "decoder_dims": [6, 8],
    "likelihood": "nb",
    "conditions": ["treatment"],
    "nuisance": ["batch"],
    "n_top_genes": 40,
    "labels": "cell_type",
    "allow_noninteger": False,
    "encode_context": True,
    "dropout": 0.25,
    "embedding_dim": 4,
    "prior": "mixture:3",
}
NUMPY_TRAIN = {
    "max_epochs": np.int64(2),
    "batch_size": np.uint8(64),
    "learning_rate": np.float32(0.0078125),
    "warmup_fraction": np.float64(0.25),
    "patience": np.int8(3),
    "validation_fraction": np.float32(0.25),
    "gradient_clip": np.int64(1000),
    "seed": np.int64(3),
    "device": np.str_("cpu"),
    "threads": np.int64(1),
}
PLAIN_TRAIN = {name: value.item() for name, value in NUMPY_TRAIN.items()}
BIG = (2**32, 2**40 + 5, 2**63 - 1)


def test_options_of_numpy_give_the_model_of_plain_options(cells, tmp_path):
    models = [
        celbo.ExpressionVAE(**options, train=TrainConfig(**train)).fit(cells)
        for options, train in ((NUMPY, NUMPY_TRAIN), (PLAIN, PLAIN_TRAIN))
    ]
    assert models[0].options() == models[1].options()
    np.testing.assert_array_equal(models[0].embed(cells), models[1].embed(cells))
    models[0].save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.options() == models[0].options()
    assert loaded.train == models[0].train
    np.testing.assert_array_equal(loaded.embed(cells), models[0].embed(cells))


def test_options_that_are_set_later_may_be_of_numpy_too(cells):
    model = celbo.ExpressionVAE(train=TrainConfig(max_epochs=1))
    model.set_params(latent_dim=np.int64(2), hidden_dims=np.array([4])).fit(cells)
    assert model.embed(cells).shape == (300, 2)
    assert model.get_params()["latent_dim"] == 2
    model.check(cells)


@pytest.mark.parametrize("name", NUMPY_TRAIN)
def test_a_training_configuration_holds_plain_values(name):
    config = TrainConfig(**{name: NUMPY_TRAIN[name]})
    assert type(getattr(config, name)) is type(PLAIN_TRAIN[name])
    assert config == TrainConfig(**{name: PLAIN_TRAIN[name]})
    assert dataclasses.replace(config, seed=np.int64(5)).seed == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": np.float64(3)}, "not whole numbers: seed=3.0"),
        ({"seed": True}, "not whole numbers: seed=True"),
        ({"max_epochs": "3"}, "not whole numbers: max_epochs='3'"),
        ({"threads": 1.5}, "not whole numbers: threads=1.5"),
        ({"learning_rate": "0.1"}, "not numbers: learning_rate='0.1'"),
        ({"learning_rate": None}, "not numbers: learning_rate=None"),
        ({"device": 0}, "not texts: device=0"),
        (
            {"batch_size": 2.0, "seed": None, "device": 1},
            "whole numbers: batch_size=2.0, seed=None; not texts: device=1",
        ),
        ({"seed": np.int64(-1)}, "out of range: seed=-1"),
        ({"seed": 2**63}, "out of range: seed="),
        ({"batch_size": np.int64(0)}, "out of range: batch_size=0"),
    ],
)
def test_values_of_another_type_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        TrainConfig(**options)


def test_a_device_of_torch_is_taken_by_its_name():
    assert TrainConfig(device=torch.device("cpu")) == TrainConfig(device="cpu")


def questions(model, cells, number, seed):
    """What each question answers; numbers are made by ``number``."""
    some, n = cells[:40], number(4)
    yield model.elbo(some, seed=seed)
    yield model.log_prob(some, n_samples=number(6), seed=seed)
    yield model.outliers(some, seed=seed)
    yield model.differential_expression(cells, groupby="cell_type", n_samples=n, seed=seed)
    changed = model.counterfactual(some, {"batch": "batch_0"}, n_samples=n, seed=seed)
    yield changed.genes
    yield changed.sample(seed=seed).to_df()
    yield changed.group_mean(n_cells=number(10), n_draws=number(8), seed=seed)
    for source in ("aggregated", "mixture", "prior"):
        yield model.sample(n, source=source, seed=seed).to_df()
    yield model.interpolate(cells[:1], cells[1:2], n_points=n).to_df()
    yield pd.DataFrame(model.diagnose(cells, groupby="cell_type", seed=seed).to_json()["findings"])
    yield pd.DataFrame([str(celbo.check_realism(model.sample(60, seed=seed), cells, seed=seed))])


@pytest.mark.parametrize("seed", [pytest.param(7, marks=pytest.mark.long), 2**63 - 1])
def test_every_question_takes_every_seed_as_a_number_of_python_or_numpy(cells, fitted, seed):
    plain = questions(fitted, cells, int, seed)
    of_numpy = questions(fitted, cells, np.int64, np.int64(seed))
    for one, other in zip(plain, of_numpy, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_another_large_seed_gives_other_draws(cells, fitted):
    first, second = (fitted.sample(20, seed=seed).to_df() for seed in (2**40, 2**41))
    assert not first.equals(second)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True, None])
def test_other_seeds_are_refused_at_once(cells, fitted, seed):
    for ask in (
        lambda: fitted.elbo(cells, seed=seed),
        lambda: fitted.sample(3, seed=seed),
        lambda: fitted.diagnose(cells, seed=seed),
    ):
        with pytest.raises(UsageError, match=r"a seed is a whole number from 0 to 2\*\*63 - 1"):
            ask()


def test_short_seeds_are_what_libraries_take():
    assert [short_seed(seed) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    short = [short_seed(seed) for seed in BIG]
    assert all(0 <= seed < 2**32 for seed in short)
    assert len(set(short)) == len(short)


@pytest.mark.long
@pytest.mark.parametrize("seed", BIG)
def test_a_run_with_a_large_seed_is_written_whole(cells, tmp_path, celbo_command, seed):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    fit = ["fit", tmp_path / "cells.h5ad", "--epochs", "2", "--hidden-dim", "8", "--seed", seed, "-o"]
    done = celbo_command(*fit, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert celbo.load(tmp_path / "run").train.seed == seed
    again = celbo_command("fit", tmp_path / "cells.h5ad", "--config", tmp_path / "run/run.json", "-o", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    np.testing.assert_array_equal(celbo.load(tmp_path / "run").embed(cells), celbo.load(tmp_path / "two").embed(cells))


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_out_of_range_is_refused_before_anything_is_read(tmp_path, celbo_command, seed):
    (tmp_path / "nothing.h5ad").write_bytes(b"")
    done = celbo_command("fit", tmp_path / "nothing.h5ad", "--seed", seed, "-o", tmp_path / "run")
    assert done.returncode == UsageError.exit_code
    assert not (tmp_path / "run").exists()
