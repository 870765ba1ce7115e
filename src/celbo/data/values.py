"""Check every stored value in one pass, and explain values that are not counts."""

import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from celbo.data.fingerprint import Fingerprint
from celbo.data.matching import align
from celbo.data.read import ORIGIN, left_on_disk
from celbo.data.stored import Stored, layer_names, layer_values, place_of, stored_matrix, use_raw

__all__ = [
    "Fault",
    "Scan",
    "describe_rounded",
    "describe_values",
    "find_counts",
    "holds_counts",
    "scan_values",
    "seem_joined",
    "value_faults",
]

LARGEST_COUNT = 1e9
"""Larger counts are errors: no experiment counts more of one gene in one sample."""

_EXACT = 2**24
"""float32 cannot represent all whole numbers above this one."""

_SAMPLE = 1000
"""Number of cells, evenly spaced, from which `describe_values` guesses the kind of values."""

_FEWEST_TOTALS, _FEWEST_EQUAL, _FEWEST_GENES = 5, 10, 100
"""Cells that are needed to compare totals; equal values of a cell that are needed to expect the next smaller value too;
and genes that are needed to compare variances with means."""
_SAME_TOTAL = 1.1
"""Counts that were scaled to a total and rounded have totals that differ by up to this factor, because some cells lose
more by rounding than others. In raw counts the totals of half of the cells are never as close."""
_GAPS, _GAPS_OF_COUNTS = 0.3, 0.1
"""Share of cells with gaps from which values are no counts. With counts, at most the second share of cells has one."""
_UNDERDISPERSED = 0.7
"""Variance over mean of genes, below which values were not counted. It is 1 or more for counts."""
_MILLION = 1_000_000
_FEWEST_GENES_OF_A_JOIN, _FEWEST_CELLS_OF_A_JOIN = 5, 20
"""Genes that a cell must lack to look like a cell of a sample without them, and cells that must lack the same."""
_FEWEST_OF_PART, _PART = 50, 0.1
"""Number and share of the cells that are looked at as a part of their own, because their totals are close."""


class Fault(NamedTuple):
    """Number of bad values of one kind, and the first of them."""

    n: int
    row: int
    column: int
    value: float


class Scan(NamedTuple):
    """Result of one pass over all stored values."""

    n_values: int
    """Number of stored values."""
    library: NDArray[np.float64]
    """Sum of each cell's values over the genes asked for, ``(cells,)``."""
    detected: NDArray[np.int64]
    """Number of cells with a non-zero value, by gene of the data, ``(genes,)``."""
    faults: dict[str, Fault]
    """Faults by their kind in `KINDS`; kinds that do not occur are absent."""


class Kind(NamedTuple):
    """A kind of bad value."""

    is_bad: Callable[[NDArray[Any]], NDArray[np.bool_]]
    description: str
    """Description in messages."""


def _not_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    return ~np.isfinite(values)


def _negative(values: NDArray[Any]) -> NDArray[np.bool_]:
    return values < 0


def _not_whole(values: NDArray[Any]) -> NDArray[np.bool_]:
    unequal = values != np.rint(values)
    return unequal & np.isfinite(values) if unequal.any() else unequal


def _too_large(values: NDArray[Any]) -> NDArray[np.bool_]:
    return (values > LARGEST_COUNT) & np.isfinite(values)


def _inexact(values: NDArray[Any]) -> NDArray[np.bool_]:
    return (values > _EXACT) & np.isfinite(values)


KINDS = {
    "not-finite": Kind(_not_finite, "not finite"),
    "negative": Kind(_negative, "negative"),
    "not-whole": Kind(_not_whole, "not whole numbers"),
    "too-large": Kind(_too_large, f"above {LARGEST_COUNT:,.0f}"),
    "inexact": Kind(_inexact, f"above {_EXACT:,}"),
}


def scan_values(
    stored: Stored,
    *,
    genes: NDArray[np.intp] | None = None,
    summed: NDArray[np.bool_] | None = None,
    hashes: Fingerprint | None = None,
    also: Callable[[sp.csr_matrix], None] | None = None,
) -> Scan:
    """Check every stored value once, in blocks of bounded memory.

    Parameters
    ----------
    stored
        The values.
    genes
        Positions of the genes to check; None for all.
    summed
        Over which of these genes each cell's values are summed, ``(genes,)``; None for all.
    hashes
        Fingerprint to which the blocks are added, with all their values; None for no fingerprint.
    also
        Called with each block of the genes to check.

    Returns
    -------
    Scan

    Examples
    --------
    >>> scan = scan_values(stored_matrix(np.array([[0.0, 3.0], [-1.0, 0.5]]), "X"))
    >>> scan.faults["negative"]
    Fault(n=1, row=1, column=0, value=-1.0)
    """
    n_cells, n_genes = stored.of_genes(genes).shape
    weights = np.ones(n_genes) if summed is None else summed.astype(np.float64)
    library, detected = np.empty(n_cells), np.zeros(n_genes, np.int64)
    faults: dict[str, Fault] = {}
    n_values = start = 0
    for block in stored.blocks():
        stop = start + block.shape[0]
        if hashes is not None:
            hashes.add(block)
        if genes is not None:
            block = align(block, genes)
        if also is not None:
            also(block)
        _add_faults(block, start, faults)
        with np.errstate(all="ignore"):  # the scan reports values that are not finite
            library[start:stop] = block @ weights
        detected += np.bincount(block.indices[block.data != 0], minlength=n_genes)
        n_values += len(block.data)
        start = stop
    return Scan(n_values, library, detected, faults)


def holds_counts(stored: Stored) -> bool:
    """Return whether all values are finite whole numbers of at least 0; stop at the first block with another value.

    Examples
    --------
    >>> [holds_counts(stored_matrix(np.array([[x]]), "X")) for x in (3.0, 0.5, -1.0)]
    [True, False, False]
    """
    return not any(_bad_kinds(block) & {"not-finite", "negative", "not-whole"} for block in stored.blocks())


def value_faults(scan: Scan, cells: pd.Index, genes: pd.Index, place: str, kinds: tuple[str, ...]) -> dict[str, str]:
    """Describe the faults of each kind in a sentence, with the first place and the number of values.

    Parameters
    ----------
    scan
        What was found.
    cells, genes
        Names of the cells and genes that were scanned.
    place
        Name of the values, as `celbo.data.stored.place_of` gives it.
    kinds
        Kinds to describe, of `KINDS`.
    """
    return {
        kind: (
            f"{place} is {fault.value:g} in cell {cells[fault.row]!r} (row {fault.row:,}), "
            f"gene {genes[fault.column]!r}; "
            f"{fault.n:,} of {scan.n_values:,} stored values are {KINDS[kind].description}."
        )
        for kind in kinds
        if (fault := scan.faults.get(kind))
    }


def seem_joined(stored: Stored, scan: Scan) -> bool:
    """Return whether cells lack values as after an outer join: many cells lack the same genes, which others have.

    The first cell with a missing value is compared with a thousand cells, evenly spaced: it lacks at least five genes,
    and not all; at least 20 cells and 1 % lack exactly these, and as many have all of these.
    """
    first = scan.faults["not-finite"].row
    rows = np.unique(np.linspace(0, stored.shape[0] - 1, min(stored.shape[0], _SAMPLE)).astype(np.intp))
    with suppress(Exception):  # a hint must not hide the fault that it helps to mend
        lacking = _missing(stored.read(np.array([first])))
        n_lacking, others = lacking.sum(), _missing(stored.read(rows))
        n_shared = others @ lacking.T
        shared = n_shared.toarray().ravel()
        alike = (shared == n_lacking) & (np.asarray(others.sum(1)).ravel() == n_lacking)
        fewest = max(_FEWEST_CELLS_OF_A_JOIN, 0.01 * len(rows))
        return bool(
            _FEWEST_GENES_OF_A_JOIN <= n_lacking < stored.shape[1]
            and alike.sum() >= fewest
            and (shared == 0).sum() >= fewest
        )
    return False


def _missing(x: sp.csr_matrix) -> sp.csr_matrix:
    """Mark missing values with 1."""
    return sp.csr_matrix((np.isnan(x.data).astype(np.int64), x.indices, x.indptr), shape=x.shape)


def describe_values(stored: Stored, scan: Scan) -> str:
    """Guess from a thousand cells what values are that are not counts; return an empty text if nothing fits.

    Scaled values have mean 0 and variance 1 in every gene. Normalised counts are, within a cell, whole multiples of the
    value of one count. Logged counts are so after ``exp(x) - 1`` or ``2**x - 1``.
    """
    with suppress(Exception):  # a hint must not hide the fault that it helps to mend
        return _kind_of_values(stored)
    return ""


def _kind_of_values(stored: Stored) -> str:
    n_cells = stored.shape[0]
    rows = np.unique(np.linspace(0, n_cells - 1, min(n_cells, _SAMPLE)).astype(np.intp))
    x = stored.read(rows)
    with np.errstate(all="ignore"):
        x.data = x.data.astype(np.float64)
    x.data[~np.isfinite(x.data)] = 0
    if not x.nnz:
        return ""
    if (x.data < 0).any():
        return _diagnose_negative(x)
    largest = f"largest value {x.data.max():.3g}"
    if x.data.max() < 40:  # no data have exp(40) counts
        for inverse, name in ((np.expm1, "log1p"), (lambda y: np.exp2(y) - 1, "log2(1 + x)")):
            unlogged = x.copy()
            unlogged.data = inverse(x.data)
            if total := _same_total(unlogged):
                return f"look like {name} of counts per {total:,.0f} ({largest})"
            if _are_multiples(unlogged):
                return f"look like {name} of counts scaled by a factor for each cell ({largest})"
    if total := _same_total(x):
        unit = {1_000_000: " (TPM or CPM)"}.get(total, "")
        return f"look normalised and not logged: every cell sums to {total:,.0f}{unit}"
    if np.mean(x.data == np.rint(x.data)) > 0.5:
        return "are mostly whole, perhaps estimated counts (RSEM, salmon, or corrected for ambient RNA)"
    if _are_multiples(x):
        return "look like counts scaled by a factor for each cell"
    if x.data.max() < 20:
        return f"look normalised and logged ({largest})"
    return ""


def describe_rounded(stored: Stored, scan: Scan) -> str:
    """Say what whole numbers look like that were scaled to a common total and rounded; return "" for counts.

    The cells that are looked at have totals within a tenth, and are half of all. One of two marks is seen. First, cells
    have gaps: many equal values, but none that is smaller by one, because each count became several. Second, totals are
    much closer to a power of ten than counts can be, but not equal to it. Counts that were drawn to a common total
    (downsampled) have neither mark: they have ones, and totals that are exactly equal, or smaller because genes were
    left out later.

    Where counts and TPM were joined, fewer cells have such totals. Each group of at least 50 cells and a tenth of all
    is looked at. Its cells have gaps, and the others have none: counts that were doubled have gaps everywhere.
    """
    totals = np.sort(scan.library[scan.library > 0])
    if len(totals) < _FEWEST_TOTALS:
        return ""
    for part in _parts_of_one_total(totals):
        x = _sample_of(stored, (scan.library >= part[0]) & (scan.library <= part[-1]))
        has_gaps = _share_with_gaps(x) >= _GAPS
        if has_gaps and len(part) < len(totals) / 2:
            others = (scan.library > 0) & ((scan.library < part[0]) | (scan.library > part[-1]))
            has_gaps = _share_with_gaps(_sample_of(stored, others)) <= _GAPS_OF_COUNTS
        if has_gaps or _are_rounded_to_power(part, x):
            low, middle, high = np.quantile(part, [0.05, 0.5, 0.95])
            is_million = abs(middle - _MILLION) < 0.1 * _MILLION
            kind = (
                "TPM or CPM that were rounded"
                if is_million
                else "counts that were scaled to a common total and rounded"
            )
            of = "" if len(part) == len(totals) else f" of {len(part):,}"
            return f"look like {kind}: nine in ten{of} cells sum to between {low:,.0f} and {high:,.0f}"
    return ""


def _parts_of_one_total(totals: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield sorted totals within a tenth, the most cells first: half of all; or parts of a tenth and 50 cells each."""
    least = min(len(totals) / 2, max(_FEWEST_OF_PART, _PART * len(totals)))
    while len(totals):
        n_close = np.searchsorted(totals, _SAME_TOTAL * totals, side="right") - np.arange(len(totals))
        start, n = int(n_close.argmax()), int(n_close.max())
        if n < least:
            return
        yield totals[start : start + n]
        totals = np.delete(totals, slice(start, start + n))


def _sample_of(stored: Stored, wanted: NDArray[np.bool_]) -> sp.csr_matrix:
    """Read at most 200 of these cells, evenly spaced."""
    rows = np.flatnonzero(wanted)
    return stored.read(rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 200)).astype(np.intp))])


def find_counts(adata: AnnData, layer: str | None) -> str:
    """Describe how to use another layer, or ``raw``, that holds counts; return an empty text if there is none.

    Values that cannot be read are passed over.
    """
    path = Path(adata.uns[ORIGIN]) if ORIGIN in adata.uns else None
    with warnings.catch_warnings(), suppress(Exception):  # a hint must not hide the fault that it helps to mend
        warnings.simplefilter("ignore")
        if path is not None and path.exists():
            with left_on_disk(path) as (values, raw):
                return _where_counts_are(adata, values, raw, layer, path)
        in_memory: dict[str | None, Callable[[], Any]] = {
            name: partial(layer_values, adata, name) for name in (None, *layer_names(adata))
        }
        return _where_counts_are(adata, in_memory, None if adata.raw is None else lambda: adata.raw.X, layer, None)
    return ""


def _where_counts_are(
    adata: AnnData,
    values: dict[str | None, Callable[[], Any]],
    raw: Callable[[], Any] | None,
    layer: str | None,
    path: Path | None,
) -> str:
    """Look for counts in the layers, then in X, then in raw."""
    for name, opened in values.items():
        if name not in (None, layer) and _are_counts(opened, adata.shape):
            return f"{place_of(name)} holds whole numbers: use layer={name!r} (--layer {shlex.quote(str(name))})."
    if layer is not None and None in values and _are_counts(values[None], adata.shape):
        return "X holds whole numbers: leave out layer (--layer)."
    if raw is not None and _are_counts(raw, adata.shape[:1]):
        return f"raw.X holds whole numbers. {use_raw(path)}"
    return ""


def _are_counts(open_values: Callable[[], Any], shape: tuple[int, ...]) -> bool:
    """Return whether values are counts, and their shape begins with ``shape``; False if they cannot be read."""
    with suppress(Exception):
        stored = stored_matrix(open_values(), "these values")
        return stored.shape[: len(shape)] == shape and holds_counts(stored)
    return False


def _add_faults(block: sp.csr_matrix, start: int, faults: dict[str, Fault]) -> None:
    """Add the faults of a block whose first row is row ``start``."""
    for kind in _bad_kinds(block):
        bad = np.flatnonzero(KINDS[kind].is_bad(block.data))
        first = int(bad[0])
        row = start + int(np.searchsorted(block.indptr, first, side="right")) - 1
        fault = Fault(len(bad), row, int(block.indices[first]), float(block.data[first]))
        faults[kind] = faults[kind]._replace(n=faults[kind].n + fault.n) if kind in faults else fault


def _bad_kinds(block: sp.csr_matrix) -> set[str]:
    """Return the kinds of bad values in a block; faster than a test for each kind, and exact."""
    values = block.data
    if not len(values):
        return set()
    kinds = set()
    with np.errstate(invalid="ignore"):
        smallest, largest = values.min(), values.max()  # NaN if there is one
        if not (np.isfinite(smallest) and np.isfinite(largest)):
            kinds.add("not-finite")
            finite = values[np.isfinite(values)]
            smallest, largest = finite.min(initial=0), finite.max(initial=0)
        if smallest < 0:
            kinds.add("negative")
        if largest > _EXACT:
            kinds.add("inexact")
        if largest > LARGEST_COUNT:
            kinds.add("too-large")
        if values.dtype.kind == "f" and _not_whole(values).any():
            kinds.add("not-whole")
    return kinds


def _same_total(x: sp.csr_matrix) -> int:
    """Return the common total of all cells with values, to three digits; 0 if totals differ."""
    totals = np.asarray(x.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if len(totals) < 2 or np.ptp(totals) > 1e-3 * np.median(totals):
        return 0
    return int(float(f"{np.median(totals):.3g}"))


def _are_rounded_to_power(totals: NDArray[np.float64], x: sp.csr_matrix) -> bool:
    """Return whether totals are near 10,000, 100,000 or a million as only rounding makes them.

    Rounding moves totals by far less than the noise of counts of that size does, and to both sides. TPM may all move to
    one side, because they have many values below a half; but so do downsampled counts if genes are left out later. TPM
    then differ from counts in genes of a few counts, whose variance is below their mean.
    """
    middle = np.median(totals)
    power = 10.0 ** np.rint(np.log10(middle))
    if power < 10_000 or abs(middle - power) > 1e-3 * power:
        return False
    if np.mean(np.abs(totals - middle) <= 0.5 * np.sqrt(middle)) < 0.9:
        return False
    both_sides = min(np.mean(totals > power), np.mean(totals < power)) >= 0.1
    return bool(both_sides or (power == _MILLION and _are_underdispersed(x)))


def _are_underdispersed(x: sp.csr_matrix) -> bool:
    """Return whether genes with a mean of 1 to 4 vary less between cells than counts do."""
    x = x.astype(np.float64)
    mean = np.asarray(x.mean(axis=0)).ravel()
    squares = np.asarray(x.multiply(x).mean(axis=0)).ravel()
    some = (mean >= 1) & (mean <= 4)
    n = x.shape[0]
    ratio = (squares[some] - mean[some] ** 2) / mean[some] * n / (n - 1)
    return len(ratio) >= _FEWEST_GENES and float(np.median(ratio)) < _UNDERDISPERSED


def _share_with_gaps(x: sp.csr_matrix) -> float:
    """Return the share of cells that have many values v, but no value v - 1."""
    n_with_gaps = 0
    for start, stop in pairwise(x.indptr):
        values, n_equal = np.unique(x.data[start:stop], return_counts=True)
        steps = np.diff(values.astype(np.float64), prepend=0.0)
        n_with_gaps += bool(((n_equal >= _FEWEST_EQUAL) & (steps > 1)).any())
    return n_with_gaps / x.shape[0]


def _are_multiples(x: sp.csr_matrix) -> bool:
    """Return whether, within cells, values are whole multiples of the smallest, as scaled counts are."""
    if x.nnz < 2 or (x.data <= 0).any():
        return False
    cells = np.diff(x.indptr) > 0
    smallest = np.minimum.reduceat(x.data, x.indptr[:-1][cells])
    ratio = x.data / np.repeat(smallest, np.diff(x.indptr)[cells])
    ratio = ratio[(ratio > 1.001) & (ratio < 50)]
    return len(ratio) > 10 and float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.02)) > 0.95


def _diagnose_negative(x: sp.csr_matrix) -> str:
    dense = x[:, : min(x.shape[1], 2000)].toarray()
    mean, sd = dense.mean(0), dense.std(0)
    varying = sd > 0
    if not varying.any():
        return ""
    if np.median(np.abs(mean[varying])) > 0.2 * np.median(sd[varying]):
        return "are partly negative: corrected or centred values, not counts"
    # Scaling turns the zeros of a gene into one value. Residuals of a count model also depend on the depth of the cell.
    ties = np.mean([np.unique(column, return_counts=True)[1].max() for column in dense[:, varying].T[:200]])
    if len(dense) >= 20 and ties < 0.05 * len(dense):
        return "look like Pearson residuals (SCTransform) or values corrected for a batch effect"
    return "look scaled to mean 0 in every gene (scanpy.pp.scale)"
