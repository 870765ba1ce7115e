"""What log p(x) costs: 10,000 cells of 2,000 genes, 500 draws of z for each, the posterior as the encoder gives it.

    python benchmarks/scoring.py

Simulated cells. Time of `celbo.ExpressionVAE.log_prob`, and the largest resident size meanwhile beyond what the process
held before, its counts and its model included (Linux).
"""

import argparse
import time
import warnings
from pathlib import Path

import celbo

MEBIBYTE = 2**20


def resident(largest: bool = False) -> int:
    """Bytes that this process holds, or the most it has held."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if largest else "VmRSS"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = celbo.simulate_cells(options.cells, 2000, seed=0)
    train = celbo.TrainConfig(max_epochs=3, threads=options.threads)
    model = celbo.ExpressionVAE(train=train).fit(adata)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before, started = resident(), time.perf_counter()
    found = model.log_prob(adata, n_samples=500)
    took, beyond = time.perf_counter() - started, (resident(largest=True) - before) / MEBIBYTE
    print(f"{len(found):,} cells: {took:.0f} s on {options.threads} threads, {beyond:.0f} MiB beyond what was there")


if __name__ == "__main__":
    main()
