"""Fit a model to simulated cells, and measure how much of the known truth it recovers."""

from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from celbo.data.normalise import log_normalise
from celbo.estimator import ExpressionVAE
from celbo.fit.train import TrainConfig
from celbo.simulate import simulate_cells
from celbo.streams import short_seed

__all__ = ["DEMO_CONDITIONS", "Recovery", "demo_cells", "demo_model", "knn_accuracy", "recover"]

DEMO_CONDITIONS = ("batch", "treatment")


class Recovery(NamedTuple):
    """How well the model recovers one part of the truth."""

    name: str
    value: float
    reference: float | None
    """The value that a simple method reaches, or None."""
    meaning: str


def demo_cells(seed: int = 0) -> AnnData:
    """Simulate 3,000 cells x 1,000 genes: 6 types, 2 batches, a treatment that acts on known genes in 3 types."""
    return simulate_cells(3000, 1000, n_types=6, n_batches=2, seed=seed)


def demo_model(seed: int = 0) -> ExpressionVAE:
    """Make the model of the demo: the defaults, conditioned on batch and treatment."""
    return ExpressionVAE(conditions=DEMO_CONDITIONS, train=TrainConfig(seed=seed))


def recover(model: ExpressionVAE, adata: AnnData) -> list[Recovery]:
    """Compare what a model learned with the truth of the simulation.

    Parameters
    ----------
    model
        Fitted to ``adata`` with the conditions "batch" and "treatment".
    adata
        From `celbo.simulate_cells`.

    Returns
    -------
    list of Recovery
        How well nearest neighbours in the latent space predict type and batch, compared with principal components of
        log-normalised counts; and how well the model decodes the effect of the treatment.
    """
    latent, components = model.embed(adata), _components(adata)
    types, batches = adata.obs["cell_type"], adata.obs["batch"]
    chance = batches.value_counts(normalize=True).max()
    return [
        Recovery(
            "cell types",
            knn_accuracy(latent, types),
            knn_accuracy(components, types),
            "share of cells whose type their 15 nearest neighbours predict; high is good",
        ),
        Recovery(
            "batch",
            knn_accuracy(latent, batches),
            knn_accuracy(components, batches),
            f"the same for the batch, where low is good; chance is {chance:.2f}",
        ),
        Recovery(
            "treatment effect",
            _treatment_correlation(model, adata),
            None,
            "correlation of the decoded with the true log fold changes, over treated genes and responding types",
        ),
    ]


def knn_accuracy(z: NDArray[np.floating[Any]], labels: Any, *, k: int = 15, seed: int = 0) -> float:
    """Compute the five-fold cross-validated accuracy of labels predicted by the k nearest neighbours.

    Parameters
    ----------
    z
        Positions, ``(cells, dimensions)``.
    labels
        One per cell.
    k
        Number of neighbours.
    seed
        Seed of the folds.

    Examples
    --------
    >>> z = np.repeat([[0.0], [9.0]], 50, axis=0) + np.random.default_rng(0).normal(size=(100, 1))
    >>> knn_accuracy(z, ["a"] * 50 + ["b"] * 50)
    1.0
    """
    folds = StratifiedKFold(5, shuffle=True, random_state=short_seed(seed))
    return float(cross_val_score(KNeighborsClassifier(k), z, np.asarray(labels).astype(str), cv=folds).mean())


def _components(adata: AnnData, n: int = 10) -> NDArray[np.float64]:
    """Compute principal components of log-normalised counts, the usual method without a model."""
    counts = adata.X.toarray()
    return PCA(n, random_state=0).fit_transform(log_normalise(counts, counts.sum(1, keepdims=True)))


def _treatment_correlation(model: ExpressionVAE, adata: AnnData) -> float:
    """Correlate decoded with true log fold changes (Pearson), over treated genes x responding types."""
    shares = {
        level: model.expected_expression(adata, given={"treatment": level}, library=1.0)
        for level in ("ctrl", "treated")
    }
    truth = adata.varm["treatment_lfc"]
    genes = adata.var["treatment_gene"].to_numpy()
    decoded, true = [], []
    for cell_type in truth.columns[truth.any()]:
        cells = (adata.obs["cell_type"] == cell_type).to_numpy()
        mean = {level: share[np.ix_(cells, genes)].mean(0) for level, share in shares.items()}
        decoded.append(np.log(mean["treated"] / mean["ctrl"]))
        true.append(truth[cell_type].to_numpy()[genes])
    return float(np.corrcoef(np.concatenate(decoded), np.concatenate(true))[0, 1])
