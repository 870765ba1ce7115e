"""The report is drawn from the files of a run, at any time, with the same bytes."""

import json
import shutil
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from forked import run_celbo

import celbo
from celbo.app import demo
from celbo.errors import ModelFileError
from celbo.runs.claims import claimed_folder
from celbo.runs.reporting import read_summary

FIT = ("--epochs", "2", "--hidden-dim", "8", "--latent-dim", "2", "--threads", "1")


@pytest.fixture(scope="module")
def cells(cells):
    """Cells with columns of all kinds, which a file may keep in another type."""
    odd = cells.copy()
    rng = np.random.default_rng(0)
    odd.obs = odd.obs[["batch"]].copy()
    odd.obs["donor"] = [f"donor {i % 100}" for i in range(odd.n_obs)]  # more levels than colours, all of one size
    odd.obs["text"] = pd.Series(rng.choice(["a", "b", None], odd.n_obs), index=odd.obs_names, dtype=object)
    odd.obs["flag"] = rng.random(odd.n_obs) < 0.5
    odd.obs["score"] = np.where(rng.random(odd.n_obs) < 0.1, np.nan, rng.normal(size=odd.n_obs))
    return odd


@pytest.fixture(scope="module")
def data(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def first_run(data):
    folder = data.parent / "run"
    command = ["fit", data, "-o", folder, "--condition", "donor", "--remedy", "mmd:5", *FIT]
    done = run_celbo(*command)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(first_run, tmp_path):
    """A copy of a run, to damage."""
    return shutil.copytree(first_run, tmp_path / "run")


def drawn(run):
    return {name: (run / name).read_bytes() for name in ("report.html", "latent.png")}


def test_the_report_has_the_same_bytes_and_nothing_else_is_touched(celbo_command, run):
    before = drawn(run)
    others = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in before and path.is_file()}
    for name in before:
        (run / name).unlink()
    for named in (run, run / "model"):
        done = celbo_command("report", named)
        assert (done.returncode, done.stderr) == (0, f"open {run / 'report.html'}\n")
        assert drawn(run) == before
    now = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in before and path.is_file()}
    assert now == others


def test_another_process_draws_the_same_without_torch(run):
    before = drawn(run)
    code = (
        "import sys; from celbo.app.cli import main; sys.argv = ['celbo', 'report', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert drawn(run) == before


def test_warnings_and_remedies_of_the_fit_are_in_the_record_and_in_the_report(run):
    notes = json.loads((run / "run.json").read_text())["notes"]
    assert notes == read_summary(run)["notes"]
    assert any("trained with mmd:5" in note for note in notes)
    assert any("posterior collapse" in note for note in notes)
    page = (run / "report.html").read_text()
    assert "trained with mmd:5: training did not maximise the ELBO itself" in page


def test_the_summary_is_that_of_the_model_and_its_cells(run, cells):
    summary = read_summary(run)
    assert summary["title"] == "celbo: cells.h5ad"
    assert summary["celbo_version"] == celbo.__version__
    assert summary["diagnosis"]["verdict"] == summary["verdict"]
    assert len(summary["history"]) == summary["metrics"]["epochs"] == 2
    colours = summary["latent"]["colours"]
    assert next(iter(colours)) == "donor"
    assert {"text", "flag", "score"} <= set(colours)
    assert colours["score"]["values"] == [None if np.isnan(v) else v for v in cells.obs["score"]]
    assert colours["flag"]["values"] == [str(value) for value in cells.obs["flag"]]
    assert summary["recovery"] is None


def test_the_demo_keeps_what_it_recovered(celbo_command, monkeypatch, tmp_path):
    small = celbo.simulate_cells(300, 60, n_types=3, n_batches=2, seed=0)
    monkeypatch.setattr(demo, "demo_cells", lambda seed: small)
    quick = celbo.TrainConfig(max_epochs=2, seed=0)
    model = celbo.ExpressionVAE(latent_dim=3, hidden_dims=(8,), conditions=demo.DEMO_CONDITIONS, train=quick)
    monkeypatch.setattr(demo, "demo_model", lambda seed: model)
    done = celbo_command("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert f"picture: {tmp_path / 'demo' / 'latent.png'}\nopen {tmp_path / 'demo' / 'report.html'}\n" in done.stderr
    before = drawn(tmp_path / "demo")
    assert b"What was recovered" in before["report.html"]
    assert celbo_command("report", tmp_path / "demo").returncode == 0
    assert drawn(tmp_path / "demo") == before


def test_a_run_of_an_older_celbo_has_no_notes_and_is_drawn(celbo_command, run):
    record = json.loads((run / "run.json").read_text())
    del record["notes"], record["recovery"]
    record["versions"]["celbo"] = "0.0.9"
    (run / "run.json").write_text(json.dumps(record))
    (run / "diagnosis.json").unlink()
    assert celbo_command("report", run).returncode == 0
    page = (run / "report.html").read_text()
    assert "celbo 0.0.9" in page
    assert "Before you rely on it" not in page


@pytest.mark.parametrize("name", ["metrics.json", "history.jsonl", "embedding.h5ad"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "of another program"])
def test_a_file_that_is_missing_or_damaged_is_named_and_the_old_report_stays(celbo_command, run, name, damage):
    before, path = drawn(run), run / name
    if damage == "missing":
        path.unlink()
    elif damage == "of another program" and name == "embedding.h5ad":
        anndata.AnnData(np.zeros((3, 2), np.float32)).write_h5ad(path)
    else:
        raw = path.read_bytes()
        path.write_bytes({"empty": b"", "cut off": raw[: len(raw) // 2]}.get(damage, b"[1, 2]\n"))
    done = celbo_command("report", run)
    if damage == "empty" and name == "history.jsonl":  # a history without epochs
        assert done.returncode == 0, done.stderr
        assert (run / "report.html").stat().st_size > 1000
    else:
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith(f"error: {path} is ")
        assert "fault in celbo" not in done.stderr
        assert drawn(run) == before


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"versions": {"celbo": "0.1.0"}}'])
def test_a_folder_without_the_record_of_a_run_is_refused(celbo_command, run, content):
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    before = sorted(run.iterdir())
    done = celbo_command("report", run)
    assert done.returncode in (2, 4)
    assert "run.json" in done.stderr
    assert sorted(run.iterdir()) == before


def test_a_folder_that_is_not_there_is_refused_and_not_made(celbo_command, tmp_path):
    done = celbo_command("report", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (4, "")
    assert f"{tmp_path / 'nothing'} does not exist; name the folder that `celbo fit -o` or `save` wrote" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_writes_is_left_alone(celbo_command, run):
    before = drawn(run)
    with claimed_folder(run):
        done = celbo_command("report", run)
    assert done.returncode == 6
    assert "is being written by process" in done.stderr
    assert "Wait for it, or copy the run, and name the copy." in done.stderr
    assert drawn(run) == before


FAULTS = {
    "picture": "celbo.report.figures.to_png",
    "page": "celbo.report.page.render",
    "layout": "celbo.runs.reporting.layout",
}


@pytest.mark.parametrize(
    ("what", "fault"),
    [("picture", ValueError("no such\nfont")), ("page", ImportError("No module named 'x'")), ("layout", MemoryError())],
)
def test_a_report_that_cannot_be_drawn_is_no_failure_of_the_fit(
    celbo_command, run, data, monkeypatch, tmp_path, what, fault
):
    def fail(*_, **__):
        raise fault

    with monkeypatch.context() as broken:
        broken.setattr(FAULTS[what], fail)
        done = celbo_command("fit", data, "-o", run, "--likelihood", "poisson", *FIT)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "could not be drawn" in line]
        reason = str(fault).split("\n")[0]
        assert line.startswith(f"warning: the report could not be drawn ({type(fault).__name__}")
        assert reason in line
        assert f"celbo report {run} tries again" in line
        assert "open " not in done.stderr
        assert "ELBO of held-out cells" in done.stderr
        assert not (run / "report.html").exists()
        assert not (run / ".celbo-lock").exists()
        if type(fault) is ValueError:
            again = celbo_command("report", run)
            assert (again.returncode, "no such" in again.stderr) == (1, True)
    assert json.loads((run / "metrics.json").read_text())["likelihood"] == "poisson"
    assert celbo.load(run).likelihood == "poisson"
    assert celbo_command("report", run).returncode == 0
    assert b"Poisson" in (run / "report.html").read_bytes()


@pytest.mark.long
def test_a_cure_whose_report_cannot_be_drawn_is_no_failure(celbo_command, run, monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("no font")

    with monkeypatch.context() as broken:
        broken.setattr(FAULTS["page"], fail)
        done = celbo_command("cure", run, "-o", tmp_path / "cured", "--tries", "1")
        assert done.returncode == 0, done.stderr
        assert "could not be drawn (ValueError: no font)" in done.stderr
    assert (tmp_path / "cured" / "cure.json").exists()
    assert celbo_command("report", tmp_path / "cured").returncode == 0
    shutil.copytree(tmp_path / "cured", tmp_path / "elsewhere")
    before = drawn(tmp_path / "cured")
    assert celbo_command("report", tmp_path / "elsewhere").returncode == 0
    assert drawn(tmp_path / "elsewhere") == before


def test_the_reader_names_the_missing_file(run):
    (run / "metrics.json").unlink()
    with pytest.raises(ModelFileError, match=r"metrics\.json is missing, and the report needs it"):
        read_summary(run)
