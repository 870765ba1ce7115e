"""Readings of a cell that show whether it is unusual. Each cell is read, filled in and encoded once.

A reading is high where a cell is unusual:

unlikely
    ``-log p(x)``.
distance
    Log of the distance of mu_z to the 15th nearest training cell.
mixture
    How much better the mean of two typical profiles explains the counts than the cell's own profile does; nats divided
    by the root of the depth. Counts only.
ambient
    The same for the mean of all typical profiles. Counts only.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import n_readings
from celbo.kernels.threads import threads
from celbo.minibatch import Rows, in_chunks
from celbo.model.importance import BLOCK, log_prob_of_block
from celbo.model.inference import Block, encoded_blocks
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

__all__ = ["CellReadings", "read_cells", "with_readings"]

_SAMPLES = 25
"""Importance samples for each cell. On simulated cells the noise of -log p(x) is then 0.6 nats (1.4 if they are deep),
where cells differ by 139 (335)."""
_NEAREST = 15
_CELLS_TO_READ = 3000
"""Held-out cells that are read after a fit, and that other cells are compared with."""
_SURPRISING_GENES = 5
_SMALLEST = 1e-9
_NOTHING = -1e4
"""Log share of a gene that was not measured. It is finite because it is multiplied by zero counts."""


class CellReadings(NamedTuple):
    """What was read of some cells."""

    readings: NDArray[np.float64]
    """``(cells, 4)``: `celbo.fit.reference.READINGS`; the first two where the values are not counts."""
    library: NDArray[np.float32]
    """``(cells,)``; it includes the counts that are filled in for missing genes."""
    genes: list[str]
    """For each cell the genes that surprise most; + after a gene with more counts than expected, - with fewer."""


def with_readings(fitted: Fitted, cells: Cells) -> Fitted:
    """Add readings of at most 3,000 held-out cells to the reference of a model that was just fitted.

    Parameters
    ----------
    fitted
        The model.
    cells
        The cells of fit.
    """
    reference, split = fitted.reference, fitted.split
    if reference is None or split is None or not (fitted.objective.samples_z and len(split.validation) > 0):
        return fitted
    if reference.held_out.all():
        return fitted
    held_out = np.flatnonzero(reference.held_out)
    chosen = np.sort(random_stream(fitted.seed, Stream.READ_CELLS).permutation(held_out)[:_CELLS_TO_READ])
    rows = split.validation[np.searchsorted(held_out, chosen)]
    readings, was_read = reference.readings.copy(), reference.was_read.copy()
    readings[chosen] = read_cells(fitted, cells, rows, with_genes=False, seed=fitted.seed).readings
    was_read[chosen] = True
    return replace(fitted, reference=reference._replace(readings=readings, was_read=was_read))


def read_cells(fitted: Fitted, cells: Cells, rows: Rows, *, with_genes: bool = True, seed: int) -> CellReadings:
    """Read these cells, each once; cells of the same conditions, that lack the same genes, are decoded together.

    Parameters
    ----------
    fitted, cells, rows
        The model, the cells, and the positions of those to read.
    with_genes
        Whether to name the genes that surprise most.
    seed
        Seed of all random draws.
    """
    reference = fitted.needed_reference()
    tree = cKDTree(reference.mu_z[~reference.held_out])
    readings = np.empty((len(rows), n_readings(fitted.is_counts)))
    library, genes = np.empty(len(rows), np.float32), np.full(len(rows), "", object)
    names = np.array(fitted.schema.genes)
    codes = np.column_stack([cells.codes[rows], cells.source.absent_level[rows]])
    _, group = np.unique(codes, axis=0, return_inverse=True)
    with threads(fitted.threads):
        for number in range(group.max(initial=-1) + 1):
            members = np.flatnonzero(group.reshape(-1) == number)
            blocks = encoded_blocks(fitted.vae, cells.source, rows[members], BLOCK)
            for places, block in zip(in_chunks(members, BLOCK), blocks, strict=True):
                estimate = log_prob_of_block(fitted.vae, block, n_samples=_SAMPLES, refine_steps=0, seed=seed)
                readings[places, 0] = -estimate.log_p
                mu_z = block.mu_z.cpu().numpy()
                distance = tree.query(mu_z, [min(_NEAREST, tree.n)])[0][:, 0]
                readings[places, 1] = np.log(np.maximum(distance, _SMALLEST))
                if fitted.is_counts:
                    readings[places, 2:] = _better_explained(fitted, block)
                library[places] = block.cells.library[:, 0].cpu().numpy()
                if with_genes:
                    genes[places] = _surprising_genes(fitted.vae, block, names)
    return CellReadings(readings, library, genes.tolist())


@torch.inference_mode()
def _better_explained(fitted: Fitted, block: Block) -> NDArray[np.float64]:
    """Multinomial log-likelihood of two typical profiles together, and of the mean of all, less that of the own one."""
    vae, cells = fitted.vae, block.cells
    centres = torch.from_numpy(fitted.centres).to(block.mu_z.device)
    context = None if (contexts := context_of(vae, cells)) is None else contexts[:1]
    first, second = np.triu_indices(len(centres), 1) if len(centres) > 1 else np.zeros((2, 1), int)
    log_known = _log_profiles(vae, centres, context, cells.observed)
    pairs = torch.logaddexp(log_known[first], log_known[second])
    mean = torch.logsumexp(log_known, 0, keepdim=True)
    pairs, mean = (profile - profile.logsumexp(-1, keepdim=True) for profile in (pairs, mean))
    own = _log_profiles(vae, block.mu_z, context, cells.observed)
    x = block.measured.to_dense()
    depth, by_own = x.sum(-1).clamp(min=1).sqrt(), (x * own).sum(-1)
    explained = torch.stack([(x @ pairs.T).amax(-1), (x @ mean.T)[:, 0]], 1)
    gain: NDArray[np.float64] = ((explained - by_own[:, None]) / depth[:, None]).cpu().numpy()
    return gain


def _log_profiles(vae: VAE, z: Tensor, context: Tensor | None, observed: Tensor | None) -> Tensor:
    """Log shares among the measured genes, ``(n, genes)``; `_NOTHING` for the other genes."""
    again = None if context is None else context.expand(len(z), -1)
    log_share = vae.decode(z, again, torch.ones(len(z), 1, device=z.device)).clamp(min=_SMALLEST).log()
    if observed is None:
        return log_share
    return torch.where(observed, log_share - log_share[:, observed].logsumexp(-1, keepdim=True), _NOTHING)


@torch.inference_mode()
def _surprising_genes(vae: VAE, block: Block, names: NDArray[np.str_]) -> list[str]:
    """Name the genes with the largest ``log p(mean_g) - log p(x_g)`` at mu_z, most surprising first."""
    cells = block.cells
    p = vae.likelihood(block.mu_z, context=context_of(vae, cells), library=cells.library)
    x, mean = cells.x.to_dense(), p.mean
    expected = mean.round() if getattr(p.support, "is_discrete", False) else mean
    lost = p.log_prob(expected) - p.log_prob(x)
    if cells.observed is not None:
        lost = torch.where(cells.observed, lost, 0.0)
    most = lost.topk(min(_SURPRISING_GENES, lost.shape[1]), dim=-1).indices
    is_more = (x > mean).gather(1, most).cpu().numpy()
    return [
        " ".join(f"{names[gene]}{'+' if more else '-'}" for gene, more in zip(of_cell, signs, strict=True))
        for of_cell, signs in zip(most.cpu().numpy(), is_more, strict=True)
    ]
