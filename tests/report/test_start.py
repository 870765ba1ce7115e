"""matplotlib starts whatever the shell says of backends and home folders."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the folders of Linux")

DRAW = """
import os, sys
from pathlib import Path
from celbo.report.start import start_matplotlib
before = dict(os.environ)
start_matplotlib(Path(sys.argv[1]))
assert dict(os.environ) == before
from celbo.report.figures import history_figure, to_png
assert to_png(history_figure({"history": []}))[:4] == bytes([137, 80, 78, 71])
assert "matplotlib.pyplot" not in sys.modules
"""
UNSET = ("MPLBACKEND", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


def draw(folder, **variables):
    """Draw in a process of its own; return its messages."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(folder)], capture_output=True, text=True, env={**environment, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.replace("Matplotlib is building the font cache; this may take a moment.\n", "")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://no.such.package", "qtagg"])
def test_the_backend_of_the_shell_does_not_matter(tmp_path, backend):
    assert draw(tmp_path, MPLBACKEND=backend) == ""


def test_its_own_folders_are_used_where_they_can_be_written_to(tmp_path):
    (tmp_path / "temporary").mkdir()
    assert draw(tmp_path, HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path / "temporary")) == ""
    assert list((tmp_path / "home" / ".cache" / "matplotlib").glob("fontlist*.json"))
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("variables", [{"HOME": "/dev/null/home"}, {"MPLCONFIGDIR": "/dev/null/settings"}])
def test_without_a_home_the_fonts_are_listed_in_the_private_folder(tmp_path, variables):
    (tmp_path / "temporary").mkdir()
    assert draw(tmp_path, TMPDIR=str(tmp_path / "temporary"), **variables) == ""
    (private,) = (tmp_path / "temporary").iterdir()
    assert private.name == f"celbo-cache-{os.getuid()}"
    assert list(private.glob("fontlist*.json"))


def test_a_matplotlib_that_is_imported_already_is_left_as_it_is(tmp_path):
    code = f"import os, matplotlib; matplotlib.use('svg')\n{DRAW}\nassert matplotlib.get_backend() == 'svg'"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
