"""What several test modules share: small simulated cells, a model fitted to them, real data where they are there."""

import os
from pathlib import Path

import anndata
import pandas
import pytest
import torch

import celbo

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: without a GPU its kernels run in numpy

REAL_DATA = Path(os.environ.get("CELBO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
QUICK = celbo.TrainConfig(max_epochs=4, seed=0)


def pytest_configure(config):
    torch.set_num_threads(1)  # tests run beside each other
    if int(pandas.__version__.split(".")[0]) >= 3:  # where all text is nullable
        anndata.settings.allow_write_nullable_strings = True


@pytest.fixture(scope="session")
def cells():
    return celbo.simulate_cells(n_cells=300, n_genes=60, n_types=3, median_library=200, seed=0)


@pytest.fixture(scope="session")
def fitted(cells):
    """A conditional model fitted for a few epochs; tests leave it as it is."""
    return celbo.ExpressionVAE(latent_dim=4, hidden_dims=(16,), conditions=["batch"], train=QUICK).fit(cells)


@pytest.fixture
def real_data():
    def read(name):
        path = REAL_DATA / f"{name}.h5ad"
        if not path.exists():
            pytest.skip(f"{path} is not here; set CELBO_TEST_DATA to the folder of real counts")
        return anndata.read_h5ad(path)

    return read
