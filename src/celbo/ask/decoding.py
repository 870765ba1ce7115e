"""Decode cells under other conditions, with the same draws of z; and draw their counts.

For negative binomial counts the cell's own deviations are carried over. Such a count is Poisson with a rate ``mu u``,
``u ~ Gamma(theta, theta)``. The cell's counts inform about u, ``u | x ~ Gamma(theta + x, theta + mu)``, and under the
other condition the rate is ``mu' u``, scaled to the library (abduction, action, prediction; Pearl 2009, section 7.1).

For cells that are not supported there are two answers, and neither is known to be right: the decoder's mean there,
mu', and the mean under the cell's own condition times the effect that the decoder has learned at the nearest supported
cells, mu e. The draws use the two answers in turn; counts are drawn from ``(mu' mu e)**(1/2)``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor
from torch.distributions import Distribution

from celbo.ask.sums import RowSum
from celbo.ask.support import nearest
from celbo.fit.cells import Cells
from celbo.minibatch import FEWEST_ROWS, Contexts, Minibatch, Rows, Source, in_chunks, in_even_pieces
from celbo.model.distributions import NegativeBinomial
from celbo.model.filling import fill_in
from celbo.model.inference import take_filled
from celbo.model.likelihoods import NegativeBinomialHead
from celbo.model.vae import VAE, context_of

__all__ = ["Carried", "Decoded", "Draws", "carried_effects", "decode_under", "draw_counts"]

_CHUNK = 64
"""Cells whose noise is drawn at a time."""
_VALUES = 1 << 20
"""Approximate number of values that are decoded at a time."""
_CARRIERS = 100
"""Supported cells nearest to an unsupported one; the effect that is carried to it is their mean effect."""


class Carried(NamedTuple):
    """Effects of the conditions asked for, carried from supported cells to cells that are not supported."""

    log_effect: NDArray[np.float32]
    """Log of the ratio of mean shares, ``(cells that are not supported, genes)``."""
    row_of: NDArray[np.intp]
    """Row of each cell in ``log_effect``, or -1, ``(cells,)``."""


def carried_effects(
    cells: Cells, contexts: Contexts, unsupported: NDArray[np.bool_], supported: NDArray[np.float32]
) -> Carried:
    """Compute the effect that the decoder has learned at the supported cells nearest to each unsupported cell.

    ``log mean_k mu(z_k, c') - log mean_k mu(z_k, c)`` over the 100 nearest; c is the cell's own context, and c' the
    context asked for.

    Parameters
    ----------
    cells
        The cells, with the model that encodes them.
    contexts
        Contexts to decode under, c'.
    unsupported
        Which cells are not supported, ``(cells,)``.
    supported
        Positions of supported known cells, ``(cells, latent_dim)``. If there are none, or the likelihood is not nb,
        nothing is carried.

    Returns
    -------
    Carried
    """
    vae, source = cells.vae, cells.source
    assert vae is not None
    is_nb = isinstance(vae.head, NegativeBinomialHead)
    rows = np.flatnonzero(unsupported) if len(supported) and is_nb else np.zeros(0, np.intp)
    row_of = np.full(source.n_cells, -1, np.intp)
    row_of[rows] = np.arange(len(rows))
    if not len(rows):
        return Carried(np.zeros((0, source.n_genes), np.float32), row_of)
    near = nearest(cKDTree(supported), cells.encoded_at(rows).mu_z, _CARRIERS)
    log_effect = np.empty((len(rows), source.n_genes), np.float32)
    device = next(vae.parameters()).device
    with torch.inference_mode():
        for chunk in _groups(len(rows), _CARRIERS * source.n_genes):
            z = torch.from_numpy(supported[near[chunk]]).to(device)
            library = z.new_ones(len(chunk), 1)
            own, other = (
                _decode_all(vae, z, context.to(device), library).mean.view(*z.shape[:2], -1).mean(1)
                for context in (cells.source.contexts(rows[chunk]), contexts(rows[chunk]))
            )
            smallest = torch.finfo(own.dtype).tiny
            log_effect[chunk] = (other.clamp(min=smallest).log() - own.clamp(min=smallest).log()).cpu().numpy()
    return Carried(log_effect, row_of)


class Draws(NamedTuple):
    """Draws of z from one model, and everything needed to decode them."""

    vae: VAE
    z: NDArray[np.float32]
    """``(cells, n_samples, latent_dim)``."""
    contexts: Contexts
    library: NDArray[np.float32]
    """``(cells, 1)``; it includes the counts that are filled in for genes that the cells lack."""
    source: Source
    """The cells."""
    carried: Carried


class Decoded(NamedTuple):
    """Cells decoded under another context, in numpy."""

    mean: NDArray[np.float32]
    """Mean over draws of z from every model, ``(cells, genes)``; ``lower`` and ``upper`` are 5 and 95 % quantiles."""
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    before: NDArray[np.float32]
    """Mean over cells, by draw, ``(models * n_samples, genes)``: under the own context, and ``after`` the other."""
    after: NDArray[np.float32]
    noise: NDArray[np.float64]
    """Variance of a count around its mean, before and after, averaged over cells: ``(2, genes)``."""
    draws: list[Draws]
    """One for each model."""


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
    """Decode the cells of a source under another context, with the same draws of z as under their own context.

    Beside the result, memory is needed for some millions of values at a time, and for means by draw and gene.

    Parameters
    ----------
    vaes
        One or more models of the same genes and conditions. Their draws have the same weight.
    source
        The cells.
    contexts
        Contexts to decode under.
    carried
        Effects for unsupported cells, by model.
    n_samples
        Draws of z for each cell and model.
    seed
        Seed of the draws.
    has_width
        Whether z is drawn from the posterior; else z is mu_z, as in a plain autoencoder.

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
            effects,
        )
        for vae, effects in zip(vaes, carried, strict=True)
    ]
    noise = torch.zeros(2, n_genes, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for rows in in_chunks(np.arange(n), _CHUNK):
            minibatch = source.take(rows)
            chunks = [_draw_z(of_model, minibatch, rows, generator, has_width) for of_model in draws]
            for group in _groups(len(rows), n_samples * len(vaes) * n_genes):
                decoded = torch.cat([chunk.decode(group).to(device) for chunk in chunks], dim=1)
                mean[rows[group]] = decoded.mean(1).cpu().numpy()
                lower[rows[group]], upper[rows[group]] = _interval(decoded)
            for number, chunk in enumerate(chunks):
                before[number] += chunk.before.result().view(n_samples, n_genes).to(device)
                after[number] += chunk.after.result().view(n_samples, n_genes).to(device)
                noise += torch.stack([total.result() for total in chunk.noise]).to(device)
    own_mean, other_mean = ((total / n).flatten(0, 1).float().cpu().numpy() for total in (before, after))
    variance = (noise / (n * n_samples * len(vaes))).cpu().numpy()
    return Decoded(mean, lower, upper, own_mean, other_mean, variance, draws)


class _Chunk(NamedTuple):
    """Cells with draws of z from one model, and sums over what was decoded of them so far."""

    draws: Draws
    rows: Rows
    cells: Minibatch
    """Missing genes are filled in."""
    x: Tensor
    """Their values, ``(cells, genes)``, dense."""
    z: Tensor
    """``(cells, n_samples, latent_dim)``."""
    other: Tensor
    """Contexts to decode under, ``(cells, context_dim)``."""
    before: RowSum
    """Over cells, of means by draw and gene under the own context; ``after``: under the other context."""
    after: RowSum
    noise: tuple[RowSum, RowSum]
    """Over cells and draws, of the variances of a count under the own and the other context."""

    def decode(self, group: Rows) -> Tensor:
        """Decode the cells at these positions, ``(cells, n_samples, genes)``, and add to the sums."""
        n_samples, n_genes = self.z.shape[1], self.x.shape[1]
        pair = self.x.new_empty(2, len(group) * n_samples, n_genes)
        weights = torch.arange(n_samples).float().repeat(len(group)) % 2  # the two answers in turn
        z = self.z[group].flatten(0, 1)
        for piece in in_even_pieces(np.arange(len(z)), max(FEWEST_ROWS, _VALUES // n_genes)):
            of_draws = group[piece // n_samples]
            library = self.cells.library[of_draws]
            own = _decode(self.draws.vae, z[piece], self.cells.context[of_draws], library)
            other = _decode(self.draws.vae, z[piece], self.other[of_draws], library)
            between = _between(other, own, self.draws.carried, self.rows[of_draws], weights[piece])
            for means, to in ((own.mean, pair[0]), (between, pair[1])):
                to[piece] = _rates(means, own, self.x[of_draws])
            for total, p in zip(self.noise, (own, other), strict=True):
                total.add(p.variance)
        self.before.add(pair[0].view(len(group), -1))
        self.after.add(pair[1].view(len(group), -1))
        return pair[1].view(len(group), n_samples, n_genes)


def _draw_z(draws: Draws, minibatch: Minibatch, rows: Rows, generator: torch.Generator, has_width: bool) -> _Chunk:
    """Draw z of these cells from a model, and keep it among the draws."""
    vae, n_samples, n_genes = draws.vae, draws.z.shape[1], draws.source.n_genes
    device = next(vae.parameters()).device  # models may be on different devices
    cells = fill_in(vae, minibatch.to(device), draws.source)
    mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
    eps = torch.randn(len(rows), n_samples, vae.latent_dim, generator=generator).to(device)
    z = mu_z[:, None] + has_width * (0.5 * logvar_z[:, None]).exp() * eps
    draws.z[rows], draws.library[rows] = z.cpu().numpy(), cells.library.cpu().numpy()
    before, after = (RowSum(len(rows), n_samples * n_genes, device) for _ in range(2))
    noise = (RowSum(len(rows) * n_samples, n_genes, device), RowSum(len(rows) * n_samples, n_genes, device))
    other = draws.contexts(rows).to(device)
    return _Chunk(draws, rows, cells, cells.x.to_dense(), z, other, before, after, noise)


def _interval(decoded: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """5 and 95 % quantiles over draws, ``(cells, genes)`` each, of ``(cells, draws, genes)``."""
    quantiles = torch.tensor([0.05, 0.95], device=decoded.device)
    most = max(1, _VALUES // (decoded.shape[0] * decoded.shape[1]))
    parts = [torch.quantile(part, quantiles, dim=1) for part in decoded.split(most, dim=2)]
    lower, upper = torch.cat(parts, dim=2).cpu().numpy()
    return lower, upper


def _groups(n_cells: int, n_values: int) -> Iterator[Rows]:
    """Cut cells into consecutive groups of at most `_CHUNK`, and of few values if a cell has ``n_values``."""
    for chunk in in_chunks(np.arange(n_cells), _CHUNK):
        yield from in_even_pieces(chunk, max(1, _VALUES // n_values))


def draw_counts(draws: Draws, rows: Rows, seed: int, weight: float = 0.5) -> sparse.csr_matrix:
    """Draw counts of these cells, ``(rows, genes)``; ``weight`` is that of the carried effect. Rows may repeat."""
    vae, z, contexts, library, source, carried = draws
    device, rng, blocks = next(vae.parameters()).device, np.random.default_rng(seed), []
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)  # not every distribution of torch takes a generator
        for chunk in in_chunks(rows, _CHUNK):
            chosen = torch.from_numpy(z[chunk, rng.integers(z.shape[1], size=len(chunk))]).to(device)
            size = torch.from_numpy(library[chunk]).to(device)
            p = vae.likelihood(chosen, context=contexts(chunk).to(device) if vae.context_dim else None, library=size)
            if isinstance(p, NegativeBinomial):
                cells = take_filled(vae, source, chunk)
                own = vae.likelihood(chosen, context=context_of(vae, cells), library=size)
                mean = _between(p, own, carried, chunk, torch.full((len(chunk),), weight))
                counts = torch.poisson(_rates(mean, own, cells.x.to_dense(), draw=True))
            else:
                counts = p.sample()
            blocks.append(sparse.csr_matrix(counts.cpu().numpy()))
    return sparse.vstack(blocks, format="csr")


def _decode_all(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Distribution:
    """Distribution p(x | z, c) for every draw of z, ``(cells * n_samples, genes)``; z is by cell and draw."""
    n_samples = z.shape[1]
    context, library = (part.repeat_interleave(n_samples, 0) for part in (context, library))
    return _decode(vae, z.flatten(0, 1), context, library)


def _decode(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Distribution:
    """Distribution p(x | z, c), ``(rows, genes)``."""
    return vae.likelihood(z, context=context if vae.context_dim else None, library=library)


def _between(p: Distribution, own: Distribution, carried: Carried, rows: Rows, weights: Tensor) -> Tensor:
    """Mean of p; ``mu'**(1 - w) (mu e)**w`` for unsupported cells of a negative binomial."""
    mean: Tensor = p.mean
    row_of = carried.row_of[rows]
    unsupported = torch.from_numpy(np.flatnonzero(row_of >= 0)).to(mean.device)
    if not (len(unsupported) and isinstance(p, NegativeBinomial) and isinstance(own, NegativeBinomial)):
        return mean
    effect = torch.from_numpy(carried.log_effect[row_of[row_of >= 0]]).to(mean.device)
    decoded, weight = p.log_mu[unsupported], weights.to(mean.device)[unsupported, None]
    between = (decoded + weight * (own.log_mu[unsupported] + effect - decoded)).exp()
    total = mean[unsupported].sum(-1, keepdim=True)
    return mean.index_copy(0, unsupported, between * (total / between.sum(-1, keepdim=True)))


def _rates(mean: Tensor, own: Distribution, x: Tensor, *, draw: bool = False) -> Tensor:
    """Means, ``(cells, genes)``; for negative binomials times the posterior mean of u given x, or times a draw of u."""
    if not isinstance(own, NegativeBinomial):
        return mean
    theta = own.log_theta.exp()
    known = theta + x
    rates = mean * (torch._standard_gamma(known) if draw else known) / (theta + own.mean)
    return rates * (mean.sum(-1, keepdim=True) / rates.sum(-1, keepdim=True).clamp(min=1e-30))
