"""celbo against scvi-tools: p(x) of unseen cells, known types, clusters, time. One evaluator, same cells, same genes.

    python benchmarks/quality.py FOLDER --scvi-python /path/to/env/bin/python

FOLDER has the .h5ad files; the other environment has scvi-tools 1.4.2 (``pip install scvi-tools==1.4.2``). A fifth
of the cells is unseen; genes (2,000 at most) are chosen on the others. Both tools: negative binomial, 10 latent
dimensions, one hidden layer of 128, one thread; otherwise each has its own defaults and its full length. Results are
kept in the work folder, so that an interrupted run goes on.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import torch
from evaluate import evaluate
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

import celbo
from celbo.data.stored import stored_values
from celbo.data.variable_genes import select_genes

N_GENES, N_EVALUATED, NEIGHBOURS = 2000, 300, 15
UNLABELLED = ("unassigned", "nan", "unknown")


class Set(NamedTuple):
    """A data set: column of types, condition given to both models."""

    types: str
    given: str | None = None


SETS = {
    "zeisel_1464": Set("cell_type"),
    "cellmix_tech": Set("cell_type", "batch"),
    "pbmc_3tech": Set("cell_type", "batch"),
    "pbmc3k": Set("cell_type"),
    "paul15": Set("cell_type"),
    "kang_ifnb": Set("cell_type", "condition"),
    "luad_laughney": Set("coarse_type_markers", "batch"),
    "simulated_20k": Set("cell_type"),
}


def prepare(name: str, seed: int, folder: Path, work: Path) -> Path:
    """Split, choose genes on the cells that are seen, and write what both tools read."""
    path = work / f"{name}-{seed}.h5ad"
    if path.exists():
        return path
    simulated = name == "simulated_20k"
    adata = celbo.simulate_cells(20_000, 2_000, seed=seed) if simulated else anndata.read_h5ad(folder / f"{name}.h5ad")
    chosen = SETS[name]
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    unseen, evaluated = np.zeros((2, adata.n_obs), bool)
    unseen[order[: adata.n_obs // 5]] = True
    levels = None if chosen.given is None else adata.obs[chosen.given].astype("category").cat.codes.to_numpy(int)
    if adata.n_vars > N_GENES:
        seen = adata[~unseen]
        blocks = stored_values(seen, None).blocks
        adata = adata[:, select_genes(blocks, N_GENES, None if levels is None else levels[~unseen])].copy()
    some = order[: adata.n_obs // 5]
    evaluated[[row for row in some if adata.X[row].sum() > 0][:N_EVALUATED]] = True
    types = adata.obs[chosen.types].astype(str)
    if name == "kang_ifnb":  # the other labels were predicted
        types = types.where(adata.obs["cell_type_source"].astype(str).str.contains("publ"), "unknown")
    obs = {"types": types.to_numpy(), "unseen": unseen, "evaluated": evaluated}
    if chosen.given is not None:
        obs["given"] = adata.obs[chosen.given].astype(str).to_numpy()
    prepared = anndata.AnnData(adata.X.astype(np.float32), obs=obs, var=adata.var[[]])
    unfinished = path.with_suffix(".part.h5ad")
    prepared.write_h5ad(unfinished)
    unfinished.replace(path)
    return path


def fit_celbo(prepared: Path, output: Path, seed: int, options: dict) -> None:
    """Fit celbo to the cells that are seen, and evaluate it."""
    torch.set_num_threads(1)
    adata = anndata.read_h5ad(prepared)
    conditions = ["given"] if "given" in adata.obs else []
    train = celbo.TrainConfig(seed=seed, threads=1, **options.get("train", {}))
    model = celbo.ExpressionVAE(**{"conditions": conditions, **options, "train": train})
    seen = adata[~adata.obs["unseen"].to_numpy()].copy()
    started, cpu = time.perf_counter(), time.process_time()
    model.fit(seen)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    mu_z, sd_z = model.posterior(adata)
    rows = np.flatnonzero(adata.obs["evaluated"].to_numpy())
    some = adata[rows]
    context = model.schema_.encode(some.obs) if model.schema_.conditions else None
    x = torch.from_numpy(some.X.toarray())
    library = x.sum(1, keepdim=True)

    def decode(z, which):
        p = model.vae_.likelihood(z, context=None if context is None else context[which], library=library[which])
        return p.log_mu, p.log_theta

    found = evaluate(x, torch.from_numpy(mu_z[rows]), torch.from_numpy(sd_z[rows]), decode)
    versions = f"celbo {celbo.__version__}, torch {torch.__version__}"
    epochs = len(model.history_)
    np.savez(output, mu_z=mu_z, seconds=seconds, cpu=cpu, versions=versions, epochs=epochs, **found._asdict())


def score(prepared: Path, mu_z: np.ndarray) -> dict[str, float]:
    """Accuracy of 15 neighbours for unseen cells, and agreement of clusters with types; in percent."""
    obs = anndata.read_h5ad(prepared, backed="r").obs
    types, unseen = obs["types"].astype(str).to_numpy(), obs["unseen"].to_numpy()
    known = ~np.isin(types, UNLABELLED)

    def neighbours(labels, wanted):
        classifier = KNeighborsClassifier(NEIGHBOURS).fit(mu_z[wanted & ~unseen], labels[wanted & ~unseen])
        return 100 * classifier.score(mu_z[wanted & unseen], labels[wanted & unseen])

    clusters = KMeans(len(set(types[known])), n_init=10, random_state=0).fit_predict(mu_z[known])
    scores = {
        "knn": neighbours(types, known),
        "ari": 100 * adjusted_rand_score(types[known], clusters),
        "nmi": 100 * normalized_mutual_info_score(types[known], clusters),
    }
    if "given" in obs:
        scores["knn_given"] = neighbours(obs["given"].astype(str).to_numpy(), np.ones(len(obs), bool))
    return scores


def components(prepared: Path) -> np.ndarray:
    """Ten principal components of log-normalised counts: what a model must beat."""
    adata = anndata.read_h5ad(prepared)
    counts, seen = adata.X.toarray(), ~adata.obs["unseen"].to_numpy()
    logged = np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))
    return PCA(10, random_state=0).fit(logged[seen]).transform(logged)


def run(tool: str, name: str, seed: int, options: argparse.Namespace) -> dict | None:
    """Fit, or read what was fitted, and score; None if it was not fitted, and is not to be."""
    prepared = prepare(name, seed, options.folder, options.work)
    tag = tool if tool != "celbo" else f"celbo-{options.tag}"
    output = options.work / f"{name}-{seed}-{tag}.npz"
    unfinished = output.with_suffix(".part.npz")  # renamed when whole: a killed fit leaves no result behind
    if options.cached and not output.exists():
        return None
    if not output.exists() or tool in options.force:
        if tool == "scvi":
            script = Path(__file__).with_name("fit_scvi.py")
            command = [options.scvi_python, script, prepared, unfinished, str(seed)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        else:
            fit_celbo(prepared, unfinished, seed, options.celbo)
        unfinished.replace(output)
    found = dict(np.load(output))
    result = {
        "set": name,
        "seed": seed,
        "tool": tag,
        "versions": str(found["versions"]),
        "seconds": float(found["seconds"]),
        "cpu": float(found["cpu"]),
        "log_p": found["log_p"].tolist(),
        "unrefined": found["unrefined"].tolist(),
        "ess": float(np.median(found["ess"])),
        "ess_below_10": float(np.mean(found["ess"] < 10)),
        "unrefined_ess": float(np.median(found["unrefined_ess"])),
        **score(prepared, found["mu_z"]),
    }
    print(
        f"{name} {seed} {tag}: log p {np.mean(result['log_p']):.2f} (unrefined {np.mean(result['unrefined']):.2f}, "
        f"ESS {result['ess']:.0f}), k-NN {result['knn']:.1f}, ARI {result['ari']:.1f}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result


def table(results: list[dict], tag: str) -> str:
    """Means over seeds for each tool, and celbo less scvi: s.e. over cells of all seeds, sd over seeds."""
    lines = [
        "| set | tool | log p(x) | unrefined | ESS | ESS < 10 | k-NN | ARI | NMI | condition k-NN | wall s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    paired_lines = [
        "| set | seeds | log p(x) celbo - scvi | s.e. (cells) | sd (seeds) | k-NN celbo - scvi |",
        "|---|---|---|---|---|---|",
    ]
    differences, knn = [], []
    for name in dict.fromkeys(row["set"] for row in results):
        by_seed = {
            tool: {row["seed"]: row for row in results if row["set"] == name and row["tool"] == tool}
            for tool in (f"celbo-{tag}", "scvi", "pca")
        }
        lines += [f"| {name} | {tool} | {_means(list(rows.values()))} |" for tool, rows in by_seed.items() if rows]
        ours, theirs = by_seed[f"celbo-{tag}"], by_seed["scvi"]
        seeds = sorted(ours.keys() & theirs.keys())  # the same cells: never one seed against another
        if not seeds:
            continue
        paired = [np.subtract(ours[seed]["log_p"], theirs[seed]["log_p"]) for seed in seeds]
        cells, means = np.concatenate(paired), [cell.mean() for cell in paired]
        sd = f"{np.std(means, ddof=1):.2f}" if len(seeds) > 1 else ""
        least = min(np.median([row[seed]["ess"] for seed in seeds]) for row in (ours, theirs))
        nearer = np.mean([ours[seed]["knn"] - theirs[seed]["knn"] for seed in seeds])
        verdict = "" if least >= 10 else " (median ESS < 10: not a result)"
        if not verdict:
            differences.append(cells.mean())
            knn.append(nearer)
        paired_lines.append(
            f"| {name} | {len(seeds)} | {cells.mean():+.2f}{verdict} "
            f"| {cells.std(ddof=1) / np.sqrt(len(cells)):.2f} | {sd} | {nearer:+.1f} |"
        )
    if differences:
        means = f"{np.mean(differences):+.2f} | | | {np.mean(knn):+.1f}"
        paired_lines.append(f"| mean of {len(differences)} sets | | {means} |")
    return "\n".join([*lines, "", *paired_lines, "", machine(results)])


def _means(rows: list[dict]) -> str:
    """One tool on one set, mean over its seeds; a column it has no figure for stays empty."""
    columns = {
        "log_p": ".1f", "unrefined": ".1f", "ess": ".0f", "ess_below_10": ".0%", "knn": ".1f", "ari": ".1f",
        "nmi": ".1f", "knn_given": ".1f", "seconds": ".0f", "cpu": ".0f",
    }  # fmt: skip
    return " | ".join(
        format(np.mean([np.mean(row[key]) for row in rows]), form) if key in rows[0] else ""
        for key, form in columns.items()
    )


def machine(results: list[dict]) -> str:
    """Where and with what; wall seconds mean little if other work ran beside, CPU seconds are of the fit alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = sorted({row["versions"] for row in results if "versions" in row})
    return f"{cpu}, {os.cpu_count()} cores, 1 thread a fit; {'; '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of the environment with scvi-tools")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="where results are kept")
    parser.add_argument("--sets", nargs="+", default=list(SETS)[:-1], choices=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="+", default=["scvi", "celbo"], choices=["scvi", "celbo"])
    parser.add_argument("--celbo", type=json.loads, default={}, help="options of ExpressionVAE, as JSON")
    parser.add_argument("--tag", default="default", help="name of these options, under which results are kept")
    parser.add_argument("--force", nargs="+", default=[], choices=["scvi", "celbo"], help="refit these")
    parser.add_argument("--cached", action="store_true", help="fit nothing: the table of what is in the work folder")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        for name in options.sets:
            results += [row for tool in options.tools if (row := run(tool, name, seed, options))]
            prepared = prepare(name, seed, options.folder, options.work)
            results.append({"set": name, "seed": seed, "tool": "pca", **score(prepared, components(prepared))})
    if options.json:
        options.json.write_text(json.dumps(results))
    print("\n" + table(results, options.tag))


if __name__ == "__main__":
    main()
