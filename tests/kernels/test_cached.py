"""Compiled kernels are kept on disk where that is possible, and computed without it where it is not."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from numba import njit
from numba.core.caching import NullCache

from celbo.kernels import cached as module
from celbo.kernels.cached import cached

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs limits and folders of POSIX")

CALL = """
import sys, warnings
import numpy as np
from celbo.kernels import compiled
out = np.empty((2, 3), np.float32)
starts, columns = np.array([0, 2, 3], np.int64), np.array([0, 2, 1], np.int32)
compiled.times(starts, columns, np.array([1, 3, 2], np.float32), np.ones((5, 3), np.float32), out)
print(out.ravel().tolist())
"""
RESULT = f"{[4.0, 4.0, 4.0, 2.0, 2.0, 2.0]}\n"


def process(folder, code=CALL, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def call(*arguments, **variables):
    """What a new process prints, and its messages."""
    with process(*arguments, **variables) as running:
        out, err = running.communicate()
    assert (running.returncode, out) == (0, RESULT), err
    return err


def test_a_second_process_uses_the_code_of_the_first(tmp_path):
    assert call(tmp_path) == ""
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}
    assert sorted(path.suffix for path in kept) == [".nbc", ".nbi"]
    assert call(tmp_path) == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")} == kept


@pytest.mark.long
def test_processors_of_two_types_share_no_file(tmp_path):
    assert call(tmp_path) == ""
    one = set(tmp_path.rglob("*.nb*"))
    assert call(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == ""
    assert len(set(tmp_path.rglob("*.nb*")) - one) == 2


@pytest.mark.long
@pytest.mark.parametrize("damage", ["cut off", "empty", "no pickle", "code cut off"])
def test_a_damaged_cache_is_written_again(tmp_path, damage):
    call(tmp_path)
    (index,), (code,) = tmp_path.rglob("*.nbi"), tmp_path.rglob("*.nbc")
    whole = len(code.read_bytes())
    if damage == "code cut off":
        code.write_bytes(code.read_bytes()[:100])
    else:
        raw = index.read_bytes()
        index.write_bytes({"cut off": raw[:-5], "empty": b"", "no pickle": b"\x80\x04nonsense"}[damage])
    assert call(tmp_path) == ""
    assert abs(len(code.read_bytes()) - whole) < 1000
    assert call(tmp_path) == ""


FULL = f"""
import resource, signal
from celbo.kernels import compiled
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
{CALL}
"""


def test_a_full_disk_costs_one_warning(tmp_path):
    err = call(tmp_path, FULL)
    assert err.count("cannot keep compiled kernels: File too large") == 1
    assert "set NUMBA_CACHE_DIR to a folder" in err
    assert "Traceback" not in err


def test_a_cache_folder_that_cannot_be_made_is_passed_over():
    assert call("/dev/null/cache") == ""


@pytest.fixture
def no_folder(monkeypatch):
    module._warn.cache_clear()
    monkeypatch.setattr(module, "_cache_in", lambda folder, function: None)


def test_without_any_folder_functions_compute_and_one_warning_says_so(no_folder, monkeypatch):
    monkeypatch.setattr(module, "private_folder", lambda: None)
    with pytest.warns(UserWarning, match=r"no folder .* can be written to\. .*set NUMBA_CACHE_DIR to a folder") as seen:
        functions = [cached(njit(lambda x: x + 1)) for _ in range(3)]
    assert len(seen) == 1
    assert [function(np.float32(i)) for i, function in enumerate(functions)] == [1, 2, 3]
    assert all(isinstance(function._cache, NullCache) for function in functions)


def test_the_private_folder_is_asked_for_only_when_numbas_folders_fail(monkeypatch, tmp_path):
    def asked():
        raise AssertionError("the private folder is not needed here")

    monkeypatch.setattr(module, "private_folder", asked)
    monkeypatch.setattr(module._settings, "CACHE_DIR", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function = cached(njit(_plus_one))
    assert function(1) == 2
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
    assert str(tmp_path) == module._settings.CACHE_DIR


def _plus_one(x):
    return x + 1


ALSO_DRAW = f"""
{CALL}
from pathlib import Path
from celbo.report.start import start_matplotlib
start_matplotlib(Path(sys.argv[0]))
from celbo.report.figures import history_figure, to_png
assert to_png(history_figure({{"history": []}}))[:4] == bytes([137, 80, 78, 71])
"""


@pytest.mark.long
def test_thirty_processes_that_start_at_once_on_a_cold_cache_all_succeed(tmp_path):
    homeless = {"HOME": "/dev/null/home", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": "", "MPLCONFIGDIR": ""}
    (tmp_path / "temporary").mkdir()
    shared = {"TMPDIR": str(tmp_path / "temporary"), **homeless}
    running = [process(tmp_path / "kernels", ALSO_DRAW, **shared) for _ in range(30)]
    ends = [one.communicate() for one in running]
    assert {one.returncode for one in running} == {0}, ends
    assert {out for out, _ in ends} == {RESULT}
    messages = {err for _, err in ends} - {"", "Matplotlib is building the font cache; this may take a moment.\n"}
    assert not messages
    assert sorted(path.suffix for path in (tmp_path / "kernels").rglob("*.nb*")) == [".nbc", ".nbi"]
    assert list((tmp_path / "temporary").rglob("fontlist*.json"))
