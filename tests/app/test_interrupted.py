"""Ctrl-C on the command line: what is written, and the exit code. And the bar on a real terminal."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import celbo
from celbo.app import terminal
from celbo.ask import readings
from celbo.fit import fitted
from celbo.kernels.dispatch import adam
from celbo.runs.claims import WRITTEN
from celbo.trust import diagnosing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and terminals")
LONG = ("--epochs", "100000", "--patience", "100000", "--latent-dim", "2", "--hidden-dim", "8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.h5ad"
    celbo.simulate_cells(n_cells=320, n_genes=20, n_types=2, seed=1).write_h5ad(path)
    return path


@contextmanager
def on_a_terminal(*command, **variables):
    """Run a program whose stderr is a pseudo-terminal. Give the process, and a function that reads up to a text."""
    outside, inside = os.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200", **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inside, text=True, env=environment)
    os.close(inside)
    seen = ""

    def read_to(text, seconds=300):
        nonlocal seen
        deadline, start = time.monotonic() + seconds, len(seen)
        while text is None or text not in seen[start:]:
            assert time.monotonic() < deadline, seen
            if not select.select([outside], [], [], 1)[0]:
                continue
            try:
                seen += os.read(outside, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                assert text is None, seen
                break
        return seen

    try:
        yield process, read_to
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(outside)


def fit_on_a_terminal(data, folder):
    code = "from celbo.app.cli import main; main()"
    return on_a_terminal(sys.executable, "-c", code, "fit", str(data), "-o", str(folder), *LONG)


@pytest.mark.long
def test_the_first_interrupt_writes_the_run_and_the_second_stops_at_once(data, tmp_path):
    folder = tmp_path / "run"
    with fit_on_a_terminal(data, folder) as (process, read_to):
        read_to("held-out ELBO")
        process.send_signal(signal.SIGINT)
        screen = read_to(None)
        assert process.wait(timeout=60) == 130
        assert process.stdout.read() == ""
    assert "left at most" in screen
    assert "interrupted: training ends; interrupt again to stop at once" in screen
    assert "Traceback" not in screen
    record = json.loads((folder / "run.json").read_text())
    assert record["stopped"] == "interrupted"
    said = "training was interrupted after"
    assert said in screen
    assert said in (folder / "report.html").read_text()
    assert {path.name for path in folder.iterdir()} >= set(WRITTEN) - {"cure.json", "choice.json"}
    first = celbo.load(folder)
    assert first.fitted_.stopped == "interrupted"
    assert len(first.history_) >= 1

    with fit_on_a_terminal(data, folder) as (process, read_to):
        read_to("held-out ELBO")
        process.send_signal(signal.SIGINT)
        read_to("training was interrupted")  # from here on the run is written
        process.send_signal(signal.SIGINT)
        screen = read_to(None)
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in screen
    assert celbo.load(folder).fitted_.stopped == "interrupted"  # the old model or the new one, and whole


def interrupting(monkeypatch, at):
    """Let Adam send this process a real SIGINT, at the step of this number."""
    steps = []

    def count(*arguments, **options):
        steps.append(adam(*arguments, **options))
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("celbo.fit.steps.adam", count)


@pytest.mark.parametrize(("at", "auto"), [(1, ()), (30, ("--latent-dim", "auto"))], ids=["first epoch", "choice"])
def test_where_nothing_can_be_kept_nothing_is_written(data, tmp_path, celbo_command, monkeypatch, at, auto):
    interrupting(monkeypatch, at)
    done = celbo_command("fit", data, "-o", tmp_path / "run", "--hidden-dim", "8", "--epochs", "8", *auto)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "nothing of this fit is kept" in done.stderr or auto
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("module", "step"), [(fitted, "_reference_of"), (readings, "with_readings"), (diagnosing, "doubts_of_fit")]
)
def test_an_interrupt_after_training_loses_nothing(data, tmp_path, celbo_command, monkeypatch, module, step):
    measured, whole = [], getattr(module, step)

    def interrupted(*arguments):
        measured.append(arguments)
        if len(measured) == 1:
            signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(module, step, interrupted)
    done = celbo_command("fit", data, "-o", tmp_path / "run", "--hidden-dim", "8", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert len(measured) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped"] is None
    assert celbo.load(tmp_path / "run").fitted_.reference is not None


def test_remedies_are_not_tried_on_an_interrupted_fit(data, tmp_path, celbo_command, monkeypatch):
    interrupting(monkeypatch, 30)
    done = celbo_command("fit", data, "-o", tmp_path / "run", "--auto-remedy", *LONG)
    assert done.returncode == 130
    assert "warning: no remedy was tried, because training was interrupted" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped"] == "interrupted"
    assert not (tmp_path / "run" / "cure.json").exists()


def test_a_fit_that_came_to_its_end_says_so(data, tmp_path, celbo_command):
    done = celbo_command("fit", data, "-o", tmp_path / "run", "--hidden-dim", "8", "--epochs", "2")
    assert (done.returncode, done.stdout) == (0, "")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "stopped" in record
    assert record["stopped"] is None


@pytest.mark.parametrize(
    ("signals", "keeps", "raised"),
    [
        ([signal.SIGINT], True, KeyboardInterrupt),
        ([signal.SIGINT], False, SystemExit),
        ([signal.SIGINT, signal.SIGINT], True, SystemExit),
        ([signal.SIGTERM], True, SystemExit),
    ],
)
def test_a_signal_that_python_dropped_acts_at_the_next_minibatch(monkeypatch, signals, keeps, raised):
    monkeypatch.setattr(terminal, "_signals", signals)
    monkeypatch.setattr(terminal, "_keeps_fit", keeps)
    acting = terminal.stop_on_signal(lambda minibatches, plan, history: minibatches)
    with pytest.raises(raised):
        next(iter(acting([[0]], None, [])))
