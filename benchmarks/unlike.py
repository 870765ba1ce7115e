"""How often fresh cells are called unlike the cells of fit, and how often cells of another kind are.

python benchmarks/unlike.py FOLDER [--seeds 3] [--sets kang_ifnb pbmc3k ...]

A tenth of the cells is kept out of fit altogether: these are fresh. The other kind has the same gene names and levels,
and profiles that fit never saw: those of the fresh cells, with the modelled genes permuted. For `simulated` sets it is
another simulation.
"""

import argparse
import warnings
from pathlib import Path

import anndata as ad
import numpy as np

import celbo
from celbo.ask.unlike import unlike, warn_of_unlike
from celbo.fit.cells import open_cells

NUISANCE = {
    "kang_ifnb": "condition",
    "pbmc_3tech": "batch",
    "gbm_panobinostat": "donor",
    "luad_laughney": "batch",
    "papalexi_thp1": "batch",
}
MOST_CELLS, N_GENES = 3000, 1000


def cells_of(folder: Path, name: str, seed: int) -> tuple[ad.AnnData, str | None]:
    """Read or simulate at most 3,000 cells; return them and the column of their nuisance."""
    if name == "simulated":
        return celbo.simulate_cells(n_cells=1500, n_genes=300, median_library=1500, seed=seed), "batch"
    cells = ad.read_h5ad(folder / f"{name}.h5ad")
    rows = np.random.default_rng(seed).permutation(cells.n_obs)[:MOST_CELLS]
    return cells[rows].copy(), NUISANCE.get(name)


def of_another_kind(folder: Path, name: str, cells: ad.AnnData, genes: tuple[str, ...], seed: int) -> ad.AnnData:
    """Return cells with the same names of genes, and other profiles."""
    if name == "simulated":
        return cells_of(folder, name, seed + 1000)[0][: cells.n_obs]
    other = cells[:, list(genes)].copy()
    other.X = other.X[:, np.random.default_rng(seed).permutation(other.n_vars)]
    return other


def main() -> None:
    """Print a line for each set and seed, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    sets = ["simulated", "kang_ifnb", "pbmc3k", "pbmc_3tech", "zeisel_1464", "paul15", "gbm_panobinostat"]
    parser.add_argument("--sets", nargs="+", default=sets)
    chosen = parser.parse_args()
    n_fresh = n_flagged = n_runs = n_warned = 0
    for name in chosen.sets:
        for seed in range(chosen.seeds):
            cells, nuisance = cells_of(chosen.folder, name, seed)
            n = cells.n_obs // 10
            fresh, fit = cells[:n].copy(), cells[n:].copy()
            options = {"nuisance": [nuisance]} if nuisance else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = celbo.ExpressionVAE(n_top_genes=N_GENES, train=celbo.TrainConfig(seed=seed), **options).fit(fit)
                of_fresh = unlike(model.fitted_, open_cells(model.fitted_, fresh))
                other = of_another_kind(chosen.folder, name, fresh, model.schema_.genes, seed)
                of_other = unlike(model.fitted_, open_cells(model.fitted_, other))
                lacking = model.schema_.genes[::8]
                few = other[:, ~other.var_names.isin(lacking)]
                of_few = unlike(model.fitted_, open_cells(model.fitted_, few))
                fresh_few = unlike(model.fitted_, open_cells(model.fitted_, fresh[:, ~fresh.var_names.isin(lacking)]))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warn_of_unlike(model.fitted_, open_cells(model.fitted_, fresh))
            warned = any("unlike the cells" in str(one.message) for one in caught)
            print(
                f"{name}, seed {seed}: fresh {of_fresh.mean():.3f} (with 1 in 8 genes missing {fresh_few.mean():.3f})"
                f"{' WARNED' if warned else ''}, other {of_other.mean():.3f} ({of_few.mean():.3f})",
                flush=True,
            )
            n_fresh, n_flagged = n_fresh + n, n_flagged + int(of_fresh.sum())
            n_runs, n_warned = n_runs + 1, n_warned + warned
    print(f"fresh cells flagged: {n_flagged:,} of {n_fresh:,} ({n_flagged / n_fresh:.2%}); warned {n_warned}/{n_runs}")


if __name__ == "__main__":
    main()
