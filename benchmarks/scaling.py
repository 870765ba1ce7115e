"""What a cell costs as cells grow in number: training time in steady state, and memory; simulated counts in memory.

    python benchmarks/scaling.py

Ten thousand simulated cells of 2,000 genes, repeated up to a million. Time: in one process, from each number of cells
in turn 10,000 cells drawn at random are trained on, minibatches of 128; the median over turns. Memory: in a process of
its own, the largest resident size during one epoch of `fit` on all cells, checks included, beyond the counts' own
bytes (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
import torch

import celbo
from celbo.data.sources import make_source
from celbo.fit import train
from celbo.minibatch import gene_moments

N_TRAINED = 10_000
MEBIBYTE = 2**20


def cells(n_cells: int) -> anndata.AnnData:
    """Simulated counts, repeated; made without a second copy of them."""
    once = celbo.simulate_cells(N_TRAINED, 2000, seed=0).X.astype(np.float32)
    times = n_cells // N_TRAINED
    starts = np.concatenate([[0], *(once.indptr[1:].astype(np.int64) + turn * once.nnz for turn in range(times))])
    x = sp.csr_matrix((np.tile(once.data, times), np.tile(once.indices, times), starts), shape=(n_cells, 2000))
    return anndata.AnnData(x)


def training_times(numbers: list[int], turns: int, threads: int) -> dict[int, float]:
    """Microseconds a cell, median over turns."""
    config = celbo.TrainConfig(max_epochs=turns + 1, validation_fraction=0.0, threads=threads)
    whole = cells(max(numbers))
    runs = {}
    for n_cells in numbers:
        adata = whole[:n_cells].copy() if n_cells < whole.n_obs else whole
        check = celbo.ExpressionVAE().check(adata)
        source = make_source(check, adata, check.schema)
        rows = np.sort(np.random.default_rng(0).choice(n_cells, N_TRAINED, replace=False))
        torch.manual_seed(0)
        likelihood = celbo.LIKELIHOODS["nb"]
        vae = celbo.VAE(adata.n_vars, 10, [128], likelihood=likelihood, norm="layer")
        vae.head.initialise(vae.fc_out, gene_moments(source, rows))
        runs[n_cells] = train.epochs(vae, source, train.Split(rows, rows[:0]), config)
    times = {n_cells: [] for n_cells in numbers}
    with threads(threads):
        for turn in range(turns + 1):
            for n_cells, run in runs.items():
                seconds = next(run).seconds
                if turn:  # the first warms up
                    times[n_cells].append(seconds / N_TRAINED * 1e6)
    return {n_cells: float(np.median(found)) for n_cells, found in times.items()}


def memory(n_cells: int) -> dict[str, float]:
    """Largest resident size in this process while it fits one epoch, beyond the counts, in MiB."""
    adata = cells(n_cells)
    counts = sum(part.nbytes for part in (adata.X.data, adata.X.indices, adata.X.indptr))
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    started = time.perf_counter()
    celbo.ExpressionVAE(train=celbo.TrainConfig(max_epochs=1, batch_size=1024)).fit(adata)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {
        "counts_mib": round(counts / MEBIBYTE),
        "beyond_mib": round((peak - counts) / MEBIBYTE),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures for picture.py")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    times, rows = training_times(options.cells, options.turns, options.threads), []
    for n_cells, microseconds in times.items():
        command = [sys.executable, str(Path(__file__).resolve()), "--memory", str(n_cells)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        of_the_fewest = microseconds / times[options.cells[0]]
        rows.append({"cells": n_cells, "us_a_cell": microseconds, "of_the_fewest": of_the_fewest, **found})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
