"""Mutual information of cells and z, and the threshold of an active dimension. Numpy only."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from celbo.streams import Stream, random_stream

__all__ = ["ACTIVE", "ANCHORS", "mutual_information"]

Floats = NDArray[np.floating[Any]]

ACTIVE = 0.01
"""A latent dimension is inactive if its posterior mean varies less than this over cells (Burda 2016)."""
ANCHORS = 5000
"""Number of cells on which mutual information is estimated; its log is the largest value possible."""


def mutual_information(mu_z: Floats, logvar_z: Floats, *, seed: int = 0, anchors: int = ANCHORS) -> float:
    """``I_q(x; z) = E log q(z | x) - log mean_i q(z | x_i)``, nats (Hoffman & Johnson 2016).

    One z is drawn for each of at most ``anchors`` cells, and the mean is over the same cells. The estimate is never
    above the log of their number; small negative values are noise.

    Examples
    --------
    Two clusters that do not overlap:

    >>> mu_z = np.repeat([[-9.0], [9.0]], 500, axis=0)
    >>> round(mutual_information(mu_z, np.full_like(mu_z, -2.0)), 3)  # log 2
    0.693
    """
    rng = random_stream(seed, Stream.INFORMATION)
    rows = rng.permutation(len(mu_z))[:anchors]
    mu, logvar = mu_z[rows].astype(np.float64), logvar_z[rows].astype(np.float64)
    mu = mu - mu.mean(0)  # so that squares lose nothing
    z = mu + np.exp(0.5 * logvar) * rng.standard_normal(mu.shape)
    own = -0.5 * (((z - mu) ** 2) * np.exp(-logvar) + logvar).sum(1)
    among = np.empty(len(rows))
    precision = np.exp(-logvar)
    constant = -0.5 * (mu**2 * precision + logvar).sum(1)
    for start in range(0, len(rows), 500):
        z_of_block = z[start : start + 500]
        log_q = -0.5 * z_of_block**2 @ precision.T + z_of_block @ (mu * precision).T + constant
        among[start : start + 500] = logsumexp(log_q, axis=1) - math.log(len(rows))
    return float((own - among).mean())
