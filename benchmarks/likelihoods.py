"""Does ``likelihood="auto"`` name the likelihood that the counts were drawn from? Simulated truth, five seeds of each.

    python benchmarks/likelihoods.py

3,000 cells of six types in two batches, 100 genes, 300 counts a cell: Poisson; negative binomial, theta 2 in the median
gene; the same with a gate of .35 (zinb); and which genes of the Poisson cells were detected (bernoulli).
"""

import argparse
import time
import warnings

import anndata

import celbo
from celbo.trials.comparing import SIMPLEST_FIRST


def simulated(likelihood: str, seed: int) -> anndata.AnnData:
    drawn_from = "poisson" if likelihood == "bernoulli" else likelihood
    gate = 0.35 if likelihood == "zinb" else None
    adata = celbo.simulate_cells(
        3000, 100, likelihood=drawn_from, gate=gate, median_theta=2, median_library=300, seed=seed
    )
    if likelihood == "bernoulli":
        adata.X = (adata.X > 0).astype("float32")
    return adata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| drawn from | seed | chosen | sure | seconds |\n|---|---|---|---|---|", flush=True)
    right = dict.fromkeys(SIMPLEST_FIRST, 0)
    for seed in options.seeds:
        for likelihood in SIMPLEST_FIRST:
            started = time.perf_counter()
            model = celbo.ExpressionVAE(latent_dim=5, train=celbo.TrainConfig(seed=seed, threads=options.threads))
            model, compared = celbo.choose(model, simulated(likelihood, seed), likelihood=True)
            right[likelihood] += model.likelihood == likelihood
            took = time.perf_counter() - started
            print(f"| {likelihood} | {seed} | {model.likelihood} | {compared[0].sure:.2f} | {took:.0f} |", flush=True)
    print("right: " + ", ".join(f"{name} {n} of {len(options.seeds)}" for name, n in right.items()))


if __name__ == "__main__":
    main()
