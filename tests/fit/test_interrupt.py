"""An interrupt (Ctrl-C) of a fit: what is kept, and when nothing is."""

import pickle
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import celbo
from celbo import ExpressionVAE, ModelFileError, TrainConfig
from celbo.ask import readings
from celbo.checkpoint import read_folder, write_folder
from celbo.data.checks import check_adata
from celbo.data.sources import open_source
from celbo.fit import fitted
from celbo.fit.steps import state_of
from celbo.fit.train import Interrupted, epochs, plan_run, split_cells
from celbo.kernels.dispatch import adam
from celbo.trust import diagnosing

PACKAGE = str(Path(celbo.__file__).parent)


@pytest.fixture(scope="module")
def few():
    return celbo.simulate_cells(n_cells=120, n_genes=20, n_types=2, median_library=200, seed=1)


@contextmanager
def interrupt_at(n):
    """Send this process a real SIGINT at the n-th call of a function of celbo after `begin`. Give it, and the calls."""
    calls = []

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_name)
            if len(calls) == n:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield lambda: sys.setprofile(count), calls
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)


def same(state, other):
    return all(torch.equal(state[name], other[name]) for name in state | other)


def interrupted_in(last_epoch):
    """A track that raises a KeyboardInterrupt in the middle of the epoch after this one."""

    def track(minibatches, plan, history):
        for number, rows in enumerate(minibatches):
            if len(history) == last_epoch and number == 2:
                raise KeyboardInterrupt
            yield rows

    return track


@pytest.mark.parametrize("validation_fraction", [0.2, 0.0])
def test_an_interrupt_at_any_call_keeps_the_best_weights_of_the_epochs_that_ended(few, validation_fraction):
    source = open_source(few, check_adata(few).accept())
    split = split_cells(source.n_cells, validation_fraction, seed=0)
    config = TrainConfig(max_epochs=6, warmup_fraction=0.3, learning_rate=0.05)

    def training(vae, track=None):
        return epochs(vae, source, split, config, track=track)

    def start():
        torch.manual_seed(0)
        return celbo.VAE(source.n_genes, 2, [8], likelihood=celbo.LIKELIHOODS["nb"], context_dim=0)

    records, seen, vae = [], [], start()
    with interrupt_at(0) as (begin, calls):
        for record in training(vae, track=begin()):
            records.append(record)
            seen.append(state_of(vae))
    warmup_steps = plan_run(len(split.train), config).warmup_steps

    def kept_after(n):
        """The weights after the last epoch of the warm-up, or those with the best held-out ELBO since."""
        counted = [i for i in range(n) if records[i].step >= warmup_steps and records[i].validation_elbo is not None]
        return seen[max(counted, key=lambda i: records[i].validation_elbo) if counted else n - 1]

    assert same(state_of(vae), kept_after(len(records)))
    n_kept = set()
    for n in np.linspace(5, 0.95 * len(calls), 7).astype(int):
        vae = start()
        with interrupt_at(n) as (begin, _), pytest.raises(KeyboardInterrupt) as raised:
            list(training(vae, track=begin()))
        history = getattr(raised.value, "history", [])
        n_kept.add(len(history))
        assert [record.step for record in history] == [record.step for record in records[: len(history)]]
        assert not history or same(state_of(vae), kept_after(len(history)))
    assert 0 in n_kept
    assert len(n_kept) >= 4


def test_an_interrupted_fit_ends_with_a_usable_model_and_says_so(few, tmp_path):
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=50))
    with pytest.warns(UserWarning, match=r"interrupted after 3 of at most 50 epochs.*fit it again") as caught:
        assert model.fit(few, track=interrupted_in(3)) is model
    assert caught[0].filename == __file__
    assert model.fitted_.stopped == "interrupted"
    assert len(model.history_) == 3
    assert repr(model).endswith("20 genes, 3 epochs, interrupted)")
    assert np.isfinite(model.embed(few)).all()
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.fitted_.stopped == "interrupted"
    np.testing.assert_array_equal(loaded.embed(few), model.embed(few))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training was interrupted")
        model.set_params(train=TrainConfig(max_epochs=4)).fit(few)
    assert model.fitted_.stopped is None
    assert (len(model.history_), "interrupted" in repr(model)) == (4, False)
    model.save(tmp_path / "model")
    assert "stopped" not in (tmp_path / "model" / "model.json").read_text()


def test_before_the_first_epoch_has_ended_there_is_nothing_to_keep(few):
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=3))
    with pytest.raises(KeyboardInterrupt) as raised:
        model.fit(few, track=interrupted_in(0))
    assert not isinstance(raised.value, Interrupted)
    assert repr(model).endswith("not fitted)")


def test_an_interrupt_after_training_leaves_the_old_fit_as_a_whole(few):
    """At calls all over the time from the last step to the return of fit: the old fit, or all of the new one.

    The first interrupt is passed over, except between the parts of the work and among the warnings.
    """
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), labels="cell_type", train=TrainConfig(max_epochs=2))
    prepared, calls = model.prepare(few), []

    def fit(n):
        nonlocal calls
        with interrupt_at(n) as (begin, calls), warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def track(minibatches, plan, history):
                yield from minibatches
                if len(history) == 1:
                    begin()

            model.fit(prepared, track=track)

    fit(0)
    old, answer = model.fitted_, model.embed(few)
    model.train = TrainConfig(max_epochs=2, seed=1)
    outcomes, n = [], 1
    was_sent = True
    while was_sent:
        try:
            fit(n)
        except KeyboardInterrupt:  # among the warnings, which come last, the model has the new fit
            outcomes.append("old" if model.fitted_ is old else "warnings")
        else:
            outcomes.append(model.fitted_.stopped or "new")
        if model.fitted_ is not old:
            assert len(model.history_) == (1 if model.fitted_.stopped else 2)
            assert model.fitted_.reference.was_read.any()
            assert model.fitted_.options == model.options()
            model.fitted_ = old
        was_sent, n = len(calls) >= n, n * 5 // 4 + 1
    assert {"interrupted", "new"} <= set(outcomes) <= {"old", "interrupted", "new", "warnings"}
    assert outcomes.count("new") > 5
    np.testing.assert_array_equal(model.embed(few), answer)


@pytest.mark.parametrize(
    ("module", "step"), [(fitted, "_reference_of"), (readings, "with_readings"), (diagnosing, "doubts_of_fit")]
)
def test_a_second_interrupt_after_training_leaves_the_old_fit_as_a_whole(few, monkeypatch, module, step):
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=2)).fit(few, progress=False)
    old, calls = model.fitted_, []

    def interrupted(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(few, progress=False)
    assert len(calls) == 2
    assert model.fitted_ is old


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(28, "No space left on device"), RuntimeError("can't allocate memory")],
    ids=["memory", "disk", "torch's memory"],
)
def test_an_error_inside_a_step_leaves_the_model_as_it_was(few, error, monkeypatch):
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=3)).fit(few, progress=False)
    old, answer, steps = model.fitted_, model.embed(few), []

    def fail(*arguments, **options):
        steps.append(adam(*arguments, **options))
        if len(steps) == 11:  # in the second epoch
            raise error

    monkeypatch.setattr("celbo.fit.steps.adam", fail)
    with pytest.raises(type(error)) as raised:
        model.fit(few, progress=False)
    assert raised.value is error
    assert model.fitted_ is old
    np.testing.assert_array_equal(model.embed(few), answer)


def test_the_commands_exit_code_says_that_memory_ended(few, tmp_path, celbo_command, monkeypatch):
    few.write_h5ad(tmp_path / "few.h5ad")
    fit = ("fit", tmp_path / "few.h5ad", "-o", tmp_path / "run", "--hidden-dim", "8", "--epochs", "2")
    assert celbo_command(*fit).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("celbo.fit.steps.adam", fail)
    done = celbo_command(*fit)
    assert done.returncode == 137
    assert "error: out of memory" in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_an_interrupt_of_a_mapping_keeps_nothing(few):
    is_new = (few.obs["batch"] == "batch_1").to_numpy()
    known = few[~is_new].copy()
    known.obs["batch"] = np.where(np.arange(known.n_obs) % 2, "batch_0", "batch_2")
    model = ExpressionVAE(latent_dim=2, hidden_dims=(8,), nuisance=["batch"], train=TrainConfig(max_epochs=4)).fit(
        known
    )
    old = model.fitted_
    with pytest.raises(KeyboardInterrupt):
        model.map_query(few[is_new], track=interrupted_in(2))
    assert model.fitted_ is old
    assert model.map_query(few[is_new], progress=False).fitted_.stopped is None


def test_an_interrupt_in_one_of_two_threads_ends_that_fit_alone(few):
    models = [ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=4, seed=s)) for s in (0, 1)]
    tracks = [interrupted_in(2), None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = [
            threading.Thread(target=model.fit, args=(few,), kwargs={"track": track, "progress": False})
            for model, track in zip(models, tracks, strict=True)
        ]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
        alone = ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=4, seed=1)).fit(few)
    assert [model.fitted_.stopped for model in models] == ["interrupted", None]
    np.testing.assert_array_equal(models[1].embed(few), alone.embed(few))


def test_the_exception_of_an_interrupt_goes_from_one_process_to_another():
    there = pickle.loads(pickle.dumps(Interrupted([1, 2])))
    assert there.history == [1, 2]
    assert isinstance(there, KeyboardInterrupt)


def test_a_model_folder_with_a_forged_reason_is_refused(few, tmp_path):
    ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=TrainConfig(max_epochs=1)).fit(few).save(tmp_path / "model")
    folder = read_folder(tmp_path / "model")
    for reason in (3, ["interrupted"], {}):
        write_folder(tmp_path / "forged", {**folder.document, "stopped": reason}, folder.weights)
        with pytest.raises(ModelFileError, match="does not describe a model"):
            celbo.load(tmp_path / "forged")
