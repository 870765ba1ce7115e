"""A run that replaces an earlier one: all of it or nothing."""

from pathlib import Path

import pytest

import celbo
from celbo.errors import CelboError
from celbo.runs import run_folder
from celbo.runs.claims import WRITTEN
from celbo.runs.run_folder import write_run


@pytest.fixture
def written(cells, tmp_path):
    """Two models for the same cells, and a folder with the run of the first."""
    trains = [celbo.TrainConfig(max_epochs=1, seed=seed) for seed in (0, 1)]
    models = [celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=train) for train in trains]
    prepared = models[0].prepare(cells, fingerprint=True)
    for model in models:
        model.fit(prepared)
    write_run(tmp_path / "run", models[0], prepared, seconds=1.0, source="cells")
    (tmp_path / "run" / "report.html").write_text("of the first run")
    return tmp_path / "run", models[1], prepared


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["measure", "_diagnose", "embedding"])
def test_an_interrupt_before_all_is_computed_leaves_the_earlier_run_whole(written, monkeypatch, part):
    folder, model, prepared = written
    before = contents(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(folder, model, prepared, seconds=1.0, source="cells")
    assert contents(folder) == before


def test_a_failure_keeps_the_new_model_and_nothing_that_contradicts_it(written, monkeypatch):
    folder, model, prepared = written

    def fails(*_):
        raise CelboError("no diagnosis")

    monkeypatch.setattr(run_folder, "_diagnose", fails)
    with pytest.raises(CelboError, match="no diagnosis"):
        write_run(folder, model, prepared, seconds=1.0, source="cells")
    assert {path.name for path in folder.iterdir()} & set(WRITTEN) == {"model"}
    assert celbo.load(folder / "model").train.seed == 1


def test_a_run_is_marked_as_one_until_nothing_earlier_is_left(written, monkeypatch):
    """A replacement that is killed half way is replaced whole by the next run."""
    folder, model, prepared = written
    (folder / "cure.json").write_text("of the first run")
    removed, unlink = [], Path.unlink

    def noted(path, **options):
        removed.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", noted)
    write_run(folder, model, prepared, seconds=1.0, source="cells")
    earlier = [name for name in removed if name in WRITTEN]
    assert set(earlier) >= {"cure.json", "report.html"}
    assert earlier[-1] == "run.json"


def test_a_whole_run_replaces_the_earlier_one(written):
    folder, model, prepared = written
    write_run(folder, model, prepared, seconds=1.0, source="cells")
    assert celbo.load(folder).train.seed == 1
    assert not (folder / "report.html").exists()  # it is drawn from the new files
    assert (folder / "embedding.h5ad").exists()


def test_in_a_new_folder_an_interrupt_leaves_the_model(written, tmp_path, monkeypatch):
    _, model, prepared = written

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "measure", interrupted)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "cure.json").write_text("of the user")
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "new", model, prepared, seconds=1.0, source="cells")
    assert celbo.load(tmp_path / "new" / "model").train.seed == 1
    assert (tmp_path / "new" / "cure.json").read_text() == "of the user"
