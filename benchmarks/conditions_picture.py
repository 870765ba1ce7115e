"""The pictures of docs/batches.md and docs/counterfactual.md.

python benchmarks/conditions_picture.py FOLDER docs/images

batches.png: cells of three protocols (pbmc_3tech), without and with the protocol named as a nuisance, coloured by
protocol and by type. counterfactual.png: of two types whose treated cells were left out of the fit (kang_ifnb), the
change of each gene as predicted from the controls, against the change between real cells.
"""

import argparse
import warnings
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
from counterfactual import TASKS, logged, prepare, split

import celbo
from celbo.report.latent import layout

SHOWN = ("CD4T", "CD14+Mono")


def batches(folder: Path, output: Path) -> None:
    adata = anndata.read_h5ad(folder / "pbmc_3tech.h5ad")
    figure, axes = plt.subplots(1, 4, figsize=(12.4, 3.3), layout="constrained")
    for pair, nuisance in ((axes[:2], []), (axes[2:], ["batch"])):
        z = celbo.ExpressionVAE(nuisance=nuisance).fit(adata).embed(adata)
        plane = layout(z, seed=0)
        order = np.random.default_rng(0).permutation(len(plane.rows))  # no level lies on top of another
        for axis, column in zip(pair, ("batch", "cell_type"), strict=True):
            groups = np.unique(adata.obs[column].astype(str), return_inverse=True)[1]
            axis.scatter(*plane.xy[order].T, c=groups[plane.rows][order], cmap="tab10", s=3, linewidths=0)
            axis.set_title(f"{'with' if nuisance else 'without'} --nuisance batch, by {column}", fontsize=9)
            axis.set(xticks=[], yticks=[])
    figure.savefig(output / "batches.png", dpi=110)


def counterfactual(folder: Path, output: Path) -> None:
    task, adata = TASKS["kang_ifnb"], prepare("kang_ifnb", folder)
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(3.6 * len(SHOWN), 3.6), layout="constrained")
    for axis, left_out in zip(axes, SHOWN, strict=True):
        learn, control, treated = split(adata, task, left_out)
        model = celbo.ExpressionVAE(conditions=["condition"]).fit(learn)
        drawn = model.counterfactual(control, {"condition": task.treated})
        before = logged(control.X).mean(0)
        predicted = np.mean([logged(drawn.sample(seed=seed).X).mean(0) for seed in range(5)], axis=0) - before
        real = logged(treated.X).mean(0) - before
        ends = [real.min(), real.max()]
        axis.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
        axis.scatter(real, predicted, s=4, linewidths=0)
        for gene in np.argsort(-real)[:2]:
            axis.annotate(learn.var_names[gene], (real[gene], predicted[gene]), ha="right", va="bottom", fontsize=7)
        axis.set_title(f"{left_out}, never seen treated", fontsize=9)
        axis.set(xlabel="change of log mean, real cells", ylabel="predicted")
    figure.savefig(output / "counterfactual.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("output", type=Path, help="where the pictures are to be")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    batches(options.folder, options.output)
    counterfactual(options.folder, options.output)


if __name__ == "__main__":
    main()
