"""Name the command that makes an .h5ad file of what celbo does not read."""

import json
import os
import re
import shlex
from pathlib import Path

__all__ = ["how_to_convert", "new_name", "python_command", "quoted"]


def new_name(path: Path, ending: str = "") -> str:
    """Return a name for the .h5ad file that somebody makes of this path, in the current folder.

    No file has that name yet. It ends with ``ending``, if there is one.

    Examples
    --------
    >>> new_name(Path("data/heart.csv.gz")), new_name(Path("heart.h5ad")), new_name(Path("heart.h5ad"), "raw")
    ('heart.h5ad', 'heart_anndata.h5ad', 'heart_raw.h5ad')
    """
    stem = re.sub(r"\.(gz|bz2|xz|zip)$", "", path.name)
    stem = re.sub(r"\.(h5ad|h5mu|h5seurat|h5|hdf5|loom|csv|tsv|txt|tab|mtx|rds|rda|rdata|zarr)$", "", stem, flags=re.I)
    named = f"{stem or 'cells'}_{ending or 'anndata'}"
    first = () if ending else (f"{stem or 'cells'}.h5ad",)
    names = (*first, f"{named}.h5ad", *(f"{named}_{number}.h5ad" for number in range(2, 1000)))
    return next(name for name in names if name != path.name and not os.path.lexists(name))


def python_command(read: str, modules: str, path: Path, ending: str = "") -> str:
    r"""Return the command that reads cells with an expression of Python and writes them to an .h5ad file.

    Examples
    --------
    >>> python_command('anndata.io.read_mtx("a.mtx").T', "anndata", Path("a.mtx"))
    'python -c \'import anndata; anndata.io.read_mtx("a.mtx").T.write_h5ad("a.h5ad")\''
    """
    code = f"import {modules}; {read}.write_h5ad({quoted(new_name(path, ending))})"
    return f"python -c {shlex.quote(code)}"


def how_to_convert(path: Path, kind: str, modules: str, read: str, also: str = "", note: str = "") -> str:
    """Say what a path is, and give the command that writes an .h5ad file of it.

    Parameters
    ----------
    path, kind
        The path, and what it is.
    modules
        Modules of Python that the command imports.
    read
        Expression of Python that gives an AnnData.
    also
        A package that must be installed too.
    note
        What to know before.
    """
    needed = " and ".join(name for name in (*modules.split(", "), also) if name and name not in ("anndata", "h5py"))
    needs = f" (it needs {needed}: pip install {needed.replace(' and ', ' ')})" if needed else ""
    return (
        f"{path} is {kind}, and no AnnData.{f' {note}.' if note else ''} Make an .h5ad file of it{needs}, and give "
        f"celbo that file: {python_command(read, modules, path)}"
    )


def quoted(value: object) -> str:
    """Write a text in double quotes, as Python and R read it.

    Examples
    --------
    >>> print(quoted("my cells.h5ad"))
    "my cells.h5ad"
    """
    return json.dumps(str(value), ensure_ascii=False)
