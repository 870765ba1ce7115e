"""Training speed of celbo on simulated counts: cells a second in steady state.

Time of ``--epochs`` + 2 epochs less time of 2, in one process, so that start-up does not count; beside it the speed
that the matrix products of a training step would allow by themselves.
"""

import argparse
import json
import time

import numpy as np
import torch

import celbo


def seconds_of(model: celbo.ExpressionVAE, adata) -> float:
    started = time.perf_counter()
    model.fit(adata)
    return time.perf_counter() - started


def cells_per_second(adata, batch_size: int, likelihood: str, epochs: int) -> float:
    def model(n: int) -> celbo.ExpressionVAE:
        config = celbo.TrainConfig(max_epochs=n, batch_size=batch_size, patience=n, validation_fraction=0.0)
        return celbo.ExpressionVAE(likelihood=likelihood, train=config)

    return adata.n_obs * epochs / (seconds_of(model(epochs + 2), adata) - seconds_of(model(2), adata))


def floor(n_genes: int, batch_size: int, hidden: int = 128, repeats: int = 30) -> float:
    """Cells a second if a step were only the products of its two wide layers: forward, and gradients of weights."""
    x, h = torch.rand(batch_size, n_genes), torch.rand(batch_size, hidden)
    w, v = torch.rand(n_genes, hidden), torch.rand(hidden, n_genes)
    started = time.perf_counter()
    for _ in range(repeats):
        x @ w, x.T @ h, h @ v, h.T @ x, x @ v.T
    return batch_size * repeats / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    adata = celbo.simulate_cells(options.cells, options.genes, seed=0)
    for likelihood in ("nb", "zinb"):
        for batch_size in (128, 1024):
            speeds = [cells_per_second(adata, batch_size, likelihood, options.epochs) for _ in range(options.repeats)]
            row = {
                "likelihood": likelihood,
                "batch_size": batch_size,
                "cells_per_second": round(float(np.median(speeds))),
                "products_only": round(floor(options.genes, batch_size)),
                "threads": torch.get_num_threads(),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
