"""Known cell types told by neighbours in the latent space, beside principal components of log-normalised counts.

For each data set: accuracy of 15 nearest neighbours, five folds, mean over seeds of fit and folds.
"""

import argparse
from pathlib import Path

import anndata
import numpy as np
from sklearn.decomposition import PCA

import celbo
from celbo.app.demo import knn_accuracy

# file: column of labels, conditions given to the model
SETS = {
    "pbmc3k": ("cell_type", []),
    "pbmc_3tech": ("cell_type", ["batch"]),
    "paul15": ("cell_type", []),
    "zeisel_1464": ("cell_type", []),
    "kang_ifnb": ("cell_type", ["condition"]),
    "yeast_bulk48": ("condition", []),
}
UNLABELLED = ("unassigned", "nan")


def components(adata: anndata.AnnData, n: int) -> np.ndarray:
    counts = adata.X.toarray()
    log_normalised = np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))
    return PCA(n, random_state=0).fit_transform(log_normalised)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print("| set | cells x genes | celbo, 10 latent | 10 PCs | 30 PCs | seconds a fit |\n|---|---|---|---|---|---|")
    for name in options.sets:
        column, conditions = SETS[name]
        adata = anndata.read_h5ad(options.folder / f"{name}.h5ad")
        labels = adata.obs[column].astype(str).to_numpy()
        known = ~np.isin(labels, UNLABELLED)

        def score(z, seed, labels=labels, known=known) -> float:
            return knn_accuracy(z[known], labels[known], seed=seed)

        latent, seconds = [], []
        for seed in range(options.seeds):
            model = celbo.ExpressionVAE(conditions=conditions, train=celbo.TrainConfig(seed=seed)).fit(adata)
            seconds.append(sum(epoch.seconds for epoch in model.history_))
            latent.append(score(model.embed(adata), seed))
        pcs = components(adata, 30)
        by_pcs = [np.mean([score(pcs[:, :n], seed) for seed in range(options.seeds)]) for n in (10, 30)]
        print(
            f"| {name} | {adata.n_obs:,} x {adata.n_vars:,} | {np.mean(latent):.3f} ± {np.std(latent):.3f} "
            f"| {by_pcs[0]:.3f} | {by_pcs[1]:.3f} | {np.mean(seconds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
