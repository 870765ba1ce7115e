"""Curing collapsed models, in Python and on the command line."""

import json
import warnings

import numpy as np
import pytest
from forked import run_celbo

import celbo
from celbo.trials.curing import is_healthy

pytestmark = pytest.mark.long
TRAIN = celbo.TrainConfig(max_epochs=60, seed=0)


@pytest.fixture(scope="module")
def many():
    return celbo.simulate_cells(n_cells=800, n_genes=100, n_types=4, type_strength=2.0, median_library=2000, seed=0)


def fitted(many, **options):
    options = {"latent_dim": 3, "hidden_dims": (32,), "train": TRAIN} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celbo.ExpressionVAE(**options).fit(many)


@pytest.fixture(scope="module")
def blob(many):
    return fitted(many, remedies=["beta:20"])


def test_a_healthy_model_is_left_as_it_is(many):
    model = fitted(many)
    cured, trail = celbo.cure(model, many)
    assert cured is model
    assert len(trail) == 1
    assert trail[0].difference is None


def test_a_collapsed_model_is_cured_and_the_trail_says_how(blob, many):
    before = blob.embed(many)
    cured, trail = celbo.cure(blob, many)
    assert trail[0].collapsed
    assert not trail[-1].collapsed
    assert trail[-1].kept
    assert trail[1].remedies == ("beta:1",)  # in the place of the one it contradicts
    assert trail[1].difference > 0
    assert trail[1].se > 0
    assert "z says more" in trail[1].said
    assert is_healthy(cured.diagnose(many))
    np.testing.assert_array_equal(blob.embed(many), before)


def test_an_interrupt_ends_the_whole_search(blob, many):
    old, epochs = blob.fitted_, []

    def track(minibatches, plan, history):
        epochs.append(len(history))
        if len(history) == 2:
            raise KeyboardInterrupt
        return minibatches

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training was interrupted")
        with pytest.raises(KeyboardInterrupt):
            celbo.cure(blob, many, track=track)
    assert blob.fitted_ is old
    assert epochs == [0, 1, 2]


@pytest.mark.long
def test_what_costs_more_than_the_tolerance_is_not_kept(blob, many, monkeypatch):
    """A remedy after which log p(x) of held-out cells is 5 nats worse."""
    import celbo.trials.curing as curing

    honest, calls = curing._log_p, []

    def worse(model, adata, rows):
        calls.append(model)
        return honest(model, adata, rows) - (25 if len(calls) > 1 else 0)

    monkeypatch.setattr(curing, "_log_p", worse)
    cured, trail = celbo.cure(blob, many, tries=1, tolerance=1)
    assert cured is blob
    assert not trail[1].kept
    assert "beyond the tolerance of 1" in trail[1].said
    calls.clear()
    assert celbo.cure(blob, many, tries=1, tolerance=100)[1][1].kept


@pytest.mark.parametrize("bad", [{"tries": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_impossible_limits_are_refused(blob, many, bad):
    with pytest.raises(celbo.UsageError, match="at least 1 try"):
        celbo.cure(blob, many, **bad)


def test_a_remedy_that_the_model_cannot_take_is_on_the_trail(blob, many, monkeypatch):
    from celbo.trust.advice import Advice

    honest = celbo.ExpressionVAE.diagnose

    def advise_the_impossible(self, adata, **options):
        found = honest(self, adata, **options)
        found.remedies.insert(0, Advice("skip", "", "", ""))
        return found

    monkeypatch.setattr(celbo.ExpressionVAE, "diagnose", advise_the_impossible)
    cured, trail = celbo.cure(blob, many)
    assert "at least two widths" in trail[1].said
    assert not trail[1].kept
    assert trail[2].kept
    assert cured is not blob


def test_other_cells_and_models_without_reference_are_refused(blob, many, tmp_path):
    with pytest.raises(celbo.UsageError, match="not the cells the model was fitted to"):
        celbo.cure(blob, many[::-1].copy())
    blob.save(tmp_path / "model", keep_reference=False)
    with pytest.raises(celbo.UsageError, match="keep_reference"):
        celbo.cure(celbo.load(tmp_path / "model"), many)


def test_what_was_said_of_models_that_were_given_up_is_not_repeated(blob, many):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        celbo.cure(blob, many)
    assert not [each for each in said if "posterior collapse" in str(each.message)]


@pytest.fixture(scope="module")
def blob_run(many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blob")
    many.write_h5ad(folder / "cells.h5ad")
    done = run_celbo(
        *("fit", folder / "cells.h5ad", "-o", folder / "run", "--latent-dim", 3, "--hidden-dim", 32),
        *("--epochs", 60, "--remedy", "beta:20"),
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_fit_announces_a_collapse_without_being_asked(blob_run):
    folder, done = blob_run
    assert "posterior collapse: the decoder loses" in done.stderr
    assert "Collapsed: the decoder loses" in done.stderr
    page = (folder / "run" / "report.html").read_text()
    assert "Collapsed: the decoder loses" in page
    assert "--remedy beta:1" in page
    assert "training did not maximise the ELBO" in page
    assert json.loads((folder / "run" / "diagnosis.json").read_text())["collapsed"]


@pytest.mark.long
def test_diagnose_finds_the_cells_of_the_run(blob_run):
    folder, _ = blob_run
    done = run_celbo("diagnose", folder / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Collapsed: the decoder loses")
    assert "1. --remedy beta:1" in done.stdout
    named = run_celbo("diagnose", folder / "run", folder / "cells.h5ad", "--json", "--groupby", "cell_type")
    document = json.loads(named.stdout)
    assert document["collapsed"]
    assert document["remedies"][0]["remedy"] == "beta:1"


@pytest.mark.long
def test_cure_writes_a_run_and_its_trail(blob_run):
    folder, _ = blob_run
    done = run_celbo("cure", folder / "run", "-o", folder / "cured", "--tries", 2)
    assert done.returncode == 0, done.stderr
    assert "beta:20: Collapsed" in done.stdout
    assert "kept: z says more" in done.stdout
    trail = json.loads((folder / "cured" / "cure.json").read_text())
    assert trail[0]["collapsed"]
    assert not trail[-1]["collapsed"]
    assert celbo.load(folder / "cured").remedies == trail[-1]["remedies"]
    assert not json.loads((folder / "cured" / "diagnosis.json").read_text())["collapsed"]


@pytest.mark.long
def test_curing_what_is_cured_changes_nothing_and_speaks_json(blob_run):
    folder, _ = blob_run
    if not (folder / "cured").exists():
        pytest.skip("needs the run that the test before wrote")
    done = run_celbo("cure", folder / "cured", "-o", folder / "again", "--json")
    assert done.returncode == 0, done.stderr
    trail = json.loads(done.stdout)
    assert len(trail) == 1
    assert (folder / "again" / "model" / "weights.safetensors").read_bytes() == (
        folder / "cured" / "model" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.long
def test_auto_remedy_cures_before_anything_is_written(blob_run):
    folder, _ = blob_run
    done = run_celbo(
        *("fit", folder / "cells.h5ad", "-o", folder / "auto", "--latent-dim", 3, "--hidden-dim", 32),
        *("--epochs", 60, "--remedy", "beta:20", "--auto-remedy"),
    )
    assert done.returncode == 0, done.stderr
    assert not json.loads((folder / "auto" / "diagnosis.json").read_text())["collapsed"]
    assert json.loads((folder / "auto" / "cure.json").read_text())[0]["collapsed"]
    assert "posterior collapse: the decoder" not in (folder / "auto" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--remedy", "annealing"], "there is no remedy 'annealing'"),
        (["--remedy", "linear", "--remedy", "cosine"], "both of which change the schedule"),
        (["--remedy", "skip"], "at least two widths"),
        (["--remedy", "vamp_prior:0"], "needs a whole number above 0"),
    ],
)
def test_bad_remedies_end_in_words_the_table_and_exit_2(blob_run, arguments, said):
    folder, _ = blob_run
    done = run_celbo("fit", folder / "cells.h5ad", "-o", folder / "bad", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "cyclical:4" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "bad" / "model").exists()


def test_the_table_of_remedies_can_be_asked_for(blob_run):
    folder, _ = blob_run
    done = run_celbo("fit", folder / "cells.h5ad", "-o", folder / "list", "--remedy", "list")
    assert done.returncode == 0
    assert all(name in done.stdout for name in celbo.REMEDIES)
    assert not (folder / "list").exists()


def test_a_run_whose_cells_are_gone_says_so(blob_run, tmp_path):
    folder, _ = blob_run
    celbo.load(folder / "run").save(tmp_path / "model")
    done = run_celbo("diagnose", tmp_path / "model")
    assert done.returncode == 2
    assert "does not say which cells it was fitted to" in done.stderr
