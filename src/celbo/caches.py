"""Find a folder for files that only save time, such as compiled code, where the usual folders cannot be written to."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["can_write", "private_folder"]

_SHARED = ("/tmp", "/var/tmp")
"""Temporary folders of all users."""


def can_write(folder: Path) -> bool:
    """Return whether a file can be written into a folder, which is made if it does not exist.

    Examples
    --------
    >>> can_write(Path(tempfile.gettempdir())), can_write(Path("/dev/null/celbo"))
    (True, False)
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permission bits do not say whether a file system is read-only
    except OSError:
        return False
    return True


def private_folder() -> Path | None:
    """Return a folder that only this user can read and write, in the first temporary folder that works.

    Everybody can write into a temporary folder, and compiled code is run when it is loaded. So the folder must
    belong to this user, have mode 700, and be no link. Otherwise it is not used.

    Returns
    -------
    pathlib.Path or None
        ``celbo-cache-<number of the user>`` in ``TMPDIR``, ``TEMP``, ``TMP``, ``/tmp`` or ``/var/tmp``. None if none of
        them can be used, and on Windows, where the usual folders are private.
    """
    if os.name != "posix":
        return None
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for parent in [*filter(None, named), *_SHARED]:
        folder = Path(parent).absolute() / f"celbo-cache-{os.getuid()}"
        with suppress(OSError):
            folder.mkdir(mode=0o700)
        if _is_private(folder) and can_write(folder):
            return folder
    return None


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()  # of a link, not of its target
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700
