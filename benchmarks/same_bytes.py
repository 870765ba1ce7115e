"""Print SHA-256 hashes of what models learn and answer, to compare two versions of celbo in one environment.

python benchmarks/same_bytes.py [DATA [golden simulated real]] > after.json
PYTHONPATH=/other/checkout/src python benchmarks/same_bytes.py [DATA] > before.json

Without DATA (the folder of real counts) only simulated cells are used. The same seed must give the same bytes on the
same machine. `python benchmarks/same_bytes.py --compare before.json after.json` lists what differs.
"""

import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import celbo

try:
    from celbo.data.read import read_adata
except ImportError:
    from celbo.data import read_adata

TRAIN = celbo.TrainConfig(max_epochs=12, seed=3, threads=2)


def digest(value) -> str:
    """SHA-256 of an array, sparse matrix, table, AnnData, or JSON value."""
    if isinstance(value, anndata.AnnData):
        parts = {"X": value.X, "obs": value.obs, "var": value.var}
        parts |= {f"obsm {name}": part for name, part in value.obsm.items()}
        parts |= {f"layer {name}": part for name, part in value.layers.items() if name is not None}
        return digest({name: digest(part) for name, part in parts.items() if part is not None})
    if isinstance(value, pd.DataFrame):
        return digest([value.to_csv(float_format=None), list(map(str, value.columns)), list(map(str, value.dtypes))])
    if sparse.issparse(value):
        value = value.toarray()
    if isinstance(value, np.ndarray):
        kind = f"{value.dtype} {value.shape}".encode()
        return hashlib.sha256(kind + np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def answers(model, cells, fit_cells, given=None, groupby=None) -> dict[str, str]:
    """Hash the weights, and the answers to every question."""
    found = {f"weight {name}": digest(value.cpu().numpy()) for name, value in model.vae_.state_dict().items()}
    found["history"] = digest(model.history_.to_frame().drop(columns="seconds"))
    mu_z, sd_z = model.posterior(cells)
    found |= {"mu_z": digest(mu_z), "sd_z": digest(sd_z), "elbo": digest(model.elbo(cells, seed=1))}
    found["expected"] = digest(model.expected_expression(cells))
    if model.objective == "vae":
        found["log_prob"] = digest(model.log_prob(cells[:60], n_samples=40))
        found["log_prob refined"] = digest(model.log_prob(cells[:20], n_samples=20, refine=True))
        found["outliers"] = digest(model.outliers(cells))
        found["diagnose"] = digest(model.diagnose(fit_cells, groupby=groupby).to_json())
    found["sample"] = digest(model.sample(50, seed=2))
    found["sample mixture"] = digest(model.sample(50, seed=2, source="mixture"))
    if model.objective == "vae":
        found["sample prior"] = digest(model.sample(50, seed=2, source="prior"))
    found["sample around"] = digest(model.sample(50, seed=2, around=cells[:20]))
    found["interpolate"] = digest(model.interpolate(cells[:3], cells[3:9], n_points=4))
    if given:
        changed = model.counterfactual(cells, given, n_samples=6)
        found |= {
            "counterfactual": digest(changed.mean),
            "lower": digest(changed.lower),
            "upper": digest(changed.upper),
        }
        found |= {"support": digest(changed.support), "changed genes": digest(changed.genes)}
        found["counterfactual sample"] = digest(changed.sample(seed=1))
        if model.schema_.values == "counts":
            found["group mean"] = digest(changed.group_mean(n_draws=8))
        found["expected given"] = digest(model.expected_expression(cells, given=given))
    if groupby and model.schema_.values == "counts":
        found["de"] = digest(model.differential_expression(cells, groupby=groupby, n_samples=2))
    if model.labels:
        found["predict"] = digest(model.predict(cells))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        found["weights file"] = digest(
            np.frombuffer((Path(folder) / "model/weights.safetensors").read_bytes(), np.uint8)
        )
        loaded = celbo.load(Path(folder) / "model")
        found["loaded mu_z"] = digest(loaded.posterior(cells)[0])
        found["reference file"] = digest(
            np.frombuffer((Path(folder) / "model/reference.safetensors").read_bytes(), np.uint8)
        )
    return found


def simulated():
    """Hash 14 kinds of models of simulated cells."""
    cells = celbo.simulate_cells(900, 200, n_types=5, n_batches=3, median_library=600, seed=1)
    cells.obs["known"] = cells.obs["cell_type"].astype(str).where(np.arange(900) % 4 > 0, "unknown")
    treated = {"treatment": "treated"}
    fit = lambda **options: celbo.ExpressionVAE(**{"latent_dim": 6, "train": TRAIN, **options})  # noqa: E731
    two = fit(conditions=["batch", "treatment"], interactions=["batch:treatment"]).fit(cells)
    yield "batch and treatment", answers(two, cells, cells, treated, "cell_type")
    top = fit(nuisance=["batch"], conditions=["treatment"], n_top_genes=120, likelihood="zinb").fit(cells)
    yield "chosen genes", answers(top, cells, cells, treated, "cell_type")
    yield "missing genes", answers(top, cells[:, np.arange(200) % 9 > 0], cells, treated, "cell_type")
    labels = fit(nuisance=["batch"], labels="known").fit(cells)
    yield "labels", answers(labels, cells, cells, groupby="cell_type")
    few = cells[(cells.obs["batch"] != "batch_2").to_numpy()]
    base = fit(nuisance=["batch"], conditions=["treatment"]).fit(few)
    mapped = base.map_query(cells)
    yield "mapped", answers(mapped, cells, few, treated)
    nearest = {
        f"{unseen} {number}": digest(part)
        for unseen in ("nearest", "marginal", "adapt")
        for number, part in enumerate(base.posterior(cells, unseen=unseen))
    }
    yield "unseen levels", nearest | {"outliers": digest(base.outliers(cells, unseen="nearest"))}
    for name, options in {
        "gaussian": {"likelihood": "gaussian", "conditions": ["treatment"]},
        "bernoulli": {"likelihood": "bernoulli", "remedies": ["cyclical", "soft_free_bits"]},
        "poisson vamp": {"likelihood": "poisson", "prior": "vamp:20", "nuisance": ["batch"]},
        "autoencoder": {"objective": "autoencoder"},
        "norm_mu": {"remedies": ["norm_mu", "free_bits:0.1", "mmd:1", "autoencoder_start"], "dispersion": "gene-cell"},
        "batch norm": {
            "norm": "batch",
            "remedies": ["linear_decoder", "capacity:5", "match_levels"],
            "nuisance": ["batch"],
        },
        "skip": {"hidden_dims": (32, 16), "remedies": ["skip", "beta:0.5"], "prior": "mixture:5"},
    }.items():
        yield name, answers(fit(**options).fit(cells), cells[:300], cells, treated if "conditions" in options else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        cells.write_h5ad(path)
        from_disk = read_adata(path, on_disk=True)
        model = fit(nuisance=["batch"], conditions=["treatment"], n_top_genes=100).fit(from_disk)
        yield "on disk", answers(model, from_disk, from_disk, treated, "cell_type")


def real(data: Path):
    """Models of four sets of real counts."""
    read = lambda name: anndata.read_h5ad(data / f"{name}.h5ad")  # noqa: E731
    kang = read("kang_ifnb")
    fitted = celbo.ExpressionVAE(conditions=["condition"], n_top_genes=2000, train=TRAIN).fit(kang)
    yield "kang_ifnb", answers(fitted, kang[::4], kang, {"condition": "stim"}, "cell_type")
    gbm = read("gbm_panobinostat")
    fitted = celbo.ExpressionVAE(conditions=["condition"], nuisance=["donor"], train=TRAIN).fit(gbm)
    yield "gbm_panobinostat", answers(fitted, gbm[::5], gbm, {"condition": "panobinostat"})
    pbmc = read("pbmc3k")
    fitted = celbo.ExpressionVAE(n_top_genes=1500, train=TRAIN).fit(pbmc)
    yield "pbmc3k, missing genes", answers(fitted, pbmc[::4, np.arange(pbmc.n_vars) % 8 > 0], pbmc, groupby="cell_type")
    tech = read("pbmc_3tech")
    tech.obs["known"] = tech.obs["cell_type"].astype(str).where(np.arange(tech.n_obs) % 2 > 0, "unknown")
    fitted = celbo.ExpressionVAE(nuisance=["batch"], labels="known", train=TRAIN).fit(tech)
    yield "pbmc_3tech, labels", answers(fitted, tech, tech, groupby="cell_type")


def golden():
    """What the golden folders answer."""
    for folder in sorted((Path(__file__).parents[1] / "tests" / "golden").glob("*/answers.json")):
        known = json.loads(folder.read_text())
        cells = anndata.AnnData(
            np.array(known["counts"], np.float32),
            obs=pd.DataFrame(known["obs"]),
            var=pd.DataFrame(index=known["genes"]),
        )
        cells.obs_names = [f"cell_{number}" for number in range(cells.n_obs)]
        model = celbo.load(folder.parent)
        found = {"mu_z": digest(model.posterior(cells)[0]), "sd_z": digest(model.posterior(cells)[1])}
        found |= {"expected": digest(model.expected_expression(cells)), "elbo": digest(model.elbo(cells))}
        found |= {"log_prob": digest(model.log_prob(cells, n_samples=20)), "sample": digest(model.sample(9, seed=4))}
        if model.labels:
            found["predict"] = digest(model.predict(cells))
        yield folder.parent.name, found


def main() -> None:
    """Print all hashes, or compare two files of them."""
    if sys.argv[1:2] == ["--compare"]:
        before, after = (json.loads(Path(path).read_text()) for path in sys.argv[2:])
        differ = [
            f"{name}: {key}"
            for name in sorted(before.keys() | after.keys())
            for key in sorted(before.get(name, {}).keys() | after.get(name, {}).keys())
            if before.get(name, {}).get(key) != after.get(name, {}).get(key)
        ]
        n_hashes = sum(map(len, before.values()))
        print("\n".join(differ) or f"all {n_hashes} hashes are the same" if n_hashes else "there are no hashes")
        sys.exit(bool(differ) or not n_hashes)
    warnings.simplefilter("ignore")
    found = {}
    only = sys.argv[2:] if len(sys.argv) > 2 else ["golden", "simulated", "real"]
    parts = {"golden": golden, "simulated": simulated, "real": lambda: real(Path(sys.argv[1])) if sys.argv[1:] else ()}
    for part in only:
        for name, hashes in parts[part]():
            found[name] = hashes
            print(name, len(hashes), file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
