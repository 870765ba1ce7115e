"""Differential expression on simulated truth: false discoveries, power, intervals; beside scvi-tools and Wilcoxon.

    python benchmarks/differential.py --scvi-python ENV/bin/python

Simulated cells (1,000 genes, 6 types, 2 batches, a treatment that changes 5 % of the genes): two close types are
compared, and treated with untreated cells of one type. A gene is changed if the log2 ratio of the groups' true mean
shares is .25 or more. ENV has scvi-tools 1.4.2, which compares with ``mode="change", delta=.25``, the batch as its
batch, its defaults otherwise; Wilcoxon's test is of log-normalised counts, with Benjamini and Hochberg's q.
Power at equal realised FDR: of each method's own ranking the longest list with at most so many false ones.
"""

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, mannwhitneyu

import celbo
from celbo.simulate import true_share

LEAST, LEVELS = 0.25, (0.05, 0.1)
SIZES = ((1500, 500.0), (3000, 1500.0))
"""Cells, and their median library."""
QUESTIONS = (("cell_type", "type_0", "type_1"), ("treatment", "treated", "ctrl"))
ONE_TYPE = "type_2"
SCVI = """
import json, sys, warnings
warnings.simplefilter("ignore")
import anndata, scvi, torch
torch.set_num_threads(1)
scvi.settings.seed = 0
adata = anndata.read_h5ad(sys.argv[1])
scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
model = scvi.model.SCVI(adata, gene_likelihood="nb")
model.train(accelerator="cpu", enable_progress_bar=False, logger=False, early_stopping=True)
for number, (column, group, reference, only) in enumerate(json.loads(sys.argv[3])):
    here = adata if only is None else adata[(adata.obs["cell_type"] == only).to_numpy()].copy()
    one, other = ((here.obs[column] == each).to_numpy() for each in (group, reference))
    found = model.differential_expression(here, idx1=one, idx2=other, mode="change", delta=0.25, silent=True)
    found.loc[list(adata.var_names)].to_csv(f"{sys.argv[2]}-{number}.csv")
"""


def question(adata: anndata.AnnData, column: str) -> anndata.AnnData:
    return adata if column == "cell_type" else adata[(adata.obs["cell_type"] == ONE_TYPE).to_numpy()].copy()


def of_celbo(adata: anndata.AnnData) -> list[pd.DataFrame]:
    """A score, high where a gene is surely changed, and the FDR it stands for."""
    model = celbo.ExpressionVAE(conditions=["treatment"], nuisance=["batch"], train=celbo.TrainConfig(seed=0)).fit(
        adata
    )
    tables = []
    for column, group, reference in QUESTIONS:
        cells = question(adata, column)
        found = model.differential_expression(cells, groupby=column, group=group, reference=reference)
        tables.append(found.loc[list(adata.var_names)].assign(score=lambda table: table["probability"]))
    return tables


def of_scvi(adata: anndata.AnnData, python: str) -> list[pd.DataFrame]:
    asked = [(column, *pair, None if column == "cell_type" else ONE_TYPE) for column, *pair in QUESTIONS]
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "cells.h5ad"), Path(folder, "found")
        anndata.AnnData(adata.X, obs=adata.obs, var=adata.var[[]]).write_h5ad(data)
        subprocess.run([python, "-c", SCVI, data, output, json.dumps(asked)], check=True, capture_output=True)
        for number in range(len(asked)):
            found = pd.read_csv(f"{output}-{number}.csv", index_col=0)
            order = np.argsort(-found["proba_de"].to_numpy(), kind="stable")
            fdr = np.empty(len(found))
            fdr[order] = np.cumsum(1 - found["proba_de"].to_numpy()[order]) / np.arange(1, len(found) + 1)
            interval = {"log2_fold_change": found["lfc_mean"]}
            tables.append(found.assign(score=found["proba_de"], fdr=fdr, **interval))
    return tables


def of_wilcoxon(adata: anndata.AnnData) -> list[pd.DataFrame]:
    tables = []
    for column, group, reference in QUESTIONS:
        cells = question(adata, column)
        x = np.asarray(cells.X.todense())
        x = np.log1p(x * (1e4 / np.maximum(x.sum(1, keepdims=True), 1)))
        one, other = (x[(cells.obs[column] == each).to_numpy()] for each in (group, reference))
        p = np.nan_to_num(mannwhitneyu(one, other, axis=0).pvalue, nan=1.0)  # nan: no counts in either
        change = (np.log1p(np.expm1(one).mean(0)) - np.log1p(np.expm1(other).mean(0))) / np.log(2)
        table = pd.DataFrame({"score": -np.log(np.maximum(p, 1e-300)), "fdr": false_discovery_control(p)})
        tables.append(table.assign(log2_fold_change=change))
    return tables


def judge(adata: anndata.AnnData, tables: list[pd.DataFrame]) -> list[dict]:
    records = []
    for (column, group, reference), table in zip(QUESTIONS, tables, strict=True):
        cells = question(adata, column)
        share, labels = true_share(cells), cells.obs[column].to_numpy()
        change = np.log2(share[labels == group].mean(0) / share[labels == reference].mean(0))
        changed = np.abs(change) >= LEAST
        record = {"question": column, "changed": int(changed.sum())}
        record["r"] = float(np.corrcoef(change, table["log2_fold_change"])[0, 1])
        if "lower" in table:
            record["inside"] = float(((change >= table["lower"]) & (change <= table["upper"])).mean())
        right = changed[np.argsort(-table["score"].to_numpy(), kind="stable")]
        realised = np.cumsum(~right) / np.arange(1, len(right) + 1)
        for level in LEVELS:
            called = (table["fdr"] <= level).to_numpy()
            longest = np.flatnonzero(realised <= level)
            record[f"called {level}"], record[f"false {level}"] = int(called.sum()), int((called & ~changed).sum())
            record[f"power {level}"] = int(right[: longest[-1] + 1].sum()) if len(longest) else 0
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scvi-python")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    records = []
    for n_cells, library in SIZES:
        for seed in options.seeds:
            adata = celbo.simulate_cells(n_cells, 1000, median_library=library, treated_types="all", seed=seed)
            found = {"celbo": of_celbo(adata), "Wilcoxon": of_wilcoxon(adata)}
            if options.scvi_python:
                found["scvi-tools"] = of_scvi(adata, options.scvi_python)
            for method, tables in found.items():
                records += [{"method": method, "cells": n_cells, "seed": seed, **each} for each in judge(adata, tables)]
            print(records[-2 * len(found) :], flush=True)
            if options.json:
                options.json.write_text(json.dumps(records))
    print(table(records))


def table(records: list[dict]) -> str:
    """Sums over seeds."""
    frame = pd.DataFrame(records)
    lines = [
        "| cells | question | method | realised FDR at 5 % | at 10 % "
        "| power at a realised 5 % | at 10 % | r | in interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (n_cells, asked, method), rows in frame.groupby(["cells", "question", "method"], sort=True):
        total = rows.select_dtypes("number").sum()
        false = [total[f"false {level}"] / max(total[f"called {level}"], 1) for level in LEVELS]
        power = [total[f"power {level}"] / total["changed"] for level in LEVELS]
        inside = f"{rows['inside'].mean():.2f}" if "inside" in rows and rows["inside"].notna().all() else ""
        numbers = " | ".join(f"{value:.3f}" for value in (*false, *power, rows["r"].mean()))
        lines.append(f"| {n_cells:,} | {asked} | {method} | {numbers} | {inside} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
