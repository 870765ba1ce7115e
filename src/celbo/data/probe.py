"""Read through an HDF5 file in a separate process, because a damaged file can crash or hang the HDF5 library.

Run as a script: ``python probe.py counts.h5ad``. It imports nothing from celbo. It exits with 0 if the file is
readable; otherwise it writes the reason to stderr.
"""

import sys
from typing import Any

__all__ = ["NO_H5PY", "walk"]

NO_H5PY = 9
"""Exit code if h5py cannot be imported."""

_SMALL = 1 << 20


def walk(path: str) -> None:
    """Read every attribute, all small datasets, and the first and last row of large ones."""
    import h5py

    def touch(_: str, item: Any) -> None:
        dict(item.attrs)
        if isinstance(item, h5py.Dataset) and item.size:
            if item.nbytes <= _SMALL or not item.shape:
                item[()]
            else:
                item[:1], item[-1:]

    with h5py.File(path, "r") as file:
        dict(file.attrs)
        file.visititems(touch)


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except ImportError:
        sys.exit(NO_H5PY)
    except Exception as error:  # noqa: BLE001 - any error of HDF5
        sys.exit(f"{error}")
