"""Files as programs write them are read; what cannot be read is explained, and hints about it never fail."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import write_elem

from celbo import DataError
from celbo.data.checks import check_adata
from celbo.data.read import read_adata
from celbo.data.stored import Stored
from celbo.data.values import describe_values, find_counts, scan_values
from celbo.errors import StorageError

COUNTS = np.array([[0, 2, 1], [3, 0, 0], [0, 0, 7], [1, 5, 0]], np.float32)
NAMES = ["c0", "c1", "c2", "c3"]


def some_cells(x=COUNTS):
    obs = pd.DataFrame({"batch": ["a", "b", "a", "b"]}, index=NAMES)
    return anndata.AnnData(sp.csr_matrix(x), obs, pd.DataFrame(index=["g0", "g1", "g2"]))


@pytest.fixture
def held(tmp_path):
    """A file that another process has open for writing, as a notebook does."""
    path = tmp_path / "embedding.h5ad"
    cells = anndata.AnnData(obs=some_cells().obs, obsm={"X_celbo": np.zeros((4, 2))})
    cells.write_h5ad(path)
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    program = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout.readline() == b"open\n"
    yield path
    program.stdin.close()
    assert program.wait(timeout=60) == 0


def test_a_file_that_another_program_has_open_for_writing_is_no_damaged_file(held, celbo_command):
    with pytest.raises(StorageError, match=r"open for writing in another program.*adata.file.close\(\)"):
        read_adata(held)
    done = celbo_command("check", held)
    assert done.returncode == 6
    assert done.stdout.startswith(f"error (unreadable): {held} is open for writing in another program")
    assert "0 cells" not in done.stdout
    done = celbo_command("check", held, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"], document["problems"][0]["name"]) == (6, False, "unreadable")
    assert [document[name] for name in ("n_cells", "n_genes", "n_values")] == [None, None, None]


def test_an_embedding_that_another_program_has_open_is_not_called_a_file_of_another_program(held):
    from celbo.runs.answers import check_embedding_path

    with pytest.raises(StorageError, match="open for writing in another program"):
        check_embedding_path(held)


def test_a_file_that_this_program_has_open_for_writing_is_explained_too(tmp_path):
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+"), pytest.raises(StorageError, match="open for writing"):
        read_adata(tmp_path / "cells.h5ad")
    assert read_adata(tmp_path / "cells.h5ad").shape == (4, 3)


def test_a_check_of_what_cannot_be_read_counts_nothing(tmp_path, celbo_command):
    (tmp_path / "cells.h5ad").write_bytes(b"\x00\x01")
    done = celbo_command("check", tmp_path / "cells.h5ad")
    assert (done.returncode, "cells x" in done.stdout) == (3, False)
    done = celbo_command("check", tmp_path / "cells.h5ad", "--json")
    assert [json.loads(done.stdout)[name] for name in ("n_cells", "n_genes", "n_values")] == [None, None, None]


def with_nested_layers(path, form):
    """X logged; counts in layers whose names have slashes, as groups in groups."""
    store = h5py.File(path, "w") if form == "h5ad" else zarr.open_group(path, mode="w")
    write_elem(store, "/", some_cells(np.log1p(COUNTS)))
    write_elem(store["layers"].require_group("counts"), "raw", sp.csr_matrix(COUNTS))
    write_elem(store["layers"].require_group("more").require_group("of"), "them", COUNTS)
    write_elem(store["layers"], "plain", np.log1p(COUNTS))
    if form == "h5ad":
        store.close()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_with_slashes_in_their_names_are_read_and_suggested(tmp_path, form, on_disk):
    path = tmp_path / f"cells.{form}"
    with_nested_layers(path, form)
    for layer in ("counts/raw", "more/of/them"):
        cells = read_adata(path, layer=layer, on_disk=on_disk)
        check = check_adata(cells, layer=layer)
        assert not check.errors
        np.testing.assert_array_equal(check.stored.read(slice(None)).toarray(), COUNTS)
    (problem,) = check_adata(read_adata(path, on_disk=on_disk)).errors
    assert "layers['counts/raw'] holds whole numbers: use layer='counts/raw' (--layer counts/raw)" in problem.message
    with pytest.raises(DataError, match=r"no layer 'counts'; they have 'counts/raw', 'more/of/them', 'plain'"):
        read_adata(path, layer="counts", on_disk=on_disk)


def test_cells_drawn_from_a_layer_with_a_slash_can_be_read_by_others(cells, tmp_path, celbo_command):
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as store:
        write_elem(store, "/", cells)
        write_elem(store["layers"].require_group("counts"), "raw", sp.csr_matrix(cells.X))
    fitting = ["fit", path, "-o", tmp_path / "run", "--layer", "counts/raw", "--epochs", "1", "--hidden-dim", "8"]
    done = celbo_command(*fitting)
    assert done.returncode == 0, done.stderr
    done = celbo_command("sample", tmp_path / "run", "-n", "20", "-o", tmp_path / "drawn.h5ad")
    assert done.returncode == 0, done.stderr
    assert "the drawn values are in X alone" in done.stderr
    drawn = anndata.read_h5ad(tmp_path / "drawn.h5ad")
    assert drawn.shape == (20, cells.n_vars)
    assert drawn.X.sum() > 0


def test_a_layer_that_anndata_wrote_with_a_slash_is_read(tmp_path):
    cells = some_cells()
    cells.layers["counts/raw"] = cells.X
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata advises against such a name, and newer versions refuse it
        try:
            cells.write_h5ad(tmp_path / "cells.h5ad")
        except ValueError:
            pytest.skip("this version of anndata writes no layer with a slash in its name")
    np.testing.assert_array_equal(
        read_adata(tmp_path / "cells.h5ad", layer="counts/raw").layers["counts/raw"].toarray(), COUNTS
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_that_cannot_be_read_hide_neither_the_fault_nor_the_counts(tmp_path, on_disk):
    path = tmp_path / "cells.h5ad"
    some_cells(np.log1p(COUNTS)).write_h5ad(path)
    with h5py.File(path, "a") as file:
        layers = file["layers"]
        layers.create_group("future").attrs["encoding-type"] = "of another version"
        layers["elsewhere"] = h5py.ExternalLink("nowhere.h5", "/x")
        layers["nothing"] = h5py.SoftLink("/nowhere")
        layers["text"] = np.array([b"a"])
        layers["other cells"] = np.ones((2, 3))
        write_elem(layers, "broken", sp.csr_matrix(COUNTS))
        layers["broken/indptr"][-1] = 99
        file.create_group("raw").attrs["encoding-type"] = "raw"
    (problem,) = check_adata(read_adata(path, on_disk=on_disk)).errors
    assert problem.name == "not-whole"
    assert "holds whole numbers" not in problem.message
    with h5py.File(path, "a") as file:
        write_elem(file["layers"], "the counts", sp.csr_matrix(COUNTS))
    (problem,) = check_adata(read_adata(path, on_disk=on_disk)).errors
    assert "use layer='the counts' (--layer 'the counts')" in problem.message


def test_hints_about_values_that_fail_while_they_are_read_are_empty():
    def fail(_):
        raise KeyError("chunk")

    cells = some_cells(np.log1p(COUNTS))
    scan = scan_values(Stored((4, 3), False, lambda rows: cells.X[rows]))
    assert describe_values(Stored((4, 3), True, fail), scan) == ""
    cells.layers["strange"] = sp.csr_matrix(COUNTS)
    cells.layers["strange"].data = cells.layers["strange"].data.astype(object)
    assert find_counts(cells, None) == ""


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("has_x", [False, True])
def test_counts_in_raw_alone_are_reached_by_the_command_of_the_message(tmp_path, monkeypatch, form, has_x):
    monkeypatch.chdir(tmp_path)
    cells = some_cells()
    cells.raw = cells.copy()
    cells.X = cells.X.log1p()
    path = f"my cells.{form}"
    cells.write_h5ad(path) if form == "h5ad" else cells.write_zarr(path)
    if not has_x and form == "h5ad":
        with h5py.File(path, "a") as file:
            del file["X"]
        add_reserved_column(path, "obs")
        add_reserved_column(path, "raw/var")
    elif not has_x:
        del zarr.open_group(path, mode="a")["X"]
    try:
        message = check_adata(read_adata(path)).errors[0].message
    except DataError as error:
        message = str(error)
    assert "raw.X" in message
    code = re.search(r"python -c '(.*)'$", message)[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    np.testing.assert_array_equal(read_adata("my cells_raw.h5ad").X.toarray(), COUNTS)
    with pytest.raises(DataError, match=r"no layer 'raw'; .*my cells_raw_2\.h5ad"):  # the first stays
        read_adata(path, layer="raw")
    with pytest.raises(DataError, match="If you fit values of X, leave out layer"):
        read_adata(path, layer="X")


def test_data_without_values_get_no_advice_that_does_not_work(tmp_path):
    anndata.AnnData(obs=some_cells().obs, var=some_cells().var).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match="no X and no layers, so there are no counts") as raised:
        read_adata(tmp_path / "cells.h5ad")
    assert "--layer" not in str(raised.value)


def rewritten(path, table, name, values):
    """Replace a column, or the index, of obs or var by plain values, as programs other than anndata write them."""
    with h5py.File(path, "a") as file:
        del file[table][name]
        file[table][name] = values
        file[table][name].attrs["encoding-type"], file[table][name].attrs["encoding-version"] = "array", "0.2.0"


def test_text_that_is_stored_as_bytes_is_text(tmp_path):
    path = tmp_path / "cells.h5ad"
    some_cells().write_h5ad(path)
    rewritten(path, "obs", "_index", np.array(NAMES, "S"))
    rewritten(path, "obs", "batch", np.array([text.encode() for text in ("a", "ü", "a", "ü")]))
    cells = read_adata(path)
    assert (list(cells.obs_names), list(cells.obs["batch"])) == (NAMES, ["a", "ü", "a", "ü"])
    assert check_adata(cells, conditions=["batch"]).accept().conditions[0].levels == ("a", "ü")


@pytest.mark.filterwarnings("error", "ignore:The 'future.infer_string' option")  # anndata asks pandas for that option
def test_names_that_are_numbers_are_text_without_a_warning(tmp_path):
    path = tmp_path / "cells.h5ad"
    some_cells().write_h5ad(path)
    rewritten(path, "obs", "_index", np.arange(4))
    rewritten(path, "var", "_index", np.arange(3))
    cells = read_adata(path)
    assert (list(cells.obs_names), list(cells.var_names)) == (["0", "1", "2", "3"], ["0", "1", "2"])


def test_a_part_that_anndata_does_not_know_is_named_without_words_of_its_code(tmp_path):
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        file["obs/batch"].attrs["encoding-type"] = "of the future"
    with pytest.raises(DataError, match="stored as 'of the future', which anndata") as raised:
        read_adata(tmp_path / "cells.h5ad")
    assert "IOSpec" not in str(raised.value)


def add_reserved_column(path, name):
    """Add a column `_index` beside the index of a table, as converters from R do."""
    with h5py.File(path, "a") as file:
        table = file[name]
        table.copy("_index", "name")
        table.attrs["_index"] = "name"
        table.attrs["column-order"] = np.array([*table.attrs["column-order"], "_index"], dtype=h5py.string_dtype())


def test_a_column_that_anndata_cannot_write_does_not_end_a_fit_after_its_training(cells, tmp_path, celbo_command):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    add_reserved_column(path, "obs")
    fitting = ["fit", path, "-o", tmp_path / "run", "--epochs", "1", "--hidden-dim", "8", "--condition", "batch"]
    done = celbo_command(*fitting)
    assert done.returncode == 0, done.stderr
    written = anndata.read_h5ad(tmp_path / "run" / "embedding.h5ad")
    assert list(written.obs_names) == list(written.obs["_index_"]) == list(cells.obs_names)
    assert set(cells.obs.columns) < set(written.obs.columns)
    changed = tmp_path / "changed.h5ad"
    asked = ["--set", f"batch={cells.obs['batch'].iloc[0]}", "-o", changed, "--n-samples", "2"]
    assert celbo_command("counterfactual", tmp_path / "run", path, *asked).returncode == 0
    assert anndata.read_h5ad(changed).shape == cells.shape
    add_reserved_column(path, "var")
    done = celbo_command("express", tmp_path / "run", path, "-o", tmp_path / "means.h5ad")
    assert done.returncode == 0, done.stderr
    assert list(anndata.read_h5ad(tmp_path / "means.h5ad").var["_index_"]) == list(cells.var_names)


def test_the_command_line_in_a_folder_that_is_gone_says_so(tmp_path):
    code = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); sys.argv = ['celbo', 'check', 'cells.h5ad']\n"
    code += "from celbo.app.cli import main; main()"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "gone"], capture_output=True, text=True, cwd=Path.cwd()
    )
    if "SystemError" in done.stderr and "numpy" in done.stderr:
        pytest.skip("this version of numpy cannot be imported in a folder that has been removed")
    assert done.returncode == 6
    assert done.stderr == "error: the current folder has been removed. Change to a folder that exists (cd).\n"


def test_a_name_with_spaces_and_umlauts_is_read(tmp_path):
    path = tmp_path / "Zellen für März.h5ad"
    some_cells().write_h5ad(path)
    assert read_adata(path).shape == (4, 3)
