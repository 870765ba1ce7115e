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
from celbo.data.genes import select_genes
from celbo.data.stored import stored_values

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
}


def prepare(name: str, seed: int, folder: Path, work: Path) -> Path:
    """Split, choose genes on the cells that are seen, and write what both tools read."""
    path = work / f"{name}-{seed}.h5ad"
    if path.exists():
        return path
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
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
    prepared.write_h5ad(path)
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
    mu_z, _ = model.posterior(adata)
    rows = np.flatnonzero(adata.obs["evaluated"].to_numpy())
    some = adata[rows]
    _, sd_z = model.posterior(some)
    context = model.schema_.encode(some.obs) if model.schema_.conditions else None
    x = torch.from_numpy(some.X.toarray())
    library = x.sum(1, keepdim=True)

    def decode(z, which):
        p = model.vae_.likelihood(z, context=None if context is None else context[which], library=library[which])
        return p.log_mu, p.log_theta

    found = evaluate(x, torch.from_numpy(mu_z[rows]), torch.from_numpy(sd_z), decode)
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
    counts = anndata.read_h5ad(prepared).X.toarray()
    return PCA(10, random_state=0).fit_transform(np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1))))


def run(tool: str, name: str, seed: int, options: argparse.Namespace) -> dict:
    """Fit, or read what was fitted, and score."""
    prepared = prepare(name, seed, options.folder, options.work)
    tag = tool if tool != "celbo" else f"celbo-{options.tag}"
    output = options.work / f"{name}-{seed}-{tag}.npz"
    if not output.exists():
        if tool == "scvi":
            script = Path(__file__).with_name("fit_scvi.py")
            command = [options.scvi_python, script, prepared, output, str(seed)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        else:
            fit_celbo(prepared, output, seed, options.celbo)
    found = dict(np.load(output))
    result = {
        "set": name,
        "seed": seed,
        "tool": tag,
        "versions": str(found["versions"]),
        "seconds": float(found["seconds"]),
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
    """Means over seeds, and celbo less scvi with the s.e. over cells and seeds."""
    lines = [
        "| set | log p(x) celbo - scvi (s.e.) | k-NN celbo | scvi | 10 PCs | ARI celbo | scvi | seconds celbo | scvi |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    differences, knn = [], []
    for name in dict.fromkeys(row["set"] for row in results):
        ours, theirs, pcs = (
            sorted((r for r in results if r["set"] == name and r["tool"] == tool), key=lambda r: r["seed"])
            for tool in (f"celbo-{tag}", "scvi", "pca")
        )
        if not (ours and theirs):
            continue
        paired = np.concatenate([np.subtract(a["log_p"], b["log_p"]) for a, b in zip(ours, theirs, strict=False)])
        se = paired.std(ddof=1) / np.sqrt(len(paired))
        differences.append(paired.mean())
        mean = {key: [np.mean([r[key] for r in rows]) for rows in (ours, theirs)] for key in ("knn", "ari", "seconds")}
        knn.append(mean["knn"][0] - mean["knn"][1])
        lines.append(
            f"| {name} | {paired.mean():+.2f} ({se:.2f}) | {mean['knn'][0]:.1f} | {mean['knn'][1]:.1f} "
            f"| {np.mean([r['knn'] for r in pcs]):.1f} | {mean['ari'][0]:.1f} | {mean['ari'][1]:.1f} "
            f"| {mean['seconds'][0]:.0f} | {mean['seconds'][1]:.0f} |"
        )
    lines.append(f"| mean of sets | {np.mean(differences):+.2f} | {np.mean(knn):+.1f} against scvi | | | | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of the environment with scvi-tools")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="where results are kept")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="+", default=["scvi", "celbo"], choices=["scvi", "celbo"])
    parser.add_argument("--celbo", type=json.loads, default={}, help="options of ExpressionVAE, as JSON")
    parser.add_argument("--tag", default="default", help="name of these options, under which results are kept")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        for name in options.sets:
            results += [run(tool, name, seed, options) for tool in options.tools]
            prepared = prepare(name, seed, options.folder, options.work)
            results.append({"set": name, "seed": seed, "tool": "pca", **score(prepared, components(prepared))})
    if options.json:
        options.json.write_text(json.dumps(results))
    print("\n" + table(results, options.tag))


if __name__ == "__main__":
    main()
