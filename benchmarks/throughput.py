"""Training speed on simulated counts, cells a second in steady state, in turns with scvi-tools.

    python benchmarks/throughput.py --scvi-python /path/to/env/bin/python

Time of 22 epochs less time of 2, in a warm process, so that start-up does not count; the median over repeats, the
better of one and two threads for each tool. The other environment has scvi-tools 1.4.2; without one, celbo alone is
measured. Beside it stands the speed that the matrix products of a training step would allow by themselves, dense as
torch does them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

EPOCHS = 20


def fit_celbo(adata, likelihood: str, batch_size: int, threads: int, n_epochs: int) -> float:
    import celbo

    config = celbo.TrainConfig(
        max_epochs=n_epochs, batch_size=batch_size, patience=n_epochs, validation_fraction=0.0, threads=threads
    )
    model = celbo.ExpressionVAE(likelihood=likelihood, train=config)
    started = time.perf_counter()
    model.fit(adata)
    return time.perf_counter() - started


def fit_scvi(adata, likelihood: str, batch_size: int, threads: int, n_epochs: int, accelerator: str = "cpu") -> float:
    import scvi
    import torch

    torch.set_num_threads(threads)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=128, n_layers=1, n_latent=10, gene_likelihood=likelihood)
    options = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    started = time.perf_counter()
    model.train(max_epochs=n_epochs, accelerator=accelerator, train_size=1.0, batch_size=batch_size, **options)
    return time.perf_counter() - started


FIT = {"celbo": fit_celbo, "scvi": fit_scvi}


def measure(tool: str, data: Path, likelihood: str, batch_size: int, threads: int, epochs: int) -> float:
    """In this process: cells a second in steady state."""
    import anndata

    warnings.simplefilter("ignore")
    adata = anndata.read_h5ad(data)
    FIT[tool](adata, likelihood, batch_size, threads, 1)
    short = FIT[tool](adata, likelihood, batch_size, threads, 2)
    return adata.n_obs * epochs / (FIT[tool](adata, likelihood, batch_size, threads, 2 + epochs) - short)


def in_its_own_process(python: str, *arguments: object) -> float:
    command = [python, str(Path(__file__).resolve()), "--measure", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments[4])}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(found.stdout.split()[-1])


def products_only(n_genes: int, batch_size: int, threads: int, hidden: int = 128, repeats: int = 30) -> float:
    """Cells a second if a step were only the products of its two wide layers: forward, and gradients."""
    import torch

    torch.set_num_threads(threads)
    x, h = torch.rand(batch_size, n_genes), torch.rand(batch_size, hidden)
    w, v = torch.rand(n_genes, hidden), torch.rand(hidden, n_genes)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        x @ w, x.T @ h, h @ v, h.T @ x, x @ v.T
        seconds.append(time.perf_counter() - started)
    return batch_size / float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="in steady state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scvi-python", help="python of the environment with scvi-tools")
    parser.add_argument("--json", type=Path, help="where to write the figures for picture.py")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        tool, data, likelihood, *numbers = options.measure
        print(measure(tool, Path(data), likelihood, *map(int, numbers)))
        return

    import celbo

    rows = []
    pythons = {"celbo": sys.executable} | ({"scvi": options.scvi_python} if options.scvi_python else {})
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "simulated.h5ad"
        celbo.simulate_cells(options.cells, options.genes, seed=0).write_h5ad(data)
        for likelihood in ("nb", "zinb"):
            for batch_size in (1024, 128):
                speeds = {(tool, threads): [] for tool in pythons for threads in options.threads}
                for _ in range(options.repeats):  # in turns: what else the machine does falls on all alike
                    for (tool, threads), found in speeds.items():
                        arguments = (tool, data, likelihood, batch_size, threads, options.epochs)
                        found.append(in_its_own_process(pythons[tool], *arguments))
                medians = {of: float(np.median(found)) for of, found in speeds.items()}
                best = {tool: max(medians[tool, threads] for threads in options.threads) for tool in pythons}
                row = {"likelihood": likelihood, "batch_size": batch_size, **{t: round(s) for t, s in best.items()}}
                if "scvi" in best:
                    row["ratio"] = round(best["celbo"] / best["scvi"], 2)
                row["by_threads"] = {f"{tool} {threads}": round(s) for (tool, threads), s in medians.items()}
                row["products_only"] = round(products_only(options.genes, batch_size, max(options.threads)))
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
