"""Make a golden folder: a small model and what it says of a few cells. Run once for each format or version kept.

python tests/golden/make.py NAME '{"likelihood": "nb", "conditions": ["batch", "dose"]}'
"""

import json
import sys
from pathlib import Path

import numpy as np

import celbo


def main(name: str, options: str) -> None:
    """Fit simulated cells, save the model, and keep ten of the cells with their posterior."""
    cells = celbo.simulate_cells(n_cells=120, n_genes=12, n_types=3, median_library=80, seed=5)
    cells.obs["dose"] = np.linspace(0.0, 1.0, 120)
    train = celbo.TrainConfig(max_epochs=3, seed=1)
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(6,), train=train, **json.loads(options)).fit(cells)
    folder = Path(__file__).parent / name
    model.save(folder / "model")
    some = cells[:10]
    mu_z, sd_z = model.posterior(some)
    answers = {
        "genes": list(some.var_names),
        "counts": some.X.toarray().astype(int).tolist(),
        "obs": {"batch": some.obs["batch"].astype(str).tolist(), "dose": some.obs["dose"].tolist()},
        "mu_z": mu_z.tolist(),
        "sd_z": sd_z.tolist(),
        "expected": model.expected_expression(some).tolist(),
    }
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
