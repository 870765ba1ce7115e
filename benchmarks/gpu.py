"""Training speed on a GPU: kernels in Triton, the reference in plain torch, and scvi-tools.

    python benchmarks/gpu.py --scvi-python /path/to/env/bin/python

Simulated counts as in throughput.py: cells a second in steady state, each measurement in its own warm process, the
median over repeats in turns. Beside each stands how busy nvidia-smi found the GPU meanwhile, in percent, start-up
included.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import throughput

BATCH_SIZES = (128, 1024, 4096)


def fit_celbo(tier: str):
    def fit(*arguments) -> float:
        from celbo.kernels import dispatch as kernels

        kernels.use(tier)
        return throughput.fit_celbo(*arguments)  # device="auto" takes the GPU

    return fit


def fit_scvi(*arguments) -> float:
    return throughput.fit_scvi(*arguments, accelerator="gpu")


FIT = {"gpu": fit_celbo("gpu"), "reference": fit_celbo("reference"), "scvi": fit_scvi}


def has_gpu(python: str) -> bool:
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def in_its_own_process(python: str, *arguments: object) -> tuple[float, float]:
    """Cells a second, and the mean utilisation of the GPU."""
    watch = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "--id=0"]
    watcher = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) if shutil.which(watch[0]) else None
    try:
        command = [python, __file__, "--measure", *map(str, arguments)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        if watcher:
            watcher.terminate()
    busy = [float(line) for line in watcher.communicate()[0].split() if line.isdigit()] if watcher else []
    return float(found.stdout.split()[-1]), float(np.mean(busy)) if busy else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=throughput.EPOCHS, help="in steady state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scvi-python", help="python of the environment with scvi-tools")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        tool, data, likelihood, *numbers = options.measure
        throughput.FIT[tool] = FIT[tool]
        batch_size, epochs = map(int, numbers)
        print(throughput.measure(tool, Path(data), likelihood, batch_size, 1, epochs))
        return
    if not has_gpu(sys.executable):
        print("torch finds no GPU on this machine: there is nothing to measure")
        return

    import celbo

    pythons = {"gpu": sys.executable, "reference": sys.executable}
    if options.scvi_python and has_gpu(options.scvi_python):
        pythons["scvi"] = options.scvi_python
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "simulated.h5ad"
        celbo.simulate_cells(options.cells, options.genes, seed=0).write_h5ad(data)
        for likelihood in ("nb", "zinb"):
            for batch_size in BATCH_SIZES:
                found = {tool: [] for tool in pythons}
                for _ in range(options.repeats):
                    for tool, python in pythons.items():
                        found[tool].append(
                            in_its_own_process(python, tool, data, likelihood, batch_size, options.epochs)
                        )
                medians = {tool: np.median(pairs, axis=0) for tool, pairs in found.items()}
                row = {"likelihood": likelihood, "batch_size": batch_size}
                row |= {tool: round(speed) for tool, (speed, _) in medians.items()}
                row["busy"] = {tool: round(busy) if busy == busy else None for tool, (_, busy) in medians.items()}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
