"""What a cell would look like under another condition: encode it under its own, decode it under the other."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor

from celbo.inference import context_of, fill_in
from celbo.minibatch import Source, in_chunks
from celbo.vae import VAE

__all__ = ["Counterfactual", "Decoded", "changed_genes", "decode_under", "support"]

_CHUNK = 64
"""Cells whose posterior samples are held at a time."""
_NEIGHBOURS = 50
"""Known cells beside a cell that are asked how many of them are of the condition asked for."""
_NEAREST = 15
"""Of the known cells of that condition, the one whose distance is measured."""
_ENOUGH = 0.1
"""Share of neighbours of that condition, in units of what it would be by chance, below which a cell is off the map."""
_FAR = 0.95
"""Quantile of the distances among cells of that condition beyond which a cell is far from them."""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Cells as they would be under other conditions."""

    mean: NDArray[np.float32]
    """Mean of p(x | z, c') over the posterior of z, ``(cells, genes)``: counts at each cell's own library size."""
    lower: NDArray[np.float32]
    """5 % quantile of that mean over draws of z, ``(cells, genes)``. It is about z: not the noise of counts, nor what
    another model would say."""
    upper: NDArray[np.float32]
    """95 % quantile."""
    support: pd.DataFrame
    """By cell: ``share`` of the neighbours that have the conditions asked for, ``distance`` to known cells that have
    them (1 is the farthest that is usual among these), and ``verdict``: "supported", "edge" or "extrapolation". It
    speaks of coverage, not of correctness."""
    genes: pd.DataFrame
    """By gene: mean over cells ``before`` and ``after``, ``log2_fold_change`` and its 90 % interval over draws of z."""
    draws: tuple[VAE, NDArray[np.float32], Tensor, NDArray[np.float32]]
    """What `sample` draws from: the model, draws of z ``(cells, n_samples, latent_dim)``, contexts and libraries."""
    obs: pd.DataFrame
    """Of the cells, with the conditions asked for."""

    def sample(self, seed: int = 0) -> AnnData:
        """Draw counts of each cell, with the likelihood's own noise, and z from its posterior.

        Returns
        -------
        anndata.AnnData
            Counts over the model's genes; obs as of the cells, conditions as asked for.
        """
        vae, z, context, library = self.draws
        device, rng, blocks = next(vae.parameters()).device, np.random.default_rng(seed), []
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)  # not every distribution of torch takes a generator
            for rows in in_chunks(np.arange(len(z)), _CHUNK):
                chosen = torch.from_numpy(z[rows, rng.integers(z.shape[1], size=len(rows))]).to(device)
                p = vae.likelihood(
                    chosen,
                    context=context[rows].to(device) if vae.context_dim else None,
                    library=torch.from_numpy(library[rows]).to(device),
                )
                blocks.append(sparse.csr_matrix(p.sample().cpu().numpy()))
        adata = AnnData(X=sparse.vstack(blocks, format="csr"), obs=self.obs.copy())
        adata.var_names = self.genes.index
        return adata


class Decoded(NamedTuple):
    """Cells decoded under another context, in numpy."""

    mean: NDArray[np.float32]
    """Over draws of z, ``(cells, genes)``, as ``lower`` and ``upper``, the 5 and 95 % quantiles."""
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]
    before: NDArray[np.float32]
    """Mean over cells under their own context, by draw: ``(n_samples, genes)``, as ``after`` under the other."""
    after: NDArray[np.float32]
    z: NDArray[np.float32]
    """The draws, ``(cells, n_samples, latent_dim)``."""
    mu_z: NDArray[np.float32]
    library: NDArray[np.float32]
    """``(cells, 1)``; grown by what was filled in for genes that the cells lack."""


def decode_under(vae: VAE, source: Source, context: Tensor, *, n_samples: int, seed: int) -> Decoded:
    """Decode the cells of a source under another context, with the same draws of z as under their own.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    context
        To decode under, ``(cells, context_dim)``.
    n_samples
        Draws of z for each cell.
    seed
        Of the draws.

    Returns
    -------
    Decoded
    """
    n, device, generator = source.n_cells, next(vae.parameters()).device, torch.Generator().manual_seed(seed)
    mean, lower, upper = (np.empty((n, source.n_genes), np.float32) for _ in range(3))
    before, after = (torch.zeros(n_samples, source.n_genes, dtype=torch.float64, device=device) for _ in range(2))
    draws, means = np.empty((n, n_samples, vae.latent_dim), np.float32), np.empty((n, vae.latent_dim), np.float32)
    library, quantiles = np.empty((n, 1), np.float32), torch.tensor([0.05, 0.95], device=device)
    was_training = vae.training
    vae.eval()
    with torch.inference_mode():
        for rows in in_chunks(np.arange(n), _CHUNK):
            cells = fill_in(vae, source.take(rows).to(device), source)
            mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
            eps = torch.randn(len(rows), n_samples, vae.latent_dim, generator=generator).to(device)
            z = mu_z[:, None] + (0.5 * logvar_z[:, None]).exp() * eps
            before += _decode(vae, z, cells.context, cells.library).sum(0)
            decoded = _decode(vae, z, context[rows].to(device), cells.library)
            after += decoded.sum(0)
            mean[rows] = decoded.mean(1).cpu().numpy()
            lower[rows], upper[rows] = torch.quantile(decoded, quantiles, dim=1).cpu().numpy()
            draws[rows], means[rows], library[rows] = (part.cpu().numpy() for part in (z, mu_z, cells.library))
    vae.train(was_training)
    own, other = (before / n).float().cpu().numpy(), (after / n).float().cpu().numpy()
    return Decoded(mean, lower, upper, own, other, draws, means, library)


def _decode(vae: VAE, z: Tensor, context: Tensor, library: Tensor) -> Tensor:
    """Means for every draw of z, ``(cells, n_samples, genes)``."""
    n_samples = z.shape[1]
    again = context.repeat_interleave(n_samples, 0) if vae.context_dim else None
    flat = vae.decode(z.flatten(0, 1), again, library.repeat_interleave(n_samples, 0))
    return flat.view(*z.shape[:2], -1)


def support(
    mu_z: NDArray[np.float32], known: NDArray[np.float32], has_it: NDArray[np.bool_], index: pd.Index
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
    index
        Names of the cells.

    Returns
    -------
    pandas.DataFrame
        See `Counterfactual.support`: "supported" where the share is at least a tenth of what chance would give and the
        distance usual, "edge" where one of both holds, else "extrapolation".
    """
    with_it = known[has_it]
    if len(with_it) < 2:
        nothing = {"share": 0.0, "distance": np.inf, "verdict": "extrapolation"}
        return pd.DataFrame(nothing, index=index)
    n_near, nearest = min(_NEIGHBOURS, len(known)), min(_NEAREST, len(with_it))
    tree, tree_with = cKDTree(known), cKDTree(with_it)
    neighbours = tree.query(mu_z, n_near)[1].reshape(len(mu_z), n_near)
    share = has_it[neighbours].mean(1)
    distance = tree_with.query(mu_z, [nearest])[0][:, 0]
    usual = np.quantile(tree_with.query(with_it, [min(nearest + 1, len(with_it))])[0][:, 0], _FAR)
    often, near = share >= _ENOUGH * has_it.mean(), distance <= usual
    verdict = np.where(often & near, "supported", np.where(often | near, "edge", "extrapolation"))
    return pd.DataFrame({"share": share, "distance": distance / max(usual, 1e-12), "verdict": verdict}, index=index)


def changed_genes(before: NDArray[np.float32], after: NDArray[np.float32], index: pd.Index) -> pd.DataFrame:
    """Means over cells under both conditions, by gene, and their log2 ratio with its 90 % interval over draws of z.

    Parameters
    ----------
    before, after
        Means over cells, ``(n_samples, genes)``, of the same draws of z.
    index
        Names of the genes.
    """
    smallest = np.finfo(np.float32).tiny
    change = np.log2(np.maximum(after, smallest)) - np.log2(np.maximum(before, smallest))
    low, high = np.quantile(change, [0.05, 0.95], axis=0)
    columns = {"before": before.mean(0), "after": after.mean(0), "log2_fold_change": change.mean(0)}
    return pd.DataFrame({**columns, "lower": low, "upper": high}, index=index)
