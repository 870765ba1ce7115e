"""The model folder on disk: JSON and safetensors with checksums; written in one step, read without executing anything.

::

    model.json              format and celbo version, options, schema, history
    weights.safetensors     tensors of the model
    reference.safetensors   latent positions of the cells of fit (may be absent)
    manifest.json           size and SHA-256 of each of these files

Nothing here needs torch: a forged folder is refused before anything heavy is loaded or allocated.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from celbo import __version__
from celbo.errors import CelboError, ModelFileError, StorageError

__all__ = ["FORMAT_VERSION", "FolderDescription", "ModelFolder", "describe_folder", "read_folder", "write_folder"]

FORMAT_VERSION = 1
"""What this celbo writes; it reads this and everything older."""

Arrays = Mapping[str, NDArray[Any]]

_MODEL, _WEIGHTS, _REFERENCE, _MANIFEST = "model.json", "weights.safetensors", "reference.safetensors", "manifest.json"
_FILES = (_MODEL, _WEIGHTS, _REFERENCE)
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# A gene name takes some ten bytes and an epoch a few hundred: these are far beyond any real model.
_LARGEST_JSON = 64 << 20
_LARGEST_MANIFEST = 64 << 10
_LARGEST_HEADER = 16 << 20
_AGAIN = "Save the model again, or copy it again from where it came."


class ModelFolder(NamedTuple):
    """A model folder, read and checked."""

    document: dict[str, Any]
    """``model.json`` without the versions: options, schema, history."""
    weights: dict[str, NDArray[Any]]
    reference: dict[str, NDArray[Any]] | None
    celbo_version: str
    format_version: int


class FolderDescription(NamedTuple):
    """What a model folder holds, checked, its tensors not loaded."""

    document: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Of the weights, by name."""
    has_reference: bool
    celbo_version: str
    format_version: int
    path: Path
    size: int
    """Bytes of all files."""


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
        Tensors of the model by name.
    reference
        Tensors of the cells of fit by name, if they are kept.

    Raises
    ------
    StorageError
        If it cannot be written; whatever model was there stays whole.
    CelboError
        If weights are not finite.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> write_folder(folder, {"options": {}}, {"fc_mu.bias": np.zeros(2, np.float32)})
    >>> read_folder(folder).weights
    {'fc_mu.bias': array([0., 0.], dtype=float32)}
    """
    path = Path(path)
    if bad := [name for name, value in weights.items() if not np.isfinite(value).all()]:
        raise CelboError(f"the weights {', '.join(bad)} are not finite; such a model is not saved.")
    model = {"format_version": FORMAT_VERSION, "celbo_version": __version__, **document}
    contents = {
        _MODEL: json.dumps(model, indent=1, ensure_ascii=False, allow_nan=False).encode(),
        _WEIGHTS: _tensors(weights),
    }
    if reference is not None:
        contents[_REFERENCE] = _tensors(reference)
    files = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
    contents[_MANIFEST] = json.dumps({"files": files}, indent=1).encode()

    if path.is_symlink() or path.exists():
        _refuse_to_replace(path)
    new, old = _sibling(path, f"new-{os.getpid()}"), _sibling(path, "previous")
    needed = sum(map(len, contents.values()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise StorageError(f"{path} needs {needed:,} bytes, and its disk has {free:,} left. Free some space.")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for name, data in contents.items():
            _write_through(new / name, data)
        _flush_folder(new)
        if path.exists():
            # A kill between the next two lines leaves no folder of this name; reading then finds the previous one.
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        if not path.exists() and old.exists():
            old.rename(path)
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}; {needed:,} bytes are needed). "
            "What was there before is whole. Free some space, or name another place."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


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
    described = describe_folder(path)
    tensors = {}
    for name in (_WEIGHTS, _REFERENCE) if described.has_reference else (_WEIGHTS,):
        try:
            tensors[name] = safetensors.numpy.load_file(described.path / name)
        except Exception as error:
            raise ModelFileError(f"{described.path / name} cannot be read: {error}. {_AGAIN}") from error
        for tensor, value in tensors[name].items():
            if n_bad := int((~np.isfinite(value)).sum()):
                raise ModelFileError(f"{described.path / name}: {n_bad:,} numbers of {tensor} are not finite. {_AGAIN}")
    return ModelFolder(
        described.document,
        tensors[_WEIGHTS],
        tensors.get(_REFERENCE),
        described.celbo_version,
        described.format_version,
    )


def describe_folder(path: str | Path) -> FolderDescription:
    """Check a model folder as `read_folder` does, and say what it holds without loading its tensors."""
    path = Path(path)
    try:
        path = _find(path)
        sizes = _check_files(path)
        document = _read_json(path / _MODEL, _LARGEST_JSON)
        found_format, found_version = document.pop("format_version", None), document.pop("celbo_version", None)
        if not isinstance(found_format, int) or isinstance(found_format, bool) or not isinstance(found_version, str):
            raise ModelFileError(f"{path / _MODEL} does not say which format it is in. {_AGAIN}")
        if found_format > FORMAT_VERSION:
            raise ModelFileError(
                f"{path} is in format {found_format}, written by celbo {found_version[:40]}; this is celbo "
                f"{__version__}, which reads up to format {FORMAT_VERSION}. Upgrade celbo."
            )
        shapes = _check_header(path / _WEIGHTS)
        if _REFERENCE in sizes:
            _check_header(path / _REFERENCE)
    except PermissionError as error:
        raise StorageError(f"{error.filename or path} may not be read. Ask its owner for permission.") from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}. {_AGAIN}") from error
    return FolderDescription(
        document, shapes, _REFERENCE in sizes, found_version, found_format, path, sum(sizes.values())
    )


def _find(path: Path) -> Path:
    """The folder itself, the model of a run's folder, or what an interrupted replacement left."""
    for candidate in (path, path / "model"):
        for folder in (candidate, _sibling(candidate, "previous")):
            if (folder / _MANIFEST).is_file():
                return folder
    found = "does not exist" if not path.exists() else "is not a model folder: it has no manifest.json"
    raise ModelFileError(f"{path} {found}; name what `celbo fit -o` or `save` wrote.")


def _check_files(folder: Path) -> dict[str, int]:
    """Compare the files with the manifest: names, sizes, checksums. Returns their sizes."""
    files = _read_json(folder / _MANIFEST, _LARGEST_MANIFEST).get("files")
    if not isinstance(files, dict) or not {_MODEL, _WEIGHTS} <= set(files):
        raise ModelFileError(f"{folder / _MANIFEST} does not list {_MODEL} and {_WEIGHTS}. {_AGAIN}")
    if strange := sorted(set(files) - set(_FILES)):
        raise ModelFileError(
            f"{folder / _MANIFEST} lists {strange[0]!r:.80}, which no model has. Do not trust this folder."
        )
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise ModelFileError(f"{folder / _MANIFEST} does not give the size and SHA-256 of {name}. {_AGAIN}")
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise ModelFileError(f"{file} is missing, or is not a plain file. {_AGAIN}")
        if (size := file.stat().st_size) != entry["size"]:
            raise ModelFileError(f"{file} has {size:,} bytes and should have {entry['size']:,}. {_AGAIN}")
    for name, entry in files.items():
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.get("sha256"):
                raise ModelFileError(
                    f"sha256 mismatch: {folder / name} is damaged, or was changed after saving. {_AGAIN}"
                )
    return {name: entry["size"] for name, entry in files.items()}


def _read_json(file: Path, largest: int) -> dict[str, Any]:
    if (size := file.stat().st_size) > largest:
        raise ModelFileError(f"{file} has {size:,} bytes; no model needs more than {largest:,}. {_AGAIN}")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file} is not JSON ({type(error).__name__}). {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{file} is not a JSON object. {_AGAIN}")
    return value


def _check_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Check that the tensors a safetensors file announces are those it has room for. Returns their shapes."""

    def refuse(what: str) -> ModelFileError:
        return ModelFileError(f"{file} is not a safetensors file of a model: {what}. {_AGAIN}")

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            if start[:1] == b"\x80" or start[:2] == b"PK":
                raise refuse("it looks like a Python pickle, which could run anything and is never loaded")
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
            whole = all(type(number) is int and number >= 0 for number in [*shape, begin, end])
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"tensor {name!r:.80} has no readable type, shape and place") from error
        if not whole or end - begin != math.prod(shape) * item_size:
            raise refuse(f"tensor {name!r:.80} announces the shape {shape!s:.80}, which is not the room it takes")
        shapes[name] = tuple(shape)
        spans.append((begin, end))
    edges = [0, *(edge for span in sorted(spans) for edge in span), size - 8 - length]
    if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
        raise refuse("its tensors overlap, or leave gaps")
    return shapes


def _refuse_to_replace(path: Path) -> None:
    inside = {entry.name for entry in path.iterdir()} if path.is_dir() and not path.is_symlink() else None
    if inside is None or (inside and _MANIFEST not in inside) or inside - {*_FILES, _MANIFEST}:
        raise StorageError(f"{path} exists, and is not just a model folder; name another place, or move it away.")


def _tensors(arrays: Arrays) -> bytes:
    return safetensors.numpy.save({name: np.array(value, order="C") for name, value in arrays.items()})


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
        finally:
            os.close(descriptor)
