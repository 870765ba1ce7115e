"""Compute fingerprints of data, from shape, values and names, that show later whether data are the same."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse as sp
    from anndata import AnnData

    from celbo.data.stored import Stored

__all__ = ["Fingerprint", "fingerprint"]


class Fingerprint:
    """SHA-256 of values, computed block by block; layout on disk and explicit zeros do not change it."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256() for _ in range(3)]

    def add(self, block: "sp.csr_matrix") -> None:
        """Add the next rows."""
        block = block.copy()  # it may be a view of the caller's values
        block.eliminate_zeros()
        for digest, array in zip(self._hashes, (np.diff(block.indptr), block.indices, block.data), strict=True):
            digest.update(array.astype(np.float64).tobytes())

    def of(self, adata: "AnnData", layer: str | None) -> dict[str, Any]:
        """Return the shape, and the hashes of the added values and of the names."""
        names = "\n".join([*adata.obs_names, "", *adata.var_names])
        return {
            "n_cells": adata.n_obs,
            "n_genes": adata.n_vars,
            "layer": layer,
            "sha256_values": hashlib.sha256(b"".join(digest.digest() for digest in self._hashes)).hexdigest(),
            "sha256_names": hashlib.sha256(names.encode()).hexdigest(),
        }


def fingerprint(stored: "Stored", adata: "AnnData", layer: str | None) -> dict[str, Any]:
    """Read all values once, and return their fingerprint."""
    hashes = Fingerprint()
    for block in stored.blocks():
        hashes.add(block)
    return hashes.of(adata, layer)
