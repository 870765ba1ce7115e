"""The model folder on disk: JSON and safetensors with checksums; written in one step, read without executing anything.

::

    model.json              format and celbo version, options, schema, history
    weights.safetensors     tensors of the model
    reference.safetensors   latent positions of the cells of fit (may be absent)
    manifest.json           size and SHA-256 of each of these files

Nothing here needs torch: a forged folder is refused before anything heavy is loaded or allocated.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from celbo.errors import CelboError, ModelFileError, StorageError
from celbo.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "FolderDescription",
    "ModelFolder",
    "describe_folder",
    "find_folder",
    "is_model_folder",
    "read_folder",
    "refuse_to_replace",
    "write_folder",
]

FORMAT_VERSION = 1
"""Format that this version writes. It reads this format and all older ones."""

Arrays = Mapping[str, NDArray[Any]]

_MODEL, _WEIGHTS, _REFERENCE, _MANIFEST = "model.json", "weights.safetensors", "reference.safetensors", "manifest.json"
_FILES = (_MODEL, _WEIGHTS, _REFERENCE)
_LITTER = {".DS_Store"}
"""Files of file browsers, which may be deleted with a model folder."""
_ITEM_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
# A gene name takes some twenty bytes, an epoch a few hundred, a tensor a hundred: these are far beyond any real model.
# Parsed JSON can take thirty times its size in memory, so its values are counted too.
_LARGEST_JSON = 32 << 20
_MOST_VALUES = 1_000_000
_LARGEST_MANIFEST = 64 << 10
_LARGEST_HEADER = 1 << 20
_MOST_DIMENSIONS = 32
_ABANDONED = 3600
"""An unfinished folder older than this, seconds, belongs to a killed process: writing takes moments."""
_AGAIN = "Save the model again, or copy it again from where it came."


class ModelFolder(NamedTuple):
    """Contents of a model folder, checked."""

    document: dict[str, Any]
    """``model.json`` without the versions: options, schema, history."""
    weights: dict[str, NDArray[Any]]
    reference: dict[str, NDArray[Any]] | None
    celbo_version: str
    format_version: int


class FolderDescription(NamedTuple):
    """Description of a model folder, checked, without its tensors."""

    document: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the weights, by name."""
    has_reference: bool
    celbo_version: str
    format_version: int
    path: Path
    size: int
    """Total size of the files, bytes."""


def write_folder(
    path: str | Path, document: Mapping[str, Any], weights: Arrays, reference: Arrays | None = None
) -> None:
    """Write a model folder in one step: into a hidden sibling, flushed to disk, then renamed.

    Parameters
    ----------
    path
        The folder; one that already holds a model is replaced, anything else there is refused.
    document
        What ``model.json`` says beside the versions.
    weights
        Tensors of the model by name, all finite.
    reference
        Tensors of the cells of fit by name, if they are kept; finite too.

    Raises
    ------
    StorageError
        If it cannot be written; whatever model was there stays whole.
    CelboError
        If what was given is nothing that could be read again, such as weights that are not finite.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> write_folder(folder, {"options": {}}, {"fc_mu.bias": np.zeros(2, np.float32)})
    >>> read_folder(folder).weights
    {'fc_mu.bias': array([0., 0.], dtype=float32)}
    """
    path = Path(os.path.realpath(Path(path).expanduser()))  # where a link leads: all renames stay on its disk
    contents = _serialise(document, weights, reference)
    needed = sum(map(len, contents.values()))
    new, old = _sibling(path, f"new-{uuid.uuid4().hex[:8]}"), _sibling(path, "previous")
    try:
        refuse_to_replace(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(new)
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise StorageError(f"{path} needs {needed:,} bytes, and its disk has {free:,} left. Free some space.")
        new.mkdir()
        for name, data in contents.items():
            _write_through(new / name, data)
        _flush_folder(new)
        _check(new)  # a model that cannot be read again replaces nothing
        if path.exists():
            # A kill between the next two renames leaves no folder of this name; reading then finds the previous one.
            _discard(old)
            path.rename(old)
        new.rename(path)
        _flush_folder(path.parent)
    except ModelFileError as error:
        raise CelboError(f"{path} is not written, because it could not be read again: {error}") from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}; {needed:,} bytes are needed). "
            "What was there before is whole. Free some space, or name another place."
        ) from error
    finally:
        with suppress(OSError):  # reading finds the old one under its hidden name as well
            if not path.exists() and old.exists():
                old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
    _discard(old)


def read_folder(path: str | Path) -> ModelFolder:
    """Read a model folder after checking names, sizes, checksums, headers and numbers.

    Parameters
    ----------
    path
        The folder, or a run's folder with ``model/`` in it.

    Returns
    -------
    ModelFolder

    Raises
    ------
    ModelFileError
        If it is not a model folder, is damaged, was changed after saving, or is of a newer format.
    StorageError
        If it may not be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise ModelFileError(f"a model is read from the path of its folder; found a {type(path).__name__}.")
    described, sums = _check(Path(path))
    tensors = {}
    for name in [name for name in sums if name != _MODEL]:
        file = described.path / name
        try:
            data = file.read_bytes()
            # Once more, in memory: somebody may be replacing the folder just now, and half of each is no model.
            _compare_sums(file, _sha256(data), sums[name])
            tensors[name] = safetensors.numpy.load(data)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise ModelFileError(f"{file} cannot be read: {error!s:.200}. {_AGAIN}") from error
        for tensor, value in tensors[name].items():
            if n_bad := value.size - int(np.isfinite(value).sum()):
                raise ModelFileError(f"{file}: {n_bad:,} numbers of {tensor!r:.80} are not finite. {_AGAIN}")
    return ModelFolder(
        described.document,
        tensors[_WEIGHTS],
        tensors.get(_REFERENCE),
        described.celbo_version,
        described.format_version,
    )


def describe_folder(path: str | Path) -> FolderDescription:
    """Check a model folder as `read_folder` does, and say what it holds without loading its tensors.

    Parameters
    ----------
    path
        The folder, or a run's folder with ``model/`` in it.

    Returns
    -------
    FolderDescription

    Raises
    ------
    ModelFileError, StorageError
        As `read_folder`, but for numbers that are not finite.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> write_folder(folder, {"options": {}}, {"fc_mu.bias": np.zeros(2, np.float32)})
    >>> describe_folder(folder).shapes
    {'fc_mu.bias': (2,)}
    """
    return _check(Path(path))[0]


def find_folder(path: Path) -> Path:
    """Find the model folder: the folder itself, the model of a run, or what an interrupted replacement left.

    Raises
    ------
    ModelFileError
        If there is none.
    StorageError
        If it may not be read.
    """
    with _explaining_faults_of(path):
        for candidate in (path, path / "model"):
            for folder in (candidate, _sibling(Path(os.path.realpath(candidate)), "previous")):
                if (folder / _MANIFEST).is_file():
                    return folder
        if not path.exists():
            fault = "does not exist"
        elif not path.is_dir():
            fault = "is not a folder"
        elif path.suffix == ".zarr":
            fault = "is not a model folder"
        else:
            fault = "is not a model folder: it has no manifest.json"
        cells = " Cells are given to the model: fit(path), embed(path)." if path.suffix in (".h5ad", ".zarr") else ""
        raise ModelFileError(f"{path} {fault}; name the folder that `celbo fit -o` or `save` wrote.{cells}")


@contextmanager
def _explaining_faults_of(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{error.filename or path} may not be read. Ask its owner for permission.") from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}. {_AGAIN}") from error


def _check(path: Path) -> tuple[FolderDescription, dict[str, str]]:
    """Check all but the numbers, the cheap before the dear. Returns what is there, and the SHA-256 of each file."""
    with _explaining_faults_of(path):
        folder = find_folder(path)
        entries = _read_manifest(folder / _MANIFEST)
        # The version comes before names and contents, which a newer format is free to change.
        sizes = {_MODEL: _check_size(folder / _MODEL, entries)}
        _check_sum(folder / _MODEL, entries)
        document = _parse_json(folder / _MODEL, _LARGEST_JSON)
        found_format, found_version = _take_versions(folder / _MODEL, document)
        if strange := sorted(entries.keys() - set(_FILES)):
            raise ModelFileError(
                f"{folder / _MANIFEST} lists {strange[0]!r:.80}, which no model has. Do not trust this folder."
            )
        tensor_files = [folder / name for name in _FILES if name in entries and name != _MODEL]
        for file in tensor_files:
            _refuse_pickle(file)
            sizes[file.name] = _check_size(file, entries)
        for file in tensor_files:
            _check_sum(file, entries)
        shapes = {file.name: _check_header(file) for file in tensor_files}
    described = FolderDescription(
        document, shapes[_WEIGHTS], _REFERENCE in shapes, found_version, found_format, folder, sum(sizes.values())
    )
    return described, {name: entries[name]["sha256"] for name in sizes}


def _read_manifest(file: Path) -> dict[str, dict[str, Any]]:
    """Read size and SHA-256 of each file. This layout, and the versions in model.json, never change."""
    entries = _parse_json(file, _LARGEST_MANIFEST).get("files")
    if not isinstance(entries, dict) or not {_MODEL, _WEIGHTS} <= entries.keys():
        raise ModelFileError(f"{file} does not list {_MODEL} and {_WEIGHTS}. {_AGAIN}")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise ModelFileError(f"{file} does not give the size and SHA-256 of {name!r:.80}. {_AGAIN}")
    return entries


def _take_versions(file: Path, document: dict[str, Any]) -> tuple[int, str]:
    """Take the versions out of what model.json says, and refuse what this celbo does not know."""
    number, version = document.pop("format_version", None), document.pop("celbo_version", None)
    known = type(number) is int and number >= 1 and isinstance(version, str)
    # The pattern keeps control characters, which a forger could send to the terminal, out of what is shown.
    if not known or not re.fullmatch(r"[\w.+!-]{1,40}", version):
        raise ModelFileError(f"{file} does not say which format it is in, and which celbo wrote it. {_AGAIN}")
    if number > FORMAT_VERSION:
        raise ModelFileError(
            f"{file.parent} is in format {number}, written by celbo {version}; this is celbo {__version__}, "
            f"which reads up to format {FORMAT_VERSION}. Upgrade celbo."
        )
    return number, version


def _check_size(file: Path, entries: Mapping[str, dict[str, Any]]) -> int:
    size, expected = _size(file), entries[file.name]["size"]
    if size != expected:
        what = "is truncated" if size < expected else "was changed after saving"
        raise ModelFileError(
            f"size and sha256 mismatch: {file} {what}: it has {size:,} bytes and should have {expected:,}. {_AGAIN}"
        )
    return size


def _check_sum(file: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    with file.open("rb") as stream:
        _compare_sums(file, hashlib.file_digest(stream, "sha256").hexdigest(), entries[file.name]["sha256"])


def _compare_sums(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ModelFileError(f"sha256 mismatch: {file} is damaged, or was changed after saving. {_AGAIN}")


def _size(file: Path) -> int:
    """Return the size of a file of the folder; links are refused."""
    try:
        status = file.lstat()
    except FileNotFoundError as error:
        raise ModelFileError(f"{file} is missing. {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{file} is not a plain file. {_AGAIN}")
    return status.st_size


def _parse_json(file: Path, largest: int) -> dict[str, Any]:
    if (size := _size(file)) > largest:
        raise ModelFileError(f"{file} has {size:,} bytes; no model needs more than {largest:,}. {_AGAIN}")
    data = file.read_bytes()
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise ModelFileError(f"{file} holds more than {_MOST_VALUES:,} values; no model needs as many. {_AGAIN}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file} is not JSON ({type(error).__name__}). {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{file} is not a JSON object. {_AGAIN}")
    return value


def _refuse_pickle(file: Path) -> None:
    """Name the one forgery everybody knows. The header's length may begin like a pickle, so look at its brace too."""
    size = _size(file)
    with file.open("rb") as stream:
        start = stream.read(9)
        stream.seek(max(size - 1, 0))
        end = stream.read(1)
    if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8:
        return
    if start[:1] == b"\x80" or start[:4] == b"PK\3\4" or (start[:1] in b"(c]}" and end == b"."):
        raise ModelFileError(
            f"{file} is not a safetensors file of a model: it looks like a Python pickle, which could run anything; "
            f"celbo never loads one. Do not trust this folder. {_AGAIN}"
        )


def _check_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Check that the tensors a safetensors file announces are those it has room for. Returns their shapes."""

    def refuse(what: str) -> ModelFileError:
        return ModelFileError(f"{file} is not a safetensors file of a model: {what}. {_AGAIN}")

    size = _size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise refuse(f"it announces a header of {length:,} bytes, in a file of {size:,}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise refuse("its header is not JSON") from error
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    shapes, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (begin, end), item_size = entry["shape"], entry["data_offsets"], _ITEM_SIZES[entry["dtype"]]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"tensor {name!r:.80} has no readable type, shape and place") from error
        # The bounds keep the product from growing to millions of digits.
        whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not whole or len(shape) > _MOST_DIMENSIONS or end - begin != math.prod(shape) * item_size:
            raise refuse(f"tensor {name!r:.80} announces the shape {shape!s:.80}, which is not the room it takes")
        shapes[name] = tuple(shape)
        spans.append((begin, end))
    edges = [0, *(edge for span in sorted(spans) for edge in span), size - 8 - length]
    if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
        raise refuse("its tensors overlap, or leave gaps")
    return shapes


def _serialise(document: Mapping[str, Any], weights: Arrays, reference: Arrays | None) -> dict[str, bytes]:
    """Return the files of a model folder and their bytes, the manifest last."""
    model = {"format_version": FORMAT_VERSION, "celbo_version": __version__, **document}
    try:
        contents = {
            _MODEL: json.dumps(model, indent=1, ensure_ascii=False, allow_nan=False).encode(),
            _WEIGHTS: _tensors(weights),
            **({} if reference is None else {_REFERENCE: _tensors(reference)}),
        }
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise CelboError(f"this model cannot be put into files ({error}); nothing is saved.") from error
    files = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
    return {**contents, _MANIFEST: json.dumps({"files": files}, indent=1).encode()}


def _tensors(arrays: Arrays) -> bytes:
    if bad := [name for name, value in arrays.items() if not np.isfinite(value).all()]:
        raise CelboError(f"the tensors {', '.join(bad)} are not finite; such a model is not saved.")
    return safetensors.numpy.save({name: np.array(value, order="C") for name, value in arrays.items()})


def is_model_folder(path: Path) -> bool:
    """Return whether a folder has all files of a model folder; their contents are not checked."""
    return all((path / name).exists() for name in (_MODEL, _WEIGHTS, _MANIFEST))


def refuse_to_replace(path: Path) -> None:
    """Raise a `StorageError` if a path is something else than a model folder."""
    if not path.exists():
        return
    inside = {entry.name for entry in path.iterdir()} - _LITTER if path.is_dir() else {path.name}
    if inside and (_MANIFEST not in inside or inside - {*_FILES, _MANIFEST}):
        raise StorageError(
            f"{path} exists, and is not just a model folder (there is {', '.join(sorted(inside)[:5])}); "
            "name another place, or move it away."
        )


def _clear_abandoned(new: Path) -> None:
    """Remove unfinished folders of killed processes that wrote the same folder."""
    start = new.name[:-8]
    for entry in new.parent.iterdir():
        if entry.name.startswith(start) and len(entry.name) == len(new.name):
            with suppress(FileNotFoundError):  # another writer was quicker
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(entry, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Delete a folder, the manifest first: a folder that is deleted in part is then not a model."""
    with suppress(OSError):
        (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{suffix}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_through(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
                raise
        finally:
            os.close(descriptor)
