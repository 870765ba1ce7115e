"""Print how long everything after training takes for many cells: reference, diagnosis, run folder, report.

python benchmarks/after_training.py [--cells 60000] [--genes 2000]
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import celbo
from celbo.fit import fitted
from celbo.runs.reporting import write_report
from celbo.runs.run_folder import write_run


def main() -> None:
    """Fit for two epochs, and time what comes after them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--genes", type=int, default=2000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cells = celbo.simulate_cells(options.cells, options.genes, n_types=10, n_batches=3, seed=0)
    model = celbo.ExpressionVAE(nuisance=["batch"], train=celbo.TrainConfig(max_epochs=2))
    prepared = model.prepare(cells, fingerprint=True)
    train, ended = fitted.epochs, []

    def timed(*arguments, **chosen):
        yield from train(*arguments, **chosen)
        ended.append(time.perf_counter())

    fitted.epochs = timed
    model.fit(prepared)
    after_fit = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), model, prepared, seconds=1.0, source="simulated cells")
        write_report(Path(folder))
    now = time.perf_counter()
    print(f"{options.cells:,} cells x {options.genes:,} genes: {now - ended[0]:.1f} s after training, of which")
    print(
        f"  {after_fit - ended[0]:.1f} s reference and readings, {now - after_fit:.1f} s run folder, diagnosis, report"
    )


if __name__ == "__main__":
    main()
