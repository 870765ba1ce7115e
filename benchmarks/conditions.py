"""Conditions on simulated truth: is a batch removed, are types kept, does a type change as it truly would?

    python benchmarks/conditions.py

Simulated are four types x two batches x a treatment, 4,000 cells x 300 genes. Mixing: the share of a cell's 15
neighbours within its type that are of the other batch, beside the same cells without a batch effect and a model that
knows no batch. Types: k-means against the truth. Then the treated cells of one type are left out of the fit, and its
controls are decoded as treated: correlation of the log fold changes with the true ones (genes that respond, all types
alike, mean above .5); and how many of the real group means (log(1 + 10,000 x / library), mean above .1) lie in the 90 %
interval, of the type left out and of one that was seen treated, from three models.
"""

import argparse
import warnings

import anndata
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

import celbo

LEFT_OUT, SEEN = "type_0", "type_1"


def simulated(seed: int, batch_strength: float) -> anndata.AnnData:
    return celbo.simulate_cells(
        4000, 300, n_types=4, n_programmes=1, type_strength=1.5, batch_strength=batch_strength, treated_types="all",
        treatment_shared=1.0, treatment_fraction=0.2, median_library=2000, seed=seed,
    )  # fmt: skip


def fit(adata: anndata.AnnData, seed: int, batch: bool = True) -> celbo.ExpressionVAE:
    nuisance = ["batch"] if batch else []
    train = celbo.TrainConfig(seed=seed)
    return celbo.ExpressionVAE(conditions=["treatment"], nuisance=nuisance, train=train).fit(adata)


def mixing(z: np.ndarray, adata: anndata.AnnData) -> float:
    types, batch = adata.obs["cell_type"].to_numpy(), adata.obs["batch"].to_numpy()
    shares = []
    for name in np.unique(types):
        here = types == name
        near = NearestNeighbors(n_neighbors=15).fit(z[here]).kneighbors(return_distance=False)
        shares.append((batch[here][near] != batch[here][:, None]).mean())
    return float(np.mean(shares))


def covered(model: celbo.ExpressionVAE, others: list, adata: anndata.AnnData, name: str) -> tuple[float, float]:
    """Share of the group means within the interval; correlation of the log fold changes."""
    of_type, treated = (adata.obs["cell_type"] == name).to_numpy(), (adata.obs["treatment"] == "treated").to_numpy()
    real = adata[of_type & treated].X.toarray()
    truth = np.log1p(real / real.sum(1, keepdims=True) * 1e4).mean(0)
    asked = adata[of_type & ~treated].copy()
    found = model.counterfactual(asked, {"treatment": "treated"}, others=others)
    interval = found.group_mean(n_cells=len(real))
    inside = ((interval["lower"] <= truth) & (truth <= interval["upper"]))[truth > 0.1].mean()
    change = np.asarray(adata.varm["treatment_lfc"])[:, 0]
    told = (found.genes["before"] > 0.5).to_numpy() & (change != 0)
    return float(inside), float(np.corrcoef(found.genes["log2_fold_change"][told], change[told])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| seed | mixing | without effect | batch unknown | ARI | r, left out | covered, left out | covered, seen |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        adata, plain = simulated(seed, 1.0), simulated(seed, 0.0)
        z = fit(adata, 0).embed(adata)
        mixed = [mixing(z, adata), mixing(fit(plain, 0, batch=False).embed(plain), plain)]
        mixed.append(mixing(fit(adata, 0, batch=False).embed(adata), adata))
        ari = adjusted_rand_score(adata.obs["cell_type"], KMeans(4, n_init=10, random_state=0).fit_predict(z))
        hidden = (adata.obs["cell_type"] == LEFT_OUT).to_numpy() & (adata.obs["treatment"] == "treated").to_numpy()
        model, *others = (fit(adata[~hidden].copy(), member) for member in range(3))
        (out, r), (seen, _) = (covered(model, others, adata, name) for name in (LEFT_OUT, SEEN))
        print(f"| {seed} | {' | '.join(f'{value:.3f}' for value in (*mixed, ari, r, out, seen))} |", flush=True)


if __name__ == "__main__":
    main()
