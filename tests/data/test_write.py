"""A full disk is an error like any other, at whatever moment the file is full, and HDF5 does not crash."""

import subprocess
import sys

import anndata
import numpy as np
import pandas as pd

from celbo.data.write import write_cells

LITTLE_ROOM = """
import resource, signal, sys
from pathlib import Path
import anndata
from celbo.data.write import write_cells
cells = anndata.read_h5ad(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 10, 1000, 5000, 20_000, 50_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_cells(cells, Path(sys.argv[2]))
    except OSError as error:
        print(limit, error.strerror)
"""


def some_cells():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"batch": list("ab") * 100}, index=[f"c{i}" for i in range(200)])
    cells = anndata.AnnData(rng.poisson(1.0, (200, 40)).astype(np.float32), obs)
    cells.obsm["z"], cells.layers["lower"], cells.uns["kind"] = rng.normal(size=(200, 3)), cells.X - 1, "mean"
    return cells


def test_a_full_disk_is_an_error_of_the_system_and_no_crash(tmp_path):
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    script = [sys.executable, "-W", "ignore", "-c", LITTLE_ROOM, tmp_path / "cells.h5ad", tmp_path / "new.h5ad"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{limit} File too large" for limit in (0, 10, 1000, 5000, 20_000, 50_000)]
    assert done.stderr == ""


def test_what_is_written_is_read_and_is_the_same_bytes_again(tmp_path):
    cells = some_cells()
    for name in ("one.h5ad", "two.h5ad"):
        write_cells(cells, tmp_path / name)
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()
    written = anndata.read_h5ad(tmp_path / "one.h5ad")
    for found, expected in ((written.X, cells.X), (written.obsm["z"], cells.obsm["z"])):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(written.layers["lower"], cells.layers["lower"])
    pd.testing.assert_frame_equal(written.obs, cells.obs)
    assert written.uns["kind"] == "mean"
