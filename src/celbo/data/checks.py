"""What values may be: every stored one is looked at before anything is computed from it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from celbo.errors import DataError

__all__ = ["check_counts", "check_reals", "holds_counts"]

Fault = Callable[[NDArray[Any]], NDArray[np.bool_]]

_CHUNK = 1 << 22
"""Stored values looked at together."""


def check_counts(x: sp.csr_matrix, adata: AnnData, place: str) -> None:
    """Refuse values that are not counts: not finite, negative, or not whole.

    Parameters
    ----------
    x
        Values, ``(cells, genes)``, in the order of ``adata``.
    adata
        For the names of cells and genes, and for other layers to suggest.
    place
        How to name the values: "X", or "layers['counts']".

    Raises
    ------
    DataError
        With the first bad value's place, the number of such values, and what to do.
    """
    _refuse(x, adata, place, _not_finite, "not finite", "Find out where it came from; counts are never missing.")
    _refuse(x, adata, place, _negative, "negative", _instead(adata, place, "Scaled or batch-corrected values"))
    _refuse(x, adata, place, _not_whole, "not whole numbers", _instead(adata, place, "Normalised or logged values"))


def check_reals(x: sp.csr_matrix, adata: AnnData, place: str) -> None:
    """Refuse values that are not finite; parameters as in `check_counts`."""
    _refuse(x, adata, place, _not_finite, "not finite", "Fill in missing values, or drop these cells or genes.")


def holds_counts(matrix: Any) -> bool:
    """Whether all values of a sparse or dense array are finite whole numbers of at least 0.

    Examples
    --------
    >>> holds_counts(np.array([0.0, 3.0])), holds_counts(np.array([0.5])), holds_counts(np.array([-1]))
    (True, False, False)
    """
    values = matrix.data if sp.issparse(matrix) else np.asarray(matrix).ravel()
    return not any(
        fault(values[start : start + _CHUNK]).any()
        for start in range(0, len(values), _CHUNK)
        for fault in (_not_finite, _negative, _not_whole)
    )


def _not_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    return ~np.isfinite(values)


def _negative(values: NDArray[Any]) -> NDArray[np.bool_]:
    return values < 0 if values.dtype.kind in "if" else np.zeros(len(values), bool)


def _not_whole(values: NDArray[Any]) -> NDArray[np.bool_]:
    return values != np.rint(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)


def _refuse(x: sp.csr_matrix, adata: AnnData, place: str, fault: Fault, found: str, advice: str) -> None:
    bad = [start + np.flatnonzero(fault(x.data[start : start + _CHUNK])) for start in range(0, len(x.data), _CHUNK)]
    positions = np.concatenate([np.empty(0, np.intp), *bad])
    if not positions.size:
        return
    first = positions[0]
    row = np.searchsorted(x.indptr, first, side="right") - 1
    raise DataError(
        f"{place} is {x.data[first]:g} in cell {adata.obs_names[row]!r} (row {row:,}), "
        f"gene {adata.var_names[x.indices[first]]!r}; {positions.size:,} of {len(x.data):,} stored values are {found}. "
        f"{advice}"
    )


def _instead(adata: AnnData, place: str, guess: str) -> str:
    """Name a layer that holds counts, if there is one."""
    layers = {f"layers[{name!r}]": (name, adata.layers[name]) for name in adata.layers}
    for other, (name, matrix) in layers.items():
        if other != place and holds_counts(matrix):
            return f"{guess}? {other} holds whole numbers: use layer={name!r} (--layer {name})."
    return (
        f"{guess}? celbo models raw counts: give it those, in X or in a layer. The gaussian "
        "likelihood also takes real numbers, from a layer that is named."
    )
