"""The command line as a person or a pipeline meets it: real processes, streams, files and exit codes."""

import fcntl
import inspect
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from forked import run_celbo
from typer.main import get_command
from typer.testing import CliRunner

import celbo
from celbo.app import cli, terminal
from celbo.app.commands import conditions_of, open_run
from celbo.app.config import READING

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments):
    return [sys.executable, "-c", "from celbo.app.cli import main; main()", *map(str, arguments)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("data") / "cells with ünicode.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def fitted_run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_celbo("fit", data, "-o", folder, "--condition", "batch", "--epochs", "4", "--latent-dim", "3")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.long
@pytest.mark.parametrize(("at", "of_the_new"), [("measure", False), ("_record", True)])
def test_a_run_that_is_killed_while_it_replaces_another_leaves_one_of_both_whole(
    fitted_run, data, tmp_path, at, of_the_new
):
    """Killed before all is computed: the earlier run is whole. Killed after it: the new model, and nothing earlier."""
    shutil.copytree(fitted_run[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    dying = (
        "import os, signal; from celbo.app import cli; from celbo.runs import run_folder\n"
        f"run_folder.{at} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main()"
    )
    arguments = ["fit", data, "-o", tmp_path / "run", "--epochs", "2", "--latent-dim", "4"]
    done = subprocess.run([sys.executable, "-c", dying, *map(str, arguments)], capture_output=True, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert after.keys() - {".celbo-lock"} == (set() if of_the_new else before.keys() - {".celbo-lock"})
    assert all(after[name] == before[name] for name in after.keys() - {".celbo-lock"})
    assert celbo.load(tmp_path / "run").latent_dim == (4 if of_the_new else 3)
    assert run_celbo("fit", data, "-o", tmp_path / "run", "--epochs", "1").returncode == 0


def test_a_runs_own_embedding_is_not_replaced(fitted_run, data, celbo_command):
    folder, _ = fitted_run
    before = (folder / "embedding.h5ad").read_bytes()
    done = celbo_command("embed", folder, data, "-o", folder / "embedding.h5ad")
    assert done.returncode == 2
    assert "is the embedding of a run" in done.stderr
    assert (folder / "embedding.h5ad").read_bytes() == before


def test_cells_that_hold_an_embedding_are_no_embedding(fitted_run, data, tmp_path, celbo_command):
    """A person's counts, into which they put what `embed` gave, as the documentation has it."""
    mine = anndata.read_h5ad(data)
    mine.obsm["X_celbo"] = anndata.read_h5ad(fitted_run[0] / "embedding.h5ad").obsm["X_celbo"]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    before = (tmp_path / "mine.h5ad").read_bytes()
    done = celbo_command("embed", fitted_run[0], data, "-o", tmp_path / "mine.h5ad")
    assert done.returncode == 2
    assert "no embedding that celbo wrote" in done.stderr
    assert (tmp_path / "mine.h5ad").read_bytes() == before
    for _ in range(2):  # its own it may replace
        assert celbo_command("embed", fitted_run[0], data, "-o", tmp_path / "z.h5ad").returncode == 0


def test_the_folder_of_another_program_is_left_alone(data, tmp_path, celbo_command):
    """Many write a run.json and a metrics.json."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for record in ("{}", "[1]", "no json", '{"versions": {"torch": "2"}}'):
        (folder / "run.json").write_text(record)
        (folder / "metrics.json").write_text("theirs")
        done = celbo_command("fit", data, "-o", folder, "--epochs", "1")
        assert done.returncode == 2
        assert "that celbo did not write" in " ".join(done.stderr.split())
        assert (folder / "run.json").read_text() == record
        assert (folder / "metrics.json").read_text() == "theirs"
        assert {path.name for path in folder.iterdir()} == {"run.json", "metrics.json"}


def test_labels_are_checked_before_they_are_fitted(data, celbo_command):
    good = celbo_command("check", data, "--labels", "cell_type")
    assert good.returncode == 0, good.stdout
    bad = celbo_command("check", data, "--labels", "types")
    assert bad.returncode == 3
    assert "error (labels): obs has no column 'types' for labels" in bad.stdout


def test_fit_writes_everything_under_one_folder(fitted_run):
    folder, _ = fitted_run
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "embedding.h5ad",
        "metrics.json",
        "history.jsonl",
        "run.json",
        "diagnosis.json",
        "latent.png",
        "report.html",
    }


def test_fit_talks_to_stderr_alone_and_without_control_characters(fitted_run):
    _, done = fitted_run
    assert done.stdout == ""
    assert "report.html" in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


def test_metrics_are_complete_and_agree_with_the_model(fitted_run, cells):
    folder, _ = fitted_run
    metrics = json.loads((folder / "metrics.json").read_text())
    promised = (
        "n_cells n_genes likelihood latent_dim epochs steps seconds cells_per_second peak_memory_mb elbo_train "
        "elbo_validation reconstruction_validation kl_validation kl_per_dim active_units kl_weight_final"
    )
    assert set(promised.split()) <= set(metrics)
    assert (metrics["n_cells"], metrics["n_genes"], metrics["likelihood"], metrics["epochs"]) == (300, 60, "nb", 4)
    assert metrics["kl_weight_final"] == 1
    assert metrics["elbo_validation"] == pytest.approx(
        metrics["reconstruction_validation"] - metrics["kl_validation"], rel=1e-5
    )
    assert sum(metrics["kl_per_dim"]) == pytest.approx(metrics["kl_validation"], rel=1e-4)
    model = celbo.load(folder)
    elbo = model.elbo(cells)["elbo"]
    best = max(epoch.validation_elbo for epoch in model.history_ if epoch.kl_weight == 1)
    assert metrics["elbo_validation"] == pytest.approx(best, rel=1e-6)
    assert elbo.mean() == pytest.approx(0.9 * metrics["elbo_train"] + 0.1 * metrics["elbo_validation"], rel=1e-5)


def test_history_has_a_line_per_epoch_and_run_says_how_to_repeat_it(fitted_run):
    folder, _ = fitted_run
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4]
    assert record["options"]["conditions"] == ["batch"]
    assert record["options"]["train"]["max_epochs"] == 4
    assert record["versions"]["celbo"] == celbo.__version__
    assert record["seed"] == 0
    assert len(record["data"]["sha256_values"]) == 64


def test_the_embedding_has_names_obs_and_latent_but_no_counts(fitted_run, cells):
    folder, _ = fitted_run
    embedding = anndata.read_h5ad(folder / "embedding.h5ad")
    assert list(embedding.obs_names) == list(cells.obs_names)
    assert set(cells.obs) <= set(embedding.obs)
    assert embedding.X is None
    assert embedding.obsm["X_celbo"].shape == embedding.obsm["X_celbo_sd"].shape == (300, 3)


def test_embed_gives_what_fit_gave_with_genes_in_any_order(fitted_run, cells, tmp_path):
    folder, _ = fitted_run
    cells[:, ::-1].write_h5ad(tmp_path / "query.h5ad")
    done = run_celbo("embed", folder, tmp_path / "query.h5ad", "-o", tmp_path / "out" / "z.h5ad")
    assert (done.returncode, done.stdout) == (0, "")
    found = anndata.read_h5ad(tmp_path / "out" / "z.h5ad").obsm["X_celbo"]
    np.testing.assert_array_equal(found, anndata.read_h5ad(folder / "embedding.h5ad").obsm["X_celbo"])


@pytest.mark.long
def test_the_same_command_gives_the_same_bytes(data, tmp_path):
    for name in ("once", "again"):  # two processes, whose sets have another order
        fit = command("fit", data, "-o", tmp_path / name, "--condition", "batch", "--epochs", "4", "--latent-dim", "3")
        assert subprocess.run(fit, capture_output=True, env=ENVIRONMENT).returncode == 0
    for name in ("weights.safetensors", "reference.safetensors"):
        once, again = ((tmp_path / folder / "model" / name).read_bytes() for folder in ("once", "again"))
        assert once == again, name


def test_inspect_tells_people_and_programs_what_a_folder_holds(fitted_run):
    folder, _ = fitted_run
    for path in (folder, folder / "model"):
        found = json.loads(run_celbo("inspect", path, "--json").stdout)
        assert (found["likelihood"], found["latent_dim"], found["n_genes"], found["epochs"]) == ("nb", 3, 60, 4)
        assert found["conditions"] == {"batch": ["batch_0", "batch_1"]}
    assert "batch_0" in run_celbo("inspect", folder).stdout


def test_inspect_needs_no_torch(fitted_run):
    folder, _ = fitted_run
    code = (
        "import sys; from celbo.app.cli import main\n"
        f"sys.argv = ['celbo', 'inspect', {str(folder)!r}]\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_the_command_lines_defaults_are_the_estimators():
    names = {"hidden_dim": "hidden_dims", "condition": "conditions", "epochs": "max_epochs", "remedy": "remedies"}
    names["interaction"] = "interactions"
    model = celbo.ExpressionVAE().options()
    lists = dict.fromkeys(["hidden_dims", "conditions", "remedies", "nuisance", "interactions"])
    defaults = {**model, **model["train"], **lists}
    defaults["latent_dim"] = str(model["latent_dim"])  # which may be a word
    options = inspect.signature(cli.fit).parameters
    for name in options.keys() - {"ctx", "data", "output", "keep_reference", "auto_remedy", "config", *READING}:
        assert options[name].default == defaults[names.get(name, name)], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--likelihood", "negbin"], "choose one of gaussian, bernoulli, poisson, nb, zinb"),
        (["--norm", "group"], "choose one of none, layer, batch"),
        (["--dispersion", "gene-cell", "--likelihood", "poisson"], "is for the likelihoods nb, zinb"),
        (["--epochs", "0"], "max_epochs=0"),
        (["--device", "warp9"], "use 'auto' or 'cpu'"),
        (["--latent-dim", "ten"], "ten"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_options_end_in_words_and_exit_2(data, tmp_path, arguments, message):
    done = run_celbo("fit", data, "-o", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("fault", ["not there", "no h5ad", "no column", "log values", "duplicate genes"])
def test_bad_data_end_in_words_and_exit_3(data, cells, tmp_path, fault):
    path, arguments = tmp_path / "bad.h5ad", []
    bad = cells.copy()
    if fault == "no h5ad":
        path.write_text("counts, honestly")
    elif fault == "no column":
        path, arguments = data, ["--condition", "donor"]
    elif fault == "log values":
        bad.X = bad.X.log1p()
        bad.write_h5ad(path)
    elif fault == "duplicate genes":
        bad.var_names = ["same"] * 60
        bad.write_h5ad(path)
    done = run_celbo("fit", path, "-o", tmp_path / "run", *arguments)
    message = {
        "not there": "does not exist",
        "no h5ad": "is no AnnData: it is a text file",
        "no column": "no column 'donor'; it has 'cell_type'",
        "log values": "are not whole numbers",
        "duplicate genes": "more than once: 'same'",
    }[fault]
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (3, True, False), done.stderr


@pytest.mark.parametrize("command_name", ["inspect", "embed"])
def test_a_tampered_model_ends_in_words_and_exit_4(fitted_run, data, tmp_path, command_name):
    folder, _ = fitted_run
    copy = tmp_path / "model"
    copy.mkdir()
    for path in (folder / "model").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "weights.safetensors").write_bytes(pickle.dumps(os.getcwd))
    more = [data, "-o", tmp_path / "z.h5ad"] if command_name == "embed" else []
    done = run_celbo(command_name, copy, *more)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "z.h5ad").exists()


def test_a_folder_that_cannot_be_written_ends_in_words(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run_celbo("fit", data, "-o", tmp_path / "file", "--epochs", "1")
    assert (done.returncode, (tmp_path / "file").read_text()) == (2, "mine")
    done = run_celbo("fit", data, "-o", "/proc/celbo", "--epochs", "1")
    assert done.returncode == 6
    assert "Name another folder" in done.stderr


def test_the_data_are_never_overwritten(fitted_run, data, tmp_path):
    folder, _ = fitted_run
    before = data.read_bytes()
    done = run_celbo("embed", folder, data, "-o", data)
    assert (done.returncode, data.read_bytes()) == (2, before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_signal_that_comes_while_c_calls_python_leaves_no_traceback():
    """What is raised there cannot be passed on, and would be printed; the next minibatch ends the work."""
    program = """
import ctypes, os, signal, sys
from celbo.app import terminal
def told():
    @ctypes.CFUNCTYPE(None)
    def called():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    called()
    for _ in terminal.stop_on_signal(lambda rows, plan, history: rows)(iter([1, 2]), None, []):
        print("went on")
terminal.guarded(told)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), pytest.param("SIGHUP", 129, marks=pytest.mark.long)])
def test_a_signal_ends_training_with_its_own_exit_code(data, tmp_path, name, exit_code):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("fit", data, "-o", folder, "--epochs", "100000", "--patience", "100000"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 60
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == exit_code
    said = {"SIGTERM": "terminated", "SIGHUP": "stopped: the terminal was closed"}
    assert stderr.endswith(f"{said[name]}\n")
    assert not folder.exists()  # nor its lock


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX terminals")
@pytest.mark.parametrize("lock", ["in a new folder", "in the folder of a run"])
def test_a_terminal_that_is_closed_ends_training_and_frees_the_folder(fitted_run, data, tmp_path, lock):
    folder = tmp_path / "run"
    if lock == "in the folder of a run":
        shutil.copytree(fitted_run[0], folder)
    files = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    ours, theirs = pty.openpty()

    def control_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command("fit", data, "-o", folder, "--epochs", "100000", "--patience", "100000"),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        preexec_fn=control_terminal,
        env={**ENVIRONMENT, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while b"epoch" not in shown:  # the progress bar: training goes on
        shown += os.read(ours, 1000)
    assert (folder / ".celbo-lock").exists()
    os.close(ours)
    assert process.wait(timeout=60) == 129
    assert {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()} == files


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_command_that_nohup_started_goes_on_when_the_terminal_is_closed(data, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("fit", data, "-o", folder, "--epochs", "3", "--hidden-dim", "8", "--latent-dim", "2"),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        env=ENVIRONMENT,
    )
    while not folder.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (folder / "report.html").exists()


MISSING_CELLS = "missing.h5ad does not exist; give an .h5ad file or a .zarr folder."
MISSING_RUN = "nothing does not exist; name the folder that `celbo fit -o` or `save` wrote."
MISSING_INPUTS = {
    "fit": (["fit", "missing.h5ad", "-o", "new", "--seed", "0"], 3, MISSING_CELLS),
    "fit with a config": (
        ["fit", "DATA", "-o", "new", "--config", "no.toml"],
        2,
        "no.toml cannot be read: No such file",
    ),
    "check": (["check", "missing.h5ad"], 3, f"error (unreadable): {MISSING_CELLS}"),
    "check for a run": (["check", "missing.h5ad", "--model", "RUN"], 3, f"error (unreadable): {MISSING_CELLS}"),
    "check for no run": (["check", "DATA", "--model", "nothing"], 4, MISSING_RUN),
    "embed": (["embed", "RUN", "missing.h5ad", "-o", "z.h5ad"], 3, MISSING_CELLS),
    "embed by no run": (["embed", "nothing", "DATA", "-o", "z.h5ad"], 4, MISSING_RUN),
    "embed by a folder": (
        ["embed", ".", "DATA", "-o", "z.h5ad"],
        4,
        ". is not a model folder: it has no manifest.json",
    ),
    "map": (["map", "RUN", "missing.h5ad", "-o", "new"], 3, MISSING_CELLS),
    "predict": (["predict", "RUN", "missing.h5ad", "-o", "a.csv"], 3, MISSING_CELLS),
    "score": (["score", "nothing", "missing.h5ad", "-o", "a.csv"], 4, MISSING_RUN),
    "de": (["de", "RUN", "missing.h5ad", "--groupby", "batch", "-o", "a.csv"], 3, MISSING_CELLS),
    "counterfactual": (["counterfactual", "RUN", "missing.h5ad", "--set", "a=b", "-o", "z.h5ad"], 3, MISSING_CELLS),
    "counterfactual by others": (
        ["counterfactual", "RUN", "DATA", "--set", "a=b", "-o", "z.h5ad", "--other", "nothing"],
        4,
        MISSING_RUN,
    ),
    "express": (["express", "RUN", "missing.h5ad", "-o", "z.h5ad"], 3, MISSING_CELLS),
    "sample": (["sample", "nothing", "-o", "z.h5ad"], 4, MISSING_RUN),
    "inspect": (["inspect", "nothing"], 4, MISSING_RUN),
    "diagnose": (["diagnose", "RUN", "missing.h5ad"], 3, MISSING_CELLS),
    "diagnose no run": (["diagnose", "nothing"], 4, MISSING_RUN),
    "diagnose without the cells of fit": (["diagnose", "LONELY"], 2, "which no longer exists; name the cells."),
    "cure": (["cure", "LONELY", "-o", "new"], 2, "which no longer exists; name the cells."),
    "compare": (["compare", "RUN", "nothing", "--data", "DATA"], 4, MISSING_RUN),
    "compare on no cells": (["compare", "RUN", "LONELY", "--data", "missing.h5ad"], 3, MISSING_CELLS),
    "report": (["report", "nothing"], 4, MISSING_RUN),
}


def test_missing_inputs_are_refused_before_anything_heavy_is_loaded(fitted_run, data, tmp_path):
    lonely = shutil.copytree(fitted_run[0], tmp_path / "lonely")
    record = json.loads((lonely / "run.json").read_text())
    record["reading"]["path"] = str(tmp_path / "gone.h5ad")
    (lonely / "run.json").write_text(json.dumps(record))
    places = {"RUN": str(fitted_run[0]), "DATA": str(data), "LONELY": str(lonely)}
    code = """
import contextlib, io, json, sys
from celbo.app.cli import main
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["celbo", *arguments]
    texts = io.StringIO()
    try:
        with contextlib.redirect_stdout(texts), contextlib.redirect_stderr(texts):
            main()
    except SystemExit as ended:
        heavy = [library for library in ("torch", "anndata", "pandas", "matplotlib", "numba") if library in sys.modules]
        found[name] = ended.code, texts.getvalue(), heavy
print(json.dumps(found))
"""
    commands = {name: [places.get(part, part) for part in given] for name, (given, _, _) in MISSING_INPUTS.items()}
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    found = json.loads(done.stdout)
    for name, (_, expected_code, message) in MISSING_INPUTS.items():
        exit_code, text, heavy = found[name]
        assert exit_code == expected_code, (name, text)
        assert message in text, (name, text)
        assert not heavy, name
    assert {path.name for path in tmp_path.iterdir()} == {"lonely"}


def test_every_command_that_takes_cells_or_a_run_is_among_those_with_missing_inputs():
    commands = get_command(cli.app).commands
    assert {given[0] for given, _, _ in MISSING_INPUTS.values()} == set(commands) - {"demo"}


def test_the_list_of_remedies_needs_no_cells(celbo_command):
    done = celbo_command("fit", "x", "-o", "y", "--remedy", "list")
    assert (done.returncode, "free_bits" in done.stdout) == (0, True)


def test_missing_cells_are_a_finding_of_check_in_json_too(celbo_command, tmp_path):
    done = celbo_command("check", tmp_path / "missing.h5ad", "--json")
    document = json.loads(done.stdout)
    message = f"{tmp_path / 'missing.h5ad'} does not exist; give an .h5ad file or a .zarr folder."
    problem = {"name": "unreadable", "severity": "error", "message": message}
    sizes = dict.fromkeys(["n_cells", "n_genes", "n_values"])
    found = {"ok": False, **sizes, "problems": [problem]}
    assert document == {"path": str(tmp_path / "missing.h5ad"), "celbo_version": celbo.__version__, **found}
    assert done.returncode == 3


def test_a_signal_whose_exception_python_drops_still_ends_training_at_the_next_minibatch(monkeypatch):
    monkeypatch.setattr(terminal, "_signals", [signal.SIGTERM])
    ending = terminal.stop_on_signal(lambda minibatches, plan, history: minibatches)
    with pytest.raises(SystemExit) as ended:
        next(iter(ending([np.arange(3)], None, [])))
    assert ended.value.code == 143


def test_a_cell_type_cannot_control_the_terminal(cells, tmp_path):
    hostile = cells.copy()
    hostile.obs["batch"] = "\x1b[31mred"
    hostile.write_h5ad(tmp_path / "cells.h5ad")
    done = run_celbo("fit", tmp_path / "cells.h5ad", "-o", tmp_path / "run", "--condition", "batch", "--epochs", "1")
    assert done.returncode == 0
    assert "[31mred" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("name", [None, "fit", "embed", "inspect", "demo"])
def test_help_teaches(name):
    done = run_celbo(*([name] if name else []), "--help", cwd=Path(celbo.__file__).parent)
    assert done.returncode == 0
    assert ("celbo fit counts.h5ad -o run" if name in {None, "fit"} else "Usage") in done.stdout


def test_a_condition_with_an_equals_sign_in_its_name_is_found():
    conditions = [SimpleNamespace(name="dose", levels=("low=1", "high")), SimpleNamespace(name="dose=low", levels=None)]
    model = SimpleNamespace(schema_=SimpleNamespace(conditions=conditions))
    assert conditions_of(model, ["dose=low=1"], "--set") == {"dose=low": 1.0}
    assert conditions_of(model, ["dose=high", "dose=low=2.5"], "--set") == {"dose": "high", "dose=low": 2.5}


def test_a_warning_is_shown_once_and_kept_each_time(capsys):
    with terminal.shown_warnings() as notes:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("few cells", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: few cells\n"
    assert notes == ["few cells"] * 2


@pytest.mark.parametrize(("recorded", "asked"), [(True, False), (False, True), (False, False)])
def test_a_run_is_read_from_disk_if_it_was_or_if_asked(fitted, data, tmp_path, recorded, asked):
    fitted.save(tmp_path / "model")
    (tmp_path / "run.json").write_text(json.dumps({"reading": {"path": str(data), "on_disk": recorded}}))
    _, adata, path, reading = open_run(tmp_path, None, on_disk=asked)
    assert (path, reading.on_disk) == (data, recorded or asked)
    assert isinstance(adata.X, sp.csr_matrix) != reading.on_disk


def test_an_empty_cell_is_not_counted_among_those_with_too_few_draws(fitted, cells, tmp_path, celbo_command):
    fitted.save(tmp_path / "model")
    x = cells.X[:20].toarray()
    x[3] = 0
    anndata.AnnData(sp.csr_matrix(x), obs=cells.obs[:20], var=cells.var).write_h5ad(tmp_path / "some.h5ad")
    ask = ["score", tmp_path / "model", tmp_path / "some.h5ad", "-o", tmp_path / "scores.csv", "--n-samples", "2"]
    done = celbo_command(*ask)
    table = pd.read_csv(tmp_path / "scores.csv")
    n_doubtful = (~table["trusted"] & table["log_p"].notna()).sum()
    assert n_doubtful > 0
    assert f"; {n_doubtful} cells with too few effective draws to trust: try --refine, or more draws" in done.stderr
    assert "; 1 without a count: " in done.stderr


def in_columns(columns, *arguments):
    """The help of a command in a terminal of so many columns."""
    done = CliRunner().invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": str(columns), "TERM": "dumb"})
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))
@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_of_every_command_reads_well(name, columns):
    text = in_columns(columns, name)
    words = set(text.split())
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for parameter in get_command(cli.app).commands[name].params:
        assert {*parameter.opts, *parameter.secondary_opts} <= words | {parameter.name}
        if parameter.opts[0].startswith("-"):
            assert parameter.help
    rows = [line for line in text.splitlines() if line.startswith("│ ") and "--" in line]
    assert len(text.splitlines()) < 6 * len(rows) + 25  # no column of single words


def test_the_options_of_fit_are_in_panels_the_common_ones_first():
    text = in_columns(80, "fit")
    panels = re.findall(r"^╭─ (\w+)", text, re.MULTILINE)
    assert panels == ["Arguments", "Options", "Data", "Model", "Training", "More"]
    common = text[text.index("╭─ Options") : text.index("╭─ Data")]
    assert re.findall(r"--[a-z]+", common) == ["--output", "--condition", "--nuisance", "--config", "--help"]


def test_the_version_is_shown():
    assert run_celbo("--version").stdout == f"celbo {celbo.__version__}\n"


def test_python_m_celbo_is_the_command_line(tmp_path):
    def module(*arguments):
        process = [sys.executable, "-m", "celbo", *map(str, arguments)]
        return subprocess.run(process, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)

    assert module("--version").stdout == f"celbo {celbo.__version__}\n"
    done = module("inspect", tmp_path / "nothing")
    assert done.returncode == run_celbo("inspect", tmp_path / "nothing").returncode == 4
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]
)
def test_running_out_of_memory_has_its_own_exit_code(monkeypatch, capsys, error):
    def hungry():
        raise error

    monkeypatch.setattr(cli, "app", hungry)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 137
    assert "out of memory" in capsys.readouterr().err


def test_a_fault_of_ours_asks_for_a_report(monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "This is a fault in celbo" in capsys.readouterr().err


@pytest.mark.long
def test_the_demo_recovers_the_truth_and_names_a_picture(tmp_path):
    done = run_celbo("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    values = {name: float(value) for name, value in re.findall(r"^([a-z ]+): ([0-9.]+)", done.stdout, re.MULTILINE)}
    assert values["cell types"] > 0.95
    assert values["batch"] < 0.6
    assert values["treatment effect"] > 0.75
    assert str(tmp_path / "demo" / "report.html") in done.stderr
    assert (tmp_path / "demo" / "latent.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_fitted_model_says_itself_is_refused_beside_it(fitted_run, data):
    folder, _ = fitted_run
    done = run_celbo("check", data, "--model", folder, "--condition", "batch", "--layer", "counts")
    assert done.returncode == 2
    assert "leave out --condition, --layer" in done.stderr


@pytest.mark.parametrize("command_name", ["predict", "score", "de"])
def test_the_table_of_another_program_is_refused_before_any_work(tmp_path, celbo_command, command_name):
    more = ["--groupby", "cell_type"] if command_name == "de" else []
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    (tmp_path / "cells.h5ad").touch()
    ask = [command_name, tmp_path / "damaged", tmp_path / "cells.h5ad", *more, "-o", tmp_path / "mine.csv"]
    starts = {
        "predict": "cell,label,probability,p_known,",
        "score": "cell,log_p,se,ess,",
        "de": "gene,group,reference,",
    }
    for name, start in starts.items():
        (tmp_path / "mine.csv").write_text(f"{start}more\n")
        done = celbo_command(*ask)
        assert done.returncode == (4 if name == command_name else 2)  # a damaged model, or no name for the table
        assert ("mine.csv exists, and is no table that celbo wrote" in done.stderr) == (name != command_name)
    (tmp_path / "mine.csv").unlink()
    (tmp_path / "mine.csv").mkdir()
    assert "mine.csv is a folder; name a file that ends in .csv" in celbo_command(*ask).stderr


def test_a_name_for_no_embedding_is_refused_before_any_work(fitted_run, tmp_path):
    folder, _ = fitted_run
    (tmp_path / "empty.h5ad").touch()
    done = run_celbo("embed", folder, tmp_path / "empty.h5ad", "-o", tmp_path / "z.txt")
    assert done.returncode == 2
    assert "z.txt does not end in .h5ad" in done.stderr
