"""Faults of data, files and machines, by number: each is survived or refused in words, and nothing is lost.

Faults 35 to 37, of model folders, are in test_checkpoint.py, numbered too.
"""

import contextlib
import errno
import json
import os
import platform
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import filelock
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import celbo
from celbo import DataError
from celbo.app import cli
from celbo.data.checks import check_adata, check_query
from celbo.data.read import read_adata
from celbo.errors import StorageError
from celbo.fit.cells import open_cells
from celbo.runs.answers import write_embedding, write_table
from celbo.runs.claims import claimed_folder
from celbo.runs.run_folder import embedding

QUICK = celbo.TrainConfig(max_epochs=2, seed=0)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line here; exit code, stdout, stderr. No traceback, whatever happens."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["celbo", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert "Traceback" not in err + out
        return code, out, err

    return run


@pytest.fixture
def fit(command, tmp_path):
    """`celbo fit` of an AnnData or a path, two epochs, into tmp_path/run."""

    def run(data, *arguments):
        if isinstance(data, anndata.AnnData):
            data.write_h5ad(tmp_path / "cells.h5ad")
            data = tmp_path / "cells.h5ad"
        return command("fit", data, "-o", tmp_path / "run", "--epochs", "2", "--hidden-dim", "8", *arguments)

    return run


def changed(cells, place, value):
    x = cells.X.toarray().astype(np.float64)
    x[place] = value
    bad = cells.copy()
    bad.X = sp.csr_matrix(x)
    return bad


def said(err):
    """The message, without the progress lines before it."""
    return err[err.index("error: ") :] if "error: " in err else ""


@pytest.fixture(scope="module")
def file(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("files") / "cells.h5ad"
    cells.write_h5ad(path, compression="gzip")
    return path


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_1_a_truncated_file_is_refused_with_its_sizes(fit, file, tmp_path, share):
    whole = file.read_bytes()
    short = tmp_path / "short.h5ad"
    short.write_bytes(whole[: int(len(whole) * share)])
    started = time.monotonic()
    code, _, err = fit(short)
    assert time.monotonic() - started < 5
    assert code == 3
    assert f"{short} is truncated: it has {short.stat().st_size:,} of {len(whole):,} bytes" in err


def test_1_an_empty_file_is_refused(fit, tmp_path):
    (tmp_path / "empty.h5ad").touch()
    code, _, err = fit(tmp_path / "empty.h5ad")
    assert (code, "is empty: 0 bytes" in err) == (3, True)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("indptr", lambda a: np.where(np.arange(len(a)) == 5, a[-1], a), "indptr falls from"),
        ("indptr", lambda a: np.where(np.arange(len(a)) == 0, 3, a), "indptr"),
        ("indptr", lambda a: np.where(np.arange(len(a)) == len(a) - 1, 10**6, a), "indptr"),
        ("indices", lambda a: np.where(np.arange(len(a)) == 7, 60, a), "index 60 at position 7"),
        ("indices", lambda a: np.where(np.arange(len(a)) == 7, -1, a), "index -1 at position 7"),
    ],
    ids=["falls", "starts late", "ends late", "too large", "negative"],
)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_2_a_matrix_that_contradicts_itself_is_refused(fit, file, tmp_path, part, change, message, place):
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(file.read_bytes())
    with h5py.File(bad, "r+") as store:
        values = store["X"][part][:]
        del store["X"][part]
        store["X"][part] = change(values).astype(values.dtype)
    code, _, err = fit(bad, *(["--on-disk"] if place == "disk" else []))
    assert code == 3
    assert message in said(err) or "index pointer" in said(err), err


@pytest.mark.parametrize("seed", range(12))
def test_2_flipped_bits_never_crash(file, tmp_path, seed):
    rng = np.random.default_rng(seed)
    raw = bytearray(file.read_bytes())
    for place in rng.integers(0, len(raw), size=[1, 20, 200][seed % 3]):
        raw[place] ^= int(rng.integers(1, 256))
    (tmp_path / "flipped.h5ad").write_bytes(bytes(raw))
    try:
        adata = read_adata(tmp_path / "flipped.h5ad")
        check_adata(adata, conditions=["batch"] if "batch" in adata.obs else [])
    except DataError as error:
        assert "flipped.h5ad" in str(error) or "cannot be read" in str(error)  # noqa: PT017 - reading whole is fine too


def test_2_a_file_that_crashes_or_hangs_the_reader_is_refused(monkeypatch, file, tmp_path):
    from celbo.data import probe, read

    crashing = tmp_path / "crash.py"
    crashing.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probe, "__file__", str(crashing))
    with pytest.raises(DataError, match=r"the HDF5 library crashed reading it \(signal 11\)"):
        read_adata(file)
    crashing.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(read, "_PROBE_SECONDS", 0.2)
    with pytest.raises(DataError, match="still reading it after"):
        read_adata(file)


def test_2_a_zarr_store_that_lacks_chunks_is_refused(cells, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells.write_zarr(tmp_path / "cells.zarr")
    chunk = next(path for path in (tmp_path / "cells.zarr" / "X" / "indices").rglob("*") if path.name == "0")
    chunk.unlink()
    with pytest.raises(DataError, match=r"indices is incomplete: it has 0 of 1 chunks"):
        read_adata(tmp_path / "cells.zarr")


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_2_chunks_that_only_held_zeros_are_not_missed(cells, tmp_path):
    one = anndata.AnnData(sp.csr_matrix(cells.X[:, :1]), obs=cells.obs, var=cells.var[:1])
    one.write_zarr(tmp_path / "one.zarr")
    assert not check_adata(read_adata(tmp_path / "one.zarr")).errors
    holes = cells.X.toarray()
    holes[:50] = 0
    with_x(cells, holes).write_zarr(tmp_path / "holes.zarr", chunks=(50, 60))
    with pytest.warns(UserWarning, match=r"1 of 6 chunks are missing, and are read as zeros"):
        np.testing.assert_array_equal(read_adata(tmp_path / "holes.zarr").X, holes)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_2_a_warning_about_the_file_is_a_plain_line(fit, cells, tmp_path):
    holes = cells.X.toarray()
    holes[:50] = 0
    with_x(cells, holes).write_zarr(tmp_path / "holes.zarr", chunks=(50, 60))
    code, _, err = fit(tmp_path / "holes.zarr")
    assert code == 0
    (line,) = [line for line in err.splitlines() if "1 of 6 chunks are missing" in line]
    assert line.startswith("warning: ")
    assert "UserWarning" not in err


def as_dask(x):
    return pytest.importorskip("dask.array").from_array(x.toarray(), chunks=(100, 60))


def shuffled(x):
    """The same matrix: indices in falling order, every value split in two."""
    x = x.tocsr().astype(np.float32)
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(x.indptr[:-1], x.indptr[1:], strict=True)])
    halves = np.floor(x.data[order] / 2)
    data = np.stack([halves, x.data[order] - halves], axis=1).ravel()
    return sp.csr_matrix((data, np.repeat(x.indices[order], 2), 2 * x.indptr), shape=x.shape)


LAYOUTS = {
    "shuffled and duplicated": shuffled,
    "csr_array": sp.csr_array,
    "csc": sp.csc_matrix,
    "csc_array": sp.csc_array,
    "dense": lambda x: x.toarray(),
    "int64": lambda x: x.astype(np.int64),
    "uint16": lambda x: x.astype(np.uint16),
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.toarray().astype(">f4"),
    "dask": as_dask,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_3_every_layout_gives_the_same_embedding(cells, fitted, layout):
    other = anndata.AnnData(LAYOUTS[layout](cells.X), obs=cells.obs, var=cells.var)
    np.testing.assert_allclose(fitted.embed(other), fitted.embed(cells), rtol=1e-6, atol=1e-6)


def test_3_booleans_are_zeros_and_ones(cells):
    detected = cells.copy()
    detected.X = (cells.X > 0).toarray()
    numbers = detected.copy()
    numbers.X = detected.X.astype(np.float32)
    model = celbo.ExpressionVAE(likelihood="bernoulli", latent_dim=2, hidden_dims=(8,), train=QUICK)
    np.testing.assert_array_equal(model.fit(detected).embed(detected), model.fit(numbers).embed(numbers))


WRITERS = {
    "h5ad csr": lambda cells, path: cells.write_h5ad(path.with_suffix(".h5ad")),
    "h5ad csc": lambda cells, path: with_x(cells, sp.csc_matrix(cells.X)).write_h5ad(path.with_suffix(".h5ad")),
    "h5ad dense": lambda cells, path: with_x(cells, cells.X.toarray()).write_h5ad(path.with_suffix(".h5ad")),
    "h5ad shuffled": lambda cells, path: with_x(cells, shuffled(cells.X)).write_h5ad(path.with_suffix(".h5ad")),
    "zarr csr": lambda cells, path: cells.write_zarr(path.with_suffix(".zarr")),
    "zarr dense": lambda cells, path: with_x(cells, cells.X.toarray()).write_zarr(path.with_suffix(".zarr")),
}


def with_x(cells, x):
    other = cells.copy()
    other.X = x
    return other


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_3_every_file_gives_the_same_model_whether_read_or_left_on_disk(cells, tmp_path, writer, on_disk):
    WRITERS[writer](cells, tmp_path / "cells")
    path = next(tmp_path.iterdir())
    options = {"latent_dim": 2, "hidden_dims": (8,), "conditions": ["batch"], "n_top_genes": 40, "train": QUICK}
    there = celbo.ExpressionVAE(**options).fit(read_adata(path, on_disk=on_disk))
    here = celbo.ExpressionVAE(**options).fit(cells)
    assert there.schema_ == here.schema_
    np.testing.assert_array_equal(there.embed(path), here.embed(cells))


def test_3_views_of_backed_data_keep_their_order(cells, fitted, file):
    backed = anndata.read_h5ad(file, backed="r")
    rows, genes = np.random.default_rng(0).permutation(300)[:100], np.random.default_rng(1).permutation(60)
    view = backed[rows, genes]  # of a view, anndata makes no other
    np.testing.assert_array_equal(fitted.embed(view), fitted.embed(cells)[rows])
    np.testing.assert_array_equal(fitted.embed(cells[rows][:, genes]), fitted.embed(cells)[rows])


def test_4_a_fraction_in_the_last_cell_is_found(fit, cells, tmp_path):
    bad = changed(cells, (299, 3), 0.5)
    code, _, err = fit(bad)
    assert code == 3
    assert "X is 0.5 in cell 'cell_299' (row 299), gene 'gene_3'; 1 of" in err
    assert "are not whole numbers" in err
    assert not (tmp_path / "run" / "model").exists()
    assert fit(bad, "--allow-noninteger")[0] == 0
    assert celbo.load(tmp_path / "run").schema_.values == "pseudo_counts"


@pytest.mark.parametrize(
    ("number", "value", "found"), [(5, -1.0, "negative"), (6, np.nan, "not finite"), (6, np.inf, "not finite")]
)
def test_5_6_one_bad_value_is_found_with_its_place(fit, cells, tmp_path, number, value, found):
    code, _, err = fit(changed(cells, (250, 7), value))
    assert code == 3
    assert f"X is {value:g} in cell 'cell_250' (row 250), gene 'gene_7'; 1 of" in err
    assert f"stored values are {found}" in err
    assert not (tmp_path / "run" / "model").exists()


def normalised(cells, target=1e4):
    x = cells.X.toarray().astype(np.float64)
    return x * (target / np.maximum(x.sum(1, keepdims=True), 1))


@pytest.mark.parametrize(
    ("number", "make", "diagnosis"),
    [
        (7, lambda cells: np.log1p(normalised(cells)), "look like log1p of counts per 10,000 (largest value"),
        (7, lambda cells: np.log2(1 + normalised(cells, 1e6)), "look like log2(1 + x) of counts per 1,000,000"),
        (7, lambda cells: np.log1p(normalised(cells))[:, :30], "look like log1p of counts scaled by a factor"),
        (8, lambda cells: normalised(cells, 1e6), "every cell sums to 1,000,000 (TPM or CPM)"),
        (8, lambda cells: scaled(np.log1p(normalised(cells))), "look scaled to mean 0 in every gene"),
        (8, lambda cells: residuals(cells.X.toarray()), "look like Pearson residuals"),
        (
            8,
            lambda cells: cells.X.toarray() + 0.37 * (np.arange(60) == 3),
            "are mostly whole, perhaps estimated counts",
        ),
    ],
    ids=["log1p", "log2", "log1p of some genes", "TPM", "scaled", "residuals", "estimated"],
)
def test_7_8_values_that_are_no_counts_are_named(fit, cells, number, make, diagnosis):
    x = make(cells)
    bad = anndata.AnnData(x, obs=cells.obs[["batch"]], var=pd.DataFrame(index=cells.var_names[: x.shape[1]]))
    code, _, err = fit(bad)
    assert code == 3
    assert diagnosis in err, err


def scaled(x):
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)


def residuals(x):
    mu = x.sum(1, keepdims=True) * x.sum(0) / x.sum()
    return (x - mu) / np.sqrt(mu + mu**2 / 100 + 1e-9)


def test_7_where_counts_lie_is_said(fit, command, cells, tmp_path):
    bad = anndata.AnnData(np.log1p(normalised(cells)), obs=cells.obs[["batch"]], var=cells.var[[]])
    bad.raw = anndata.AnnData(cells.X, obs=bad.obs, var=bad.var)
    assert "raw.X holds whole numbers" in fit(bad)[2]
    bad.layers["counts"] = cells.X
    assert "layers['counts'] holds whole numbers: use layer='counts' (--layer counts)" in fit(bad)[2]
    assert fit(bad, "--layer", "counts")[0] == 0


def test_9_an_empty_cell_is_kept_and_marked(fit, cells, tmp_path):
    bad = changed(cells, (slice(4, 6), slice(None)), 0)
    code, _, err = fit(bad)
    assert code == 0
    assert "2 of 300 cells have no counts, the first 'cell_4'" in err
    embedding = anndata.read_h5ad(tmp_path / "run" / "embedding.h5ad")
    assert np.flatnonzero(embedding.obs["celbo_empty"]).tolist() == [4, 5]
    assert np.isfinite(embedding.obsm["X_celbo"]).all()
    np.testing.assert_array_equal(embedding.obsm["X_celbo"][4], embedding.obsm["X_celbo"][5])


def test_10_an_empty_gene_is_kept_with_a_warning(fit, cells, tmp_path):
    code, _, err = fit(changed(cells, (slice(None), 4), 0))
    assert (code, "1 of 60 genes have no counts: 'gene_4'" in err) == (0, True)
    assert "gene_4" in celbo.load(tmp_path / "run").schema_.genes


def test_11_genes_of_one_name_are_refused_or_numbered(fit, command, cells, tmp_path):
    bad = cells.copy()
    bad.var_names = ["same", "same", *cells.var_names[2:]]
    code, _, err = fit(bad)
    assert (code, "1 gene names occur more than once: 'same'" in err, "--make-unique" in err) == (3, True, True)
    assert fit(bad, "--make-unique")[0] == 0
    assert celbo.load(tmp_path / "run").schema_.genes[:2] == ("same", "same-1")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reading"]["make_unique"] is True
    out = tmp_path / "z.h5ad"
    assert command("embed", tmp_path / "run", tmp_path / "cells.h5ad", "--make-unique", "-o", out)[0] == 0


def test_12_cells_of_one_name_are_warned_of_and_kept_in_order(fit, cells, tmp_path):
    bad = cells.copy()
    bad.obs_names = ["same", "same", *cells.obs_names[2:]]
    code, _, err = fit(bad)
    assert (code, "1 cell names occur more than once: 'same'" in err) == (0, True)
    embedding = anndata.read_h5ad(tmp_path / "run" / "embedding.h5ad")
    assert list(embedding.obs_names) == list(bad.obs_names)


def test_13_the_order_of_genes_changes_nothing(cells, fitted):
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(fitted.embed(cells[:, order]), fitted.embed(cells))


def test_14_genes_of_another_kind_of_name_are_explained(command, fit, cells, tmp_path):
    assert fit(cells)[0] == 0
    renamed = cells.copy()
    renamed.var["gene_name"] = [*cells.var_names[:58], "other", "another"]
    renamed.var_names = [f"ENSG{i:011d}.4" for i in range(60)]
    renamed.write_h5ad(tmp_path / "renamed.h5ad")
    query = ["embed", tmp_path / "run", tmp_path / "renamed.h5ad", "-o", tmp_path / "z.h5ad"]
    code, _, err = command(*query)
    assert code == 3
    for part in (
        "60 of the model's 60 genes are not in these data (0 % match)",
        "Yours look like Ensembl ids with version numbers",
        "the model's are symbols",
        "var['gene_name'] matches 58 of 60 (96 %): use --gene-column gene_name",
    ):
        assert part in err
    assert not (tmp_path / "z.h5ad").exists()
    assert command(*query, "--gene-column", "gene_name")[0] == 0
    code, _, err = command(*query, "--gene-column", "symbol")
    assert (code, "var has no column 'symbol' to name genes by; it has 'base_share'" in err) == (3, True), err


def test_14_version_numbers_and_capitals_are_noticed(cells, tmp_path, monkeypatch):
    versioned = cells.copy()
    versioned.var_names = [f"ENSG{i:011d}.4" for i in range(60)]
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=QUICK).fit(versioned)
    plain = cells.copy()
    plain.var_names = [f"ENSG{i:011d}" for i in range(60)]
    without_versions = plain.copy()
    with pytest.raises(DataError, match=r"Without version numbers 100 % match") as refused:
        model.embed(plain)
    assert "no counts" not in str(refused.value)  # the values are there, under other names
    (advice,) = re.findall(r"in Python: (import .*?write_h5ad\('NEW.h5ad'\))", str(refused.value))
    model.save(tmp_path / "RUN")
    plain.write_h5ad(tmp_path / "CELLS.h5ad")
    monkeypatch.chdir(tmp_path)
    exec(advice, {})
    np.testing.assert_array_equal(model.embed("NEW.h5ad"), model.embed(versioned))
    of_plain = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=QUICK).fit(without_versions)
    with pytest.raises(DataError, match=r"Without version numbers 100 % match") as refused:
        of_plain.embed(versioned)
    other = versioned.copy()
    (advice,) = re.findall(r"Take them off: (.*regex=True\))", str(refused.value))
    exec(advice, {"adata": other})
    assert of_plain.embed(other).shape == (other.n_obs, 2)
    lower = versioned.copy()
    lower.var_names = [name.lower() for name in versioned.var_names]
    with pytest.raises(DataError, match=r"If capitals are ignored 100 % match"):
        model.embed(lower)


def test_15_a_few_missing_genes_are_filled_in_by_the_model(command, fit, tmp_path):
    cells = celbo.simulate_cells(n_cells=600, n_genes=100, n_types=4, median_library=500, seed=1)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = celbo.ExpressionVAE(latent_dim=4, train=celbo.TrainConfig(max_epochs=30)).fit(cells)
    kept = np.sort(np.random.default_rng(0).permutation(100)[:82])
    whole = model.embed(cells)
    with pytest.warns(
        UserWarning, match=r"18 of the model's 100 genes are not in these data \(82 % match\).*fills them in"
    ):
        filled = model.embed(cells[:, kept])
    zeroed = cells.copy()
    zeroed.X = zeroed.X.multiply(np.isin(np.arange(100), kept)).tocsr()
    with_zeros = model.embed(zeroed)

    def error(z):
        return np.sqrt(np.mean((z - whole) ** 2))

    assert error(filled) < 0.6 * error(with_zeros)
    assert error(filled) < 0.5 * whole.std()
    terms = model.elbo(cells[:, kept])
    assert (terms["reconstruction"] > model.elbo(cells)["reconstruction"]).mean() > 0.99  # fewer genes, more probable


def test_15_too_many_missing_genes_are_refused_unless_asked_for(command, fit, cells, tmp_path):
    assert fit(cells)[0] == 0
    cells[:, :40].copy().write_h5ad(tmp_path / "some.h5ad")
    query = ["embed", tmp_path / "run", tmp_path / "some.h5ad", "-o", tmp_path / "z.h5ad"]
    code, _, err = command(*query)
    assert (code, "20 of the model's 60 genes" in err, "At least 80% are needed" in err) == (3, True, True)
    assert command(*query, "--genes-present", "0.5")[0] == 0
    assert command(*query, "--genes-present", "1.5")[0] == 2


def test_16_levels_not_seen_in_fit_are_refused_or_read_as_asked(command, fit, cells, tmp_path):
    assert fit(cells, "--condition", "batch")[0] == 0
    new = cells.copy()
    new.obs["batch"] = np.where(np.arange(300) < 50, "batch_9", cells.obs["batch"].astype(str))
    new.write_h5ad(tmp_path / "new.h5ad")
    query = ["embed", tmp_path / "run", tmp_path / "new.h5ad", "-o", tmp_path / "z.h5ad"]
    code, _, err = command(*query)
    assert code == 3
    assert "levels not seen in fit: 'batch_9' (50 cells; known: 'batch_0', 'batch_1')" in err
    known = anndata.read_h5ad(tmp_path / "run" / "embedding.h5ad").obsm["X_celbo"]
    for choice in ("nearest", "marginal", "adapt"):
        code, _, err = command(*query, "--unseen", choice)
        assert code == 0, err
        found = anndata.read_h5ad(tmp_path / "z.h5ad")
        np.testing.assert_array_equal(found.obsm["X_celbo"][50:], known[50:])
        assert found.obs["batch"].iloc[0] == "batch_9"
    code, _, err = command(*query, "--unseen", "guess")
    assert (code, "choose one of refuse, nearest, marginal, adapt" in err) == (2, True)


def test_16_the_nearest_level_is_the_one_the_cells_came_from(cells):
    model = celbo.ExpressionVAE(conditions=["batch"], train=celbo.TrainConfig(max_epochs=40)).fit(cells)
    for level in ("batch_0", "batch_1"):
        some = cells[(cells.obs["batch"] == level).to_numpy()].copy()
        expected = model.embed(some)
        some.obs["batch"] = "elsewhere"
        with pytest.warns(UserWarning, match=f"'elsewhere' .*is read as '{level}'"):
            np.testing.assert_array_equal(model.embed(some, unseen="nearest"), expected)


def test_17_cells_without_a_condition_are_refused_or_a_level(command, fit, cells, tmp_path):
    bad = cells.copy()
    bad.obs["batch"] = bad.obs["batch"].astype(object).where(np.arange(300) >= 30, None)
    code, _, err = fit(bad, "--condition", "batch")
    assert code == 3
    assert "obs column 'batch' has no value in 30 of 300 cells, the first 'cell_0'" in err
    assert "--na-as-level" in err
    assert fit(bad, "--condition", "batch", "--na-as-level")[0] == 0
    assert "(missing)" in celbo.load(tmp_path / "run").schema_.conditions[0].levels
    query = ["embed", tmp_path / "run", tmp_path / "cells.h5ad", "-o", tmp_path / "z.h5ad"]
    assert command(*query)[0] == 3
    assert command(*query, "--na-as-level")[0] == 0


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("rest", [0, 1, 2])
def test_18_no_minibatch_has_a_single_cell(cells, norm, rest):
    config = celbo.TrainConfig(max_epochs=2, batch_size=16, validation_fraction=0.0)
    model = celbo.ExpressionVAE(norm=norm, latent_dim=2, hidden_dims=(8,), train=config).fit(cells[: 160 + rest])
    assert np.isfinite(model.history_[-1].train_elbo)


@pytest.mark.parametrize("n_cells", [1, 2, 3, 7])
def test_19_very_few_cells_are_trained_without_held_out_ones(fit, cells, tmp_path, n_cells):
    code, _, err = fit(cells[:n_cells].copy(), "--latent-dim", "10")
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(metrics["elbo_train"])
    assert (metrics["elbo_validation"] is None) == (n_cells < 5)


def test_19_no_cells_and_no_genes_are_refused(fit, cells):
    for nothing in (cells[:0].copy(), cells[:, :0].copy()):
        code, _, err = fit(nothing)
        assert (code, "a model needs both" in err) == (3, True)


@pytest.mark.parametrize("seed", range(6))
def test_20_the_only_cell_of_a_batch_is_trained_on(cells, seed):
    lonely = cells.copy()
    lonely.obs["batch"] = np.where(np.arange(300) == 17, "alone", cells.obs["batch"].astype(str))
    config = celbo.TrainConfig(max_epochs=1, validation_fraction=0.5, seed=seed)
    with pytest.warns(UserWarning, match="condition 'batch' has levels with one cell: 'alone'"):
        model = celbo.ExpressionVAE(conditions=["batch"], hidden_dims=(8,), train=config).fit(lonely)
    assert 17 in model.split_.train


def test_17_numbers_without_end_are_no_condition(fit, cells):
    wild = cells.copy()
    wild.obs["dose"] = np.where(np.arange(300) < 2, 1e300, 1.0)
    code, _, err = fit(wild, "--condition", "dose")
    assert (code, "goes from 1 to 1e+300: rescale it" in err) == (3, True)


def test_10_data_without_a_count_are_refused(fit, cells):
    code, _, err = fit(with_x(cells, sp.csr_matrix(cells.shape)))
    assert (code, "these data have no counts" in err) == (3, True)


def test_21_a_condition_of_one_level_is_left_out_with_a_warning(fit, cells, tmp_path):
    same = cells.copy()
    same.obs["site"] = "here"
    code, _, err = fit(same, "--condition", "site")
    assert (code, "condition 'site' is 'here' in every cell" in err) == (0, True)
    model = celbo.load(tmp_path / "run")
    assert model.schema_.conditions == ()
    with pytest.raises(celbo.UsageError, match="'site' is not a condition of this model"):
        model.expected_expression(same, given={"site": "there"})


@pytest.mark.parametrize("value", [1e7, 2.0**25, 9e8])
def test_24_enormous_counts_stay_finite_and_are_flagged(fit, cells, tmp_path, value):
    code, _, err = fit(changed(cells, (3, 4), value))
    assert code == 0
    assert ("above 16,777,216" in err) == (value > 2**24)
    assert np.isfinite(anndata.read_h5ad(tmp_path / "run" / "embedding.h5ad").obsm["X_celbo"]).all()


@pytest.mark.parametrize("value", [3e38, 1e12])
def test_24_impossible_counts_are_refused(fit, cells, value):
    code, _, err = fit(changed(cells, (3, 4), value))
    assert code == 3
    assert "1 of" in err
    assert "above 1,000,000,000" in err


def test_24_large_integers_are_checked_as_integers(cells):
    large = anndata.AnnData(np.array([[2**24 + 1, 5], [3, 4]], dtype=np.int64))
    check = check_adata(large)
    assert [problem.name for problem in check.problems] == ["inexact"]


@pytest.mark.long
def test_25_a_full_disk_keeps_the_old_run(cells, file, tmp_path):
    def run(*arguments, **options):
        code = "from celbo.app.cli import main; main()"
        fitting = ["fit", file, "-o", tmp_path / "run", "--epochs", "1", "--hidden-dim", "8", *arguments]
        done = [sys.executable, "-c", code, *map(str, fitting)]
        return subprocess.run(done, capture_output=True, text=True, env=ENVIRONMENT, **options)

    assert run().returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}

    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run("--latent-dim", "30", preexec_fn=little_room)
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()} == before
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".celbo-lock"]


def test_31_a_device_that_is_not_there_is_refused_and_auto_is_not(fit, file):
    code, _, err = fit(file, "--device", "cuda:99")
    assert (code, "use 'auto' or 'cpu'" in err) == (2, True)
    code, _, err = fit(file, "--device", "auto")
    assert (code, f"computing on {'cuda' if torch.cuda.is_available() else 'cpu'}" in err) == (0, True)


@contextlib.contextmanager
def claimed_elsewhere(folder):
    """Another process that holds the folder; its number."""
    code = """
import sys, time
from pathlib import Path
from celbo.runs.claims import claimed_folder
from celbo.runs.answers import write_embedding, write_table
from celbo.runs.run_folder import embedding
with claimed_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_32_a_second_writer_is_refused_and_told_who_writes(fit, file, tmp_path):
    folder = tmp_path / "run"
    with claimed_elsewhere(folder) as pid:
        code, _, err = fit(file)
        assert (code, f"is being written by process {pid} on {platform.node()}. Wait for it" in err) == (6, True), err
        assert "delete" not in said(err)
        assert (folder / ".celbo-lock").read_text() == f"{pid}\n{platform.node()}\n"
        assert {path.name for path in folder.iterdir()} == {".celbo-lock"}


@pytest.mark.parametrize(
    "owner",
    [
        "killed",
        *(
            pytest.param(owner, marks=pytest.mark.long)
            for owner in ("same number", "another host", "an older celbo", "nobody")
        ),
    ],
)
def test_32_the_lock_file_of_a_dead_process_is_taken_over(fit, file, tmp_path, owner):
    lock = tmp_path / "run" / ".celbo-lock"
    if owner == "killed":
        with claimed_elsewhere(lock.parent):
            pass
        assert lock.exists()
    else:
        lock.parent.mkdir()
        lock.write_text(
            {
                "same number": f"{os.getpid()}\n{platform.node()}\n",  # as of a former life in a container
                "another host": "17\nanother-host\n",
                "an older celbo": json.dumps({"pid": os.getppid(), "host": platform.node()}),
                "nobody": "",
            }[owner]
        )
    code, _, err = fit(file)
    assert code == 0, err
    assert not lock.exists()


def test_32_the_host_that_holds_the_lock_is_named_and_an_odd_lock_file_is_no_fault(tmp_path):
    with claimed_elsewhere(tmp_path / "run"):
        for text, owner in (("17\nanother-host\n", "process 17 on another-host"), ("odd", "another process")):
            (tmp_path / "run" / ".celbo-lock").write_text(text)
            with (
                pytest.raises(StorageError, match=f"is being written by {owner}. Wait"),
                claimed_folder(tmp_path / "run"),
            ):
                pass


def test_32_a_folder_is_claimed_once_in_a_process_too(tmp_path):
    folder = tmp_path / "run"
    with claimed_folder(folder):
        with pytest.raises(StorageError, match=f"written by process {os.getpid()} on"), claimed_folder(folder):
            pass
        assert (folder / ".celbo-lock").exists()
    assert not folder.exists()


@pytest.mark.parametrize("failure", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_32_a_file_system_without_locks_is_marked_instead(monkeypatch, tmp_path, failure):
    def no_locks(*_):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr("fcntl.flock", no_locks)
    folder = tmp_path / "run"
    marker = folder / ".celbo-lock-marker"
    fallback = pytest.warns(UserWarning, match=f"cannot lock files .{os.strerror(failure)}.*celbo-lock-marker marks")
    refusal = pytest.raises(StorageError, match=f"by process .*no process writes there, delete {marker}")
    with fallback, claimed_folder(folder):
        with refusal as refused, claimed_folder(folder):
            pass
        assert f"by process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert marker.exists()
    assert not folder.exists()
    folder.mkdir()
    marker.write_text(f"{2**22 + 1}\n{socket.gethostname()}\n")  # above the largest process number
    with pytest.warns(UserWarning, match="cannot lock files"), claimed_folder(folder):
        pass
    assert not list(folder.iterdir())
    marker.write_text("17\nanother-host\n")
    with pytest.warns(UserWarning, match="cannot lock files"), refusal as refused, claimed_folder(folder):
        pass
    assert "by process 17 on another-host" in str(refused.value)
    assert marker.exists()


def test_32_the_lock_file_is_gone_before_the_lock_is_free(monkeypatch, tmp_path):
    """Deleted later, it could be the file that the next process has locked by then."""
    lock, release, seen = tmp_path / ".celbo-lock", filelock.FileLock.release, []

    def watched(self, *arguments, **options):
        if self.lock_file == str(lock):  # and not a lock of another test, which Python deletes now
            seen.append(lock.exists())
        release(self, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "release", watched)
    with claimed_folder(tmp_path):
        assert not seen
    assert seen[0] is False


def test_32_a_failure_to_lock_leaves_nothing_behind(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    refusal = pytest.raises(StorageError, match="run cannot be written to: No space left on device")
    with refusal, claimed_folder(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with claimed_folder(tmp_path / "run"):  # the lock is free
        pass


@pytest.mark.long
def test_32_two_processes_do_not_write_one_folder(file, tmp_path):
    fitting = ["fit", file, "-o", tmp_path / "run", "--epochs", "30", "--patience", "30"]
    code = "from celbo.app.cli import main; main()"
    both = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, fitting)], stderr=subprocess.PIPE, env=ENVIRONMENT)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 6], ends
    assert celbo.load(tmp_path / "run").history_


def test_33_input_is_only_read(fit, file, command, tmp_path):
    data = tmp_path / "data" / "cells.h5ad"
    data.parent.mkdir()
    data.write_bytes(file.read_bytes())
    data.chmod(stat.S_IRUSR)
    data.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = data.stat().st_mtime_ns, data.read_bytes()
    try:
        assert fit(data)[0] == 0
        assert fit(data, "--on-disk")[0] == 0
        assert (data.stat().st_mtime_ns, data.read_bytes()) == before
    finally:
        data.parent.chmod(stat.S_IRWXU)


def test_33_a_run_never_overwrites_its_own_input(fit, command, file, tmp_path):
    assert fit(file)[0] == 0
    inside = tmp_path / "run" / "embedding.h5ad"
    inside.unlink()
    inside.symlink_to(file)
    before = file.read_bytes()
    for data in (inside, file):
        code, _, err = command("fit", data, "-o", tmp_path / "run")
        assert (code, "would be overwritten by this run" in err) == (2, True)
    assert command("embed", tmp_path / "run", file, "-o", inside)[0] == 2
    assert file.read_bytes() == before


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_33_no_run_is_written_into_its_own_input(command, cells, tmp_path):
    cells.write_zarr(tmp_path / "cells.zarr")
    code, _, err = command("fit", tmp_path / "cells.zarr", "-o", tmp_path / "cells.zarr" / "run", "--epochs", "1")
    assert (code, "cells.zarr would be overwritten by this run" in err) == (2, True)
    assert not (tmp_path / "cells.zarr" / "run").exists()


def test_33_a_link_stays_a_link_to_the_new_file(fitted, cells, tmp_path):
    table = pd.DataFrame({"label": ["a"], "probability": [1.0], "p_known": [1.0], "a": [1.0]}, index=["cell_0"])
    for name, write in (
        ("labels.csv", lambda path: write_table(table, path, "predict")),
        ("z.h5ad", lambda path: write_embedding(embedding(fitted.fitted_, open_cells(fitted.fitted_, cells)), path)),
    ):
        target, link = tmp_path / "elsewhere" / name, tmp_path / name
        link.symlink_to(target)
        for _ in range(2):
            write(link)
            assert link.is_symlink()
            assert target.stat().st_size
        assert [path.name for path in target.parent.iterdir()] == [name]
        target.unlink()


@pytest.mark.long
def test_34_no_home_no_utf8_and_a_folder_that_may_not_be_written(cells, tmp_path):
    path = tmp_path / "zellen ünïcode.h5ad"
    named = cells.copy()
    named.obs["batch"] = [f"Größe {level}" for level in cells.obs["batch"]]
    named.write_h5ad(path)
    away = tmp_path / "read only"
    away.mkdir(mode=0o500)
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("HOME", "LANG", "LC_ALL")}
    environment |= {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent"}
    code = "from celbo.app.cli import main; main()"
    for arguments in (
        ["fit", path, "-o", tmp_path / "läuf", "--condition", "batch", "--epochs", "1"],
        ["inspect", tmp_path / "läuf"],
        ["check", path, "--condition", "batch"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, cwd=away, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    assert celbo.load(tmp_path / "läuf").schema_.conditions[0].levels[0].startswith("Größe")


def test_46_the_same_seed_gives_the_same_bytes_and_says_which(fit, file, tmp_path):
    hashes = set()
    for _ in range(2):
        assert fit(file, "--threads", "1")[0] == 0
        hashes.add(json.loads((tmp_path / "run" / "run.json").read_text())["weights_sha256"])
    assert len(hashes) == 1


def test_48_odd_tables_are_read(fit, cells, tmp_path):
    odd = cells.copy()
    odd.obs["nullable"] = pd.array(["x", "y", "z"] * 100, dtype="string")
    odd.obs["whole"] = pd.array([1, 2, 3] * 100, dtype="Int64")
    odd.obs["flag"] = pd.array([True, False, True] * 100, dtype="boolean")
    odd.obs["ordered"] = pd.Categorical(["lo", "hi", "lo"] * 100, categories=["lo", "never", "hi"], ordered=True)
    odd.obs["date"] = pd.Categorical(pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"] * 100).astype(str))
    odd.uns["huge"] = {str(i): np.zeros(1000) for i in range(200)}
    with anndata.settings.override(allow_write_nullable_strings=True):
        odd.write_h5ad(tmp_path / "odd.h5ad")
    code, _, err = fit(
        tmp_path / "odd.h5ad", *[part for name in odd.obs.columns[-5:] for part in ("--condition", name)]
    )
    assert code == 0, err
    levels = {condition.name: condition.levels for condition in celbo.load(tmp_path / "run").schema_.conditions}
    assert levels["ordered"] == ("lo", "hi")
    assert levels["whole"] == ("1", "2", "3")
    assert levels["flag"] == ("False", "True")


def test_48_a_clock_that_goes_back_does_not_matter(fit, file, monkeypatch):
    seconds = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    assert fit(file)[0] == 0


def test_all_mismatches_are_told_at_once(cells, fitted):
    bad = changed(cells, (3, 4), -1.0)
    bad.obs["batch"] = "elsewhere"
    check = check_query(bad[:, :20].copy(), fitted.schema_)
    assert {problem.name for problem in check.errors} == {"genes", "negative", "conditions"}
    with pytest.raises(DataError, match=r"(?s)40 of the model's.*negative.*elsewhere"):
        check.accept()
