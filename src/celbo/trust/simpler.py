"""Simpler models of the same cells, as a comparison: gene means, principal components, and the spectrum of the data."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, Distribution, Normal

from celbo.data.normalise import log_normalise
from celbo.minibatch import Minibatch, Rows, Source, gene_moments, in_chunks
from celbo.model.ablation import in_brief
from celbo.model.distributions import NegativeBinomial
from celbo.model.inference import CHUNK
from celbo.model.likelihoods import Likelihood
from celbo.model.objective import log_prob_of_cells

__all__ = [
    "Sample",
    "expected_dim",
    "gene_mean_log_prob",
    "principal_component_log_prob",
    "principal_components",
    "read_sample",
]

Dense = NDArray[np.float32]

_GENES_OF_SPECTRUM = 1500
_ABOVE_NOISE = 1.05
"""An eigenvalue counts above this many times the edge of noise: the edge is sharp only for many cells and genes."""
_FEWEST_IN_CONTEXT = 20
"""Median number of cells of a context below which contexts do not get means of their own."""
_OF_GENE_MEAN = 0.05
"""Share of the gene mean in the mean by principal components, so that no count is impossible."""
_THETA_RANGE = (1e-2, 1e3)


@dataclass(frozen=True, eq=False)
class Sample:
    """Training cells that simpler models learn from."""

    x: Dense
    """Values as the likelihood takes them, ``(cells, genes)``."""
    library: Dense
    """``(cells, 1)``."""
    groups: NDArray[np.intp]
    """Number of the context of each cell, ``(cells,)``; all 0 if most contexts have few cells."""
    is_counts: bool

    @cached_property
    def scaled(self) -> Dense:
        """Values that principal components see, ``(cells, genes)``."""
        return self.scale(self.x, self.library)

    def scale(self, x: Dense, library: Dense) -> Dense:
        """Log-normalise counts; leave other values as they are."""
        return log_normalise(x, library).astype(np.float32, copy=False) if self.is_counts else x

    def components(self, n: int) -> PCA:
        """Fit ``n`` principal components, or as many as there can be."""
        n = min(n, *(side - 1 for side in self.x.shape))
        return PCA(n, svd_solver="randomized", random_state=0).fit(self.scaled)


def read_sample(source: Source, rows: Rows, *, is_counts: bool) -> Sample:
    """Read the cells at these positions into dense arrays; ``is_counts`` says whether their values are counts."""
    x, library, contexts = [], [], []
    for piece in in_chunks(rows, CHUNK):
        cells = source.take(piece)
        x.append(cells.x.to_dense())
        library.append(cells.library)
        contexts.append(sparse.csr_matrix(cells.context.numpy()))
    brief = in_brief(sparse.vstack(contexts, format="csr"))
    _, groups, sizes = np.unique(brief, axis=0, return_inverse=True, return_counts=True)
    groups = np.zeros(len(rows), np.intp) if np.median(sizes) < _FEWEST_IN_CONTEXT else groups.reshape(-1)
    return Sample(torch.cat(x).numpy(), torch.cat(library).numpy(), groups, is_counts)


def gene_mean_log_prob(
    source: Source, rows: Rows, training: Rows, likelihood: Likelihood, dispersion: str = "gene"
) -> NDArray[np.float32]:
    """Compute the log-likelihood of cells under the best model without z, gene means x library size.

    Training starts at this model: the closed form of `celbo.model.likelihoods.Head.initialise` on the training cells.
    Returns ``(rows,)``, nats.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and have no effect
        head, fc_out = likelihood.make_head(source.n_genes, 1, 0, dispersion), nn.Linear(1, source.n_genes)
    head.initialise(fc_out, gene_moments(source, training))
    log_prob = []
    with torch.no_grad():
        for piece in in_chunks(rows, CHUNK):
            cells = source.take(piece)
            p = head(torch.zeros(len(piece), 1), fc_out, None, cells.library)
            log_prob.append(log_prob_of_cells(p, cells.x, cells.observed).numpy())
    return np.concatenate(log_prob)


def principal_component_log_prob(
    source: Source, rows: Rows, sample: Sample, likelihood: Likelihood, n_components: int, dispersion: str = "gene"
) -> NDArray[np.float32]:
    """Compute the log-likelihood of cells as principal components reconstruct them; ``(rows,)``, nats.

    Counts are log-normalised (10,000 a cell), projected, and turned back into means. The noise around the means is
    negative binomial, theta by moments; for real numbers it is normal, with a variance for each gene. As with the
    reconstruction of a VAE, the model has seen the cell that it describes.
    """
    pca = sample.components(n_components)
    share = sample.x.sum(0, dtype=np.float64) + 0.5
    share /= share.sum()

    def expected(x: Dense, library: Dense) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = pca.inverse_transform(pca.transform(sample.scale(x, library))).astype(np.float64)
        if not sample.is_counts:
            return mean
        mean = np.expm1(mean).clip(0)
        mean /= np.maximum(mean.sum(1, keepdims=True), 1e-12)
        return ((1 - _OF_GENE_MEAN) * mean + _OF_GENE_MEAN * share) * np.maximum(library, 1e-8)

    spread = torch.from_numpy(_spread(sample, expected(sample.x, sample.library), dispersion))
    log_prob = []
    for piece in in_chunks(rows, CHUNK):
        x, library = _dense(source.take(piece))
        mu = torch.from_numpy(expected(x, library))
        p: Distribution
        if sample.is_counts:
            p = NegativeBinomial(mu, spread, validate_args=False)
        elif likelihood.values == "detected":
            p = Bernoulli(probs=mu.clamp(0.005, 0.995))
        else:
            p = Normal(mu, spread)
        log_prob.append(p.log_prob(torch.from_numpy(x).double()).sum(-1).numpy().astype(np.float32))
    return np.concatenate(log_prob)


def _spread(sample: Sample, mean: NDArray[np.float64], dispersion: str) -> NDArray[np.floating[Any]]:
    """Estimate theta of each gene for counts, the standard deviation for real numbers, ``(genes,)``."""
    if sample.is_counts:
        excess = ((sample.x - mean) ** 2 - mean).sum(0)
        theta = np.where(excess > 0, (mean**2).sum(0) / np.maximum(excess, 1e-12), _THETA_RANGE[1])
        return theta.clip(*_THETA_RANGE)
    sd: NDArray[np.floating[Any]] = np.sqrt(((sample.x - mean) ** 2).mean(0)).clip(1e-2)
    return np.ones_like(sd) if dispersion == "fixed" else sd


def principal_components(source: Source, rows: Rows, sample: Sample, n: int) -> NDArray[np.float32]:
    """Compute the first ``n`` principal components of log-normalised values, ``(rows, n)``."""
    pca = sample.components(n)
    components: NDArray[np.float32] = np.concatenate(
        [pca.transform(sample.scale(*_dense(source.take(piece)))) for piece in in_chunks(rows, CHUNK)]
    )
    return components


def expected_dim(sample: Sample) -> int:
    """Count the dimensions of the cells above their noise: eigenvalues of the covariance beyond the edge of noise.

    The covariance is that of Pearson residuals for counts, of centred values for real numbers, around the means of each
    context. Each gene is scaled to a variance of 1, so that without structure no eigenvalue is above
    ``(1 + sqrt(genes / cells))**2`` (Marchenko-Pastur).
    """
    genes = np.argsort(-sample.x.mean(0), kind="stable")[:_GENES_OF_SPECTRUM]
    x = sample.x[:, genes].astype(np.float64)
    residual = np.empty_like(x)
    for group in np.unique(sample.groups):
        members = sample.groups == group
        size = sample.library[members].astype(np.float64) if sample.is_counts else np.ones((members.sum(), 1))
        mean = size * (x[members].sum(0) / max(size.sum(), 1e-12))
        centred = x[members] - mean
        residual[members] = centred / np.sqrt(np.maximum(mean, 1e-8)) if sample.is_counts else centred
    if sample.is_counts:
        residual = residual.clip(-np.sqrt(len(x)), np.sqrt(len(x)))
    sd = residual.std(0)
    residual = residual[:, sd > 1e-8] / sd[sd > 1e-8]
    n_cells, n_genes = residual.shape
    small = residual @ residual.T if n_cells < n_genes else residual.T @ residual
    eigenvalues = np.linalg.eigvalsh(small / n_cells)
    edge = (1 + np.sqrt(n_genes / n_cells)) ** 2
    return int((eigenvalues > _ABOVE_NOISE * edge).sum())


def _dense(cells: Minibatch) -> tuple[Dense, Dense]:
    """Return values ``(cells, genes)`` and library sizes ``(cells, 1)``."""
    return cells.x.to_dense().numpy(), cells.library.numpy()
