"""Batches mixed and types kept: celbo, scvi-tools, harmony and nothing at all, by scib-metrics.

    python benchmarks/integration.py FOLDER --scvi-python ENV/bin/python --json integration.json
    python benchmarks/integration.py --table integration.json                    # the tables of docs/batches.md

ENV is the other tools' own environment: ``pip install scvi-tools==1.4.2 scib-metrics==0.5.9 harmonypy==0.0.10``.
Every tool gets all cells and 2,000 genes chosen within batches; celbo and scvi-tools ten latent dimensions, harmony 30
principal components. Each runs at its own default length on one thread (SCANVI 20 epochs after SCVI); those that use
labels are given the types of half of them. Scored are the cells whose type nobody was told (of known types), so that
all methods are judged by the same ones. Overall is .4 batch correction + .6 bio conservation, not scaled between
methods (Luecken 2022).

Then the most common type of the largest batch is left out of that batch, and celbo fitted again: the share of the 15
neighbours of its other cells that are of its type, beside the same cells where it was left in. What is in the JSON file
is not measured again.
"""

import argparse
import json
import subprocess
import warnings
from pathlib import Path

import anndata
import numpy as np
from sklearn.neighbors import NearestNeighbors

import celbo
from celbo.data.stored import stored_values
from celbo.data.variable_genes import select_genes

SETS = {
    "pbmc_3tech": ("cell_type", "batch"),
    "cellmix_tech": ("cell_type", "batch"),
    "luad_laughney": ("coarse_type_markers", "batch"),
    "kang_ifnb": ("cell_type", "condition"),
}
"""Column of types, and what is taken as the batch."""
UNLABELLED = ("unassigned", "nan", "unknown")
N_GENES, NEIGHBOURS = 2000, 15


def prepare(name: str, seed: int, folder: Path) -> anndata.AnnData:
    """Obs: ``types``, ``given`` (the batch), ``known``: the types of half of the cells, ``judged``: of the others."""
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    column, given = SETS[name]
    types = adata.obs[column].astype(str)
    if name == "kang_ifnb":  # the other labels were predicted
        types = types.where(adata.obs["cell_type_source"].astype(str).str.contains("publ"), "unknown")
    batch = adata.obs[given].astype("category")
    if adata.n_vars > N_GENES:
        adata = adata[:, select_genes(stored_values(adata, None).blocks, N_GENES, batch.cat.codes.to_numpy(int))]
    is_known = ~types.isin(UNLABELLED).to_numpy()
    told = np.random.default_rng(seed).random(adata.n_obs) < 0.5
    obs = {
        "types": types.to_numpy(),
        "given": batch.astype(str).to_numpy(),
        "known": np.where(told & is_known, types, "unknown"),
        "judged": ~told & is_known,
    }
    return anndata.AnnData(adata.X.astype(np.float32), obs=obs, var=adata.var[[]])


def embedded(adata: anndata.AnnData, seed: int, labels: str | None = None) -> np.ndarray:
    train = celbo.TrainConfig(seed=seed, threads=1)
    return celbo.ExpressionVAE(nuisance=["given"], labels=labels, train=train).fit(adata).embed(adata)


def left_out(adata: anndata.AnnData, z: np.ndarray, seed: int) -> dict[str, float | str]:
    """Share of a type's neighbours that are its own, where one batch has it and where it has not."""
    types, batch = (adata.obs[column].astype(str) for column in ("types", "given"))
    largest = batch.value_counts().index[0]
    name = types[(batch == largest) & ~types.isin(UNLABELLED)].value_counts().index[0]
    stays = ~((types == name) & (batch == largest)).to_numpy()
    fewer = adata[stays].copy()
    is_it, known = (types == name).to_numpy()[stays], ~types.isin(UNLABELLED).to_numpy()[stays]

    def own(where: np.ndarray) -> float:
        near = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(where[known])
        of_it = near.kneighbors(where[known & is_it], return_distance=False)[:, 1:]
        return float(is_it[known][of_it].mean())

    return {"type": name, "batch": largest, "left in": own(z[stays]), "left out": own(embedded(fewer, seed))}


def measure(name: str, seed: int, folder: Path, python: str, work: Path) -> dict:
    work.mkdir(parents=True, exist_ok=True)
    adata = prepare(name, seed, folder)
    z = embedded(adata, seed)
    np.savez(work / "celbo.npz", **{"celbo": z, "celbo, labels": embedded(adata, seed, "known")})
    adata.write_h5ad(work / "cells.h5ad")
    script = Path(__file__).with_name("integration_scvi.py")
    command = [python, script, work / "cells.h5ad", work / "celbo.npz", work / "scores.json", str(seed)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    scores = json.loads((work / "scores.json").read_text())
    return {"set": name, "seed": seed, "scores": scores, "left out": left_out(adata, z, seed)}


def table(records: list[dict]) -> str:
    """Means over seeds, overall (batch / biology), and of the types left out."""
    methods = list(records[0]["scores"])
    names = list(dict.fromkeys(record["set"] for record in records))
    lines = ["| | seeds | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]

    def mean(method: str, part: str, of: str) -> float:
        return float(np.mean([record["scores"][method][part] for record in records if record["set"] == of]))

    for row in [*([name] for name in names), names]:
        cells = [
            [np.mean([mean(method, part, name) for name in row]) for part in ("overall", "batch", "biology")]
            for method in methods
        ]
        seeds = str(sum(record["set"] == row[0] for record in records)) if len(row) == 1 else ""
        shown = " | ".join(f"{overall:.3f} ({batch:.2f} / {biology:.2f})" for overall, batch, biology in cells)
        lines.append(f"| {row[0] if len(row) == 1 else 'mean'} | {seeds} | {shown} |")
    lines += ["", "| | type left out | of batch | its own among 15 neighbours, left in | left out |", "|---" * 5 + "|"]
    for name in names:
        of_set = [record["left out"] for record in records if record["set"] == name]
        shares = " | ".join(f"{np.mean([each[part] for each in of_set]):.3f}" for part in ("left in", "left out"))
        lines.append(f"| {name} | {of_set[0]['type']} | {of_set[0]['batch']} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are")
    parser.add_argument("--scvi-python", help="python of the other tools' environment")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("integration-work"))
    parser.add_argument("--json", type=Path, default=Path("integration.json"), help="where every figure is kept")
    parser.add_argument("--table", type=Path, help="print the tables of figures written before, and end")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    if options.folder is None or options.scvi_python is None:
        parser.error("name the folder of the .h5ad files, and --scvi-python")
    warnings.simplefilter("ignore")
    records = json.loads(options.json.read_text()) if options.json.exists() else []
    for seed in options.seeds:
        for name in options.sets:
            if any((record["set"], record["seed"]) == (name, seed) for record in records):
                continue
            records.append(measure(name, seed, options.folder, options.scvi_python, options.work))
            print(json.dumps(records[-1]), flush=True)
            options.json.write_text(json.dumps(records, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
