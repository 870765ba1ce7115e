"""Labels of some cells: how many of the others are told right, and how a type that was never labelled is taken.

    python benchmarks/labels.py                                            # simulated
    python benchmarks/labels.py FOLDER --scvi-python ENV/bin/python        # real cells, beside scvi-tools' SCANVI

Simulated are 2,500 cells of five types and 150 genes. Labelled are a fifth of the cells, or ("uneven") a twentieth of
one type and a quarter of the others; of the first type none. It is among the cells of fit, unlabelled, or not there.
Of real cells a tenth is labelled, and the others are told: the share told right, the mean of that over types, the mean
of log2 of the true type's probability, and how far the probability of the type told is from how often it is right
(expected calibration error, ten bins). 2,000 genes; ENV has scvi-tools 1.4.2, 100 epochs of SCVI and 20 of SCANVI.
"""

import argparse
import subprocess
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score

import celbo
from celbo.ask.labels import NONE_OF_THESE
from celbo.data.stored import stored_values
from celbo.data.variable_genes import select_genes

SETS = {"pbmc_3tech": "batch", "cellmix_tech": "batch", "kang_ifnb": "condition"}
"""Sets with types known otherwise than by their counts' clusters alone, and the nuisance in each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the .h5ad files are; simulated cells if not given")
    parser.add_argument("--scvi-python", help="python of an environment with scvi-tools 1.4.2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("labels-work"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.folder is None:
        simulated(options.seeds)
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        real(options.folder, options.scvi_python, options.seeds, options.work)


def simulated(seeds: list[int]) -> None:
    print("| labelled | the type is | told right | known types called none of these | the type called none of these |")
    print("|---|---|---|---|---|")
    for name in ("even", "uneven"):
        for is_there in (True, False):
            found = np.array([measured(seed, name == "uneven", is_there) for seed in seeds])
            shown = [f"{column.mean():.3f} ({column.min():.3f} to {column.max():.3f})" for column in found.T]
            place = "among the cells of fit" if is_there else "new"
            print(f"| {name} | {place} | {' | '.join(shown)} |", flush=True)


def measured(seed: int, uneven: bool, is_there: bool) -> tuple[float, float, float]:
    cells = celbo.simulate_cells(2500, 150, n_types=5, type_strength=1.5, median_library=1500, seed=seed)
    types = cells.obs["cell_type"].astype(str).to_numpy()
    is_it = types == "type_0"
    share = np.where(types == "type_2", 0.05, 0.25) if uneven else np.full(len(types), 0.2)
    labelled = (np.random.default_rng(seed).random(len(types)) < share) & ~is_it
    cells.obs["known"] = np.where(labelled, types, "unknown")
    model = celbo.ExpressionVAE(latent_dim=5, labels="known", nuisance=["batch"], train=celbo.TrainConfig(seed=seed))
    model.fit(cells if is_there else cells[~is_it].copy())
    told = model.predict(cells)["label"].to_numpy()
    asked = ~labelled & ~is_it
    none = told == NONE_OF_THESE
    return float((told == types)[asked].mean()), float(none[asked].mean()), float(none[is_it].mean())


def real(folder: Path, scvi_python: str | None, seeds: list[int], work: Path) -> None:
    print("| | | told right | mean over types | log2 of the true type's probability | calibration error |")
    print("|---|---|---|---|---|---|")
    for name, nuisance in SETS.items():
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in seeds:
            cells, types, labelled = partly_labelled(folder / f"{name}.h5ad", nuisance, seed)
            probabilities = {"celbo": by_celbo(cells, nuisance, seed)}
            if scvi_python:
                probabilities["SCANVI"] = by_scanvi(scvi_python, cells, nuisance, seed, work)
            for method, those in probabilities.items():
                found.setdefault(method, []).append(judge(those[~labelled], types[~labelled]))
        for method, rows in found.items():
            shown = " | ".join(f"{column.mean():.3f}" for column in np.array(rows).T)
            print(f"| {name} | {method} | {shown} |", flush=True)


def partly_labelled(path: Path, nuisance: str, seed: int) -> tuple[anndata.AnnData, np.ndarray, np.ndarray]:
    adata = anndata.read_h5ad(path)
    if "cell_type_source" in adata.obs:  # the others were predicted
        adata = adata[adata.obs["cell_type_source"].astype(str).str.contains("publ").to_numpy()]
    adata = adata[adata.obs["cell_type"].notna().to_numpy()].copy()
    if adata.n_vars > 2000:
        batch = adata.obs[nuisance].astype("category").cat.codes.to_numpy(int)
        adata = adata[:, select_genes(stored_values(adata, None).blocks, 2000, batch)].copy()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    rng = np.random.default_rng(seed)
    labelled = rng.random(len(types)) < 0.1
    for each in np.unique(types):  # every type has two labels at least
        labelled[rng.permutation(np.flatnonzero(types == each))[:2]] = True
    adata.obs["known"] = np.where(labelled, types, "unknown")
    return adata, types, labelled


def by_celbo(cells: anndata.AnnData, nuisance: str, seed: int) -> pd.DataFrame:
    model = celbo.ExpressionVAE(labels="known", nuisance=[nuisance], train=celbo.TrainConfig(seed=seed)).fit(cells)
    return model.predict(cells).iloc[:, 3:]


def by_scanvi(python: str, cells: anndata.AnnData, nuisance: str, seed: int, work: Path) -> pd.DataFrame:
    cells.write_h5ad(work / "learn.h5ad")
    script = Path(__file__).with_name("labels_scvi.py")
    arguments = [work / "learn.h5ad", work / "told.csv", nuisance, seed]
    subprocess.run([python, script, *map(str, arguments)], check=True, capture_output=True)
    return pd.read_csv(work / "told.csv", index_col=0)


def judge(probability: pd.DataFrame, types: np.ndarray) -> tuple[float, float, float, float]:
    levels = probability.columns.to_numpy(str)
    table = probability.to_numpy(float)
    told, sure = levels[table.argmax(1)], table.max(1)
    right = told == types
    of_truth = table[np.arange(len(types)), pd.Index(levels).get_indexer(types)]
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(right[bins == each].mean() - sure[bins == each].mean()) * (bins == each).mean() for each in set(bins)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a type told of no cell
        balanced = balanced_accuracy_score(types, told)
    return float(right.mean()), float(balanced), float(np.log2(np.maximum(of_truth, 1e-6)).mean()), float(sum(gaps))


if __name__ == "__main__":
    main()
