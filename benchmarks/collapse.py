"""Collapsing set-ups, every remedy on them, and what `celbo.cure` makes of them by itself.

    python benchmarks/collapse.py FOLDER --json collapse.json      # FOLDER has pbmc3k.h5ad and paul15.h5ad
    python benchmarks/collapse.py --table collapse.json            # the tables of docs/collapse.md

For each set-up and seed: a healthy reference, the set-up as it is, the set-up with one remedy at a time, and the end of
`cure`. Figures are of held-out cells: active units, mutual information, reconstruction lost without z, refined
log p(x); and of all cells: types, or a planted state within types, told by 15 neighbours in z over five folds.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import celbo
from celbo.fit.cells import open_cells
from celbo.fit.fitted import cells_to_measure
from celbo.model.importance import log_prob
from celbo.trials.curing import is_healthy

N_GENES = 1000


class Setup(NamedTuple):
    """Cells, what is wrong with the model, and what a healthy one has instead."""

    cells: Callable[[Path], anndata.AnnData]
    options: dict[str, Any]
    """Of the model that collapses."""
    healthy: dict[str, Any]
    """Of the reference."""
    within: str | None = None
    """Types within which ``label`` is told."""
    label: str = "cell_type"


def real(name: str) -> Callable[[Path], anndata.AnnData]:
    def read(folder: Path) -> anndata.AnnData:
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        known = ~np.isin(adata.obs["cell_type"].astype(str), ("unassigned", "nan"))
        adata = adata[known].copy()
        log = log_normalised(adata)
        return adata[:, np.sort(np.argsort(-log.var(0))[:N_GENES])].copy()

    return read


def log_normalised(adata: anndata.AnnData) -> np.ndarray:
    x = np.asarray(adata.X.todense())
    return np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4)


def scaled(make: Callable[[Path], anndata.AnnData]) -> Callable[[Path], anndata.AnnData]:
    """Each gene scaled to lie between 0 and 1, as for pictures: a layer of reals."""

    def scale(folder: Path) -> anndata.AnnData:
        adata = make(folder)
        log = log_normalised(adata)
        adata.layers["scaled"] = (log - log.min(0)) / np.maximum(np.ptp(log, axis=0), 1e-9)
        return adata

    return scale


def simulated(folder: Path) -> anndata.AnnData:
    return celbo.simulate_cells(n_cells=2000, n_genes=N_GENES, n_types=6, median_library=1500, seed=1)


def with_state(folder: Path) -> anndata.AnnData:
    """Six types, and in each of them half of the cells in another state."""
    return celbo.simulate_cells(
        n_cells=2000, n_genes=N_GENES, n_programmes=0, n_batches=1, treated_types="all", treatment_shared=1.0,
        median_library=1500, seed=1,
    )  # fmt: skip


DEEP = {"hidden_dims": (256, 256, 256), "norm": "none", "train": {"warmup_fraction": 0.0}}
FIXED = {"likelihood": "gaussian", "layer": "scaled", "dispersion": "fixed"}
LEARNED = {"likelihood": "gaussian", "layer": "scaled"}
LABELS = {"conditions": ["cell_type"], "train": {"warmup_fraction": 0.0}}

SETUPS = {
    "deep, pbmc3k": Setup(real("pbmc3k"), DEEP, {}),
    "deep, paul15": Setup(real("paul15"), DEEP, {}),
    "deep, simulated": Setup(simulated, DEEP, {}),
    "fixed sigma, pbmc3k": Setup(scaled(real("pbmc3k")), FIXED, LEARNED),
    "fixed sigma, paul15": Setup(scaled(real("paul15")), FIXED, LEARNED),
    "fixed sigma, simulated": Setup(scaled(simulated), FIXED, LEARNED),
    "labels, simulated": Setup(with_state, LABELS, {"conditions": ["cell_type"]}, "cell_type", "treatment"),
}
REMEDIES = [name for name in celbo.REMEDIES if name != "beta"]
SWEEP = {
    "one hidden layer of 128": {},
    "KL from the first step": {"train": {"warmup_fraction": 0.0}},
    "no norm": {"norm": "none"},
    "no norm, KL from the first step": {"norm": "none", "train": {"warmup_fraction": 0.0}},
    "three layers of 256": {"hidden_dims": (256, 256, 256)},
    "decoder of three layers of 256": {"decoder_dims": (256, 256, 256)},
    "three layers of 256, no norm": {"hidden_dims": (256, 256, 256), "norm": "none"},
    "three layers of 256, no norm, KL from the first step": DEEP,
}
"""Which of the named causes collapses a count model whose decoder sees one cell at a time."""


def make(options: dict[str, Any], seed: int, **more: Any) -> celbo.ExpressionVAE:
    options = dict(options)
    train = celbo.TrainConfig(**{"seed": seed, "threads": 1, **options.pop("train", {})})
    return celbo.ExpressionVAE(**options, **more, train=train)


def measure(model: celbo.ExpressionVAE, adata: anndata.AnnData, setup: Setup, seconds: float) -> dict[str, Any]:
    found = model.diagnose(adata)
    cells = open_cells(model.fitted_, adata)
    source, (rows, _) = cells.source, cells_to_measure(model.fitted_, cells)
    log_p = log_prob(model.vae_, source, rows[:200], n_samples=100)
    z, labels = model.embed(adata), adata.obs[setup.label].astype(str).to_numpy()
    groups = np.zeros(len(z), int) if setup.within is None else adata.obs[setup.within].astype(str).to_numpy()
    told = [
        cross_val_score(KNeighborsClassifier(15), z[groups == group], labels[groups == group], cv=5).mean()
        for group in np.unique(groups)
    ]
    leaks = [each.value for each in found.findings if each.name.startswith("leakage")]
    return {
        "active_units": found.active_units,
        "collapsed": found.collapsed,
        "healthy": is_healthy(found),
        "mutual_information": found.finding("mutual information").value,
        "ablation": found.finding("latent ablation").value[0]["nats"],
        "log_p": float(log_p.log_p.mean()),
        "knn": float(np.mean(told)),
        "leakage": max(leaks, default=None),
        "advice": [advice.remedy for advice in found.remedies],
        "seconds": seconds,
    }


def fit(options: dict[str, Any], adata: anndata.AnnData, setup: Setup, seed: int, **more: Any) -> dict[str, Any]:
    started = time.perf_counter()
    model = make(options, seed, **more).fit(adata)
    return measure(model, adata, setup, time.perf_counter() - started)


def run(name: str, setup: Setup, folder: Path, seed: int, remedies: list[str]) -> list[dict[str, Any]]:
    adata, found = setup.cells(folder), []

    def record(what: str, figures: dict[str, Any]) -> None:
        found.append({"setup": name, "seed": seed, "what": what, **figures})
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}
        print(name, seed, what, shown, flush=True)

    record("healthy reference", fit(setup.healthy, adata, setup, seed))
    collapsed = make(setup.options, seed).fit(adata)
    record("as it is", measure(collapsed, adata, setup, sum(epoch.seconds for epoch in collapsed.history_)))
    started = time.perf_counter()
    cured, trail = celbo.cure(collapsed, adata)
    path = " + ".join(cured.remedies) or "nothing"
    record(f"cure: {path}", measure(cured, adata, setup, time.perf_counter() - started))
    found[-1]["trail"] = [[list(step.remedies), step.kept, step.said] for step in trail]
    for remedy in remedies:
        try:
            record(remedy, fit(setup.options, adata, setup, seed, remedies=[remedy]))
        except celbo.UsageError:
            continue  # a remedy that this model cannot take
    return found


def sweep(folder: Path, seed: int) -> list[dict[str, Any]]:
    found = []
    for name in ("pbmc3k", "paul15"):
        setup = Setup(real(name), {}, {})
        adata = setup.cells(folder)
        for what, options in SWEEP.items():
            found.append({"setup": f"sweep, {name}", "seed": seed, "what": what, **fit(options, adata, setup, seed)})
            print(found[-1], flush=True)
    return found


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for setup in dict.fromkeys(record["setup"] for record in records):
        of_setup = [record for record in records if record["setup"] == setup]
        lines += [
            f"\n**{setup}**\n",
            "| | active units | mutual information | without z, nats lost | refined log p(x) | k-NN | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for what in dict.fromkeys(record["what"] for record in of_setup):
            rows = [record for record in of_setup if record["what"] == what]
            keys = ("mutual_information", "ablation", "log_p", "knn", "seconds")
            mean = {key: float(np.mean([row[key] for row in rows])) for key in keys}
            active = ", ".join(str(row["active_units"]) for row in rows)
            lines.append(
                f"| {what} | {active} | {mean['mutual_information']:.2f} | {mean['ablation']:.1f} "
                f"| {mean['log_p']:.1f} | {100 * mean['knn']:.1f} | {mean['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are")
    parser.add_argument("--setups", nargs="+", default=[*SETUPS, "sweep"], choices=[*SETUPS, "sweep"])
    parser.add_argument("--remedies", nargs="*", default=REMEDIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of figures written before, and end")
    options = parser.parse_args()
    if options.table:
        print(table([record for path in options.table for record in json.loads(path.read_text())]))
        return
    warnings.simplefilter("ignore")
    records = []
    for name in options.setups:
        for seed in options.seeds:
            if name == "sweep":
                records += sweep(options.folder, seed)
            else:
                records += run(name, SETUPS[name], options.folder, seed, options.remedies)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
