"""Refuse a path without data before a library that reads data is loaded."""

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
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give an .h5ad file or a .zarr folder.")
    return path
