"""Unusual cells: is the p-value right for cells that were never seen, and are planted ones found?

    python benchmarks/outliers.py FOLDER --scrublet-python ENV/bin/python --json outliers.json
    python benchmarks/outliers.py --table outliers.json                   # the figures of docs/score.md

FOLDER has the .h5ad files. Of each set of at least 1,000 cells a fifth is never seen: usual cells. Among them are
planted: the sum of two cells of different types, a type that was left out of fitting (one that principal components
separate), cells whose genes were permuted, and cells drawn from the mean profile alone. Beside celbo's score stand the
reconstruction error, what 30 principal components leave of log-normalised counts, and, for doublets, Scrublet, if the
python of an environment with it is named (``pip install scrublet==0.2.3``). False alarms are told beside their 99 %
interval if the held-out cells they are told by were very many, and as they are, which are few themselves.
"""

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse
from scipy.stats import binom, ks_2samp, norm
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import celbo
from celbo.ask.outliers import joined, p_values, standardised
from celbo.ask.readings import read_cells
from celbo.fit.cells import open_cells

SETS = {
    "kang_ifnb": ("cell_type", "condition"),
    "papalexi_thp1": (None, "batch"),
    "gbm_panobinostat": (None, "condition"),
    "pbmc_3tech": ("cell_type", "batch"),
    "cellmix_tech": ("cell_type", "batch"),
    "luad_laughney": ("coarse_type_markers", "batch"),
    "pbmc3k": ("cell_type", None),
    "paul15": ("cell_type", None),
    "zeisel_1464": ("cell_type", None),
    "brain10k": (None, None),
}
N_GENES, PLANTED, LEVELS = 2000, 200, (0.01, 0.05, 0.1)
UNLABELLED = ("unassigned", "nan", "unknown")
SCRUBLET = """
import sys, anndata, numpy as np, scrublet
adata = anndata.read_h5ad(sys.argv[1])
np.save(sys.argv[2], scrublet.Scrublet(adata.X.tocsc(), random_state=0).scrub_doublets(verbose=False)[0])
"""


def read(folder: Path, name: str) -> anndata.AnnData:
    """The set's most variable genes, cells with counts; a fifth marked as unseen, types and batch under fixed names."""
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    if adata.n_vars > N_GENES:
        keep = np.argsort(-logged(adata.X).var(0))[:N_GENES]
        adata = adata[:, np.sort(keep)].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    types, batch = SETS[name]
    order = np.random.default_rng(0).permutation(adata.n_obs)
    obs = {"unseen": np.isin(np.arange(adata.n_obs), order[: adata.n_obs // 5])}
    obs["types"] = np.full(adata.n_obs, "unknown") if types is None else adata.obs[types].astype(str).to_numpy()
    obs["given"] = np.full(adata.n_obs, "one") if batch is None else adata.obs[batch].astype(str).to_numpy()
    return anndata.AnnData(adata.X.astype(np.float32).tocsr(), obs=obs, var=adata.var[[]])


def logged(x) -> np.ndarray:
    x = np.asarray(x.todense())
    return np.log1p(x * (1e4 / np.maximum(x.sum(1, keepdims=True), 1)))


def plant(adata: anndata.AnnData) -> dict[str, anndata.AnnData]:
    """Unusual cells made of unseen ones."""
    rng, unseen = np.random.default_rng(0), np.flatnonzero(adata.obs["unseen"])
    types, given = adata.obs["types"].to_numpy(), adata.obs["given"].to_numpy()
    n, planted = min(PLANTED, len(unseen) // 2), {}
    one, other = rng.choice(unseen, (2, 20 * n))
    apart = (types[one] != types[other]) & (given[one] == given[other])
    apart &= ~np.isin(types[one], UNLABELLED) & ~np.isin(types[other], UNLABELLED)
    if apart.any():
        one, other = one[apart][:n], other[apart][:n]
        planted["doublets"] = made(adata, one, adata.X[one] + adata.X[other])
    some = rng.choice(unseen, n, replace=False)
    x = np.asarray(adata.X[some].todense())
    planted["permuted genes"] = made(adata, some, rng.permuted(x, axis=1))
    mean = np.asarray(adata.X.sum(0)).ravel().astype(float)
    planted["ambient only"] = made(adata, some, [rng.multinomial(int(total), mean / mean.sum()) for total in x.sum(1)])
    return planted


def made(adata: anndata.AnnData, rows: np.ndarray, x) -> anndata.AnnData:
    found = anndata.AnnData(sparse.csr_matrix(x, dtype=np.float32), obs=adata.obs.iloc[rows].copy(), var=adata.var)
    found.obs_names = [f"planted_{number}" for number in range(len(rows))]
    return found


def separated_type(adata: anndata.AnnData) -> str | None:
    """The largest type of 3 to 30 % of the cells, nine tenths of whose neighbours (30 components) are of it."""
    types = adata.obs["types"].to_numpy()
    shares = {each: float((types == each).mean()) for each in set(types) - set(UNLABELLED)}
    z = PCA(30, random_state=0).fit_transform(logged(adata.X))
    near = NearestNeighbors(n_neighbors=16).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    alike = (types[near] == types[:, None]).mean(1)
    apart = [each for each, share in shares.items() if 0.03 < share < 0.3 and alike[types == each].mean() >= 0.9]
    return max(apart, key=lambda each: shares[each]) if apart else None


def fit(adata: anndata.AnnData, left_out: str | None = None) -> tuple[celbo.ExpressionVAE, PCA]:
    seen = adata[~adata.obs["unseen"].to_numpy() & (adata.obs["types"] != left_out).to_numpy()].copy()
    conditions = ["given"] if seen.obs["given"].nunique() > 1 else []
    model = celbo.ExpressionVAE(conditions=conditions, train=celbo.TrainConfig(seed=0)).fit(seen)
    return model, PCA(30, random_state=0).fit(logged(seen.X))


def rank(model: celbo.ExpressionVAE, pca: PCA, cells: anndata.AnnData) -> dict[str, np.ndarray]:
    """How unusual each way finds these cells."""
    x = logged(cells.X)
    residual = x - pca.inverse_transform(pca.transform(x))
    return {
        "celbo": model.outliers(cells)["score"].to_numpy(),
        "log p(x)": -model.log_prob(cells, n_samples=100)["log_p"].to_numpy(),
        "reconstruction": -model.elbo(cells)["reconstruction"].to_numpy(),
        "PCA": (residual**2).sum(1),
    }


def areas(usual: dict[str, np.ndarray], unusual: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        way: float(roc_auc_score(np.repeat([0, 1], [len(usual[way]), len(unusual[way])]), [*usual[way], *unusual[way]]))
        for way in usual
    }


def scrublet(python: str, adata: anndata.AnnData, doublets: anndata.AnnData) -> float:
    """AUC of its doublet score, of all cells together."""
    with tempfile.TemporaryDirectory() as folder:
        data, scores = Path(folder, "cells.h5ad"), Path(folder, "scores.npy")
        anndata.concat([adata, doublets]).write_h5ad(data)
        subprocess.run([python, "-c", SCRUBLET, data, scores], check=True, capture_output=True)
        found = np.load(scores)
    usual = found[: adata.n_obs][adata.obs["unseen"].to_numpy()]
    return areas({"": usual}, {"": found[adata.n_obs :]})[""]


def calibration(model: celbo.ExpressionVAE, cells: anndata.AnnData) -> dict:
    """Scores of held-out and of unseen usual cells: Kolmogorov-Smirnov by depth tercile; false alarms."""
    known = model.reference_.was_read
    opened = open_cells(model.fitted_, cells)
    found = read_cells(model.fitted_, opened, opened.rows, with_genes=False, seed=0).readings
    library = (model.reference_.library[known], opened.source.library)
    codes = [
        part[:, 0] if part.shape[1] else np.zeros(len(part))
        for part in (model.reference_.conditions[known], opened.codes)
    ]
    batch = (codes[0].astype(int), codes[1].astype(int))
    usual, here = standardised(model.reference_.readings[known], found, library=library, batch=batch)
    scores = joined(usual, usual), joined(usual, here)
    edges = np.quantile(library[1], [1 / 3, 2 / 3])
    tests = []
    for tercile in range(3):
        pair = [part[np.digitize(depth, edges) == tercile] for part, depth in zip(scores, library, strict=True)]
        tests.append(float(ks_2samp(*pair).pvalue))
    p = p_values(*scores)
    alarms = {str(level): int((p <= level).sum()) for level in LEVELS}
    return {
        "n": [len(part) for part in scores],
        "ks": tests,
        "alarms": alarms,
        "scores": [list(part) for part in scores],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--scrublet-python")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--table", type=Path, help="print the tables of figures written before, and end")
    options = parser.parse_args()
    if options.table:
        written = json.loads(options.table.read_text())
        print(table(written["planted"]))
        print(said(written["calibration"]))
        return
    if options.folder is None:
        parser.error("name the folder of the .h5ad files")
    warnings.simplefilter("ignore")
    records, calibrated = [], {}
    for name in options.sets:
        adata = read(options.folder, name)
        model, pca = fit(adata)
        usual_cells = adata[adata.obs["unseen"].to_numpy()].copy()
        calibrated[name] = calibration(model, usual_cells)
        usual = rank(model, pca, usual_cells)
        for kind, cells in plant(adata).items():
            record = {"set": name, "kind": kind, **areas(usual, rank(model, pca, cells))}
            record["named"] = float((model.outliers(cells)["kind"].str.startswith(kind.split()[0][:7])).mean())
            if kind == "doublets" and options.scrublet_python:
                record["Scrublet"] = scrublet(options.scrublet_python, adata, cells)
            records.append(record)
        if (left_out := separated_type(adata)) is not None:
            model, pca = fit(adata, left_out)
            is_it = (usual_cells.obs["types"] == left_out).to_numpy()
            both = [rank(model, pca, usual_cells[which].copy()) for which in (~is_it, is_it)]
            records.append({"set": name, "kind": f"left out ({left_out})", **areas(*both)})
        print(json.dumps([record for record in records if record["set"] == name], indent=None), flush=True)
        print({key: value for key, value in calibrated[name].items() if key != "scores"}, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"planted": records, "calibration": calibrated}))
    print(table(records))
    print(said(calibrated))


def table(records: list[dict]) -> str:
    ways = ("celbo", "log p(x)", "reconstruction", "PCA", "Scrublet")
    lines = ["| planted | sets | " + " | ".join(ways) + " |", "|---" * (len(ways) + 2) + "|"]
    for kind in dict.fromkeys(record["kind"].split(" (")[0] for record in records):
        rows = [record for record in records if record["kind"].startswith(kind)]
        cells = []
        for way in ways:
            values = [row[way] for row in rows if way in row]
            cells.append(f"{np.mean(values):.3f} ({min(values):.2f})" if values else "")
        lines.append(f"| {kind} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def said(calibrated: dict) -> str:
    sets = calibrated.values()
    tests = [p for found in sets for p in found["ks"]]
    lines = [f"depth terciles with p > .01: {sum(p > 0.01 for p in tests)} of {len(tests)}"]
    n_known, n = (np.array([found["n"][side] for found in sets]) for side in (0, 1))
    for level in LEVELS:
        alarms = np.array([found["alarms"][str(level)] for found in sets])
        low, high = binom.interval(0.99, n, level)
        # Of a share of n cells above a quantile of n_known others: that of n alone, times 1 + n / n_known.
        wider = norm.ppf(0.995) * np.sqrt(level * (1 - level) * (n * (1 + n / n_known)).sum()) / n.sum()
        bounds = binom.interval(0.99, n.sum(), level) / n.sum()
        lines.append(
            f"false alarms at {level:.0%}: {alarms.sum() / n.sum():.2%} of {n.sum():,} (99 %: {bounds[0]:.2%} to "
            f"{bounds[1]:.2%}; as many held-out cells as there are: {level - wider:.2%} to {level + wider:.2%}); "
            f"{((low <= alarms) & (alarms <= high)).sum()} of {len(alarms)} sets inside"
        )
    pooled = [np.concatenate([found["scores"][side] for found in calibrated.values()]) for side in (0, 1)]
    lines.append(
        f"pooled: {len(pooled[0]):,} held-out, {len(pooled[1]):,} unseen, KS {ks_2samp(*pooled).statistic:.3f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
