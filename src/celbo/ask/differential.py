"""Which genes differ between groups of cells: the model's means, corrected by the counts, and shrunk as they deserve.

What a model decodes is smooth, and has seen the counts that it would be tested on: its own spread over z says nothing
of how many cells it learned from. So its group means are corrected by the ratio of what was counted to what it expects
(one step of a ratio estimator), the error of that ratio is the likelihood's, and the log fold changes are shrunk by
what those of all genes are like (adaptive shrinkage; Stephens 2017, Biostatistics 18:275).
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import polygamma
from scipy.stats import norm

from celbo.data.conditions import as_text, column_of
from celbo.errors import DataError, UsageError, listed
from celbo.minibatch import Contexts, Source, in_chunks
from celbo.model.filling import fill_in
from celbo.model.inference import false_share
from celbo.model.vae import VAE, context_of

__all__ = ["Sums", "add_up", "contrast", "fold_changes", "group_cells", "of_genes", "pseudobulk", "shrink"]

_CHUNK = 256
_JEFFREYS = 0.5
"""Shape of the prior of a rate: n counts leave ``Gamma(n + 1/2)``, whose logarithm varies by trigamma(n + 1/2)."""
_SCALES, _ROUNDS = 16, 200
"""Normal distributions that log fold changes are thought to be mixed of, and rounds of fitting their weights."""
_NARROWEST = 0.05
"""Standard deviation of the narrowest of them, log2: no gene is quite the same in two groups."""
_DRAWS = 2000
_FEWEST = 2
"""Cells of a group."""
_SMALLEST = 1e-12


class Sums(NamedTuple):
    """Over the cells of each set, ``(sets, genes)``; draws of z first where there are several."""

    share: NDArray[np.float64]
    """Decoded shares of expression under the conditions in question, mean over cells, ``(n_samples, sets, genes)``."""
    counted: NDArray[np.float64]
    """Counts."""
    expected: NDArray[np.float64]
    """Means of the counts under each cell's own conditions."""
    variance: NDArray[np.float64]
    """Their variances."""
    n_cells: NDArray[np.intp]
    """``(sets,)``."""


def add_up(
    vae: VAE,
    source: Source,
    sets: NDArray[np.intp],
    contexts: Sequence[Contexts | None],
    *,
    n_samples: int,
    seed: int,
    has_width: bool = True,
) -> Sums:
    """Add up over sets of cells what `fold_changes` compares.

    Parameters
    ----------
    vae
        A model of counts.
    source
        The cells.
    sets
        Number of each cell's set; -1 for cells of none.
    contexts
        To decode under, the mean of all of them; None for each cell's own.
    n_samples
        Draws of z for each cell.
    seed
        Of the draws.
    has_width
        Whether posteriors have one; of a plain autoencoder z is mu_z.
    """
    n_sets, n_genes, device = int(sets.max()) + 1, source.n_genes, next(vae.parameters()).device
    share = torch.zeros(n_samples, n_sets, n_genes, dtype=torch.float64, device=device)
    counted, expected, variance = (torch.zeros(n_sets, n_genes, dtype=torch.float64, device=device) for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for rows in in_chunks(np.flatnonzero(sets >= 0), _CHUNK):
            cells = fill_in(vae, source.take(rows).to(device), source)
            own, of_set = context_of(vae, cells), torch.from_numpy(sets[rows]).to(device)
            mu_z, logvar_z = vae.encode(cells.x, own)
            p = vae.likelihood(mu_z, context=own, library=cells.library)
            for total, values in ((counted, cells.x.to_dense()), (expected, p.mean), (variance, p.variance)):
                total.index_add_(0, of_set, values.double())
            one = torch.ones_like(cells.library)
            for draw in range(n_samples):
                eps = torch.randn(mu_z.shape, generator=generator).to(device)
                z = mu_z + has_width * (0.5 * logvar_z).exp() * eps
                for context in contexts:
                    given = own if context is None or own is None else context(rows).to(device)
                    share[draw].index_add_(0, of_set, vae.decode(z, given, one).double() / len(contexts))
    n_cells = np.bincount(sets[sets >= 0], minlength=n_sets)
    share /= torch.from_numpy(np.maximum(n_cells, 1)).to(device)[:, None]
    return Sums(share.cpu().numpy(), counted.cpu().numpy(), expected.cpu().numpy(), variance.cpu().numpy(), n_cells)


def of_genes(sums: Sums, chosen: NDArray[np.bool_]) -> Sums:
    """The same of some genes."""
    share, counted, expected, variance = (part[..., chosen] for part in (sums[0], sums[1], sums[2], sums[3]))
    return Sums(share, counted, expected, variance, sums.n_cells)


def fold_changes(sums: Sums, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[NDArray[np.float64], ...]:
    """Log2 ratios of the corrected mean shares of sets, and their variances.

    ``log2 (share counted / expected)`` of one side less that of the other. Counts are taken as so many fewer of a
    Poisson distribution as their variance exceeds the mean; the error is what they leave unknown of a rate's logarithm,
    of both sides, and the spread over draws of z.

    Parameters
    ----------
    sums
        Of all sets.
    pairs
        Sets on the one side and on the other, for each pair; the mean over pairs is returned.

    Returns
    -------
    tuple
        Log2 fold change, its variance, and the corrected mean share on either side; ``(genes,)`` each.
    """
    change, variance, means = [], [], []
    for pair in pairs:
        sides = [_side(sums, np.asarray(some)) for some in pair]
        (one, error, spread), (other, other_error, other_spread) = sides
        change.append(np.log2(np.maximum(one, _SMALLEST)) - np.log2(np.maximum(other, _SMALLEST)))
        variance.append((error + other_error + spread + other_spread) / np.log(2) ** 2)
        means.append((one, other))
    one, other = np.mean(means, axis=0)
    return np.mean(change, axis=0), np.sum(variance, axis=0) / len(pairs) ** 2, one, other


def _side(sums: Sums, some: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Corrected mean share of some sets together; variance of its logarithm by counting, and over draws of z."""
    weight = sums.n_cells[some] / sums.n_cells[some].sum()
    share = np.maximum(np.einsum("s,dsg->dg", weight, sums.share[:, some]), _SMALLEST)
    counted, expected, variance = (part[some].sum(0) for part in (sums.counted, sums.expected, sums.variance))
    per_count = np.maximum(variance / np.maximum(expected, _SMALLEST), 1)
    ratio = (counted / per_count + _JEFFREYS) / (expected / per_count + _JEFFREYS)
    error = polygamma(1, counted / per_count + _JEFFREYS)
    return share.mean(0) * ratio, error, np.log(share).var(0)


def shrink(change: NDArray[np.float64], variance: NDArray[np.float64], least: float, *, seed: int = 0) -> pd.DataFrame:
    """Posterior of log fold changes, given what those of all genes are like: a mixture of normals around their median.

    The median is not quite 0: shares sum to 1, so that what some genes gain all others lose.

    Parameters
    ----------
    change, variance
        Estimates and their sampling variances, ``(genes,)``.
    least
        Change that matters.
    seed
        Of the draws that intervals are taken from.

    Returns
    -------
    pandas.DataFrame
        By gene: ``log2_fold_change`` (posterior mean), its 90 % interval ``lower, upper``, ``probability`` that it is
        beyond ``least``, and ``fdr``: the share of others among this gene and those that are surer.

    Examples
    --------
    >>> found = shrink(np.array([3.0, 0.1] + [0.0] * 50), np.full(52, 0.01), 0.25)
    >>> found["probability"].round(2).tolist()[:3]
    [1.0, 0.0, 0.0]
    """
    middle = _weighted_median(change, 1 / variance)
    change = change - middle
    largest = 2 * np.sqrt(max((change**2 - variance).max(), _NARROWEST**2))
    scales = np.geomspace(_NARROWEST, largest, _SCALES)
    total = variance[:, None] + scales**2
    log_fit = norm.logpdf(change[:, None], scale=np.sqrt(total))
    fit, weights = np.exp(log_fit - log_fit.max(1, keepdims=True)), np.full(_SCALES, 1 / _SCALES)
    for _ in range(_ROUNDS):
        of_gene = fit * weights
        weights = (of_gene / of_gene.sum(1, keepdims=True)).mean(0)
    of_gene = fit * weights
    of_gene /= of_gene.sum(1, keepdims=True)
    mean = scales**2 / total * change[:, None]
    sd = np.sqrt(scales**2 / total * variance[:, None])
    mean += middle
    beyond = norm.cdf((-least - mean) / sd) + norm.sf((least - mean) / sd)
    probability = (of_gene * beyond).sum(1).clip(0, 1)
    rng = np.random.default_rng([seed, 21])
    chosen = (of_gene.cumsum(1)[:, None] < rng.random((len(change), _DRAWS))[:, :, None]).sum(2).clip(max=_SCALES - 1)
    drawn = np.take_along_axis(mean, chosen, 1) + np.take_along_axis(sd, chosen, 1) * rng.standard_normal(chosen.shape)
    lower, upper = np.quantile(drawn, [0.05, 0.95], axis=1)
    columns = {"log2_fold_change": (of_gene * mean).sum(1), "lower": lower, "upper": upper}
    return pd.DataFrame({**columns, "probability": probability, "fdr": false_share(probability)})


def group_cells(
    obs: pd.DataFrame, groupby: str, group: str | None, reference: str | None, pair_by: str | None
) -> tuple[NDArray[np.intp], list[str], list[list[tuple[list[int], list[int]]]]]:
    """Number the sets of cells, one for each group and level of ``pair_by``.

    Returns
    -------
    tuple
        The number of each cell's set, -1 where a value is missing; the groups to compare; for each of them the pairs
        of sets that `fold_changes` takes.

    Raises
    ------
    UsageError
        If columns or groups are not there, or have too few cells to be compared.
    """
    for option, column in (("groupby", groupby), ("pair_by", pair_by)):
        if column is not None and column not in obs.columns:
            raise UsageError(f"{option}={column!r} is no column of obs; it has {listed(obs.columns)}.")
    labels = _as_text(column_of(obs, groupby))
    sizes = labels.value_counts()
    if unknown := [each for each in (group, reference) if each is not None and each not in sizes]:
        raise UsageError(f"{groupby!r} has no {listed(unknown)}; it has {listed(sorted(sizes.index))}.")
    if group is not None and group == reference:
        raise UsageError(f"group and reference are both {group!r}; give two groups, or leave the reference out.")
    if pd.api.types.is_float_dtype(obs[groupby]):
        raise UsageError(f"{groupby!r} holds floating-point numbers, which are no groups; cut it into some.")
    if n_missing := int(labels.isna().sum()):
        warnings.warn(f"{n_missing:,} cells have no {groupby!r}, and are left out.", stacklevel=3)
    if not len(sizes):
        raise DataError(f"no cell has a {groupby!r}: there is nothing to compare.")
    if len(sizes) < 2:
        raise UsageError(f"{groupby!r} has a single group, {listed(sizes.index)}: there is nothing to compare it with.")
    if few := [each for each in (group, reference) if each is not None and sizes[each] < _FEWEST]:
        raise UsageError(f"{listed(few)} has fewer than {_FEWEST} cells, too few to compare.")
    asked = [group] if group is not None else sorted(each for each in sizes.index if each != reference)
    groups = [each for each in asked if sizes[each] >= _FEWEST]
    if few := sorted(set(asked) - set(groups)):
        warnings.warn(f"groups of one cell are left out: {listed(few)}.", stacklevel=3)
    if not groups:
        raise UsageError(
            f"none of the {len(sizes):,} groups of {groupby!r} has {_FEWEST} cells; group by a coarser column."
        )
    levels = pd.Series("", obs.index) if pair_by is None else _as_text(column_of(obs, pair_by))
    both = pd.DataFrame({"level": levels, "group": labels})
    numbered = both.groupby(["level", "group"], sort=True)
    sets = numbered.ngroup().to_numpy()
    sets = np.where(both.notna().all(axis=1), sets, -1).astype(np.intp)
    of_sets = {key: int(number) for number, key in enumerate(numbered.size().index)}
    enough = {key for key, n in numbered.size().items() if n >= _FEWEST}
    comparisons, unpaired = [], []
    for one in groups:
        pairs = []
        for level in dict.fromkeys(level for level, _ in of_sets):
            others = [name for at, name in of_sets if at == level and name != one and reference in (None, name)]
            if (level, one) in enough and any((level, name) in enough for name in others):
                pairs.append(([of_sets[level, one]], [of_sets[level, name] for name in others]))
        if pairs:
            comparisons.append(pairs)
        else:
            unpaired.append(one)
    within = "" if pair_by is None else f", or none, in each level of {pair_by!r}"
    few_left = f"{listed(unpaired)}, or what it is compared with, has a single cell{within}"
    if not comparisons:
        raise UsageError(f"{few_left}.")
    if unpaired:
        warnings.warn(f"{few_left}, and is left out.", stacklevel=3)
    return sets, [name for name in groups if name not in unpaired], comparisons


def _as_text(column: pd.Series) -> pd.Series:
    """Each value as text, None where it is missing."""
    return as_text(column).astype(object).where(column.notna(), None)


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    below = weights[order].cumsum()
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def contrast(
    sums: Sums,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    genes: Sequence[str],
    *,
    names: tuple[str, str],
    least: float,
    seed: int,
) -> pd.DataFrame:
    """Table of one comparison, surest genes first; see `celbo.ExpressionVAE.differential_expression`."""
    change, variance, one, other = fold_changes(sums, pairs)
    table = shrink(change, variance, least, seed=seed)
    table.index = pd.Index(genes, name="gene")
    for place, (name, values) in enumerate(
        [("group", names[0]), ("reference", names[1]), ("mean_group", one), ("mean_reference", other)]
    ):
        table.insert(place, name, values)
    table["raw_log2_fold_change"] = change
    return table.sort_values("fdr", kind="stable")


def pseudobulk(adata: AnnData, by: Sequence[str], *, layer: str | None = None) -> AnnData:
    """Add up the counts of cells that are alike in these columns of obs, for tools that count donors, not cells.

    Parameters
    ----------
    adata
        The cells.
    by
        Columns of obs: ``["donor", "condition"]``.
    layer
        That holds the counts; None for X.

    Returns
    -------
    anndata.AnnData
        A row for each combination that occurs: sums of counts; obs has the columns and ``n_cells``.

    Raises
    ------
    DataError
        If obs lacks a column, or a value in one is missing.

    Examples
    --------
    >>> import celbo
    >>> adata = celbo.simulate_cells(n_cells=100, n_genes=20)
    >>> celbo.pseudobulk(adata, ["batch", "treatment"]).shape
    (4, 20)
    """
    if isinstance(by, str) or not by or any(name not in adata.obs.columns for name in by):
        raise DataError(f"by={by!r}: give a list of columns of obs; it has {listed(adata.obs.columns)}.")
    if missing := [name for name in by if column_of(adata.obs, name).isna().any()]:
        raise DataError(f"cells have no value of {listed(missing)}; leave these cells out, or name the missing value.")
    grouped = adata.obs.groupby(list(by), observed=True, sort=True)
    codes, n_cells = grouped.ngroup().to_numpy(), grouped.size()
    which = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(n_cells), len(codes)))
    if layer is not None and layer not in adata.layers:
        raise UsageError(f"layer={layer!r} is none of these cells; they have {listed(adata.layers) or 'none'}.")
    counts = adata.X if layer is None else adata.layers[layer]
    obs = n_cells.index.to_frame(index=False).assign(n_cells=n_cells.to_numpy())
    obs.index = pd.Index(obs[list(by)].astype(str).agg(" | ".join, axis=1))
    found = AnnData(sparse.csr_matrix(which @ counts), obs=obs, var=adata.var.copy())
    return found
