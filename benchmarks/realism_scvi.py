"""Fit scvi-tools and draw cells from its prior; runs in its own environment, for realism.py."""

import sys
import warnings

import anndata
import numpy as np
import torch
from scipy import sparse

warnings.simplefilter("ignore")


def main(learn: str, output: str, n: int, batch_key: str, seed: int) -> None:
    import scvi

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata = anndata.read_h5ad(learn)
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key or None)
    model = scvi.model.SCVI(adata, n_latent=10, gene_likelihood="nb")
    model.train(accelerator="cpu", enable_progress_bar=False, logger=False)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(np.asarray(adata.X.todense(), np.float32))
    codes = np.zeros(len(x), np.int64)
    if batch_key:
        levels = [str(level) for level in model.adata_manager.get_state_registry("batch").categorical_mapping]
        codes = adata.obs[batch_key].astype(str).map({level: code for code, level in enumerate(levels)}).to_numpy()
    rows = rng.permutation(len(x))[:n]  # batch and library size of a cell of fit
    batch, log_library = torch.from_numpy(codes)[:, None], x.sum(1, keepdim=True).log()
    module = model.module.eval()
    torch.manual_seed(seed)
    with torch.inference_mode():
        posterior = module.inference(x[rows], batch[rows])["qz"].sample()
        for name, z in (("prior", torch.randn_like(posterior)), ("aggregated", posterior)):
            px = module.generative(z, log_library[rows], batch[rows])["px"]
            drawn = anndata.AnnData(sparse.csr_matrix(px.sample().numpy()), var=adata.var[[]])
            drawn.write_h5ad(output + f"/{name}.h5ad")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
