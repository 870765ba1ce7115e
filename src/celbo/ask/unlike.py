"""Cells that are unlike the cells of fit: the model explains them worse than held-out cells of fit."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from celbo.ask.outliers import batches, p_values, standardised
from celbo.errors import warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import Reference
from celbo.minibatch import Rows, in_chunks
from celbo.model.inference import CHUNK

__all__ = ["unlike", "warn_of_unlike"]

_UNLIKE = 0.005
"""Largest share of held-out cells that are explained as badly as a cell that is called unlike them."""
_FEWEST_HELD_OUT = 30
_TAIL, _FEWEST_IN_TAIL = 0.1, 10
"""The tail is fitted to this share of the held-out cells, or to this number of them."""
_EXPECTED, _CHANCE = 0.01, 1e-3
"""There is a warning if this share of unlike cells, or a smaller one, gives as many with less than this probability."""


def unlike(fitted: Fitted, cells: Cells) -> NDArray[np.bool_] | None:
    """Tell which cells are unlike the cells of fit, ``(cells,)``; None if the model cannot tell.

    A cell is compared with held-out cells by ``-log p(x | mu_z, c)`` over the measured genes, standardised given log
    library size and level (`celbo.ask.outliers.standardised`). It is unlike them if at most 0.5 % of them are explained
    as badly. A cell without a count is never unlike. If the cells lack genes of the model, the part of these genes is
    taken from the held-out cells, as the model expects it for each of them.

    A model cannot tell if it keeps no reference cells, if fewer than 30 cells were held out, or if an older celbo saved
    it.
    """
    reference = fitted.reference
    if reference is None:
        return None
    known = reference.held_out & (reference.log_p != 0)
    if known.sum() < _FEWEST_HELD_OUT:
        return None
    encoded = cells.encoded
    held_out = reference.log_p[known].astype(np.float64)
    if not cells.measured.all():
        held_out -= _log_p_of_genes(fitted, reference, np.flatnonzero(known), ~cells.measured)
    usual, readings = standardised(
        -held_out[:, None],
        -encoded.log_p[:, None].astype(np.float64),
        library=(reference.library[known], encoded.library),
        batch=batches(fitted, reference, known, cells),
    )
    tail = max(_TAIL, _FEWEST_IN_TAIL / len(usual))
    is_unlike: NDArray[np.bool_] = (p_values(usual[:, 0], readings[:, 0], tail=tail) <= _UNLIKE) & ~cells.empty
    return is_unlike


def _log_p_of_genes(fitted: Fitted, reference: Reference, rows: Rows, genes: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Draw values of these genes for reference cells, and return their log p(x | mu_z, c), ``(rows,)``, nats."""
    vae, schema = fitted.vae, fitted.schema
    device, log_p = next(vae.parameters()).device, []
    no_genes = np.zeros((1, len(genes)), bool)
    absent = no_genes if schema.absent is None else schema.absent.masks(schema.genes)
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(fitted.seed)  # not every distribution of torch takes a generator
        for piece in in_chunks(rows, CHUNK):
            z, library = (torch.from_numpy(part[piece]).to(device) for part in (reference.mu_z, reference.library))
            context = schema.expand(reference.conditions[piece]).to(device) if vae.context_dim else None
            p = vae.likelihood(z, context=context, library=library[:, None])
            measured = torch.from_numpy(genes & ~absent[reference.absent_level[piece]]).to(device)
            log_p.append(torch.where(measured, p.log_prob(p.sample()), 0).sum(-1).double().cpu().numpy())
    return np.concatenate(log_p)


def warn_of_unlike(fitted: Fitted, cells: Cells) -> NDArray[np.bool_] | None:
    """Return `unlike`, and warn if more cells are unlike the cells of fit than chance explains."""
    is_unlike = unlike(fitted, cells)
    if is_unlike is None:
        return None
    n, n_cells = int(is_unlike.sum()), int((~cells.empty).sum())
    if binom.sf(n - 1, n_cells, _EXPECTED) < _CHANCE:
        result = (
            "The result means little for most cells. Are tissue, chemistry, species and genes those of fit?"
            if n > n_cells / 2
            else "The result means little for these cells; celbo score --outliers (model.outliers) tells more."
        )
        warn(
            f"{n:,} of {n_cells:,} cells ({n / n_cells:.0%}) are unlike the cells of fit: the model explains them "
            f"worse than {1 - _UNLIKE:.1%} of the held-out cells of the same depth and level. {result}"
        )
    return is_unlike
