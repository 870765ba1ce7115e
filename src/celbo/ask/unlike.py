"""Cells that are unlike the cells of fit: the model explains them worse than held-out cells of fit."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from celbo.ask.outliers import batches, standardised
from celbo.errors import warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted

__all__ = ["describe_unlike", "unlike", "warn_of_unlike"]

_UNLIKE = 0.005
"""Largest share of held-out cells that are explained as badly as a cell that is called unlike them."""
_FEWEST_HELD_OUT = 30
_TAIL, _FEWEST_IN_TAIL = 0.1, 10
"""The tail is fitted to this share of the held-out cells, or to this number of them."""
_EXPECTED, _CHANCE = 0.01, 1e-3
"""There is a warning if this share of unlike cells, or a smaller one, gives as many with less than this probability."""


def unlike(fitted: Fitted, cells: Cells) -> NDArray[np.bool_] | None:
    """Tell which cells are unlike the cells of fit, ``(cells,)``; None if the model cannot tell.

    A cell is compared with held-out cells by its surprise (`celbo.model.surprise.surprise`), standardised given log
    library size and level (`celbo.ask.outliers.standardised`). It is unlike them if at most 0.5 % of them are as
    surprising. A cell without a count is never unlike.

    A model cannot tell if it keeps no reference cells, if fewer than 30 cells were held out, or if an older celbo saved
    it.
    """
    reference = fitted.reference
    if reference is None:
        return None
    known = reference.held_out & (reference.surprise != 0)
    if known.sum() < _FEWEST_HELD_OUT:
        return None
    surprise = cells.surprise  # `encoded` comes from the same pass
    usual, readings = standardised(
        reference.surprise[known, None].astype(np.float64),
        surprise[:, None].astype(np.float64),
        library=(reference.library[known], cells.encoded.library),
        batch=batches(fitted, reference, known, cells),
    )
    return (readings[:, 0] > _highest_usual(usual[:, 0])) & ~cells.empty


def _highest_usual(usual: NDArray[np.float64]) -> float:
    """Return the reading that 0.5 % of usual cells exceed, with an exponential tail beyond the highest tenth."""
    n_tail = max(_FEWEST_IN_TAIL, round(_TAIL * len(usual)))
    highest = np.sort(usual)[-n_tail - 1 :]
    excess = (highest[1:] - highest[0]).mean()
    return float(highest[0] + excess * np.log(n_tail / len(usual) / _UNLIKE))


def describe_unlike(is_unlike: NDArray[np.bool_], cells: Cells) -> str:
    """Say how many cells are unlike the cells of fit; return "" if chance explains as many."""
    n, n_cells = int(is_unlike.sum()), int((~cells.empty).sum())
    if binom.sf(n - 1, n_cells, _EXPECTED) >= _CHANCE:
        return ""
    result = (
        "The result means little for most cells. Are tissue, chemistry, species and genes those of fit?"
        if n > n_cells / 2
        else "The result means little for these cells; celbo score --outliers (model.outliers) tells more."
    )
    return (
        f"{n:,} of {n_cells:,} cells ({n / n_cells:.0%}) are unlike the cells of fit: the model explains them "
        f"worse than {1 - _UNLIKE:.1%} of the held-out cells of the same depth and level. {result}"
    )


def warn_of_unlike(fitted: Fitted, cells: Cells) -> NDArray[np.bool_] | None:
    """Return `unlike`, and warn, once for these cells, if more are unlike the cells of fit than chance explains."""
    if "unlike" not in cells.kept:
        is_unlike = cells.kept["unlike"] = unlike(fitted, cells)
        if is_unlike is not None and (doubt := describe_unlike(is_unlike, cells)):
            warn(doubt)
    kept: NDArray[np.bool_] | None = cells.kept["unlike"]
    return kept
