"""What a cell would look like under another condition: encode it under its own, decode it under the other.

Of negative binomial counts its own deviations are carried over. Such a count is Poisson with a rate ``mu u``, ``u ~
Gamma(theta, theta)``; what the cell shows tells of u, ``u | x ~ Gamma(theta + x, theta + mu)``, and under the other
condition the rate is ``mu' u``, scaled to the library (abduction, action, prediction; Pearl 2009, section 7.1).

Of cells that are not supported there are two answers, neither of which is known to be right: what the decoder says
there, mu', and its mean under the cell's own condition times the effect that it has learned at the nearest cells that
are supported, mu e. The draws take the one and the other in turns; counts are drawn from ``(mu' mu e)**(1/2)``.
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

from celbo.ask.support import nearest
from celbo.errors import UsageError, check_count, check_seed
from celbo.minibatch import Contexts, Rows, Source, in_chunks
from celbo.model.distributions import NegativeBinomial
from celbo.model.filling import fill_in
from celbo.model.inference import false_share, posterior
from celbo.model.likelihoods import NegativeBinomialHead
from celbo.model.vae import VAE, context_of

__all__ = ["LEAST_CHANGE", "Carried", "Counterfactual", "Decoded", "Draws", "carry", "changed_genes", "decode_under"]

LEAST_CHANGE = 0.25
"""Of the log2 of a mean, from which on a gene counts as changed; of a gaussian, of its standard deviation."""
_SURE = 0.05
"""Share of false ones among the genes that are said to change."""
_ROUNDING = 1e-5
"""Of a mean, below which a change is one of 32-bit arithmetic."""
_CHUNK = 64
"""Cells whose posterior samples are held at a time."""
_CARRIERS = 100
"""Known cells nearest to one that is not supported, over which the effect that is carried to it is a mean."""


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactual:
    """Cells as they would be under other conditions."""

    mean: NDArray[np.float32]
    """What is expected of each cell, over the posterior of z, ``(cells, genes)``: at its own library size. Of nb counts
    ``mu' (theta + x) / (theta + mu)``, scaled to the library, which keeps what is the cell's own, and of cells that are
    not supported the mean of that and of the same with ``mu e``; else the mean of p(x | z, c')."""
    lower: NDArray[np.float32]
    """5 % quantile of that mean over draws of z, ``(cells, genes)``. It is about z, and of cells that are not supported
    about the two answers: not the noise of counts, nor what another model would say."""
    upper: NDArray[np.float32]
    """95 % quantile."""
    support: pd.DataFrame
    """By cell: ``share`` of the known cells around it that have the conditions asked for (a mean over the cells without
    them that are nearest to it), ``distance`` to known cells that have them (1 is the farthest that is usual among
    these), and ``verdict``: "supported", "edge" or "extrapolation". It speaks of coverage, not of correctness. A cell
    without a count is "empty", and has NaN."""
    genes: pd.DataFrame
    """By gene: mean over cells ``before`` and ``after``, ``log2_fold_change`` (of a gaussian: ``difference``) and its
    90 % interval (draws of z and models, and the error that so many cells leave), ``probability``: share of the draws
    in which it changes by `LEAST_CHANGE` or more, and ``fdr``: the share of false ones among this gene and those that
    are surer, as far as the draws tell; NaN, both, of genes that the cells lack."""
    draws: "list[Draws]"
    """What `sample` draws from, by model."""
    obs: pd.DataFrame
    """Of the cells, with the conditions asked for."""
    layer: str | None = None
    """Where the model reads values from, other than X."""

    def __repr__(self) -> str:
        """How many cells and genes, how many of each verdict, and how many genes surely change."""
        verdicts = ", ".join(f"{n:,} {verdict}" for verdict, n in self.support["verdict"].value_counts().items())
        changed = int((self.genes["fdr"] <= _SURE).sum())
        return (
            f"{len(self.obs):,} cells ({verdicts}) x {len(self.genes):,} genes, {changed:,} changed (fdr <= {_SURE:g})"
        )

    def sample(self, seed: int = 0) -> AnnData:
        """Draw counts of each cell, with the likelihood's own noise, and z (of nb counts u, too) from its posterior.

        With several models, those of one of them: the next with the next seed. Of cells that are not supported, rates
        are the geometric mean of the two answers.

        Returns
        -------
        anndata.AnnData
            Counts over the model's genes, which it can read itself; obs as of the cells, conditions as asked for.
        """
        check_seed(seed)
        counts = _draw(self.draws[seed % len(self.draws)], np.arange(len(self.obs)), seed)
        layers = {} if self.layer is None else {self.layer: counts.copy()}
        adata = AnnData(X=counts, obs=self.obs.copy(), layers=layers)
        adata.var_names = self.genes.index
        return adata

    def group_mean(self, *, n_cells: int | None = None, n_draws: int = 100, seed: int = 0) -> pd.DataFrame:
        """What the mean of so many real cells would be: ``log(1 + 10,000 x / library)``, by gene.

        Each draw takes as many cells as these from among them, with replacement and counts of their own, and from these
        the group: a mean has the error of both samples, ``s**2 (1 / n + 1 / n_cells)``, since that of the cells asked
        about is not known better than n cells tell. What another model would say is in it only if several were asked
        (see `one_more_draw`).

        Parameters
        ----------
        n_cells
            Cells that the mean is of; as many as these if None.
        n_draws
            Draws of all of them, at least two for each model and answer, of each as many.
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
        if n_cells is not None:
            check_count("n_cells", n_cells, 1)
        check_count("n_draws", n_draws, 4 * n_models)
        n, rng, means = len(self.obs), np.random.default_rng([seed, 17]), []
        for number in range(n_draws // (2 * n_models) * 2 * n_models):
            again = np.sort(rng.integers(n, size=n))  # cells that might have been asked about
            of_model, weight = self.draws[number // 2 % n_models], float(number % 2)
            counts = _draw(of_model, again, seed * n_draws + number, weight).astype(np.float64)
            library = np.maximum(np.asarray(counts.sum(1)), 1)
            rows = rng.integers(n, size=n if n_cells is None else n_cells)
            means.append(np.asarray(counts.multiply(1e4 / library).tocsr().log1p()[rows].mean(0)).ravel())
        mean, half = one_more_draw(np.array(means).reshape(-1, n_models, 2, len(self.genes)))
        columns = {"mean": mean, "lower": np.maximum(mean - half, 0), "upper": mean + half}
        return pd.DataFrame(columns, index=self.genes.index)


def one_more_draw(draws: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where a draw from one more model is to be expected, nine times in ten: ``mean +- t sqrt(W + B + A)``.

    ``W = (1 + 1/n) w``, w the variance among draws of a model and answer, n draws in all; ``B = (1 + 1/M) b``, b the
    variance of the M models' means, and ``A = (1 + 1/2) a``, a that of the two answers', beyond what the draws leave in
    them. t is the 95 % quantile of Student's distribution with ``(W + B)**2 / (W**2 / (n - 2 M) + B**2 / (M - 1))``
    degrees of freedom (Satterthwaite 1946, doi 10.2307/3002019): few models that differ say little about how much a
    further one will. It holds 88 to 90 % from three models on; of two that differ much, 83 %.

    Parameters
    ----------
    draws
        ``(draws, models, answers, genes)``: two draws at least, two answers.

    Returns
    -------
    tuple
        The mean over all, and the half-width of the 90 % interval, ``(genes,)`` each.
    """
    n_each, n_models, n_answers, _ = draws.shape
    n, w = n_each * n_models * n_answers, draws.var(0, ddof=1).mean((0, 1))
    within = (1 + 1 / n) * w
    between, error = np.zeros_like(w), np.square(within) / (n - n_models * n_answers)
    if n_models > 1:
        of_models = draws.mean((0, 2)).var(0, ddof=1)
        between = (1 + 1 / n_models) * np.maximum(of_models - w / (n_each * n_answers), 0)
        error += np.square(between) / (n_models - 1)
    of_answers = draws.mean((0, 1)).var(0, ddof=1)
    answers = (1 + 1 / n_answers) * np.maximum(of_answers - w / (n_each * n_models), 0)
    total = within + between
    t = student_t.ppf(0.95, np.square(total) / np.maximum(error, 1e-300))
    return draws.mean((0, 1, 2)), np.where(total + answers > 0, t * np.sqrt(total + answers), 0)


class Carried(NamedTuple):
    """What the conditions asked for do where it was seen, for cells that are not supported."""

    log_effect: NDArray[np.float32]
    """Log of the ratio of mean shares, ``(cells that are not supported, genes)``."""
    row_of: NDArray[np.intp]
    """The row of each cell therein, or -1, ``(cells,)``."""


def carry(
    vae: VAE, source: Source, contexts: Contexts, unsupported: NDArray[np.bool_], supported: NDArray[np.float32]
) -> Carried:
    """What the decoder has learned of the conditions at the supported cells nearest to each that is not supported.

    ``log mean_k mu(z_k, c') - log mean_k mu(z_k, c)`` over the 100 nearest, c and c' the cell's own.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    contexts
        To decode under, c'.
    unsupported
        Which cells are not supported, ``(cells,)``.
    supported
        Where known cells lie that are, ``(cells, latent_dim)``; if there are none, or the likelihood is not nb,
        nothing is carried.

    Returns
    -------
    Carried
    """
    is_nb = isinstance(vae.head, NegativeBinomialHead)
    rows = np.flatnonzero(unsupported) if len(supported) and is_nb else np.zeros(0, np.intp)
    row_of = np.full(source.n_cells, -1, np.intp)
    row_of[rows] = np.arange(len(rows))
    if not len(rows):
        return Carried(np.zeros((0, source.n_genes), np.float32), row_of)
    near = nearest(cKDTree(supported), posterior(vae, source, rows)[0], _CARRIERS)
    log_effect = np.empty((len(rows), source.n_genes), np.float32)
    device = next(vae.parameters()).device
    with torch.inference_mode():
        for some in in_chunks(np.arange(len(rows)), _CHUNK):
            z = torch.from_numpy(supported[near[some]]).to(device)
            library = z.new_ones(len(some), 1)
            own, other = (
                _decode(vae, z, context.to(device), library).mean.view(*z.shape[:2], -1).mean(1)
                for context in (source.take(rows[some]).context, contexts(rows[some]))
            )
            smallest = torch.finfo(own.dtype).tiny
            log_effect[some] = (other.clamp(min=smallest).log() - own.clamp(min=smallest).log()).cpu().numpy()
    return Carried(log_effect, row_of)


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
    carried: Carried


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


def decode_under(
    vaes: Sequence[VAE],
    source: Source,
    contexts: Contexts,
    carried: Sequence[Carried],
    *,
    n_samples: int,
    seed: int,
    has_width: bool = True,
) -> Decoded:
    """Decode the cells of a source under another context, with the same draws of z as under their own.

    Parameters
    ----------
    vaes
        One or more models of the same genes and conditions, whose draws count alike.
    source
        The cells.
    contexts
        To decode under.
    carried
        By model, for cells that are not supported.
    n_samples
        Draws of z for each cell and model.
    seed
        Of the draws.
    has_width
        Whether posteriors have one; of a plain autoencoder z is mu_z.

    Returns
    -------
    Decoded
    """
    n, n_genes, device = source.n_cells, source.n_genes, next(vaes[0].parameters()).device
    mean, lower, upper = (np.empty((n, n_genes), np.float32) for _ in range(3))
    before, after = (torch.zeros(len(vaes), n_samples, n_genes, dtype=torch.float64, device=device) for _ in range(2))
    draws = [
        Draws(
            vae,
            np.empty((n, n_samples, vae.latent_dim), np.float32),
            contexts,
            np.empty((n, 1), np.float32),
            source,
            of_model,
        )
        for vae, of_model in zip(vaes, carried, strict=True)
    ]
    noise = torch.zeros(2, n_genes, dtype=torch.float64, device=device)
    weights = torch.arange(n_samples).float() % 2  # either answer in turns
    generator, quantiles = torch.Generator().manual_seed(seed), torch.tensor([0.05, 0.95], device=device)
    with torch.inference_mode():
        for rows in in_chunks(np.arange(n), _CHUNK):
            taken, found = source.take(rows), []
            for number, vae in enumerate(vaes):
                here = next(vae.parameters()).device  # each may be on one of its own
                cells = fill_in(vae, taken.to(here), source)
                mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
                eps = torch.randn(len(rows), n_samples, vae.latent_dim, generator=generator).to(here)
                z = mu_z[:, None] + has_width * (0.5 * logvar_z[:, None]).exp() * eps
                own = _decode(vae, z, cells.context, cells.library)
                other = _decode(vae, z, contexts(rows).to(here), cells.library)
                x = cells.x.to_dense().repeat_interleave(n_samples, 0)
                means = own.mean, _between(other, own, carried[number], rows, weights.repeat(len(rows)))
                pair = [_rates(mean, own, x).view(len(rows), n_samples, n_genes).to(device) for mean in means]
                found.append(pair[1])
                before[number] += pair[0].sum(0)
                after[number] += pair[1].sum(0)
                noise += torch.stack([p.variance.sum(0) for p in (own, other)]).to(device)
                draws[number].z[rows], draws[number].library[rows] = z.cpu().numpy(), cells.library.cpu().numpy()
            decoded = torch.cat(found, dim=1)
            mean[rows] = decoded.mean(1).cpu().numpy()
            lower[rows], upper[rows] = torch.quantile(decoded, quantiles, dim=1).cpu().numpy()
    own_mean, other_mean = ((total / n).flatten(0, 1).float().cpu().numpy() for total in (before, after))
    of_one = (noise / (n * n_samples * len(vaes))).cpu().numpy()
    return Decoded(mean, lower, upper, own_mean, other_mean, of_one, draws)


def _draw(draws: Draws, rows: Rows, seed: int, weight: float = 0.5) -> sparse.csr_matrix:
    """Counts of these cells, each by itself where one is named again, ``(rows, genes)``; weight of what is carried."""
    vae, z, contexts, library, source, carried = draws
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
                mean = _between(p, own, carried, some, torch.full((len(some),), weight))
                counts = torch.poisson(_rates(mean, own, cells.x.to_dense(), draw=True))
            else:
                counts = p.sample()
            blocks.append(sparse.csr_matrix(counts.cpu().numpy()))
    return sparse.vstack(blocks, format="csr")


def _decode(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Distribution:
    """p(x | z, c) for every draw of z, ``(cells * n_samples, genes)``."""
    n_samples = z.shape[1]
    again = context.repeat_interleave(n_samples, 0) if vae.context_dim else None
    return vae.likelihood(z.flatten(0, 1), context=again, library=library.repeat_interleave(n_samples, 0))


def _between(p: Distribution, own: Distribution, carried: Carried, rows: Rows, weights: Tensor) -> Tensor:
    """Mean of p; of negative binomials of carried cells ``mu'**(1 - w) (mu e)**w``. Draws of a cell lie together."""
    mean: Tensor = p.mean
    row_of = np.repeat(carried.row_of[rows], len(mean) // len(rows))
    here = torch.from_numpy(np.flatnonzero(row_of >= 0)).to(mean.device)
    if not (len(here) and isinstance(p, NegativeBinomial) and isinstance(own, NegativeBinomial)):
        return mean
    effect = torch.from_numpy(carried.log_effect[row_of[row_of >= 0]]).to(mean.device)
    decoded, weight = p.log_mu[here], weights.to(mean.device)[here, None]
    between = (decoded + weight * (own.log_mu[here] + effect - decoded)).exp()
    return mean.index_copy(0, here, between * (mean[here].sum(-1, keepdim=True) / between.sum(-1, keepdim=True)))


def _rates(mean: Tensor, own: Distribution, x: Tensor, *, draw: bool = False) -> Tensor:
    """Means, ``(cells, genes)``; of negative binomials times what x says of u under its own, or a draw of that."""
    if not isinstance(own, NegativeBinomial):
        return mean
    theta = own.log_theta.exp()
    known = theta + x
    rates = mean * (torch._standard_gamma(known) if draw else known) / (theta + own.mean)
    return rates * (mean.sum(-1, keepdim=True) / rates.sum(-1, keepdim=True).clamp(min=1e-30))


def changed_genes(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    noise: NDArray[np.float64],
    n_cells: tuple[int, int],
    index: pd.Index,
    measured: NDArray[np.bool_],
    *,
    is_ratio: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over cells under both conditions, by gene, and how they differ; see `Counterfactual.genes`.

    To each draw comes an error of what was learned, normal, with the variance that the log ratio of two means of
    ``n_cells`` counts has: ``var_before / (n_before before**2) + var_after / (n_after after**2)``; of a difference
    ``var_before / n_before + var_after / n_after``.

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
    is_ratio
        Whether means are above 0, so that their log2 ratio tells; else their difference does, and a change is one by
        `LEAST_CHANGE` standard deviations of a value before.
    seed
        Of the errors.
    """
    variances = noise / np.maximum(n_cells, 1)[:, None]
    if is_ratio:
        smallest, name, least = np.finfo(np.float32).tiny, "log2_fold_change", LEAST_CHANGE
        change = np.log2(np.maximum(after, smallest)) - np.log2(np.maximum(before, smallest))
        means = np.maximum(np.stack([before.mean(0), after.mean(0)]).astype(np.float64), 1e-12)
        error = np.sqrt((variances / means**2).sum(0)) / np.log(2)
    else:
        name, least, change = "difference", LEAST_CHANGE * np.sqrt(noise[0]), after - before
        error = np.sqrt(variances.sum(0))
    moved = np.abs(after - before).max(0) > _ROUNDING * np.abs(before).max(0)
    drawn = change + moved * error * np.random.default_rng([seed, 16]).standard_normal(change.shape)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    probability = np.where(measured, (np.abs(drawn) >= least).mean(0), np.nan)
    fdr = np.where(measured, false_share(np.nan_to_num(probability)), np.nan)
    columns = {"before": before.mean(0), "after": after.mean(0), name: change.mean(0)}
    columns |= {"lower": low, "upper": high, "probability": probability, "fdr": fdr}
    return pd.DataFrame(columns, index=index)
