"""A disk that takes no more, and two commands that write the same output: what was there stays whole."""

import os
import resource
import signal
import subprocess
import sys

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMANDS = {
    "embed": ["cells.h5ad", "-o", "out/e.h5ad"],
    "map": ["new.h5ad", "-o", "out/mapped"],
    "predict": ["cells.h5ad", "-o", "out/p.csv"],
    "score": ["cells.h5ad", "-o", "out/s.csv", "--n-samples", "2"],
    "counterfactual": ["cells.h5ad", "--set", "batch=a", "-o", "out/c.h5ad", "--n-samples", "2"],
    "de": ["cells.h5ad", "--groupby", "cell_type", "-o", "out/de.csv"],
    "express": ["cells.h5ad", "-o", "out/x.h5ad"],
    "sample": ["-n", "100", "-o", "out/new.h5ad"],
    "cure": ["-o", "out/cured", "--tries", "1"],
}
FOLDERS = {"map", "cure"}
"""Commands that write a folder, which one process at a time may do."""


def little_room():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("disk")
    cells = cells[:150].copy()
    cells.obs["batch"] = ["a", "b"] * 75
    cells.write_h5ad(folder / "cells.h5ad")
    cells.obs["batch"] = "new"
    cells.write_h5ad(folder / "new.h5ad")
    options = ["--epochs", "1", "--hidden-dim", "8", "--condition", "batch", "--labels", "cell_type"]
    assert finish(start(folder, ["fit", "cells.h5ad", "-o", "run", *options]))[0] == 0
    return folder


def start(folder, arguments, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "celbo", *arguments], cwd=folder, env=ENVIRONMENT, **pipes, **options
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in out + err
    assert "fault in celbo" not in err
    return process.returncode, err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".celbo-lock" not in path.name}


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_and_a_second_writer_leave_whole_files(folder, name):
    arguments = [name, "run", *COMMANDS[name]]
    before = contents(folder)
    code, err = finish(start(folder, arguments, preexec_fn=little_room))
    assert (code, "File too large" in err, "Free some space" in err) == (6, True, True), err
    assert contents(folder) == before
    assert finish(start(folder, arguments))[0] == 0
    before = contents(folder)
    code, err = finish(start(folder, arguments, preexec_fn=little_room))
    assert code == 6, err
    assert contents(folder) == before
    both = [finish(process) for process in [start(folder, arguments), start(folder, arguments)]]
    assert {code for code, _ in both} <= ({0, 6} if name in FOLDERS else {0}), both
    assert any(code == 0 for code, _ in both)
    assert all("is being written by process" in err for code, err in both if code == 6), both
    assert contents(folder).keys() == before.keys()
