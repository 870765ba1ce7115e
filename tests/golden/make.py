"""Make a golden folder: a small model and its answers for ten cells. Run once for each format or kind of model kept.

python tests/golden/make.py NAME '{"likelihood": "nb", "conditions": ["batch", "dose"]}'

With `--map`, batch_1 is left out of the fit and mapped afterwards.
"""

import json
import sys
from pathlib import Path

import numpy as np

import celbo


def main(name: str, options: str, *, mapped: bool = False) -> None:
    """Fit simulated cells, save the model, and keep ten of the cells with the model's answers."""
    cells = celbo.simulate_cells(n_cells=120, n_genes=12, n_types=3, median_library=80, seed=5)
    cells.obs["dose"] = np.linspace(0.0, 1.0, 120)
    cells.obs["donor"] = [f"donor_{number % 60}" for number in range(120)]
    is_known = np.arange(120) % 3 > 0
    cells.obs["known_type"] = cells.obs["cell_type"].astype(str).where(is_known, "unknown")
    cells.obs["batch"] = cells.obs["batch"].astype(str)
    train = celbo.TrainConfig(max_epochs=3, seed=1)
    model = celbo.ExpressionVAE(**{"latent_dim": 2, "hidden_dims": (6,), "train": train, **json.loads(options)})
    is_new = (cells.obs["batch"] == "batch_1").to_numpy()
    model = model.fit(cells[~is_new]).map_query(cells[is_new]) if mapped else model.fit(cells)
    folder = Path(__file__).parent / name
    model.save(folder / "model")
    some = cells[:10]
    mu_z, sd_z = model.posterior(some)
    columns = ["batch", "treatment", "donor", "known_type"]
    answers = {
        "genes": list(some.var_names),
        "counts": some.X.toarray().astype(int).tolist(),
        "obs": {
            **{column: some.obs[column].astype(str).tolist() for column in columns},
            "dose": list(some.obs["dose"]),
        },
        "mu_z": mu_z.tolist(),
        "sd_z": sd_z.tolist(),
        "expected": model.expected_expression(some).tolist(),
        "log_p": model.log_prob(some, n_samples=20)["log_p"].tolist(),
        "sample": model.sample(3, seed=1).X.toarray().astype(int).tolist(),
    }
    if model.labels is not None:
        answers["labels"] = model.predict(some)["label"].astype(str).tolist()
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--map"]
    main(*arguments, mapped="--map" in sys.argv)
