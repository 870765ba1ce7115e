"""Cells under a condition they were never seen in: celbo, scvi-tools and simpler guesses, beside the ceiling.

    python benchmarks/counterfactual.py FOLDER --scvi-python ENV/bin/python --json counterfactual.json
    python benchmarks/counterfactual.py --table counterfactual.json              # the tables of docs/counterfactual.md

kang_ifnb: each of seven types in turn, its treated cells left out of the fit (published labels only); in kang_merged
the two kinds of monocytes are one type.
gbm_panobinostat: each of five donors in turn, its treated cells left out. Both tools: negative binomial, 2,000 genes at
most, chosen on the cells that are learned from. Predicted are counts, drawn 20 times for each control cell; predicted
and real cells are normalised to 10,000 and logged one by one. ENV has scvi-tools 1.4.2, which gets 30 latent
dimensions, two layers and 100 epochs; celbo its defaults.
"""

import argparse
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

import celbo
from celbo.data.stored import stored_values
from celbo.data.variable_genes import select_genes
from celbo.trust.findings import energy_distance

N_GENES, N_TOP, N_DRAWS, N_MEMBERS = 2000, 100, 20, 3


class Task(NamedTuple):
    """What is left out, and of what."""

    within: str
    """Column whose levels are left out in turn, treated."""
    control: str
    treated: str


TASKS = {
    "kang_ifnb": Task("cell_type", "ctrl", "stim"),
    "kang_merged": Task("cell_type", "ctrl", "stim"),
    "gbm_panobinostat": Task("donor", "ctrl", "panobinostat"),
}


def prepare(name: str, folder: Path) -> anndata.AnnData:
    merged = name == "kang_merged"
    adata = anndata.read_h5ad(folder / f"{'kang_ifnb' if merged else name}.h5ad")
    if "cell_type_source" in adata.obs:  # predicted labels would leak treated cells of the type left out
        adata = adata[adata.obs["cell_type_source"].astype(str).str.contains("publ").to_numpy()].copy()
    if merged:
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace(r".*Mono.*", "Mono", regex=True)
    return adata


def split(adata: anndata.AnnData, task: Task, left_out: str) -> tuple[anndata.AnnData, ...]:
    """Cells to learn from, controls and treated cells of the level left out; genes chosen on the first."""
    is_it = (adata.obs[task.within].astype(str) == left_out).to_numpy()
    treated = (adata.obs["condition"].astype(str) == task.treated).to_numpy()
    learn = adata[~(is_it & treated)]
    if adata.n_vars > N_GENES:
        levels = learn.obs["condition"].astype("category").cat.codes.to_numpy(int)
        adata = adata[:, select_genes(stored_values(learn, None).blocks, N_GENES, levels)]
    return tuple(adata[rows].copy() for rows in (~(is_it & treated), is_it & ~treated, is_it & treated))


def logged(counts: Any) -> np.ndarray:
    counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, np.float64)
    return np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))


def judge(predicted: np.ndarray, real: np.ndarray, control: np.ndarray, learned: np.ndarray) -> dict[str, float]:
    """Scores of predicted cells, all logged: ``(draws * cells, genes)``."""
    mean, truth, before = predicted.mean(0), real.mean(0), control.mean(0)
    t = (truth - before) / np.sqrt(real.var(0) / len(real) + control.var(0) / len(control) + 1e-9)
    top = np.argsort(-np.abs(t))[:N_TOP]  # chosen on real cells alone
    with_prediction = (mean - before) / np.sqrt(predicted.var(0) / len(real) + control.var(0) / len(control) + 1e-9)
    pca = PCA(min(30, *learned.shape), random_state=0).fit(learned)
    rng = np.random.default_rng(0)
    some = predicted[rng.permutation(len(predicted))[:1000]]
    return {
        "means": float(np.corrcoef(mean, truth)[0, 1] ** 2),
        "means of top genes": float(np.corrcoef(mean[top], truth[top])[0, 1] ** 2),
        "change explained": float(r2_score(truth - before, mean - before)),
        "variances": float(r2_score(real.var(0), predicted.var(0))),
        "energy distance": energy_distance(pca.transform(some), pca.transform(real)),
        "changed genes in common": len({*np.argsort(-np.abs(with_prediction))[:N_TOP]} & {*top}) / N_TOP,
    }


def by_celbo(learn: anndata.AnnData, control: anndata.AnnData, real: np.ndarray, task: Task, seed: int) -> dict:
    """Cells drawn by one model; and how often the real mean is where several models expect it."""
    models = [
        celbo.ExpressionVAE(conditions=["condition"], train=celbo.TrainConfig(seed=member)).fit(learn)
        for member in range(seed * N_MEMBERS, (seed + 1) * N_MEMBERS)
    ]
    given = {"condition": task.treated}
    one = models[0].counterfactual(control, given)
    drawn = np.concatenate([logged(one.sample(seed=number).X) for number in range(N_DRAWS)])
    all_of_them = models[0].counterfactual(control, given, others=models[1:])
    interval = all_of_them.group_mean(n_cells=len(real))
    shown = (real.mean(0) > 0.1).nonzero()[0]
    truth = real.mean(0)[shown]
    inside = (interval["lower"].to_numpy()[shown] <= truth) & (truth <= interval["upper"].to_numpy()[shown])
    return {
        "drawn": drawn,
        "coverage": float(inside.mean()),
        "support": one.support["verdict"].value_counts().to_dict(),
    }


def by_scvi(
    python: str, learn: anndata.AnnData, control: anndata.AnnData, task: Task, seed: int, work: Path
) -> np.ndarray:
    work.mkdir(parents=True, exist_ok=True)
    learn.write_h5ad(work / "learn.h5ad")
    control.write_h5ad(work / "control.h5ad")
    script = Path(__file__).with_name("counterfactual_scvi.py")
    arguments = [work / "learn.h5ad", work / "control.h5ad", work / "drawn.npy", task.treated, seed, N_DRAWS]
    subprocess.run([python, script, *map(str, arguments)], check=True, capture_output=True)
    return np.concatenate([logged(counts) for counts in np.load(work / "drawn.npy")])


def shifted(learn: anndata.AnnData, control: np.ndarray, task: Task, left_out: str) -> np.ndarray:
    """Controls moved by what the treatment does to the mean of the other levels."""
    x, treated = logged(learn.X), (learn.obs["condition"].astype(str) == task.treated).to_numpy()
    other = (learn.obs[task.within].astype(str) != left_out).to_numpy()
    return np.maximum(control + x[treated & other].mean(0) - x[~treated & other].mean(0), 0)


def run(name: str, left_out: str, seed: int, folder: Path, scvi_python: str | None, work: Path) -> list[dict[str, Any]]:
    task = TASKS[name]
    learn, control, treated = split(prepare(name, folder), task, left_out)
    real, before, learned = logged(treated.X), logged(control.X), logged(learn.X)
    found = by_celbo(learn, control, real, task, seed)
    predictions = {"celbo": found.pop("drawn")}
    if scvi_python:
        predictions["scvi-tools"] = by_scvi(scvi_python, learn, control, task, seed, work)
    order = np.random.default_rng(seed).permutation(len(real))
    half, other_half = real[order[::2]], real[order[1::2]]
    predictions |= {"mean shift": shifted(learn, before, task, left_out), "no change": before}
    of_all = {"set": name, "left out": left_out, "seed": seed, "controls": len(before), "treated": len(real)}
    records = [
        {**of_all, "method": method, **judge(cells, real, before, learned)} for method, cells in predictions.items()
    ]
    records[0] |= found
    records.append({**of_all, "method": "half of the real cells", **judge(half, other_half, before, learned)})
    return records


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    measures = [
        "means", "means of top genes", "change explained", "variances", "energy distance", "changed genes in common",
        "coverage",
    ]  # fmt: skip
    for name in dict.fromkeys(record["set"] for record in records):
        lines += [f"\n**{name}**\n", "| | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for method in dict.fromkeys(record["method"] for record in records):
            rows = [record for record in records if record["set"] == name and record["method"] == method]
            shown = [np.mean([row[each] for row in rows]) if each in rows[0] else None for each in measures]
            lines.append(f"| {method} | " + " | ".join("" if each is None else f"{each:.3f}" for each in shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of an environment with scvi-tools 1.4.2")
    parser.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--left-out", nargs="+", help="levels to leave out in turn; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("counterfactual-work"))
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of figures written before, and end")
    options = parser.parse_args()
    if options.table:
        print(table([record for path in options.table for record in json.loads(path.read_text())]))
        return
    if options.folder is None:
        parser.error("name the folder of the .h5ad files")
    warnings.simplefilter("ignore")
    records: list[dict[str, Any]] = []
    for name in options.sets:
        levels = sorted(prepare(name, options.folder).obs[TASKS[name].within].astype(str).unique())
        for left_out in options.left_out or levels:
            for seed in options.seeds:
                records += run(name, left_out, seed, options.folder, options.scvi_python, options.work)
                print(json.dumps([each for each in records if each["seed"] == seed][-5:]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(records, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
