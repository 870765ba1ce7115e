"""Recognise by its contents what a path holds that is no AnnData, and say how to make an AnnData of it."""

import bz2
import codecs
import lzma
import re
import shlex
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import zarr

from celbo.data.convert import how_to_convert, new_name, quoted

__all__ = ["describe_file", "describe_folder", "describe_special", "describe_store"]

_HEAD = 1 << 16
"""Number of bytes from which the kind of a file is recognised."""

_AGAIN = "Copy it again from where it came."
_GIVE = "Give an .h5ad file that adata.write_h5ad wrote, or a .zarr folder that adata.write_zarr wrote."

_HDF5 = b"\x89HDF\r\n\x1a\n"

_UNPACKERS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", lambda head: zlib.decompressobj(31).decompress(head, _HEAD)),
    b"BZh": ("bzip2", lambda head: bz2.BZ2Decompressor().decompress(head, _HEAD)),
    b"\xfd7zXZ": ("xz", lambda head: lzma.LZMADecompressor().decompress(head, _HEAD)),
}
"""First bytes of a compressed file: the program that made it, and a function that unpacks its beginning."""

_R = (b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n", b"X\n\x00\x00\x00", b"A\n2\n", b"A\n3\n")
"""First bytes of the files of R: of save, then of saveRDS."""

_BINARY = {
    b"PAR1": "a table in the Parquet format",
    b"ARROW1": "a table in the Arrow (Feather) format",
    b"\x80": "a pickle of Python, which celbo never opens, because opening it runs code",
    b"\x93NUMPY": "a NumPy array without names of cells and genes",
    b"BAM\x01": "a file of aligned reads (BAM)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
}

_MATRIX_MTX = re.compile(r"(.*)matrix\.mtx(\.gz)?$")
_ZARR_METADATA = {"zarr.json", ".zgroup", ".zarray"}


def describe_special(path: Path) -> str:
    """Say what a path is if it is neither a file nor a folder, as a pipe; return an empty text if it is one of them."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return f"{path} is {kind}, and celbo cannot read it from there: write the cells to an .h5ad file, and give that."


def describe_file(path: Path) -> str:
    """Say what a file is that is not HDF5, and how to make an .h5ad file of it."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _describe_zip(path)
    packed_by = ""
    for magic, (program, unpack) in _UNPACKERS.items():
        if head.startswith(magic):
            try:
                packed_by, head = program, unpack(head)
            except (zlib.error, OSError, EOFError, lzma.LZMAError):
                return f"{path} is damaged: {program} cannot unpack it. {_AGAIN}"
    if head.startswith(_HDF5):
        command = f"{packed_by} -dc {shlex.quote(str(path))} > {shlex.quote(new_name(path))}"
        return f"{path} is an HDF5 file that {packed_by} compressed. Unpack it, and give celbo the new file: {command}"
    if head.startswith(_R):
        read = "get(load({}))" if head.startswith(b"RD") else "readRDS({})"
        return f"{path} is a file of R. {_in_r(path, read.format(quoted(path)))}"
    if head.startswith(b"%%MatrixMarket"):
        return _describe_mtx(path)
    if head[257:262] == b"ustar":
        return f"{path} is a tar archive. Unpack it with tar -xf {shlex.quote(str(path))}, and give what it holds."
    if text := _as_text(head):
        return _describe_text(path, text)
    kinds = [kind for magic, kind in _BINARY.items() if head.startswith(magic)]
    return f"{path} is no AnnData: it is {kinds[0] if kinds else 'no HDF5 file'}. {_GIVE}"


def describe_store(path: Path, store: h5py.File | zarr.Group) -> str:
    """Say what an HDF5 file or a zarr store is that holds no AnnData, and how to make an .h5ad file of it."""
    names = set(store)
    if isinstance(store, h5py.File) and (known := _describe_hdf5(path, store, names)):
        return known
    if inside := _find_anndata(store):
        if isinstance(store, zarr.Group):
            return f"{path} is no AnnData, but has some in it. Name one: {_examples(path / name for name in inside)}."
        read = f"anndata.io.read_elem(h5py.File({quoted(path)})[{quoted(inside[0])}])"
        return how_to_convert(path, f"a file with AnnData in {_examples(inside)}", "anndata, h5py", read)
    if names & {"X", "obs", "var"}:
        return (
            f"{path} is an incomplete AnnData (it has {_examples(names)}), perhaps because the program that wrote it "
            f"was stopped. {_AGAIN}"
        )
    parents = [parent for parent in path.resolve().parents if _ZARR_METADATA & _names_in(parent)]
    if isinstance(store, zarr.Group) and parents:
        return f"{path} is a part of the store {parents[-1]}; give that."
    return f"{path} holds no AnnData (it has {_examples(names)}). {_GIVE}"


def describe_folder(path: Path) -> str:
    """Say what a folder is that is no zarr group, and how to make an .h5ad file of what it holds."""
    names = _names_in(path)
    if not names:
        return f"{path} is an empty folder. {_GIVE}"
    if "zarr.json" in names or ".zarray" in names:
        return f"{path} is an array of a zarr store; give the folder of the whole store."
    if {"model.json", "weights.safetensors"} <= names:
        return f"{path} is the folder of a fitted model, which has no counts. Name the cells, as an .h5ad or a .zarr."
    if "model" in names and {"model.json", "weights.safetensors"} <= _names_in(path / "model"):
        return f"{path} is a run of celbo, which has no counts. Name the cells, as an .h5ad or a .zarr."
    if runs := [name for name in sorted(names) if (path / name / "model" / "model.json").exists()]:
        return f"{path} is a folder with runs of celbo ({_examples(runs)}). Name the cells, as an .h5ad or a .zarr."
    if matrices := sorted(name for name in names if _MATRIX_MTX.match(name)):
        return _describe_mtx(path / matrices[0])
    if cells := [path / name for name in sorted(names) if name.endswith((".h5ad", ".zarr"))]:
        return f"{path} is a folder, and no zarr store. Name one of the files in it: {_examples(cells)}."
    patterns = ("", "outs/", "count/", "per_sample_outs/*/count/", "outs/per_sample_outs/*/count/")
    found = [file for pattern in patterns for file in sorted(path.glob(f"{pattern}*filtered_feature_bc_matrix.h5"))]
    if found:
        read = f"scanpy.read_10x_h5({quoted(found[0])})"
        others = f", with {len(found):,} matrices ({_examples(found)})" if len(found) > 1 else ""
        return how_to_convert(path, f"a folder of Cell Ranger{others}", "scanpy", read)
    if {"X", "obs", "var"} <= names:
        return f"{path} is an incomplete .zarr store: it lacks its file zarr.json or .zgroup. {_AGAIN}"
    return f"{path} is a folder, and no zarr store (it has {_examples(names)}). {_GIVE}"


def _describe_hdf5(path: Path, file: h5py.File, names: set[str]) -> str:
    """Recognise the HDF5 files of other programs by their groups; return an empty text for an unknown file."""
    text = quoted(path)
    if {"matrix", "row_attrs", "col_attrs"} <= names:
        return how_to_convert(path, "a .loom file", "anndata", f'anndata.io.read_loom({text}, X_name="")', "loompy")
    if isinstance(modalities := file.get("mod"), h5py.Group) and len(modalities):
        name = "rna" if "rna" in modalities else min(modalities)
        kind = f"a MuData with {_examples(modalities)}, of which celbo reads one"
        return how_to_convert(path, kind, "mudata", f"mudata.read_h5mu({text})[{quoted(name)}]")
    if isinstance(matrix := file.get("matrix"), h5py.Group) and "barcodes" in matrix:
        is_corrected = names & {"droplet_latents", "global_latents"} or "latent_cell_probability" in matrix
        program = "CellBender" if is_corrected else "10x Genomics (Cell Ranger)"
        return how_to_convert(path, f"a count matrix of {program}", "scanpy", f"scanpy.read_10x_h5({text})")
    genomes = [name for name in sorted(names) if {"barcodes", "genes", "indptr"} <= set(_group(file, name))]
    if genomes:
        genome = f", genome={quoted(genomes[0])}" if len(genomes) > 1 else ""
        kind = f"a count matrix of 10x Genomics (Cell Ranger 2; genomes {_examples(genomes)})"
        return how_to_convert(path, kind, "scanpy", f"scanpy.read_10x_h5({text}{genome})")
    if "umi" in names and names & {"barcode", "barcode_idx"}:
        return (
            f"{path} is the molecule file of Cell Ranger, which has no table of counts. Take "
            "filtered_feature_bc_matrix.h5 from the same folder."
        )
    if {"assays", "cell.names"} <= names:
        return f"{path} is an .h5Seurat file. {_in_r(path, f'SeuratDisk::LoadH5Seurat({text})')}"
    return ""


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"{path} is a damaged or incomplete zip archive. {_AGAIN}"
    roots = [Path(name).parent for name in names if Path(name).name in _ZARR_METADATA]
    if roots:
        folder = Path(re.sub(r"(\.zarr)?\.zip$", "", path.name) + ".zarr")
        inside = min(roots, key=lambda root: len(root.parts))
        command = f"python -m zipfile -e {shlex.quote(str(path))} {shlex.quote(str(folder))}"
        return f"{path} is a zipped .zarr store. Unpack it, and give celbo {folder / inside}: {command}"
    if any(name.endswith(".npy") for name in names):
        return f"{path} is a NumPy archive (.npz) without names of cells and genes. {_GIVE}"
    if "xl/workbook.xml" in names:
        return f"{path} is an Excel file. Save the table as a .csv file, which anndata.io.read_csv reads. {_GIVE}"
    return f"{path} is a zip archive ({_examples(names)}). Unpack it, and give celbo the .h5ad or .zarr in it."


def _in_r(path: Path, read: str) -> str:
    """Say how R writes an object as .h5ad, with counts in X."""
    target = quoted(new_name(path))
    return (
        "Write an .h5ad file in R, and give celbo that file. For a Seurat object: "
        f'sceasy::convertFormat({read}, from = "seurat", to = "anndata", main_layer = "counts", outFile = {target}). '
        f'For a SingleCellExperiment: zellkonverter::writeH5AD({read}, {target}, X_name = "counts").'
    )


def _describe_mtx(path: Path) -> str:
    """Say how to read a Matrix Market file: with the barcodes and features beside it, or without names."""
    names = _names_in(path.parent)
    match = _MATRIX_MTX.match(path.name)
    prefix = match[1] if match else ""
    beside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    features = [name for name in ("features.tsv.gz", "genes.tsv", "features.tsv", "genes.tsv.gz") if name in beside]
    if not (match and features and beside & {"barcodes.tsv", "barcodes.tsv.gz"}):
        missing = "There are no barcodes.tsv and features.tsv beside it, so cells and genes get numbers as names"
        return how_to_convert(
            path, "a Matrix Market file", "anndata", f"anndata.io.read_mtx({quoted(path)}).T", note=missing
        )
    packed = {"matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"}
    plain = {"matrix.mtx", "barcodes.tsv", "genes.tsv"}
    note = ""
    if not (packed <= beside or plain <= beside):
        note = (
            "scanpy expects the names matrix.mtx.gz, barcodes.tsv.gz and features.tsv.gz there: first compress the "
            "three files with gzip, and rename them where they differ"
        )
    option = f", prefix={quoted(prefix)}" if prefix else ""
    read = f"scanpy.read_10x_mtx({quoted(path.parent)}{option})"
    folder = path.parent
    return how_to_convert(
        folder, "a folder in the format of 10x Genomics (matrix, barcodes, features)", "scanpy", read, note=note
    )


def _describe_text(path: Path, text: str) -> str:
    start = text.lstrip("\ufeff \r\n\t")
    if start.startswith("version https://git-lfs"):
        return f"{path} stands for a large file that Git LFS has not loaded yet: run git lfs pull."
    if start[:5].lower() in ("<!doc", "<html"):
        return f"{path} is a web page, not the file that was to be downloaded. Download it again."
    if start.startswith(("{", "[{")):
        return f"{path} is no AnnData: it is a text file (JSON). {_GIVE}"
    first, second, *_ = (*start.splitlines(), "", "")
    separators = {sign: min(first.count(sign), second.count(sign)) for sign in ("\t", ",", ";")}
    sign = max(separators, key=lambda sign: separators[sign])
    if not separators[sign]:
        return f"{path} is no AnnData: it is a text file. {_GIVE}"
    option = "" if sign == "," else f", delimiter={quoted(sign)}"
    read = f"anndata.io.read_csv({quoted(path)}{option})"
    return how_to_convert(
        path, "a text table", "anndata", read, note="If its rows are genes, add .T before .write_h5ad"
    )


def _as_text(head: bytes) -> str:
    """Return the beginning of a file as text; an empty text if it is binary."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        text = head.decode("latin-1")
    is_text = all(letter.isprintable() or letter in "\t\n\r\f\ufeff\xa0\xad" for letter in text)
    return text if is_text else ""


def _find_anndata(store: Any, prefix: str = "", depth: int = 2) -> list[str]:
    """Return the paths of AnnData inside a store, down to ``depth`` groups below."""
    found = []
    for name in sorted(store):
        item = store.get(name)
        if not isinstance(item, h5py.Group | zarr.Group):
            continue
        if item.attrs.get("encoding-type") == "anndata":
            found.append(f"{prefix}{name}")
        elif depth > 1:
            found += _find_anndata(item, f"{prefix}{name}/", depth - 1)
    return found


def _group(file: h5py.File, name: str) -> Any:
    """Return a group of a file; an empty one if the name is not that of a group."""
    item = file.get(name)
    return item if isinstance(item, h5py.Group) else ()


def _names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _examples(names: Any) -> str:
    """Join at most five names, the first in the order of the alphabet."""
    found = sorted(str(name) for name in names)
    return (", ".join(found[:5]) or "nothing") + (f" and {len(found) - 5:,} more" if len(found) > 5 else "")
