"""Memory that a question needs beyond what the process held before, and beyond its answer (Linux).

    python benchmarks/memory.py QUESTION [GENES [DRAWS]]

400 cells of random counts, a model that was trained for one epoch, one thread. QUESTION is one of `QUESTIONS`.
"express" writes expression of 10,000 cells instead, with all threads, and prints cells per second.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse

import celbo
from celbo.ask.scoring import expression_blocks
from celbo.fit.cells import open_cells
from celbo.runs.answers import write_expression
from celbo.runs.expression import expression_frame

QUESTIONS = {
    "whatif": lambda model, cells, draws: model.counterfactual(cells[:120].copy(), {"treatment": "b"}, n_samples=draws),
    "expected": lambda model, cells, draws: model.expected_expression(cells, over=["treatment"]),
    "sample": lambda model, cells, draws: model.sample(600),
    "interpolate": lambda model, cells, draws: model.interpolate(cells[:1], cells[1:2]),
    "de": lambda model, cells, draws: model.differential_expression(cells, groupby="group"),
    "log_prob": lambda model, cells, draws: model.log_prob(cells[:120].copy()),
    "outliers": lambda model, cells, draws: model.outliers(cells[:120].copy()),
    "diagnose": lambda model, cells, draws: model.diagnose(cells),
    "express": lambda model, cells, draws: express(model, cells),
}


def express(model, cells) -> None:
    """Write the expression of all cells to a file."""
    opened = open_cells(model.fitted_, cells)
    frame = expression_frame(model.fitted_, opened, cells, np.arange(cells.n_vars), {})
    with tempfile.TemporaryDirectory() as folder:
        write_expression(frame, expression_blocks(model.fitted_, opened), Path(folder) / "out.h5ad")


def memory(key: str) -> float:
    """Read a line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def random_cells(n_cells: int, n_genes: int) -> anndata.AnnData:
    """Make cells of two treatments and two donors; cells of one donor were never seen with treatment b."""
    rng = np.random.default_rng(0)
    counts = sparse.random(n_cells, n_genes, density=0.05, format="csr", dtype=np.float32, rng=rng)
    counts.data[:] = 1 + rng.integers(5, size=counts.nnz)
    cells = anndata.AnnData(counts)
    number = np.arange(n_cells)
    cells.obs["donor"] = np.where(number % 8 < 6, "one", "other")
    cells.obs["treatment"] = np.where((number % 2 > 0) & (number % 8 < 6), "b", "a")
    cells.obs["group"] = np.where(number % 3 > 0, "x", "y")
    return cells


def main(question: str, n_genes: int = 20_000, n_draws: int = 50) -> None:
    """Ask, and print memory and time."""
    warnings.simplefilter("ignore")
    cells = random_cells(10_000 if question == "express" else 400, n_genes)
    train = celbo.TrainConfig(max_epochs=1, threads=None if question == "express" else 1)
    model = celbo.ExpressionVAE(conditions=["treatment", "donor"], train=train).fit(cells[:400].copy())
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS"), time.perf_counter()
    answer = QUESTIONS[question](model, cells, n_draws)
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - before
    kept = (answer.nbytes if isinstance(answer, np.ndarray) else 3 * 120 * n_genes * 4 * (question == "whatif")) / 2**20
    print(f"{question}, {n_genes:,} genes: {peak - kept:,.0f} MB beyond the answer ({kept:,.0f} MB), {seconds:.1f} s")
    if question == "express":
        print(f"{cells.n_obs / seconds:,.0f} cells per second")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
