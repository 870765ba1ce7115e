"""Log-normalise counts, with numpy and scipy only."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["COUNTS_PER_CELL", "log_normalise"]

COUNTS_PER_CELL = 1e4
"""Library size to which counts are scaled before the logarithm, the usual one for single cells."""


def log_normalise(x: Any, library: NDArray[np.floating[Any]]) -> Any:
    """Compute ``log(1 + 10,000 x / library)``.

    Parameters
    ----------
    x
        Counts: an array or a sparse matrix. Sparse matrices stay sparse, and float32 stays float32.
    library
        Library sizes, of a shape that broadcasts against ``x``. Values below 1 are replaced by 1, so that cells
        without counts become zeros.

    Examples
    --------
    >>> log_normalise(np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[10.0], [0.0]])).round(2).tolist()
    [[0.0, 6.91], [0.0, 0.0]]
    """
    per_count = COUNTS_PER_CELL / np.maximum(library, 1)
    return x.multiply(per_count).tocsr().log1p() if sp.issparse(x) else np.log1p(x * per_count)
