"""Folders for compiled code and settings: private where everybody can write."""

import os
import stat

import pytest

from celbo import caches
from celbo.caches import can_write, private_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs users and modes of POSIX")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The only temporary folder."""
    for name in ("TMP", "TEMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(caches, "_SHARED", ())
    return tmp_path


def test_the_private_folder_is_made_for_this_user_alone_and_found_again(temporary):
    folder = private_folder()
    assert folder == temporary / f"celbo-cache-{os.getuid()}"
    status = folder.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.getuid())
    assert private_folder() == folder
    assert not list(folder.iterdir())


def test_its_mode_does_not_depend_on_the_mask_of_this_process(temporary):
    before = os.umask(0)
    try:
        assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
    finally:
        os.umask(before)


def open_to_all(folder):
    folder.mkdir()
    folder.chmod(0o777)


def readable_by_the_group(folder):
    folder.mkdir()
    folder.chmod(0o750)


def of_somebody_else(folder):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to another user")
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)


def a_link(folder):
    target = folder.with_name("elsewhere")
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


def a_file(folder):
    folder.touch(0o700)


@pytest.mark.parametrize("made", [open_to_all, readable_by_the_group, of_somebody_else, a_link, a_file])
def test_a_folder_of_this_name_that_others_may_have_filled_is_not_used(temporary, monkeypatch, tmp_path_factory, made):
    made(temporary / f"celbo-cache-{os.getuid()}")
    assert private_folder() is None
    monkeypatch.setattr(caches, "_SHARED", (str(tmp_path_factory.mktemp("next")),))
    assert private_folder().parent.name.startswith("next")


def test_without_a_temporary_folder_there_is_none(temporary, monkeypatch):
    for parent in ("/dev/null", str(temporary / "missing")):
        monkeypatch.setenv("TMPDIR", parent)
        assert private_folder() is None
    assert not list(temporary.iterdir())


def test_a_folder_is_made_to_see_whether_it_can_be_written_to(tmp_path):
    assert can_write(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    assert not can_write(tmp_path / "file")
    assert not can_write(tmp_path / "file" / "below")
