"""Record which genes scanpy chooses, for tests/test_variable_genes.py; how to run it: README.md, beside it."""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

SETS = [
    ("simulated", 100, None),
    ("simulated", 100, "batch"),
    ("pbmc3k", 2000, None),
    ("kang_ifnb", 2000, "condition"),
    ("luad_laughney", 2000, "batch"),
    ("cellmix_tech", 2000, "batch"),
    ("pbmc_3tech", 500, "batch"),
]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def how_ties_fall():
    """Tells processors apart on which numpy's default sort, which scanpy uses, orders equal numbers differently."""
    return sha256(np.argsort(np.random.default_rng(3).integers(0, 5, 5000).astype(float)).tobytes())


def chosen(cells, n_top_genes, batch, span):
    import scanpy

    options = {"n_top_genes": n_top_genes, "flavor": "seurat_v3", "batch_key": batch, "span": span}
    table = scanpy.pp.highly_variable_genes(cells, **options, inplace=False)
    positions = np.flatnonzero(table["highly_variable"].to_numpy())
    names = sorted(cells.var_names[positions])
    return positions.tolist(), {"sha256": sha256("\n".join(names).encode()), "first": names[:20]}


def record(folder, simulated):
    import anndata
    import scanpy

    default, stable = np.argsort, partial(np.argsort, kind="stable")
    recorded = {"tool": "scanpy", "version": scanpy.__version__, "numpy": np.__version__, "ties": how_ties_fall()}
    sets = []
    for name, n_top_genes, batch in SETS:
        cells = anndata.read_h5ad(simulated if name == "simulated" else Path(folder) / f"{name}.h5ad")
        entry = {"name": name, "n_top_genes": n_top_genes, "batch": batch, "span": 0.3}
        try:
            chosen(cells, n_top_genes, batch, 0.3)
        except ValueError as error:
            entry |= {"span": 0.5, "at span 0.3": str(error)}
        if name == "simulated":
            entry["counts"] = sha256(cells.X.toarray().astype(np.int64).tobytes())
        for sort, argsort in (("default", default), ("stable", stable)):
            np.argsort = argsort
            positions, names = chosen(cells, n_top_genes, batch, entry["span"])
            entry[sort] = {"positions": positions} if name in ("simulated", "pbmc_3tech") else names
        np.argsort = default
        sets.append(entry)
    return recorded | {"sets": sets}


if __name__ == "__main__":
    json.dump(record(*sys.argv[1:]), sys.stdout, indent=1)
