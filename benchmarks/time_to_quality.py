"""Wall seconds of a default fit until it predicts unseen cells as well as scvi-tools does after its full training.

    python benchmarks/time_to_quality.py FOLDER --scvi-python /path/to/env/bin/python

Quality is the refined log p(x) of cells that neither tool has seen (``evaluate.py``; 150 cells, the same for both).
What scvi-tools 1.4.2 reaches is recorded in ``recorded.json``, by its full default training (``quality.py``); its
seconds are measured now: those of a short run, in turns with celbo's fit, times the epochs of the full one, with the
better of one and two threads. celbo's clock runs through a whole default fit, checks and start included; its weights
after each epoch are evaluated afterwards, by bisection for the first that reaches scvi-tools' figure.
"""

import argparse
import bisect
import copy
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import anndata
import numpy as np
import torch
from evaluate import evaluate
from quality import prepare
from throughput import in_its_own_process

import celbo
from celbo.data.sources import make_source
from celbo.fit import train

SETS = ("pbmc3k", "kang_ifnb", "simulated_20k")
RECORDED = Path(__file__).with_name("recorded.json")
N_EVALUATED = 150
SHORT = 4
"""Epochs of the short run."""


def refined_log_p(vae: celbo.VAE, cells: anndata.AnnData, source) -> np.ndarray:
    """Refined log p(x) of these cells, by the evaluator that all tools share."""
    minibatch = source.take(np.arange(cells.n_obs))
    context = minibatch.context if vae.context_dim else None
    vae.eval()
    vae.requires_grad_(False)
    with torch.no_grad():
        mu_z, logvar_z = vae.encode(minibatch.x, context)

    def decode(z, which):
        p = vae.likelihood(z, context=None if context is None else context[which], library=minibatch.library[which])
        return p.log_mu, p.log_theta

    found = evaluate(minibatch.x.to_dense(), mu_z, torch.exp(0.5 * logvar_z), decode)
    vae.requires_grad_(True)
    return found.log_p


def time_celbo(prepared: Path, seed: int, wanted: np.ndarray) -> dict:
    """Fit with the defaults; the first epoch after which the mean over cells is what is wanted."""
    adata = anndata.read_h5ad(prepared)
    seen = adata[~adata.obs["unseen"].to_numpy()].copy()
    cells = adata[np.flatnonzero(adata.obs["evaluated"].to_numpy())[:N_EVALUATED]].copy()
    conditions = ["given"] if "given" in adata.obs else []
    model = celbo.ExpressionVAE(conditions=conditions, train=celbo.TrainConfig(seed=seed))
    source = make_source(model.check(cells), cells, model.check(seen).schema)
    snapshots, copying = [], 0.0

    def watched(vae: celbo.VAE, *arguments, **options) -> Iterator[train.Epoch]:
        nonlocal copying
        for record in train.epochs(vae, *arguments, **options):
            paused = time.perf_counter()
            snapshots.append((paused - started - copying, copy.deepcopy(vae)))
            copying += time.perf_counter() - paused
            yield record

    started = time.perf_counter()
    with mock.patch("celbo.estimator.epochs", watched):
        model.fit(seen)
    whole = time.perf_counter() - started - copying

    def gain(vae: celbo.VAE) -> float:
        return float((refined_log_p(vae, cells, source) - wanted).mean())

    reached = bisect.bisect_left(snapshots, 0, key=lambda snapshot: gain(snapshot[1]))
    return {
        "epoch": reached + 1,
        "seconds": snapshots[reached][0] if reached < len(snapshots) else math.inf,
        "epochs": len(snapshots),
        "whole": whole,
        "end": gain(model.vae_),
        "trained": len(model.split_.train),
    }


def speed_of_scvi(python: str, prepared: Path, work: Path) -> float:
    """Cells a second by a short run: the better of one and two threads."""
    adata = anndata.read_h5ad(prepared)
    seen = adata[~adata.obs["unseen"].to_numpy()].copy()
    data = work / "scvi-short.h5ad"
    seen.write_h5ad(data)
    return max(in_its_own_process(python, "scvi", data, "nb", 128, threads, SHORT) for threads in (1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of the environment with scvi-tools; else its recorded seconds")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="where prepared cells are kept")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write the figures for picture.py")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    recorded = json.loads(RECORDED.read_text())
    print(f"scvi-tools: {recorded['versions']}; {recorded['machine']}")
    print("| set | seed | epoch | celbo s | scvi-tools s | ratio | whole fit s | epochs | log p(x) at end |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.sets:
        for seed in options.seeds:
            prepared = prepare(name, seed, options.folder, options.work)
            known = recorded["sets"][name][str(seed)]
            found = time_celbo(prepared, seed, np.array(known["log_p"]))
            speed = known["cells_a_second"]
            if options.scvi_python:
                speed = speed_of_scvi(options.scvi_python, prepared, options.work)
            theirs = known["epochs"] * found["trained"] / speed
            rows.append({"set": name, "seed": seed, "scvi": theirs, "scvi_speed": speed, **found})
            print(
                f"| {name} | {seed} | {found['epoch']} | {found['seconds']:.1f} | {theirs:.0f} "
                f"| {theirs / found['seconds']:.0f} | {found['whole']:.1f} | {found['epochs']} | {found['end']:+.1f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
