"""Import matplotlib so that neither the shell's backend nor a home folder that cannot be written to matters."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celbo.caches import can_write, private_folder

__all__ = ["start_matplotlib"]


def start_matplotlib(spare: Path) -> None:
    """Import the parts of matplotlib that draw a report, unless it is imported already.

    A notebook sets ``MPLBACKEND`` to its own backend. Where that backend is not installed, matplotlib refuses to be
    imported. celbo draws into files and needs no backend, so the variable is hidden meanwhile.

    matplotlib needs a folder for its settings and its list of fonts: ``MPLCONFIGDIR``, or one in ``XDG_CONFIG_HOME``
    and ``XDG_CACHE_HOME``, or in the home folder. If these cannot be written to, it gets a private temporary
    folder; without one, a folder in ``spare`` that is removed afterwards.

    Parameters
    ----------
    spare
        A folder that can be written to.
    """
    if "matplotlib" in sys.modules:
        return
    with _without_backend(), _folder_for_fonts(spare):
        import matplotlib.backends.backend_agg
        import matplotlib.font_manager
        import matplotlib.style  # noqa: F401


@contextmanager
def _without_backend() -> Iterator[None]:
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


@contextmanager
def _folder_for_fonts(spare: Path) -> Iterator[None]:
    if _has_folders():
        yield
        return
    before, private = os.environ.get("MPLCONFIGDIR"), private_folder()
    folder = Path(tempfile.mkdtemp(prefix=".celbo-fonts-", dir=spare)) if private is None else private
    os.environ["MPLCONFIGDIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MPLCONFIGDIR"]
        if before is not None:
            os.environ["MPLCONFIGDIR"] = before
        if private is None:
            shutil.rmtree(folder)


def _has_folders() -> bool:
    """Return whether `matplotlib.get_configdir` and `matplotlib.get_cachedir` will find a folder to write to."""
    named = {"XDG_CONFIG_HOME": "~/.config", "XDG_CACHE_HOME": "~/.cache"}
    try:
        if folder := os.environ.get("MPLCONFIGDIR"):
            return can_write(Path(folder))
        if not sys.platform.startswith(("linux", "freebsd")):
            return can_write(Path("~/.matplotlib").expanduser())
        folders = [Path(os.environ.get(name) or usual).expanduser() for name, usual in named.items()]
    except RuntimeError:  # this user has no home folder
        return False
    return all(can_write(folder / "matplotlib") for folder in folders)
