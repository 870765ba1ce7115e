"""Fit scvi-tools' SCANVI to partly labelled cells and tell the probabilities of all; runs in its own environment."""

import sys
import warnings

import anndata

warnings.simplefilter("ignore")


def main(learn: str, output: str, nuisance: str, seed: int) -> None:
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    adata = anndata.read_h5ad(learn)
    scvi.model.SCVI.setup_anndata(adata, batch_key=nuisance)
    plain = scvi.model.SCVI(adata, n_latent=10, gene_likelihood="nb")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    plain.train(max_epochs=100, **quiet)
    model = scvi.model.SCANVI.from_scvi_model(plain, unlabeled_category="unknown", labels_key="known")
    model.train(max_epochs=20, **quiet)
    model.predict(soft=True).to_csv(output)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
