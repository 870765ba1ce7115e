"""The picture of docs/collapse.md: latent spaces before and after `celbo.cure`, coloured by what is known of the cells.

python benchmarks/collapse_picture.py FOLDER docs/images/collapse.png
"""

import argparse
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from collapse import SETUPS, make

import celbo
from celbo.report.latent import layout

SHOWN = ("fixed sigma, pbmc3k", "deep, pbmc3k", "deep, paul15", "labels, simulated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(3.1 * len(SHOWN), 6.2), layout="constrained")
    for column, name in zip(axes.T, SHOWN, strict=True):
        setup = SETUPS[name]
        adata = setup.cells(options.folder)
        model = make(setup.options, 0).fit(adata)
        cured, _ = celbo.cure(model, adata)
        groups = np.unique(adata.obs[setup.label].astype(str), return_inverse=True)[1]
        for axis, each in zip(column, (model, cured), strict=True):
            found = each.diagnose(adata)
            plane = layout(each.embed(adata), seed=0)
            axis.scatter(*plane.xy.T, c=groups[plane.rows], cmap="tab20", s=3, linewidths=0)
            active = f"{found.active_units} of {each.latent_dim} dimensions"
            nats = max(0.0, found.finding("latent ablation").value[0]["nats"])
            remedies = " + ".join(remedy for remedy in each.remedies) or "as it is"
            axis.set_title(f"{name}\n{remedies}\n{active}, {nats:.0f} nats lost without z", fontsize=8)
            axis.set(xticks=[], yticks=[])
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
