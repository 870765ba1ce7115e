"""Fit scvi-tools to a prepared data set and evaluate it; runs in scvi-tools' own environment, for quality.py."""

import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import torch
from evaluate import evaluate

warnings.simplefilter("ignore")


def main(prepared: Path, output: Path, seed: int) -> None:
    import scvi

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata = anndata.read_h5ad(prepared)
    batch_key = "given" if "given" in adata.obs else None
    train = adata[~adata.obs["unseen"].to_numpy()].copy()
    scvi.model.SCVI.setup_anndata(train, batch_key=batch_key)
    model = scvi.model.SCVI(train, n_hidden=128, n_layers=1, n_latent=10, gene_likelihood="nb")
    started, cpu = time.perf_counter(), time.process_time()
    model.train(accelerator="cpu", enable_progress_bar=False, logger=False)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    module = model.module.eval()

    x = torch.from_numpy(adata.X.toarray())
    codes = np.zeros(adata.n_obs)
    if batch_key:
        levels = list(model.adata_manager.get_state_registry("batch").categorical_mapping)
        codes = adata.obs["given"].astype(str).map({str(level): code for code, level in enumerate(levels)}).to_numpy()
    batch = torch.from_numpy(codes.astype(np.int64))[:, None]
    with torch.inference_mode():
        q = module.inference(x, batch)["qz"]
        mu_z, sd_z = q.loc.clone(), q.scale.clone()
    rows = np.flatnonzero(adata.obs["evaluated"].to_numpy())
    x_rows, batch_rows = x[rows], batch[rows]
    log_library = x_rows.sum(1, keepdim=True).log()

    def decode(z, which):
        px = module.generative(z, log_library[which], batch_rows[which])["px"]
        return px.mu.log(), px.theta.log()

    found = evaluate(x_rows, mu_z[rows].clone(), sd_z[rows].clone(), decode)
    versions = f"scvi-tools {scvi.__version__}, torch {torch.__version__}"
    np.savez(output, mu_z=mu_z.numpy(), seconds=seconds, cpu=cpu, versions=versions, **found._asdict())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
