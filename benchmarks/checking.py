"""How long it takes to look at every value, and in how much memory: 100,000 cells x 2,000 genes, in memory and on disk.

Each case runs in a process of its own; ``peak_mb`` is its largest resident memory, imports and data included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from celbo.data.checks import check_adata
from celbo.data.read import read_adata

CASES = ("csr", "csc", "dense", "csr on disk", "dense on disk")


def make(n_cells: int, n_genes: int, density: float) -> anndata.AnnData:
    x = sp.random(n_cells, n_genes, density=density, format="csr", dtype=np.float32, random_state=0)
    x.data = np.ceil(5 * x.data)
    return anndata.AnnData(x)


def run(case: str, path: Path) -> dict:
    """Check one case; this process does nothing else."""
    if "on disk" in case:
        adata = read_adata(path / f"{case.split()[0]}.h5ad", on_disk=True)
    else:
        adata = read_adata(path / "csr.h5ad")
        adata.X = {"csr": adata.X.tocsr, "csc": adata.X.tocsc, "dense": adata.X.toarray}[case]()
    started = time.perf_counter()
    check = check_adata(adata)
    seconds = time.perf_counter() - started
    assert not check.errors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"case": case, "n_values": check.n_values, "seconds": round(seconds, 2), "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        adata = make(options.cells, options.genes, options.density)
        adata.write_h5ad(Path(folder) / "csr.h5ad")
        adata.X = adata.X.toarray()
        adata.write_h5ad(Path(folder) / "dense.h5ad")
        del adata
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", folder]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
