"""What several test modules share: small simulated cells, a model fitted to them, real data where they are there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata
import pandas
import pytest
import torch

import celbo
from celbo.app.cli import main

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: without a GPU its kernels run in numpy

REAL_DATA = Path(os.environ.get("CELBO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
LONG_PAGES = ("collapse.md", "counterfactual.md", "differential.md", "labels.md", "sample.md", "score.md")
"""Pages of docs/ whose examples take long."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
QUICK = celbo.TrainConfig(max_epochs=4, seed=0)


def pytest_configure(config):
    torch.set_num_threads(1)  # tests run beside each other
    if int(pandas.__version__.split(".")[0]) >= 3:  # where all text is nullable
        anndata.settings.allow_write_nullable_strings = True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG_PAGES:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def cells():
    return celbo.simulate_cells(n_cells=300, n_genes=60, n_types=3, median_library=200, seed=0)


@pytest.fixture(scope="session")
def fitted(cells):
    """A conditional model fitted for a few epochs; tests leave it as it is."""
    return celbo.ExpressionVAE(latent_dim=4, hidden_dims=(16,), conditions=["batch"], train=QUICK).fit(cells)


@pytest.fixture
def celbo_command(capsys, monkeypatch):
    """Run a command of celbo as a shell would, but in this process, which has torch already."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["celbo", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def real_data():
    def read(name):
        path = REAL_DATA / f"{name}.h5ad"
        if not path.exists():
            pytest.skip(f"{path} is not here; set CELBO_TEST_DATA to the folder of real counts")
        return anndata.read_h5ad(path)

    return read
