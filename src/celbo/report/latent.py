"""Lay out the latent space in two dimensions."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

from celbo.streams import short_seed

__all__ = ["Layout", "layout"]

MIN_CELLS = 10
"""t-SNE needs at least this many cells."""

MAX_ITER = 400
"""Number of t-SNE steps. Scikit-learn's default, 1,000, takes 2.5 times as long, and keeps neighbours no better."""

ANGLE = 0.8
"""How coarsely t-SNE joins distant cells. scikit-learn's default, 0.5, takes 1.2 to 1.4 times as long."""


class Layout(NamedTuple):
    """Positions of cells in the plane."""

    rows: NDArray[np.int64]
    """Rows of the cells that are shown, ``(shown,)``, increasing."""
    xy: NDArray[np.float64]
    """Their positions, ``(shown, 2)``."""
    method: str
    """Description of the method."""


def layout(mu_z: ArrayLike, *, max_cells: int = 2000, seed: int = 0) -> Layout:
    """Place cells in the plane, so that neighbours in the latent space stay neighbours.

    The method is t-SNE (van der Maaten & Hinton 2008) if there are at least ten cells and three latent dimensions.
    Otherwise the axes are the latent dimensions or principal components. The same input and seed give the same plane.

    Parameters
    ----------
    mu_z
        Posterior means, ``(cells, latent_dim)``. Cells with values that are not finite are left out.
    max_cells
        Largest number of cells to show; more are sampled at random.
    seed
        Seed of the sample of cells, and of the heights if there is only one latent dimension.

    Returns
    -------
    Layout
        The cells shown, their coordinates and the method's name.

    Examples
    --------
    >>> import numpy as np
    >>> layout(np.eye(4, 2), max_cells=3)
    Layout(rows=array([1, 2, 3]), xy=array([[0., 1.], [0., 0.], [0., 0.]]), method='the two latent dimensions')
    """
    z = np.asarray(mu_z, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(np.isfinite(z).all(axis=1))
    if len(rows) > max_cells:
        rows = np.sort(rng.choice(rows, max_cells, replace=False))
    z = z[rows]
    if z.shape[1] == 1:
        return Layout(
            rows,
            np.c_[z, rng.uniform(-1, 1, len(z))],
            "the one latent dimension, from left to right (height is random)",
        )
    if z.shape[1] == 2:
        return Layout(rows, z, "the two latent dimensions")
    plane = _principal_plane(z)
    spread = np.ptp(plane[:, 0]) if len(plane) else 0.0
    if len(z) < MIN_CELLS or spread == 0:
        return Layout(rows, plane, "the first two principal components")
    tsne = TSNE(
        init=(plane / spread * 1e-3).astype(np.float32),
        perplexity=min(30.0, (len(z) - 1) / 3),
        max_iter=MAX_ITER,
        angle=ANGLE,
        random_state=short_seed(seed),
    )
    # One thread keeps the order of sums, and does not compete with other processes.
    with threadpool_limits(1):
        return Layout(rows, tsne.fit_transform(z / spread).astype(np.float64), "t-SNE")


def _principal_plane(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the first two principal components, ``(cells, 2)``; zeros if there are fewer than two cells."""
    if len(z) < 2:
        return np.zeros((len(z), 2))
    with np.errstate(invalid="ignore"):  # equal cells have a variance of zero
        plane: NDArray[np.float64] = PCA(2, svd_solver="full").fit_transform(z)
    return plane
