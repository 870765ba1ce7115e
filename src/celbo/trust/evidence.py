"""What diagnostics want to know of a model and its cells: ablations, simpler models, the dimensions of the data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal

from celbo.data.conditions import Condition
from celbo.minibatch import Rows, Source, gene_moments, in_chunks
from celbo.model.ablation import in_brief, sensitivity, use_of_latent
from celbo.model.distributions import NegativeBinomial
from celbo.model.inference import cell_terms, posterior
from celbo.model.information import ACTIVE, ANCHORS
from celbo.model.likelihoods import Likelihood
from celbo.model.objective import Objective, log_prob_of_cells
from celbo.model.vae import VAE
from celbo.streams import Stream, random_stream
from celbo.trust.advice import Evidence
from celbo.trust.diagnostics import condition_ablation, enough_ablation, falls_short

__all__ = ["doubts_of_fit", "expected_dim", "gather", "gene_mean_log_prob", "principal_component_log_prob"]

_CELLS_TO_LEARN_FROM = 3000
"""Training cells that principal components and the spectrum of the data are taken from."""
_CELLS_FOR_SENSITIVITY = 500
_CELLS_TO_LOOK_AT = 1000
"""After each fit."""
_PRINCIPAL = 30
_GENES_OF_SPECTRUM = 1500
_ABOVE_NOISE = 1.05
"""An eigenvalue counts above this many times the edge of noise: the edge is sharp only for many cells and genes."""
_OF_GENE_MEAN = 0.05
"""Share of the gene mean in what principal components expect, so that nothing is held impossible."""
_THETA_RANGE = (1e-2, 1e3)
_CHUNK = 1024


def gather(
    vae: VAE,
    source: Source,
    rows: Rows,
    training: Rows,
    likelihood: Likelihood,
    *,
    objective: Objective,
    conditions: Mapping[str, tuple[slice, NDArray[Any]]],
    settings: Mapping[str, Any],
    types: NDArray[Any] | None = None,
    seed: int = 0,
) -> Evidence:
    """Measure a model on some cells.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    rows
        Those to measure on; best ones that it did not learn from.
    training
        Those that simpler models learn from.
    likelihood
        Row of the model's likelihood.
    objective
        What the model was trained for.
    conditions
        For each condition its columns of the context, and each cell's level or value, ``(rows,)``.
    settings
        What `celbo.trust.diagnostics.diagnose` asks of how the model was trained.
    types
        Known types, ``(rows,)``.
    seed
        Of all draws.

    Returns
    -------
    Evidence
    """
    terms = cell_terms(vae, source, rows, seed=seed, objective=objective)
    use = use_of_latent(
        vae,
        source,
        rows,
        by_dimension=True,
        of_context=[columns for columns, _ in conditions.values()],
        sample=settings.get("objective") != "autoencoder",
        seed=seed,
    )
    n_parts = 1 + vae.latent_dim
    some, few = _some(training, _CELLS_TO_LEARN_FROM, seed), _some(rows, _CELLS_FOR_SENSITIVITY, seed)
    dispersion = "fixed" if settings.get("dispersion") == "fixed" else "gene"
    enough = len(some) > 2 * vae.latent_dim < source.n_genes and source.take(rows[:1]).observed is None
    return Evidence(
        mu_z=use.mu_z,
        logvar_z=use.logvar_z,
        anchors=posterior(vae, source, _some(np.union1d(rows, training), ANCHORS, seed)),
        kl=terms.kl,
        lost=use.lost[:n_parts],
        elbo=terms.elbo,
        reconstruction=terms.reconstruction,
        gene_means=gene_mean_log_prob(source, rows, training, likelihood, dispersion),
        components=principal_component_log_prob(source, rows, some, likelihood, vae.latent_dim, dispersion)
        if enough
        else None,
        expected_dim=expected_dim(source, some, is_counts=likelihood.values == "counts") if enough else None,
        sensitivity=sensitivity(vae, source, few),
        lost_by_condition={
            name: lost[~np.isnan(lost)] for name, lost in zip(conditions, use.lost[n_parts:], strict=True)
        },
        conditions={name: levels for name, (_, levels) in conditions.items()},
        types=types,
        principal=None
        if types is None or not enough
        else _principal(source, rows, some, likelihood.values == "counts"),
        settings=settings,
    )


def doubts_of_fit(
    vae: VAE,
    source: Source,
    held_out: Rows,
    training: Rows,
    likelihood: Likelihood,
    *,
    objective: Objective,
    conditions: Sequence[Condition],
    columns: Sequence[slice],
    settings: Mapping[str, Any],
    seed: int = 0,
) -> list[str]:
    """What a person must hear of a model that was just fitted, from a look at 1,000 cells: empty if nothing.

    A decoder that does not listen to z, or to a condition that one wants to ask about; a z far narrower than the data.

    Parameters
    ----------
    vae, source, training, likelihood, objective, settings, seed
        As in `gather`.
    held_out
        Cells that the model did not learn from; those that it did, where there are fewer than two others.
    conditions, columns
        The conditions, and where in the context each is.
    """
    rng = random_stream(seed, Stream.DOUBTS)
    rows, learned = (
        np.sort(rng.permutation(cells)[:n])
        for cells, n in ((held_out, _CELLS_TO_LOOK_AT), (training, 3 * _CELLS_TO_LOOK_AT))
    )
    if len(rows) < 2:
        return []
    sample, dispersion = settings["objective"] != "autoencoder", settings["dispersion"]
    use = use_of_latent(vae, source, rows, of_context=columns, sample=sample, seed=seed)
    elbo = cell_terms(vae, source, rows, seed=seed, objective=objective).elbo
    means = gene_mean_log_prob(source, rows, learned, likelihood, "fixed" if dispersion == "fixed" else "gene")
    found, nats = [], float(use.lost[0].mean())
    if nats < enough_ablation(float((elbo - means).mean())):
        found.append(
            f"posterior collapse: the decoder loses {max(0.0, nats):.2f} nats per cell without z, so that the "
            "latent space shows a blob without separation"
        )
    elif 2 * (active := int((use.mu_z.var(0) > ACTIVE).sum())) < vae.latent_dim:  # else not worth looking
        expected = expected_dim(source, learned, is_counts=likelihood.values == "counts")
        if falls_short(active, expected, vae.latent_dim):
            found.append(
                f"posterior collapse in part: {active} of {vae.latent_dim} latent dimensions vary between cells, "
                f"where the data show {expected} above their noise"
            )
    for condition, lost in zip(conditions, use.lost[1:], strict=True):
        ignored = condition_ablation(condition.name, lost[~np.isnan(lost)])
        if ignored.verdict == "bad" and not condition.nuisance:
            found.append(ignored.meaning)
    return [f"{each}; model.diagnose(adata) (celbo diagnose RUN) says why, and what to try." for each in found]


def gene_mean_log_prob(
    source: Source, rows: Rows, training: Rows, likelihood: Likelihood, dispersion: str = "gene"
) -> NDArray[np.float32]:
    """Log-likelihood of cells under the best model without z: gene means x library size; ``(rows,)``, nats.

    It is where training starts: the closed form of `celbo.model.likelihoods.Head.initialise` on the training cells.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and play no part
        head, fc_out = likelihood.make_head(source.n_genes, 1, 0, dispersion), nn.Linear(1, source.n_genes)
    head.initialise(fc_out, gene_moments(source, training))
    found = []
    with torch.no_grad():
        for piece in in_chunks(rows, _CHUNK):
            cells = source.take(piece)
            p = head(torch.zeros(len(piece), 1), fc_out, None, cells.library)
            found.append(log_prob_of_cells(p, cells.x, cells.observed).numpy())
    return np.concatenate(found)


def principal_component_log_prob(
    source: Source, rows: Rows, training: Rows, likelihood: Likelihood, n_components: int, dispersion: str = "gene"
) -> NDArray[np.float32]:
    """Log-likelihood of cells under what principal components make of them; ``(rows,)``, nats.

    Counts are log-normalised (10,000 a cell), projected, and turned back into means; what remains is negative binomial,
    theta by moments. Reals keep a normal error by gene. Like a reconstruction it has seen the cell it describes.
    """
    is_counts = likelihood.values == "counts"

    def scaled(x: NDArray[np.float32], library: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.log1p(x * (1e4 / np.maximum(library, 1e-8))).astype(np.float32) if is_counts else x

    x, library = _dense(source, training)
    n_components = min(n_components, *(side - 1 for side in x.shape))
    pca = PCA(n_components, svd_solver="randomized", random_state=0).fit(scaled(x, library))
    share = x.sum(0, dtype=np.float64) + 0.5
    share /= share.sum()

    def expected(x: NDArray[np.float32], library: NDArray[np.float32]) -> NDArray[np.float64]:
        found = pca.inverse_transform(pca.transform(scaled(x, library))).astype(np.float64)
        if not is_counts:
            return found
        found = np.expm1(found).clip(0)
        found /= np.maximum(found.sum(1, keepdims=True), 1e-12)
        return ((1 - _OF_GENE_MEAN) * found + _OF_GENE_MEAN * share) * np.maximum(library, 1e-8)

    mean = expected(x, library)
    if is_counts:
        excess = ((x - mean) ** 2 - mean).sum(0)
        theta = np.where(excess > 0, (mean**2).sum(0) / np.maximum(excess, 1e-12), _THETA_RANGE[1])
        spread = torch.from_numpy(theta.clip(*_THETA_RANGE))
    else:
        sd = np.sqrt(((x - mean) ** 2).mean(0)).clip(1e-2)
        spread = torch.from_numpy(np.ones_like(sd) if dispersion == "fixed" else sd)
    found = []
    for piece in in_chunks(rows, _CHUNK):
        x, library = _dense(source, piece)
        mu, values = torch.from_numpy(expected(x, library)), torch.from_numpy(x).double()
        p: Distribution
        if is_counts:
            p = NegativeBinomial(mu, spread, validate_args=False)
        elif likelihood.values == "detected":
            p = Bernoulli(probs=mu.clamp(0.005, 0.995))
        else:
            p = Normal(mu, spread)
        found.append(p.log_prob(values).sum(-1).numpy().astype(np.float32))
    return np.concatenate(found)


def _principal(source: Source, rows: Rows, training: Rows, is_counts: bool) -> NDArray[np.float32]:
    """The first 30 principal components of log-normalised values, ``(rows, 30)``."""

    def scaled(some: Rows) -> NDArray[np.float32]:
        x, library = _dense(source, some)
        return np.log1p(x * (1e4 / np.maximum(library, 1e-8))).astype(np.float32) if is_counts else x

    x = scaled(training)
    pca = PCA(min(_PRINCIPAL, *(side - 1 for side in x.shape)), svd_solver="randomized", random_state=0).fit(x)
    found: NDArray[np.float32] = np.concatenate([pca.transform(scaled(piece)) for piece in in_chunks(rows, _CHUNK)])
    return found


def expected_dim(source: Source, training: Rows, *, is_counts: bool) -> int:
    """Dimensions of these cells above their noise: eigenvalues of the covariance of residuals beyond the edge of noise.

    Of counts the Pearson residuals, of reals standardised ones, around the means of each context; scaled to a variance
    of 1 by gene, so that without structure no eigenvalue is above ``(1 + sqrt(genes / cells))**2`` (Marchenko-Pastur).
    """
    x, library = _dense(source, training)
    genes = np.argsort(-x.mean(0), kind="stable")[:_GENES_OF_SPECTRUM]
    x = x[:, genes].astype(np.float64)
    groups = _groups(source, training)
    residual = np.empty_like(x)
    for group in np.unique(groups):
        here = groups == group
        size = library[here].astype(np.float64) if is_counts else np.ones((here.sum(), 1))
        mean = size * (x[here].sum(0) / max(size.sum(), 1e-12))
        residual[here] = (x[here] - mean) / np.sqrt(np.maximum(mean, 1e-8)) if is_counts else x[here] - mean
    if is_counts:
        residual = residual.clip(-np.sqrt(len(x)), np.sqrt(len(x)))
    sd = residual.std(0)
    residual = residual[:, sd > 1e-8] / sd[sd > 1e-8]
    n_cells, n_genes = residual.shape
    small = residual @ residual.T if n_cells < n_genes else residual.T @ residual
    eigenvalues = np.linalg.eigvalsh(small / n_cells)
    edge = (1 + np.sqrt(n_genes / n_cells)) ** 2
    return int((eigenvalues > _ABOVE_NOISE * edge).sum())


def _some(rows: Rows, most: int, seed: int) -> Rows:
    """At most so many of these cells, at random, in order."""
    return np.sort(random_stream(seed, Stream.EVIDENCE).permutation(rows)[:most])


def _dense(source: Source, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Values ``(rows, genes)`` and library sizes ``(rows, 1)``."""
    cells = [source.take(piece) for piece in in_chunks(rows, _CHUNK)]
    x: Tensor = torch.cat([each.x.to_dense() for each in cells])
    return x.numpy(), torch.cat([each.library for each in cells]).numpy()


def _groups(source: Source, rows: Rows) -> NDArray[np.intp]:
    """Cells of the same context, where such groups are large enough for means of their own; else all are one."""
    contexts = [sparse.csr_matrix(source.take(piece).context.numpy()) for piece in in_chunks(rows, _CHUNK)]
    brief = in_brief(sparse.vstack(contexts, format="csr"))
    _, groups, sizes = np.unique(brief, axis=0, return_inverse=True, return_counts=True)
    return np.zeros(len(rows), np.intp) if np.median(sizes) < 20 else groups.reshape(-1)
