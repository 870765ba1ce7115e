"""Fit scvi-tools, decode controls under the treatment, draw counts; runs in its own environment."""

import sys
import warnings

import anndata
import numpy as np
import torch

warnings.simplefilter("ignore")


def main(learn: str, control: str, output: str, treated: str, seed: int, n_draws: int) -> None:
    import scvi

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata, cells = anndata.read_h5ad(learn), anndata.read_h5ad(control)
    scvi.model.SCVI.setup_anndata(adata, batch_key="condition")
    model = scvi.model.SCVI(adata, n_latent=30, n_layers=2, gene_likelihood="nb")
    model.train(max_epochs=100, accelerator="cpu", enable_progress_bar=False, logger=False)
    levels = [str(level) for level in model.adata_manager.get_state_registry("batch").categorical_mapping]
    own = levels.index(str(cells.obs["condition"].iloc[0]))
    x = torch.from_numpy(np.asarray(cells.X.todense(), np.float32))
    log_library = x.sum(1, keepdim=True).log()
    module, drawn = model.module.eval(), []

    def batch(code: int) -> torch.Tensor:
        return torch.full((len(x), 1), code)

    torch.manual_seed(seed)
    with torch.inference_mode():
        q = module.inference(x, batch(own))["qz"]
        for _ in range(n_draws):
            px = module.generative(q.sample(), log_library, batch(levels.index(treated)))["px"]
            drawn.append(px.sample().numpy())
    np.save(output, np.stack(drawn).astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]))
