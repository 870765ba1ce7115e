"""How often values are read, and cells are encoded: counted, so that nothing reads them again unnoticed."""

from dataclasses import replace

import numpy as np
import pytest

import celbo
from celbo.data import stored
from celbo.data.sources import CellSource
from celbo.fit import fitted as fitting
from celbo.model import inference
from celbo.model.vae import VAE


class Count:
    """Values read from the data, except while training."""

    def __init__(self):
        self.values, self.training = 0, False

    def reading(self, made):
        def read(rows):
            block = made.read(rows)
            self.values += 0 if self.training else block.nnz
            return block

        return replace(made, read=read)


@pytest.fixture
def count(monkeypatch):
    count, make, train = Count(), stored.stored_matrix, fitting.epochs

    def epochs(*arguments, **options):
        count.training = True
        yield from train(*arguments, **options)
        count.training = False

    monkeypatch.setattr(stored, "stored_matrix", lambda *arguments: count.reading(make(*arguments)))
    monkeypatch.setattr(fitting, "epochs", epochs)
    return count


@pytest.mark.parametrize(
    ("on_disk", "limit"), [(False, 4), (True, 12)]
)  # levels are compared on a sample: here all cells
def test_a_fit_reads_every_value_a_few_times_at_most(tmp_path, count, celbo_command, on_disk, limit):
    cells = celbo.simulate_cells(n_cells=400, n_genes=90, seed=0)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--n-top-genes", "60", "--nuisance", "batch", "--condition", "treatment", "--epochs", "2"]
    done = celbo_command(
        "fit", tmp_path / "cells.h5ad", "-o", tmp_path / "run", *options, *(["--on-disk"] if on_disk else [])
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert 0 < count.values <= limit * cells.X.nnz, count.values / cells.X.nnz


@pytest.mark.long
def test_checksums_of_real_numbers_on_disk_cost_no_reading(tmp_path, count, celbo_command, monkeypatch):
    cells = celbo.simulate_cells(n_cells=300, n_genes=40, seed=0)
    cells.layers["real"] = np.random.default_rng(0).normal(size=cells.shape)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = []
    for known in (True, False):
        if not known:  # nothing is known of a cell, and nothing is computed
            monkeypatch.setattr(CellSource, "checksums", lambda _, rows: np.zeros(len(rows), np.int32))
        count.values = 0
        options = ["--layer", "real", "--likelihood", "gaussian", "--epochs", "2", "--on-disk"]
        done = celbo_command("fit", tmp_path / "cells.h5ad", "-o", tmp_path / "run", *options)
        assert done.returncode == 0, done.stderr
        read.append(count.values)
    assert read[0] == read[1] > 0


@pytest.mark.parametrize("genes", [slice(None), slice(0, 55)])
def test_outliers_fill_in_and_encode_each_cell_once(cells, fitted, monkeypatch, genes):
    """A cell with missing genes is encoded five times more while they are filled in."""
    filled, encoded, fill_in, encode = [], [], inference.fill_in, VAE.encode

    def counting_fill(vae, minibatch, source):
        filled.append(len(minibatch.x))
        before = len(encoded)
        minibatch = fill_in(vae, minibatch, source)
        del encoded[before:]
        return minibatch

    def counting_encode(vae, x, *arguments, **options):
        encoded.append(len(x))
        return encode(vae, x, *arguments, **options)

    monkeypatch.setattr(inference, "fill_in", counting_fill)
    monkeypatch.setattr(VAE, "encode", counting_encode)
    model, query = celbo.ExpressionVAE(conditions=["batch"], latent_dim=3, train=celbo.TrainConfig(max_epochs=2)), cells
    model.fit(celbo.simulate_cells(n_cells=400, n_genes=60, seed=0))
    filled.clear(), encoded.clear()
    model.outliers(query[:, genes])
    assert sum(filled) == sum(encoded) == query.n_obs
    assert np.isfinite(model.outliers(query[:, genes])["p_value"]).all()
