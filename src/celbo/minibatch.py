"""Minibatch and Source: the interface between data and model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FEWEST_ROWS",
    "Contexts",
    "GeneMoments",
    "Minibatch",
    "Rows",
    "Source",
    "csr_tensor",
    "gene_moments",
    "in_chunks",
    "in_even_pieces",
    "scipy_csr",
]

Rows = NDArray[np.int64]
"""Positions of cells in a `Source`."""
Contexts = Callable[[Rows], Tensor]
"""Encoded conditions of the cells at these positions, ``(cells, context_dim)``: made where they are needed."""
FEWEST_ROWS = 16
"""Smallest limit for pieces of a matrix that is multiplied. Fewer than 4 rows are multiplied by other code, which may
round in another way; even pieces have at least half as many rows as their limit."""


class Minibatch(NamedTuple):
    """The cells of one step."""

    x: Tensor
    """Values as the likelihood takes them, ``(cells, genes)`` float32: sparse CSR, dense on a GPU."""
    context: Tensor
    """Encoded conditions, ``(cells, context_dim)`` float32."""
    library: Tensor
    """Library size on the linear scale, ``(cells, 1)`` float32."""
    observed: Tensor | None = None
    """Which genes were measured, ``(genes,)`` bool, or ``(cells, genes)`` if cells differ in this; None if all were."""
    labels: Tensor | None = None
    """Number of each cell's label, ``(cells,)``, -1 for an unknown one; None where no labels are learned."""

    def to(self, device: torch.device | str) -> "Minibatch":
        """Move to the device that computes; on a GPU become dense there."""
        x = self.x.to(device)
        observed = None if self.observed is None else self.observed.to(device)
        labels = None if self.labels is None else self.labels.to(device)
        x = x.to_dense() if x.is_cuda else x
        return Minibatch(x, self.context.to(device), self.library.to(device), observed, labels)


def csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Make a sparse tensor of its parts, without torch's warning that such tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, tuple(shape), check_invariants=False)


def scipy_csr(x: Tensor) -> sp.csr_matrix:
    """Return a matrix of values, ``(cells, genes)``, as scipy's; it may share memory with a sparse tensor."""
    x = x.cpu()
    if x.layout != torch.sparse_csr:
        return sp.csr_matrix(x.numpy())
    parts = (part.numpy() for part in (x.values(), x.col_indices(), x.crow_indices()))
    return sp.csr_matrix(tuple(parts), tuple(x.shape))


class Source(Protocol):
    """Cells that are read by position, with genes in the model's order."""

    n_cells: int
    n_genes: int
    library_is_sum: bool
    """Whether the library is the sum of the counts, and not a size factor."""
    scaled_to: float | None
    """Library size to which counts were scaled before the logarithm; None if x is not log-normalised."""

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        ...


def in_chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut positions into consecutive pieces of at most ``size``.

    Examples
    --------
    >>> [piece.tolist() for piece in in_chunks(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def in_even_pieces(rows: Rows, most: int) -> Iterator[Rows]:
    """Cut positions into consecutive pieces of at most ``most``, as few as possible, whose sizes differ by 1 at most.

    Examples
    --------
    >>> [piece.tolist() for piece in in_even_pieces(np.arange(5), 4)]
    [[0, 1, 2], [3, 4]]
    """
    yield from np.array_split(rows, max(1, -(-len(rows) // most)))


class GeneMoments(NamedTuple):
    """Sums over cells that give each likelihood its closed-form start; float64, ``(genes,)`` or scalar."""

    n_cells: int
    x: Tensor
    """Sum of x, by gene."""
    x_squared: Tensor
    """Sum of x squared, by gene."""
    x_library: Tensor
    """Sum of x times library, by gene."""
    detected: Tensor
    """Number of cells with x > 0, by gene."""
    library: Tensor
    """Sum of library."""
    library_squared: Tensor
    """Sum of library squared."""


def gene_moments(source: Source, rows: Rows, chunk: int = 4096) -> GeneMoments:
    """Sum the powers of x and library that `GeneMoments` names, in one pass over these cells.

    Sums of a gene that some cells lack are scaled up by the share of all counts that the other cells have.

    Parameters
    ----------
    source
        Where the cells are.
    rows
        Which of them.
    chunk
        Cells held in memory at a time.
    """
    by_gene = torch.zeros(4, source.n_genes, dtype=torch.float64)
    library_sum = library_squared = torch.zeros((), dtype=torch.float64)
    library_seen, cells_differ = torch.zeros(source.n_genes, dtype=torch.float64), False
    for piece in in_chunks(rows, chunk):
        minibatch = source.take(piece)
        x, genes = minibatch.x.values().double(), minibatch.x.col_indices().long()
        library = minibatch.library.double().squeeze(1)
        library_of_x = library.repeat_interleave(minibatch.x.crow_indices().diff())
        by_gene.index_add_(1, genes, torch.stack([x, x * x, x * library_of_x, (x > 0).double()]))
        if minibatch.observed is None:
            library_seen += library.sum()
        else:
            cells_differ = True
            library_seen += library @ minibatch.observed.double().expand(len(library), -1)
        library_sum = library_sum + library.sum()
        library_squared = library_squared + library.square().sum()
    if cells_differ:
        by_gene *= torch.where(library_seen > 0, library_sum / library_seen, 1.0)
    x_sum, x_squared, x_library, detected = by_gene
    return GeneMoments(len(rows), x_sum, x_squared, x_library, detected, library_sum, library_squared)
