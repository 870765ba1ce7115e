"""Cells opened for a model: checked and aligned once. They live for one question, or from a fit to its written run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from celbo.data.read import read_adata
from celbo.data.schema import Schema
from celbo.data.sources import CellSource, open_source
from celbo.kernels.threads import threads
from celbo.minibatch import Contexts, Rows
from celbo.model.inference import Encoded, encode
from celbo.model.vae import VAE

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from celbo.fit.fitted import Fitted

__all__ = ["Cells", "open_cells"]


@dataclass(eq=False)
class Cells:
    """Cells that were checked against a schema, aligned by gene name, and can be read by position.

    The posteriors of all cells are computed at most once, for one model; see `seen_by`.
    """

    source: CellSource
    obs: "pd.DataFrame"
    """The table of cells. Its index holds their names."""
    schema: Schema
    vae: VAE | None = None
    """The model that encodes them; None before it is fitted."""
    n_threads: int | None = None
    """Processor threads of the model."""
    fingerprint: Mapping[str, Any] | None = None
    """Shape and hashes of the values and names, if they were asked for."""
    prepared_with: Mapping[str, Any] | None = None
    """Options with which they were prepared for a fit; None if they were opened for a question."""

    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What was found out about these cells and is asked for again, by name."""
    _view: "Cells | None" = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.source.n_cells

    @property
    def rows(self) -> Rows:
        """Positions of all cells."""
        return np.arange(self.source.n_cells)

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Which cells have no count of the model's genes, ``(cells,)``; none where values are real numbers."""
        return self.source.empty

    @property
    def codes(self) -> NDArray[np.float32]:
        """Conditions, ``(cells, conditions)``: the number of a level, or a standardised value."""
        return self.source.codes

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which genes of the model the cells have, ``(genes,)``."""
        return self.source.measured

    @cached_property
    def encoded(self) -> Encoded:
        """Posteriors and library sizes; missing genes are filled in. Computed in one pass, at the first use."""
        return self._encode(None, None)

    @cached_property
    def surprise(self) -> NDArray[np.float32]:
        """`celbo.model.surprise.surprise` of the cells, ``(cells,)``; `encoded` comes from the same pass."""
        encoded = self._encode(None, np.ones(len(self), bool))
        self.__dict__.setdefault("encoded", encoded)
        return encoded.surprise

    def encoded_at(self, rows: Rows, *, surprise_of: NDArray[np.bool_] | None = None) -> Encoded:
        """Posteriors and library sizes of the cells at these positions; if these are most cells, all are encoded.

        ``surprise_of`` says for which of them `Encoded.surprise` is computed, ``(rows,)``.
        """
        are_most = 2 * len(rows) > len(self)
        if surprise_of is None:
            return self.encoded.at(rows) if are_most or "encoded" in self.__dict__ else self._encode(rows, None)
        if not are_most:
            return self._encode(rows, surprise_of)
        of_all = np.zeros(len(self), bool)
        of_all[rows[surprise_of]] = True
        encoded = self._encode(None, of_all)
        self.__dict__.setdefault("encoded", encoded)
        return encoded.at(rows)

    def contexts(self, given: Mapping[str, Any]) -> Contexts:
        """Contexts of these cells by position, with the conditions of ``given`` set to its values."""
        codes = self.schema.codes(self.obs, given)
        return lambda rows: self.schema.expand(codes[rows])

    def _encode(self, rows: Rows | None, surprise_of: NDArray[np.bool_] | None) -> Encoded:
        assert self.vae is not None
        with threads(self.n_threads):
            return encode(self.vae, self.source, rows, surprise_of=surprise_of)

    def seen_by(self, fitted: "Fitted") -> "Cells":
        """Return the same cells, to be encoded by this model. The view of the last model is kept."""
        if self.vae is fitted.vae:
            return self
        if self._view is None or self._view.vae is not fitted.vae:
            self._view = replace(self, vae=fitted.vae, schema=fitted.schema, n_threads=fitted.threads)
        return self._view


def open_cells(
    fitted: "Fitted",
    adata: "AnnData | str | Path",
    *,
    unseen: str = "refuse",
    genes_present: float | None = None,
) -> Cells:
    """Check cells against a fitted model, align them by gene name, and make them ready to be read.

    Parameters
    ----------
    fitted
        The model.
    adata
        The cells, or the path of an ``.h5ad`` file or ``.zarr`` folder. They stay unchanged.
    unseen, genes_present
        As `celbo.data.checks.check_query` takes them.

    Raises
    ------
    DataError
        If genes, values or conditions do not fit the model. The message lists everything that does not fit.
    """
    adata = read_adata(adata, layer=fitted.schema.layer)
    source = open_source(adata, fitted.schema, unseen=unseen, genes_present=genes_present)
    return Cells(source, adata.obs, fitted.schema, fitted.vae, fitted.threads)
