"""Refuse a path without data before a library that reads data is loaded."""

import os
import re
from pathlib import Path

from celbo.errors import DataError

__all__ = ["existing_path"]


def existing_path(data: str | Path) -> Path:
    """Return the path of data, with ``~`` replaced by the home folder.

    Raises
    ------
    DataError
        If nothing has this path.
    """
    path = Path(os.path.expanduser(data))  # noqa: PTH111 - Path.expanduser fails if there is no such user
    if not path.exists():
        raise DataError(_describe_missing(path))
    return path


def _describe_missing(path: Path) -> str:
    """Say why nothing can be read at a path that does not exist."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which does not exist: correct the link, or name the file."
    if re.match(r"[a-z0-9]+:/", str(path)):
        return f"{path} is an address on the network; download the file, and give its path."
    try:
        Path.cwd()
    except FileNotFoundError:
        if not path.is_absolute():
            return f"{path} cannot be found: the current folder has been removed. Change to a folder that exists (cd)."
    return f"{path} does not exist; give an .h5ad file or a .zarr folder."
