"""Fit alone, then at the same time in Python threads or in processes: say whether the weights have the same bytes."""

import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

import celbo

SEEDS = (0, 1)


def weights(seed):
    """All weights of a model that is fitted from this seed."""
    warnings.simplefilter("ignore")
    cells = celbo.simulate_cells(n_cells=300, n_genes=30, n_types=2, seed=5)
    train = celbo.TrainConfig(max_epochs=3, seed=seed)
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(16,), train=train).fit(cells, progress=False)
    return b"".join(value.numpy().tobytes() for value in model.vae_.state_dict().values())


def main():
    torch.set_num_threads(2)
    alone = [weights(seed) for seed in SEEDS]
    assert alone[0] != alone[1]
    for kind in sys.argv[1:]:
        if kind == "threads":
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(weights, SEEDS * 3))
        else:
            start = {"initializer": torch.set_num_threads, "initargs": (2,)} if kind == "spawn" else {}
            with ProcessPoolExecutor(2, multiprocessing.get_context(kind), **start) as pool:
                together = list(pool.map(weights, SEEDS))
        same = together == alone * (len(together) // 2)
        print(kind, "same weights" if same else "other weights", torch.get_num_threads(), flush=True)


if __name__ == "__main__":
    main()
