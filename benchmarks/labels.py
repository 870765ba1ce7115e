"""Labels of some cells: how many of the others are told right, and how a type that was never labelled is taken.

    python benchmarks/labels.py

Simulated are 2,500 cells of five types and 150 genes. Labelled are a fifth of the cells, or ("uneven") a twentieth of
one type and a quarter of the others; of the first type none. It is among the cells of fit, unlabelled, or not there.
"""

import argparse
import warnings

import numpy as np

import celbo
from celbo.labels import NONE_OF_THESE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| labelled | the type is | told right | known types called none of these | the type called none of these |")
    print("|---|---|---|---|---|")
    for name in ("even", "uneven"):
        for is_there in (True, False):
            found = np.array([measured(seed, name == "uneven", is_there) for seed in options.seeds])
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


if __name__ == "__main__":
    main()
