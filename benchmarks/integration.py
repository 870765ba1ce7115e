"""Batches mixed and types kept: celbo, scvi-tools, harmony and nothing at all, by scib-metrics.

    python benchmarks/quality.py FOLDER --scvi-python ENV/bin/python --work WORK     # fits both tools, three seeds
    ENV/bin/python benchmarks/integration.py WORK --json integration.json            # scores what they embedded
    ENV/bin/python benchmarks/integration.py --table integration.json                # the table of docs/benchmarks.md

ENV is the other tools' own environment: ``pip install scvi-tools==1.4.2 scib-metrics==0.5.9 harmonypy==0.0.10``.
Each model was fitted to four fifths of the cells and embeds all of them; cells without a known type are left out of
the score. Overall is .4 batch correction + .6 bio conservation, not scaled between methods (Luecken 2022).
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np

SETS = ("pbmc_3tech", "cellmix_tech", "luad_laughney", "kang_ifnb")
UNLABELLED = ("unassigned", "nan", "unknown")
PARTS = {"Total": "overall", "Batch correction": "batch", "Bio conservation": "biology"}


def score(work: Path, name: str, seed: int, tag: str) -> list[dict[str, float | str | int]]:
    import anndata
    import harmonypy
    from scib_metrics.benchmark import Benchmarker
    from sklearn.decomposition import PCA

    adata = anndata.read_h5ad(work / f"{name}-{seed}.h5ad")
    counts = adata.X.toarray()
    logged = np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))
    adata.obsm["nothing"] = PCA(30, random_state=seed).fit_transform(logged)
    found = harmonypy.run_harmony(adata.obsm["nothing"], adata.obs, "given", random_state=seed).Z_corr
    adata.obsm["harmony"] = np.asarray(found if found.shape[0] == adata.n_obs else found.T)
    adata.obsm["celbo"] = np.load(work / f"{name}-{seed}-celbo-{tag}.npz")["mu_z"]
    adata.obsm["scvi-tools"] = np.load(work / f"{name}-{seed}-scvi.npz")["mu_z"]
    adata = adata[~adata.obs["types"].astype(str).isin(UNLABELLED).to_numpy()].copy()
    for column in ("types", "given"):
        adata.obs[column] = adata.obs[column].astype(str).astype("category")
    methods = ["celbo", "scvi-tools", "harmony", "nothing"]
    judge = Benchmarker(
        adata, "given", "types", methods, pre_integrated_embedding_obsm_key="nothing", n_jobs=1, progress_bar=False
    )
    judge.benchmark()
    table = judge.get_results(min_max_scale=False)
    return [
        {"set": name, "seed": seed, "method": method}
        | {short: float(table.loc[method, part]) for part, short in PARTS.items()}
        for method in methods
    ]


def table(records: list[dict]) -> str:
    """Means over seeds, overall (batch / biology)."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    sets = list(dict.fromkeys(record["set"] for record in records))
    lines = ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]

    def cell(method: str, names: list[str]) -> str:
        rows = [record for record in records if record["method"] == method and record["set"] in names]
        mean = {part: np.mean([row[part] for row in rows]) for part in PARTS.values()}
        return f"{mean['overall']:.3f} ({mean['batch']:.2f} / {mean['biology']:.2f})"

    named = [*((name, [name]) for name in sets), ("mean", sets)]
    lines += [f"| {name} | " + " | ".join(cell(method, of) for method in methods) + " |" for name, of in named]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="the work folder of quality.py")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tag", default="default", help="of celbo's fits in that folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    warnings.simplefilter("ignore")
    records = []
    for name in options.sets:
        for seed in options.seeds:
            records += score(options.work, name, seed, options.tag)
            print(records[-4:], flush=True)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
