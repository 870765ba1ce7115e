"""The command that writes expression: the same numbers as in Python, in real files, whole or not at all."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import celbo
from celbo.ask.scoring import expression_blocks
from celbo.data.read import read_adata
from celbo.fit.cells import open_cells

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = celbo.TrainConfig(max_epochs=2, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cells, fitted):
    folder = tmp_path_factory.mktemp("express")
    fitted.save(folder / "run" / "model")
    cells.write_h5ad(folder / "cells.h5ad")
    cells.write_zarr(folder / "cells.zarr")
    return folder


def written(path):
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--given", "batch=batch_1"], {"given": {"batch": "batch_1"}}),
        (["--over", "batch", "--library", "1e4"], {"over": ["batch"], "library": 1e4}),
    ],
)
def test_the_file_has_what_expected_expression_returns(
    folder, cells, fitted, tmp_path, celbo_command, ending, arguments, options
):
    output = tmp_path / f"out{ending}"
    data = folder / ("cells.zarr" if ending == ".zarr" else "cells.h5ad")
    done = celbo_command("express", folder / "run", data, "-o", output, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"300 cells x 60 genes: {output}" in done.stderr
    found = written(output)
    assert found.X.dtype == np.float32
    np.testing.assert_array_equal(found.X, fitted.expected_expression(cells, **options))
    pd.testing.assert_frame_equal(found.obs, cells.obs, check_dtype=False, check_categorical=False)
    pd.testing.assert_frame_equal(found.var, cells.var, check_dtype=False)
    said = {**options, "likelihood": "nb"}
    kept = found.uns["celbo_expression"]
    assert set(kept) == set(said)
    assert all(np.array_equal(kept[name], value) for name, value in said.items() if name != "given")
    assert dict(kept.get("given", {})) == options.get("given", {})
    assert {path.name for path in tmp_path.iterdir()} == {output.name}


def test_data_on_disk_give_the_same_bytes(folder, tmp_path, celbo_command):
    outputs = [tmp_path / name for name in ("memory.h5ad", "disk.h5ad", "zarr.h5ad")]
    for output, data, flags in zip(
        outputs, ("cells.h5ad", "cells.h5ad", "cells.zarr"), ([], ["--on-disk"], ["--on-disk"]), strict=True
    ):
        assert celbo_command("express", folder / "run", folder / data, "-o", output, *flags).returncode == 0
    first, *others = (written(output).X for output in outputs)
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_chosen_genes_come_in_the_order_asked_for(folder, cells, fitted, tmp_path, celbo_command):
    (tmp_path / "genes.txt").write_text("gene_7\n\n gene_3 \ngene_50\n")
    asked = ["--gene", "gene_50", "--genes", tmp_path / "genes.txt"]
    done = celbo_command("express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / "some.h5ad", *asked)
    assert done.returncode == 0, done.stderr
    found = written(tmp_path / "some.h5ad")
    assert list(found.var_names) == ["gene_50", "gene_7", "gene_3"]
    np.testing.assert_array_equal(found.X, fitted.expected_expression(cells)[:, [50, 7, 3]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gene", "gene_1", "--gene", "GAPDH"], "1 of the 2 genes asked for are not among the 60 genes of the model"),
        (["--genes", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--given", "batch=batch_9"], "batch_9"),
        (["--over", "donor"], "donor"),
        (["--over", "batch", "--given", "batch=batch_0"], "not given already"),
        (["--library", "0"], "a finite number above 0"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_is_written(folder, tmp_path, celbo_command, arguments, said):
    done = celbo_command("express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / "no.h5ad", *arguments)
    assert done.returncode in (2, 3)
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_genes_are_marked_and_filled_in(folder, cells, fitted, tmp_path, celbo_command):
    some = cells[:, 6:][:, ::-1].copy()
    some.var["is_marker"] = np.arange(54) % 2 == 0
    some.var["chromosome"] = pd.Categorical(["1", "2"] * 27)
    some.var["place"] = np.arange(54)
    some.var["name"] = [f"name {number}" for number in range(54)]
    some.write_h5ad(tmp_path / "some.h5ad")
    done = celbo_command("express", folder / "run", tmp_path / "some.h5ad", "-o", tmp_path / "out.h5ad")
    assert done.returncode == 0, done.stderr
    found = written(tmp_path / "out.h5ad")
    with pytest.warns(UserWarning, match="fills them in"):
        np.testing.assert_array_equal(found.X, fitted.expected_expression(some))
    assert list(found.var_names) == list(cells.var_names)
    assert found.var["celbo_measured"].tolist() == [False] * 6 + [True] * 54
    assert found.var["place"].tolist()[6:] == list(range(53, -1, -1))
    assert found.var[["place", "is_marker", "chromosome"]].iloc[:6].isna().all(axis=None)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_a_model_without_conditions_and_of_other_values(cells, tmp_path, celbo_command, likelihood):
    model = celbo.ExpressionVAE(latent_dim=3, likelihood=likelihood, train=QUICK).fit(cells)
    model.save(tmp_path / "model")
    empty = cells.copy()
    empty.X[3] = 0
    empty.write_h5ad(tmp_path / "cells.h5ad")
    done = celbo_command("express", tmp_path / "model", tmp_path / "cells.h5ad", "-o", tmp_path / "out.zarr")
    assert done.returncode == 0, done.stderr
    found = written(tmp_path / "out.zarr")
    with pytest.warns(UserWarning, match="no counts"):
        np.testing.assert_array_equal(found.X, model.expected_expression(empty))
    assert np.flatnonzero(found.obs["celbo_empty"]).tolist() == [3]
    assert found.uns["celbo_expression"] == {"likelihood": likelihood}


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_only_its_own_file_is_replaced(folder, cells, tmp_path, celbo_command, ending):
    ask = ["express", folder / "run", folder / "cells.h5ad"]
    output = tmp_path / f"out{ending}"
    for library in ("1", "2"):
        assert celbo_command(*ask, "-o", output, "--library", library).returncode == 0
    np.testing.assert_allclose(written(output).X.sum(1), 2, rtol=1e-4)
    changed = written(output)
    changed.obsm["X_umap"] = np.zeros((300, 2))
    mine = {"more": changed, "counts": cells}
    for name, adata in mine.items():
        path = tmp_path / f"{name}{ending}"
        adata.write_zarr(path) if ending == ".zarr" else adata.write_h5ad(path)
        done = celbo_command(*ask, "-o", path)
        assert done.returncode == 2
        assert "exists, and is no expression that celbo wrote" in done.stderr
        np.testing.assert_array_equal(written(path).obs_names, adata.obs_names)
    (tmp_path / f"text{ending}").write_text("mine")
    assert celbo_command(*ask, "-o", tmp_path / f"text{ending}").returncode == 2
    assert (tmp_path / f"text{ending}").read_text() == "mine"


def test_neither_data_nor_a_run_are_written_over(folder, tmp_path, celbo_command):
    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = files()
    for data, output in (
        ("cells.h5ad", "cells.h5ad"),
        ("cells.zarr", "cells.zarr"),
        ("cells.zarr", "cells.zarr/layers/new.h5ad"),
        ("cells.h5ad", "run/model/new.h5ad"),
        ("cells.h5ad", "run/model"),
        ("cells.h5ad", "run/model.csv"),
    ):
        done = celbo_command("express", folder / "run", folder / data, "-o", folder / output)
        assert done.returncode == 2, output
        assert files() == before
    done = celbo_command("express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / "table.csv")
    assert "adata.to_df() makes a table" in done.stderr
    (tmp_path / "link.h5ad").symlink_to(folder / "cells.h5ad")
    assert celbo_command("express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / "link.h5ad").returncode == 2
    assert files() == before


KILLED = """
import os, signal, sys
from celbo.app.cli import main
from celbo.data import write
fill = write._fill
def part_of(blocks):
    for block in blocks:
        yield block[:7]
        os.kill(os.getpid(), signal.{name})
        yield block[7:]
write._fill = lambda x, blocks: fill(x, part_of(blocks))
sys.argv = ["celbo", *{arguments!r}]
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_file_is_whole_or_as_it_was_if_the_command_is_stopped(folder, tmp_path, celbo_command, ending, name, code):
    output = tmp_path / f"out{ending}"
    ask = [str(part) for part in ("express", folder / "run", folder / "cells.h5ad", "-o", output)]
    assert celbo_command(*ask, "--library", "1").returncode == 0
    before = written(output).X
    program = KILLED.format(name=name, arguments=ask)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    np.testing.assert_array_equal(written(output).X, before)
    if name != "SIGKILL":
        assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert celbo_command(*ask).returncode == 0
    assert written(output).X.sum() > 2 * before.sum()


@pytest.mark.long
@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_a_full_disk_ends_in_words_and_leaves_nothing(folder, tmp_path, ending):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, 45_000))  # noqa: E731
    arguments = ["express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / f"out{ending}"]
    command = [sys.executable, "-c", "from celbo.app.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit)
    assert done.returncode == 6, done.stderr
    assert "cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_on_the_disk_is_not_begun(folder, tmp_path, celbo_command, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=71_999))
    done = celbo_command("express", folder / "run", folder / "cells.h5ad", "-o", tmp_path / "out.h5ad")
    assert done.returncode == 6
    assert "it needs 72,000 bytes, and its disk has 71,999 left" in done.stderr
    assert not list(tmp_path.iterdir())


def test_blocks_and_pieces_of_any_size_give_the_same_bytes(cells, monkeypatch):
    """Also with more threads, and a mean over levels."""
    train = celbo.TrainConfig(max_epochs=2, seed=0, threads=3)
    model = celbo.ExpressionVAE(latent_dim=3, conditions=["batch"], train=train).fit(cells)
    opened = open_cells(model.fitted_, cells)
    whole = model.expected_expression(cells, over=["batch"])
    for piece, block in ((60 * 40, 60 * 90), (1, 1), (60 * 100, 1 << 20)):
        monkeypatch.setattr("celbo.model.inference._PIECE", piece)
        monkeypatch.setattr("celbo.model.inference._BLOCK", block)
        blocks = [*expression_blocks(model.fitted_, opened, over=["batch"])]
        assert len(blocks) > 1 or block > 1 << 19
        np.testing.assert_array_equal(np.concatenate(blocks), whole)


WRITES = """
import json, sys
from celbo.app.cli import main
def peak():  # of this process alone: ru_maxrss counts the process that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
import celbo, celbo.ask.mapping, celbo.ask.scoring, celbo.runs.answers
def run(*arguments):
    sys.argv = ["celbo", "express", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
run({run!r}, {few!r}, "-o", {output!r} + "few.h5ad", "--on-disk")
before = peak()
run({run!r}, {many!r}, "-o", {output!r} + "many.h5ad", "--on-disk")
print(json.dumps(peak() - before))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 144 MB: 12,000 cells, of hardly any counts, x 3,000 genes."""
    rng = np.random.default_rng(0)
    counts = sp.random(12_000, 3000, density=0.002, format="csr", dtype=np.float32, rng=rng)
    counts.data[:] = 1 + rng.integers(5, size=counts.nnz)
    many = anndata.AnnData(counts)
    many.write_h5ad(tmp_path / "many.h5ad")
    many[:400].copy().write_h5ad(tmp_path / "few.h5ad")
    train = celbo.TrainConfig(max_epochs=1, seed=0, threads=1)
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=train).fit(many[:400].copy())
    model.save(tmp_path / "model")
    names = {name: str(tmp_path / f"{name}.h5ad") for name in ("few", "many")}
    program = WRITES.format(run=str(tmp_path / "model"), output=str(tmp_path / "out_"), **names)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out_many.h5ad").stat().st_size > 144e6
    assert json.loads(done.stdout) < 120
    read = read_adata(tmp_path / "out_many.h5ad", on_disk=True)
    last = model.expected_expression(many[11_264:].copy())[-300:]
    np.testing.assert_array_equal(read.X[-300:], last)
