"""What is no AnnData is recognised by what it holds, and the message says how to make an AnnData of it."""

import bz2
import gzip
import lzma
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from celbo import DataError
from celbo.data.read import read_adata

COUNTS = sp.csr_matrix(np.array([[0, 2, 1], [3, 0, 0], [0, 0, 7], [1, 5, 0]], np.int32))
CELLS, GENES = ["c0", "c1", "c2", "c3"], ["g0", "g1", "g2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def some_cells():
    return anndata.AnnData(COUNTS.astype(np.float32), pd.DataFrame(index=CELLS), pd.DataFrame(index=GENES))


def refusal(path):
    with pytest.raises(DataError) as raised:
        read_adata(path)
    message = str(raised.value)
    assert str(path) in message
    assert "IOSpec" not in message
    return message


def follow(message):
    """Run the command at the end of a message, in the Python that runs the tests."""
    command = re.search(r": ((python|gzip|bzip2|xz) .*)$", message)[1]
    folder = Path("programs")
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.unlink(missing_ok=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder.resolve()}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)


def write_10x(group, **features):
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(COUNTS, name)
    group["shape"] = COUNTS.shape[::-1]
    group["barcodes"] = np.array(CELLS, "S")
    for name, values in features.items():
        group[name] = np.array(values, "S")


def cell_ranger(path):
    with h5py.File(path, "w") as file:
        write_10x(file.create_group("matrix"))
        file["matrix/features/name"] = np.array(GENES, "S")


def cellbender(path):
    cell_ranger(path)
    with h5py.File(path, "a") as file:
        file["droplet_latents/cell_probability"] = np.ones(4)


def cell_ranger_2(path):
    with h5py.File(path, "w") as file:
        for genome in ("hg19", "mm10"):
            write_10x(file.create_group(genome), genes=GENES, gene_names=GENES)


def loom(path):
    with h5py.File(path, "w") as file:
        file["matrix"] = COUNTS.toarray().T
        file["col_attrs/CellID"] = np.array(CELLS, "S")
        file["row_attrs/Gene"] = np.array(GENES, "S")


def mudata(path):
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "MuData"
        for name in ("mod", "obs", "var"):
            file.create_group(name)
        for name in ("prot", "rna"):
            anndata.io.write_elem(file["mod"], name, some_cells())


def molecules(path):
    with h5py.File(path, "w") as file:
        file["umi"], file["barcode_idx"] = [1, 2], [0, 0]


def h5_seurat(path):
    with h5py.File(path, "w") as file:
        file["assays/RNA/counts"], file["cell.names"] = [1], np.array(CELLS, "S")


@pytest.mark.parametrize("name", ["counts.h5", "counts.h5ad", "mit Leerzeichen und ümlaut.h5"])
@pytest.mark.parametrize(
    ("write", "kind", "reader"),
    [
        (cell_ranger, "a count matrix of 10x Genomics", 'scanpy.read_10x_h5("{}").write_h5ad("'),
        (cellbender, "a count matrix of CellBender", 'scanpy.read_10x_h5("{}").write_h5ad("'),
        (cell_ranger_2, "genomes hg19, mm10", 'scanpy.read_10x_h5("{}", genome="hg19").write_h5ad("'),
        (loom, "a .loom file", 'anndata.io.read_loom("{}", X_name="").write_h5ad("'),
        (mudata, "a MuData with prot, rna", 'mudata.read_h5mu("{}")["rna"].write_h5ad("'),
        (molecules, "the molecule file of Cell Ranger", "filtered_feature_bc_matrix.h5"),
        (h5_seurat, "an .h5Seurat file", 'SeuratDisk::LoadH5Seurat("{}")'),
    ],
)
def test_hdf5_of_other_programs_is_recognised_by_its_groups_whatever_its_name(write, kind, reader, name):
    write(name)
    message = refusal(name)
    assert kind in message
    assert reader.format(name) in message
    assert f'write_h5ad("{name}")' not in message, "the file itself would be overwritten"


def test_a_file_that_only_resembles_one_of_another_program_is_not_taken_for_it():
    with h5py.File("weights.h5", "w") as file:
        file["matrix"] = np.eye(3)
        file["umi"] = [1]
    message = refusal("weights.h5")
    assert "holds no AnnData (it has matrix, umi)" in message
    assert "scanpy" not in message


def test_anndata_in_a_group_is_taken_out_by_the_command_of_the_message():
    with h5py.File("nested.h5", "w") as file:
        anndata.io.write_elem(file.create_group("samples"), "one", some_cells())
    follow(refusal("nested.h5"))
    np.testing.assert_array_equal(read_adata("nested.h5ad").X.toarray(), COUNTS.toarray())


def write_mtx(folder, prefix="", packed=True, features="features.tsv"):
    Path(folder).mkdir()
    scipy.io.mmwrite("counts.mtx", COUNTS.T.tocoo())
    files = {
        "matrix.mtx": Path("counts.mtx").read_text(),
        "barcodes.tsv": "\n".join(CELLS),
        features: "\n".join(f"ENSG{g}\t{g}" for g in GENES),
    }
    for name, text in files.items():
        path = Path(folder) / f"{prefix}{name}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


@pytest.mark.parametrize(
    ("options", "reader", "note"),
    [
        ({}, 'scanpy.read_10x_mtx("folder")', False),
        ({"prefix": "GSM1_"}, 'scanpy.read_10x_mtx("folder", prefix="GSM1_")', False),
        ({"packed": False, "features": "genes.tsv"}, 'scanpy.read_10x_mtx("folder")', False),
        ({"packed": False}, 'scanpy.read_10x_mtx("folder")', True),
    ],
)
def test_a_folder_of_matrix_barcodes_and_features_names_its_reader(options, reader, note):
    write_mtx("folder", **options)
    message = refusal("folder")
    assert reader in message
    assert ("compress the three files" in message) is note
    (matrix,) = Path("folder").glob("*matrix.mtx*")
    with pytest.raises(DataError, match=re.escape(reader)):
        read_adata(matrix)


def test_a_folder_of_cell_ranger_leads_to_its_filtered_matrix():
    for sample in ("a", "b"):
        counts = Path("outs") / "per_sample_outs" / sample / "count"
        counts.mkdir(parents=True)
        cell_ranger(counts / "sample_filtered_feature_bc_matrix.h5")
    message = refusal("outs")
    assert "with 2 matrices" in message
    assert 'read_10x_h5("outs/per_sample_outs/a/count/sample_filtered_feature_bc_matrix.h5")' in message


def test_a_matrix_without_names_is_read_by_the_command_of_the_message():
    scipy.io.mmwrite("counts.mtx", COUNTS.T.tocoo())
    follow(refusal("counts.mtx"))
    np.testing.assert_array_equal(read_adata("counts.h5ad").X.toarray(), COUNTS.toarray())


@pytest.mark.parametrize(
    ("name", "separator", "packed"),
    [("t.csv", ",", False), ("t.tsv", "\t", True), ("t 'x'.txt", ";", False), ("t.h5ad", ",", True)],
)
def test_a_table_in_a_text_file_is_read_by_the_command_of_the_message(name, separator, packed):
    table = pd.DataFrame(COUNTS.toarray(), CELLS, GENES).to_csv(sep=separator).encode()
    path = f"{name}.gz" if packed else name
    Path(path).write_bytes(gzip.compress(table) if packed else table)
    message = refusal(path)
    assert "If its rows are genes, add .T" in message
    follow(message)
    cells = read_adata(new_name_of(path))
    assert (list(cells.obs_names), list(cells.var_names)) == (CELLS, GENES)
    np.testing.assert_array_equal(cells.X, COUNTS.toarray())


def new_name_of(path):
    """Name that the message gave before the file existed."""
    stem = re.sub(r"\.(csv|tsv|txt|h5ad)$", "", path.removesuffix(".gz"))
    return f"{stem}_anndata.h5ad" if path.endswith(".h5ad") else f"{stem}.h5ad"


@pytest.mark.parametrize(("program", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("name", ["cells.h5ad", "cells.h5ad.packed"])
def test_a_packed_h5ad_is_unpacked_by_the_command_of_the_message(program, pack, name):
    some_cells().write_h5ad("whole.h5ad")
    Path(name).write_bytes(pack(Path("whole.h5ad").read_bytes()))
    message = refusal(name)
    assert f"an HDF5 file that {program} compressed" in message
    if any((Path(folder) / program).exists() for folder in os.environ["PATH"].split(":")):
        follow(message)
        assert read_adata(re.search(r"> (\S+)$", message)[1]).shape == COUNTS.shape


@pytest.mark.parametrize("inside", ["", "cells.zarr"])
def test_a_zipped_store_is_unpacked_by_the_command_of_the_message(inside):
    some_cells().write_zarr("store")
    with zipfile.ZipFile("cells.zarr.zip", "w") as archive:
        for path in Path("store").rglob("*"):
            archive.write(path, Path(inside) / path.relative_to("store"))
    message = refusal("cells.zarr.zip")
    follow(message)
    assert read_adata(re.search(r"give celbo (\S+):", message)[1]).shape == COUNTS.shape


R_FILE = b"X\n\x00\x00\x00\x03\x00\x04\x01\x00"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_files_of_r_are_recognised_however_they_are_packed(pack):
    Path("cells.rds").write_bytes(pack(R_FILE))
    message = refusal("cells.rds")
    assert 'sceasy::convertFormat(readRDS("cells.rds")' in message
    assert 'zellkonverter::writeH5AD(readRDS("cells.rds"), "cells.h5ad", X_name = "counts")' in message
    Path("cells.rda").write_bytes(pack(b"RDX3\n" + R_FILE))
    assert 'get(load("cells.rda"))' in refusal("cells.rda")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"not counts", "it is a text file"),
        (b"counts, honestly\nand no table", "it is a text file"),
        ("Zelle\nM\u00fcller\n".encode("latin-1"), "it is a text file"),
        (b'{"a": 1}', "text file (JSON)"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\x80\x04\x95\x00\x00\x00", "a pickle of Python"),
        (b"PAR1\x00\x00", "Parquet"),
        (b"\x1f\x8b\x08zzzzzzz", "gzip cannot unpack it"),
        (b"PK\x03\x04zzzz", "damaged or incomplete zip"),
        (b"\x00\x01\x02\xff" * 99, "no HDF5 file"),
        (b"\x00" * 257 + b"ustar\x0000", "a tar archive"),
    ],
)
def test_other_files_are_refused_for_what_they_are(content, kind):
    Path("cells.h5ad").write_bytes(content)
    assert kind in refusal("cells.h5ad")


def test_folders_are_refused_for_what_they_are(fitted):
    fitted.save("run/model")
    Path("empty").mkdir()
    Path("several").mkdir()
    some_cells().write_h5ad("several/a.h5ad")
    some_cells().write_zarr("cells.zarr")
    some_cells().write_zarr("broken.zarr")
    for name in ("zarr.json", ".zgroup", ".zattrs", ".zmetadata"):
        Path("broken.zarr", name).unlink(missing_ok=True)
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    assert "is an empty folder" in refusal("empty")
    assert "is the folder of a fitted model" in refusal("run/model")
    assert "is a run of celbo" in refusal("run")
    assert "folder with runs of celbo (run)" in refusal(".")
    assert "Name one of the files in it: several/a.h5ad" in refusal("several")
    assert f"part of the store {Path('cells.zarr').resolve()}" in refusal("cells.zarr/obs")
    assert "lacks its file zarr.json or .zgroup" in refusal("broken.zarr")
    assert "no zarr store (it has cat.jpg)" in refusal("photos")


def test_a_store_of_several_anndata_names_them_and_each_is_read():
    import zarr

    store = zarr.open_group("several.zarr", mode="w")
    for name in ("prot", "rna"):
        anndata.io.write_elem(store.require_group("mod"), name, some_cells())
    assert "Name one: several.zarr/mod/prot, several.zarr/mod/rna" in refusal("several.zarr")
    assert read_adata("several.zarr/mod/rna").shape == COUNTS.shape


def test_what_is_neither_file_nor_folder_is_refused_without_waiting():
    os.mkfifo("pipe.h5ad")
    Path("link.h5ad").symlink_to("nowhere.h5ad")
    assert "is a pipe" in refusal("pipe.h5ad")
    assert "is a link to nowhere.h5ad, which does not exist" in refusal("link.h5ad")
    assert "is a device" in refusal("/dev/null")
    with pytest.raises(DataError, match="is an address on the network"):
        read_adata("https://example.org/cells.h5ad")


def test_a_relative_path_in_a_folder_that_is_gone_is_explained(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current folder has been removed" in refusal("cells.h5ad")
    monkeypatch.chdir(tmp_path)


def test_the_named_functions_of_anndata_exist():
    assert all(hasattr(anndata.io, name) for name in ("read_csv", "read_elem", "read_loom", "read_mtx"))
