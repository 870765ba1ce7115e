"""Can drawn cells be told from real ones that no model has seen? Each way of drawing z, beside scvi-tools.

    python benchmarks/realism.py FOLDER --scvi-python ENV/bin/python --json realism.json
    python benchmarks/realism.py --table realism.json                     # the table of docs/sample.md

A fifth of the cells is held out; 2,000 genes, the most variable of the others. As many cells are drawn as are held out.
The figure is that of `celbo.check_realism`: the highest AUC of four classifiers in cross-validation, 0.5 is chance.
Both tools: negative binomial, 10 latent dimensions; ENV has scvi-tools 1.4.2, at its default length of training.
"""

import argparse
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np

import celbo
from celbo.data.stored import stored_values
from celbo.data.variable_genes import select_genes

N_GENES = 2000
CONDITIONS = {"pbmc3k": [], "kang_ifnb": ["condition"]}
WAYS = [
    ("gene", "normal", ["aggregated"]),
    ("gene-cell", "normal", ["aggregated", "mixture", "prior"]),
    ("gene-cell", "vamp:100", ["prior"]),
]
"""What theta depends on, the prior that was trained with, and where z is drawn from."""


def split(name: str, folder: Path, seed: int) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Cells to learn from, and held-out ones."""
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    held_out, learn = np.sort(order[: adata.n_obs // 5]), np.sort(order[adata.n_obs // 5 :])
    adata = adata[:, select_genes(stored_values(adata[learn], None).blocks, N_GENES)]
    return adata[learn].copy(), adata[held_out].copy()


def by_celbo(learn: anndata.AnnData, n: int, conditions: list[str], seed: int) -> dict[str, anndata.AnnData]:
    drawn = {}
    for dispersion, prior, sources in WAYS:
        train = celbo.TrainConfig(seed=seed, threads=1)
        model = celbo.ExpressionVAE(conditions=conditions, dispersion=dispersion, prior=prior, train=train).fit(learn)
        for each in sources:
            of = f"prior ({prior})" if each == "prior" else each
            drawn[f"celbo, {of}, theta by {dispersion}"] = model.sample(n, source=each, seed=seed)
    return drawn


def by_scvi(
    python: str, learn: anndata.AnnData, n: int, conditions: list[str], seed: int, work: Path
) -> dict[str, anndata.AnnData]:
    work.mkdir(parents=True, exist_ok=True)
    learn.write_h5ad(work / "learn.h5ad")
    script = Path(__file__).with_name("realism_scvi.py")
    arguments = [work / "learn.h5ad", work, n, *(conditions or [""]), seed]
    subprocess.run([python, script, *map(str, arguments)], check=True, capture_output=True)
    sources = ("prior", "aggregated")
    return {f"scvi-tools, {each}, theta by gene": anndata.read_h5ad(work / f"{each}.h5ad") for each in sources}


def run(name: str, seed: int, folder: Path, scvi_python: str | None, work: Path) -> list[dict[str, Any]]:
    learn, held_out = split(name, folder, seed)
    asked = (learn, held_out.n_obs, CONDITIONS[name], seed)
    drawn = by_scvi(scvi_python, *asked, work) if scvi_python else by_celbo(*asked)
    return [
        {"set": name, "seed": seed, "method": method}
        | celbo.check_realism(cells, held_out, labels="cell_type", seed=seed).to_json()
        for method, cells in drawn.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(record["set"] for record in records):
        lines += [f"\n**{name}**\n"]
        lines += ["| | AUC | by seed | means | variances | zeros | correlations | types missing |", "|---" * 8 + "|"]
        of_set = [record for record in records if record["set"] == name]
        methods = list(dict.fromkeys(record["method"] for record in of_set))
        for method in sorted(methods, key=lambda each: np.mean([r["auc"] for r in of_set if r["method"] == each])):
            rows = [record for record in of_set if record["method"] == method]
            aucs, missing = [row["auc"] for row in rows], sum(len(row["missing"]) for row in rows)
            agreement = [np.mean([row["agreement"][each] for row in rows]) for each in rows[0]["agreement"]]
            cells = [f"{np.mean(aucs):.3f}", " ".join(f"{auc:.2f}" for auc in aucs), *(f"{a:.3f}" for a in agreement)]
            lines.append(f"| {method} | {' | '.join(cells)} | {missing} |")
        real = list({record["seed"]: record for record in of_set}.values())
        aucs = [row["auc_real"] for row in real]
        agreement = [np.mean([row["agreement_real"][each] for row in real]) for each in real[0]["agreement_real"]]
        cells = [f"{np.mean(aucs):.3f}", " ".join(f"{auc:.2f}" for auc in aucs), *(f"{a:.3f}" for a in agreement)]
        lines.append(f"| real cells, two halves | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of an environment with scvi-tools 1.4.2")
    parser.add_argument("--sets", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of celbo")
    parser.add_argument("--scvi-seeds", nargs="+", type=int, help="seeds of scvi-tools; as many if not given")
    parser.add_argument("--work", type=Path, default=Path("realism-work"))
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of figures written before, and end")
    options = parser.parse_args()
    if options.table:
        print(table([record for path in options.table for record in json.loads(path.read_text())]))
        return
    warnings.simplefilter("ignore")
    records: list[dict[str, Any]] = []
    asked = [(None, seed) for seed in options.seeds]
    if options.scvi_python:
        seeds = options.seeds if options.scvi_seeds is None else options.scvi_seeds
        asked += [(options.scvi_python, seed) for seed in seeds]
    for python, seed in asked:
        for name in options.sets:
            records += run(name, seed, options.folder, python, options.work)
            print(table(records), flush=True)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
