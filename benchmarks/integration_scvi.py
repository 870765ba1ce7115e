"""Fit SCVI, SCANVI and harmony, and score every embedding by scib-metrics; runs in the other tools' own environment."""

import json
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np

warnings.simplefilter("ignore")
PARTS = {"Total": "overall", "Batch correction": "batch", "Bio conservation": "biology"}


def main(cells: str, celbo: str, output: str, seed: int) -> None:
    import harmonypy
    import scvi
    import torch
    from scib_metrics.benchmark import Benchmarker
    from sklearn.decomposition import PCA

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata = anndata.read_h5ad(cells)
    for name, z in np.load(celbo).items():
        adata.obsm[name] = z
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    scvi.model.SCVI.setup_anndata(adata, batch_key="given")
    plain = scvi.model.SCVI(adata, n_latent=10, gene_likelihood="nb")
    plain.train(**quiet)
    adata.obsm["scvi-tools, SCVI"] = plain.get_latent_representation()
    labelled = scvi.model.SCANVI.from_scvi_model(plain, unlabeled_category="unknown", labels_key="known")
    labelled.train(max_epochs=20, **quiet)
    adata.obsm["scvi-tools, SCANVI"] = labelled.get_latent_representation()
    counts = adata.X.toarray()
    logged = np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))
    adata.obsm["nothing"] = PCA(30, random_state=seed).fit_transform(logged)
    found = harmonypy.run_harmony(adata.obsm["nothing"], adata.obs, "given", random_state=seed).Z_corr
    adata.obsm["harmony"] = np.asarray(found if found.shape[0] == adata.n_obs else found.T)
    adata = adata[adata.obs["judged"].to_numpy(bool)].copy()
    for column in ("types", "given"):
        adata.obs[column] = adata.obs[column].astype(str).astype("category")
    methods = ["celbo", "scvi-tools, SCVI", "harmony", "nothing", "celbo, labels", "scvi-tools, SCANVI"]
    judge = Benchmarker(
        adata, "given", "types", methods, pre_integrated_embedding_obsm_key="nothing", n_jobs=1, progress_bar=False
    )
    judge.benchmark()
    table = judge.get_results(min_max_scale=False)
    scores = {method: {short: float(table.loc[method, part]) for part, short in PARTS.items()} for method in methods}
    Path(output).write_text(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
