"""What a cell would look like under another condition: encode it under its own, decode it under the other.

Of negative binomial counts its own deviations are carried over. Such a count is Poisson with a rate ``mu u``, ``u ~
Gamma(theta, theta)``; what the cell shows tells of u, ``u | x ~ Gamma(theta + x, theta + mu)``, and under the other
condition the rate is ``mu' u``, scaled to the library (abduction, action, prediction; Pearl 2009, section 7.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import t as student_t
from torch import Tensor
from torch.distributions import Distribution

from celbo.distributions import NegativeBinomial
from celbo.errors import UsageError, check_seed
from celbo.inference import context_of, false_share, fill_in
from celbo.minibatch import Contexts, Rows, Source, in_chunks
from celbo.vae import VAE

__all__ = ["LEAST_CHANGE", "Counterfactual", "Decoded", "Draws", "changed_genes", "decode_under", "n_like", "support"]

LEAST_CHANGE = 0.25
"""Of the log2 of a mean, from which on a gene counts as changed."""
_CHUNK = 64
"""Cells whose posterior samples are held at a time."""
_NEIGHBOURS = 50
"""Known cells beside a cell that are asked how many of them are of the condition asked for."""
_LIKE = 30
"""Known cells without that condition, nearest to a cell, over which that share is averaged: cells like it."""
_NEAREST = 15
"""Of the known cells of that condition, the one whose distance is measured."""
_ENOUGH, _SELDOM = 0.4, 0.1
"""Share of neighbours of that condition, in units of what it would be by chance, from which on a cell can be supported,
and below which it is off the map."""
_FAR = 0.95
"""Quantile of the distances among cells of that condition beyond which a cell is far from them."""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Cells as they would be under other conditions."""

    mean: NDArray[np.float32]
    """What is expected of each cell, over the posterior of z, ``(cells, genes)``: at its own library size. Of nb counts
    ``mu' (theta + x) / (theta + mu)``, scaled to the library, which keeps what is the cell's own; else the mean of
    p(x | z, c')."""
    lower: NDArray[np.float32]
    """5 % quantile of that mean over draws of z, ``(cells, genes)``. It is about z: not the noise of counts, nor what
    another model would say."""
    upper: NDArray[np.float32]
    """95 % quantile."""
    support: pd.DataFrame
    """By cell: ``share`` of the known cells around it that have the conditions asked for (a mean over the cells without
    them that are nearest to it), ``distance`` to known cells that have them (1 is the farthest that is usual among
    these), and ``verdict``: "supported", "edge" or "extrapolation". It speaks of coverage, not of correctness."""
    genes: pd.DataFrame
    """By gene: mean over cells ``before`` and ``after``, ``log2_fold_change`` and its 90 % interval (draws of z and
    models, and the error that so many cells leave), ``probability``: share of the draws in which it changes by
    `LEAST_CHANGE` or more, and ``fdr``: the share of false ones among this gene and those that are surer, as far as the
    draws tell; NaN, both, of genes that the cells lack."""
    draws: "list[Draws]"
    """What `sample` draws from, by model."""
    obs: pd.DataFrame
    """Of the cells, with the conditions asked for."""

    def sample(self, seed: int = 0) -> AnnData:
        """Draw counts of each cell, with the likelihood's own noise, and z (of nb counts u, too) from its posterior.

        With several models, those of one of them: the next with the next seed.

        Returns
        -------
        anndata.AnnData
            Counts over the model's genes; obs as of the cells, conditions as asked for.
        """
        check_seed(seed)
        counts = _draw(self.draws[seed % len(self.draws)], np.arange(len(self.obs)), seed)
        adata = AnnData(X=counts, obs=self.obs.copy())
        adata.var_names = self.genes.index
        return adata

    def group_mean(self, *, n_cells: int | None = None, n_draws: int = 100, seed: int = 0) -> pd.DataFrame:
        """What the mean of so many real cells would be: ``log(1 + 10,000 x / library)``, by gene.

        Each draw takes as many cells as these from among them, with replacement and counts of their own, and from these
        the group: a mean has the error of both samples, ``s**2 (1 / n + 1 / n_cells)``, since that of the cells asked
        about is not known better than n cells tell. What another model would say is in it only if several were asked
        (see `over_models`).

        Parameters
        ----------
        n_cells
            Cells that the mean is of; as many as these if None.
        n_draws
            Draws of all of them, at least two for each model.
        seed
            Of the draws.

        Returns
        -------
        pandas.DataFrame
            By gene: ``mean`` and its 90 % interval, ``lower`` and ``upper``.

        Raises
        ------
        UsageError
            If the model is not of counts, there is no cell to take the mean of, or too few draws.
        """
        n_models = len(self.draws)
        if self.draws[0].vae.values != "counts":
            raise UsageError("a group mean is of log-normalised counts, and this model is of other values.")
        check_seed(seed)
        if n_cells is not None and n_cells < 1:
            raise UsageError(f"n_cells is {n_cells}; a mean is of at least 1 cell")
        if n_draws < 2 * n_models:
            raise UsageError(f"n_draws is {n_draws}; {n_models} models need at least {2 * n_models}")
        n, rng, means = len(self.obs), np.random.default_rng([seed, 17]), []
        for number in range(n_draws):
            again = np.sort(rng.integers(n, size=n))  # cells that might have been asked about
            counts = _draw(self.draws[number % n_models], again, seed * n_draws + number).astype(np.float64)
            library = np.maximum(np.asarray(counts.sum(1)), 1)
            rows = rng.integers(n, size=n if n_cells is None else n_cells)
            means.append(np.asarray(counts.multiply(1e4 / library).tocsr().log1p()[rows].mean(0)).ravel())
        mean, half = over_models([np.array(means[number::n_models]) for number in range(n_models)])
        columns = {"mean": mean, "lower": np.maximum(mean - half, 0), "upper": mean + half}
        return pd.DataFrame(columns, index=self.genes.index)


def over_models(by_model: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where a draw from one more model is to be expected, nine times in ten: ``mean +- t sqrt(W + B)``.

    ``W = (1 + 1/n) w``, w the variance among draws of a model, n draws in all; ``B = (1 + 1/M) b``, b the variance of
    the M models' means beyond what their draws leave in them; t is the 95 % quantile of Student's distribution with
    ``(W + B)**2 / (W**2 / (n - M) + B**2 / (M - 1))`` degrees of freedom (Satterthwaite 1946, doi 10.2307/3002019): few
    models that differ say little about how much a further one will. It holds 88 to 90 % from three models on; of two
    that differ much, 83 %.

    Parameters
    ----------
    by_model
        For each model its draws, ``(draws, genes)``, at least two.

    Returns
    -------
    tuple
        The mean over models, and the half-width of the 90 % interval, ``(genes,)`` each.
    """
    of_model, n_models, n = np.array([some.mean(0) for some in by_model]), len(by_model), sum(map(len, by_model))
    variances = np.array([some.var(0, ddof=1) for some in by_model])
    within = (1 + 1 / n) * variances.mean(0)
    between, error = np.zeros_like(within), np.square(within) / (n - n_models)
    if n_models > 1:
        noise = (variances / [[len(some)] for some in by_model]).mean(0)
        between = (1 + 1 / n_models) * np.maximum(of_model.var(0, ddof=1) - noise, 0)
        error += np.square(between) / (n_models - 1)
    total = within + between
    t = student_t.ppf(0.95, np.square(total) / np.maximum(error, 1e-300))
    return of_model.mean(0), np.where(total > 0, t * np.sqrt(total), 0)


class Draws(NamedTuple):
    """Draws of z from one model, and what else it takes to decode them."""

    vae: VAE
    z: NDArray[np.float32]
    """``(cells, n_samples, latent_dim)``."""
    contexts: Contexts
    library: NDArray[np.float32]
    """``(cells, 1)``; grown by what was filled in for genes that the cells lack."""
    source: Source
    """The cells as they are."""


class Decoded(NamedTuple):
    """Cells decoded under another context, in numpy."""

    mean: NDArray[np.float32]
    """Over draws of z from every model, ``(cells, genes)``, as ``lower`` and ``upper``, the 5 and 95 % quantiles."""
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    before: NDArray[np.float32]
    """Mean over cells under their own context, by draw, ``(models * n_samples, genes)``; ``after``: under the other."""
    after: NDArray[np.float32]
    noise: NDArray[np.float64]
    """Variance of a count around its mean, before and after, mean over cells: ``(2, genes)``."""
    draws: list[Draws]
    """By model."""
    mu_z: NDArray[np.float32]
    """Of the first model."""


def decode_under(vaes: Sequence[VAE], source: Source, contexts: Contexts, *, n_samples: int, seed: int) -> Decoded:
    """Decode the cells of a source under another context, with the same draws of z as under their own.

    Parameters
    ----------
    vaes
        One or more models of the same genes and conditions, whose draws count alike.
    source
        The cells.
    contexts
        To decode under.
    n_samples
        Draws of z for each cell and model.
    seed
        Of the draws.

    Returns
    -------
    Decoded
    """
    n, n_genes, device = source.n_cells, source.n_genes, next(vaes[0].parameters()).device
    mean, lower, upper = (np.empty((n, n_genes), np.float32) for _ in range(3))
    before, after = (torch.zeros(len(vaes), n_samples, n_genes, dtype=torch.float64, device=device) for _ in range(2))
    draws = [
        Draws(vae, np.empty((n, n_samples, vae.latent_dim), np.float32), contexts, np.empty((n, 1), np.float32), source)
        for vae in vaes
    ]
    means, noise = (
        np.empty((n, vaes[0].latent_dim), np.float32),
        torch.zeros(2, n_genes, dtype=torch.float64).to(device),
    )
    generator, quantiles = torch.Generator().manual_seed(seed), torch.tensor([0.05, 0.95], device=device)
    with torch.inference_mode():
        for rows in in_chunks(np.arange(n), _CHUNK):
            taken, found = source.take(rows).to(device), []
            for number, vae in enumerate(vaes):
                cells = fill_in(vae, taken, source)
                mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
                eps = torch.randn(len(rows), n_samples, vae.latent_dim, generator=generator).to(device)
                z = mu_z[:, None] + (0.5 * logvar_z[:, None]).exp() * eps
                own = _decode(vae, z, cells.context, cells.library)
                other = _decode(vae, z, contexts(rows).to(device), cells.library)
                x = cells.x.to_dense().repeat_interleave(n_samples, 0)
                pair = [_rates(p, own, x).view(len(rows), n_samples, n_genes) for p in (own, other)]
                found.append(pair[1])
                before[number] += pair[0].sum(0)
                after[number] += pair[1].sum(0)
                noise += torch.stack([p.variance.sum(0) for p in (own, other)])
                draws[number].z[rows], draws[number].library[rows] = z.cpu().numpy(), cells.library.cpu().numpy()
                if number == 0:
                    means[rows] = mu_z.cpu().numpy()
            decoded = torch.cat(found, dim=1)
            mean[rows] = decoded.mean(1).cpu().numpy()
            lower[rows], upper[rows] = torch.quantile(decoded, quantiles, dim=1).cpu().numpy()
    own_mean, other_mean = ((total / n).flatten(0, 1).float().cpu().numpy() for total in (before, after))
    of_one = (noise / (n * n_samples * len(vaes))).cpu().numpy()
    return Decoded(mean, lower, upper, own_mean, other_mean, of_one, draws, means)


def _draw(draws: Draws, rows: Rows, seed: int) -> sparse.csr_matrix:
    """Counts of these cells, each by itself where one is named again, ``(rows, genes)``."""
    vae, z, contexts, library, source = draws
    device, rng, blocks = next(vae.parameters()).device, np.random.default_rng(seed), []
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)  # not every distribution of torch takes a generator
        for some in in_chunks(rows, _CHUNK):
            chosen = torch.from_numpy(z[some, rng.integers(z.shape[1], size=len(some))]).to(device)
            size = torch.from_numpy(library[some]).to(device)
            p = vae.likelihood(chosen, context=contexts(some).to(device) if vae.context_dim else None, library=size)
            if isinstance(p, NegativeBinomial):
                cells = fill_in(vae, source.take(some).to(device), source)
                own = vae.likelihood(chosen, context=context_of(vae, cells), library=size)
                counts = torch.poisson(_rates(p, own, cells.x.to_dense(), draw=True))
            else:
                counts = p.sample()
            blocks.append(sparse.csr_matrix(counts.cpu().numpy()))
    return sparse.vstack(blocks, format="csr")


def _decode(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Distribution:
    """p(x | z, c) for every draw of z, ``(cells * n_samples, genes)``."""
    n_samples = z.shape[1]
    again = context.repeat_interleave(n_samples, 0) if vae.context_dim else None
    return vae.likelihood(z.flatten(0, 1), context=again, library=library.repeat_interleave(n_samples, 0))


def _rates(p: Distribution, own: Distribution, x: Tensor, *, draw: bool = False) -> Tensor:
    """Means of p, ``(cells, genes)``; of negative binomials times what x says of u under its own, or a draw of that."""
    if not isinstance(own, NegativeBinomial):
        mean: Tensor = p.mean
        return mean
    theta = own.log_theta.exp()
    known = theta + x
    rates = p.mean * (torch._standard_gamma(known) if draw else known) / (theta + own.mean)
    return rates * (p.mean.sum(-1, keepdim=True) / rates.sum(-1, keepdim=True).clamp(min=1e-30))


def support(
    mu_z: NDArray[np.float32],
    known: NDArray[np.float32],
    has_it: NDArray[np.bool_],
    seen: NDArray[np.bool_],
    index: pd.Index,
) -> pd.DataFrame:
    """Whether cells of the conditions asked for were seen near each cell in the latent space.

    Parameters
    ----------
    mu_z
        Of the cells, ``(cells, latent_dim)``.
    known
        Of the cells that the model learned from.
    has_it
        Which of these have the conditions asked for.
    seen
        Which cells' own other levels were seen with these conditions; see `celbo.reference.seen_together`.
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        See `Counterfactual.support`: "supported" where the combination was seen, the share is at least .4 of what
        chance would give, and the distance usual; "extrapolation" where the distance is not, and the combination was
        not seen or the share is less than .1 of that; else "edge". The share is a mean over the 30 known cells without
        the conditions that are nearest, for those are like the cell: a type never seen so has none around
        it, even if one cell of it has by chance.
    """
    with_it = known[has_it]
    if len(with_it) < 2:
        nothing = {"share": 0.0, "distance": np.inf, "verdict": "extrapolation"}
        return pd.DataFrame(nothing, index=index)
    nearest = min(_NEAREST, len(with_it))
    tree, tree_with = cKDTree(known), cKDTree(with_it)
    like = known if has_it.all() else known[~has_it]
    nearby = _neighbours(cKDTree(like), mu_z, _LIKE)
    looked_at, where = np.unique(nearby, return_inverse=True)
    shares = has_it[_neighbours(tree, like[looked_at], _NEIGHBOURS)].mean(1)
    share = shares[where.reshape(nearby.shape)].mean(1)
    distance = tree_with.query(mu_z, [nearest])[0][:, 0]
    usual = np.quantile(tree_with.query(with_it, [min(nearest + 1, len(with_it))])[0][:, 0], _FAR)
    near, chance = distance <= usual, has_it.mean()
    supported = near & seen & (share >= _ENOUGH * chance)
    off = ~near & (~seen | (share < _SELDOM * chance))
    verdict = np.where(supported, "supported", np.where(off, "extrapolation", "edge"))
    return pd.DataFrame({"share": share, "distance": distance / max(usual, 1e-12), "verdict": verdict}, index=index)


def _neighbours(tree: cKDTree, cells: NDArray[np.float32], n: int) -> NDArray[np.intp]:
    """Positions of the n nearest in the tree, or of all if it has fewer, ``(cells, n)``."""
    n = min(n, tree.n)
    return np.asarray(tree.query(cells, n)[1]).reshape(len(cells), n)


def n_like(mu_z: NDArray[np.float32], known: NDArray[np.float32], has_it: NDArray[np.bool_]) -> tuple[int, int]:
    """How many different known cells are among the 15 nearest of a cell: of those without the conditions, and with."""
    counts = []
    for some in (known[~has_it], known[has_it]):
        nearest = min(_NEAREST, len(some))
        counts.append(len(np.unique(cKDTree(some).query(mu_z, nearest)[1])) if nearest else 0)
    return counts[0], counts[1]


def changed_genes(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    noise: NDArray[np.float64],
    n_cells: tuple[int, int],
    index: pd.Index,
    measured: NDArray[np.bool_],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over cells under both conditions, by gene, and their log2 ratio; see `Counterfactual.genes`.

    To each draw comes an error of what was learned, normal, with the variance that the log ratio of two means of
    ``n_cells`` counts has: ``var_before / (n_before before**2) + var_after / (n_after after**2)``.

    Parameters
    ----------
    before, after
        Means over cells, ``(n_samples, genes)``, of the same draws of z.
    noise
        Variances of a count before and after, ``(2, genes)``.
    n_cells
        Cells learned from like these that do not have the conditions, and that do; see `n_like`.
    index
        Names of the genes.
    measured
        Which of them the cells have; of the others nothing is told but the means.
    seed
        Of the errors.
    """
    smallest = np.finfo(np.float32).tiny
    change = np.log2(np.maximum(after, smallest)) - np.log2(np.maximum(before, smallest))
    means = np.maximum(np.stack([before.mean(0), after.mean(0)]).astype(np.float64), 1e-12)
    error = np.sqrt((noise / means**2 / np.maximum(n_cells, 1)[:, None]).sum(0)) / np.log(2)
    moved = np.abs(after - before).max(0) > 0
    drawn = change + moved * error * np.random.default_rng([seed, 16]).standard_normal(change.shape)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    probability = np.where(measured, (np.abs(drawn) >= LEAST_CHANGE).mean(0), np.nan)
    fdr = np.where(measured, false_share(np.nan_to_num(probability)), np.nan)
    columns = {"before": before.mean(0), "after": after.mean(0), "log2_fold_change": change.mean(0)}
    columns |= {"lower": low, "upper": high, "probability": probability, "fdr": fdr}
    return pd.DataFrame(columns, index=index)
