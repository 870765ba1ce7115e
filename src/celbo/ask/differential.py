"""Genes that differ between groups of cells: decoded means, corrected by the counts, and shrunk.

Decoded means are smooth, and the model has seen the counts on which it would be tested: its own spread over z does not
depend on how many cells it learned from. So group means are corrected by the ratio of observed to expected counts (one
step of a ratio estimator), the likelihood gives the error of this ratio, and log fold changes are shrunk towards the
distribution of the fold changes of all genes (adaptive shrinkage; Stephens 2017, Biostatistics 18:275).
"""

import math
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

from celbo.ask.groups import group_cells, group_named, warn_of_confounding
from celbo.data.conditions import Condition, column_of
from celbo.data.groups import Groups, grouping, is_column
from celbo.data.schema import MOST_COMBINATIONS
from celbo.data.stored import layer_names
from celbo.errors import DataError, UsageError, check_count, check_seed, listed, warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.kernels.threads import threads
from celbo.minibatch import Contexts, Source, in_chunks
from celbo.model.inference import false_share, take_filled
from celbo.model.vae import VAE, context_of
from celbo.streams import Stream, random_stream

__all__ = ["Sums", "differential_expression", "fold_changes", "group_sums", "pseudobulk", "shrink"]

_CHUNK = 256
_JEFFREYS = 0.5
"""Shape of the prior of a rate: n counts give ``Gamma(n + 1/2)``; its logarithm has the variance trigamma(n + 1/2)."""
_SCALES, _ROUNDS = 16, 200
"""Number of normal distributions in the mixture of log fold changes, and rounds of fitting their weights."""
_NARROWEST = 0.05
"""Standard deviation of the narrowest normal distribution, log2: no gene is exactly the same in two groups."""
_DRAWS, _GENES = 2000, 512
"""Draws from which an interval is computed, and genes that are drawn together."""
_SMALLEST = 1e-12


def differential_expression(
    fitted: Fitted,
    cells: Cells,
    *,
    groupby: Groups,
    group: str | None = None,
    reference: str | None = None,
    least_change: float = 0.25,
    pair_by: Groups | None = None,
    over: Sequence[str] | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare groups of cells gene by gene; see `celbo.ExpressionVAE.differential_expression`."""
    schema = fitted.schema
    if not fitted.is_counts:
        raise UsageError(f"fold changes are of counts; this model is of other values ({fitted.likelihood.name}).")
    if not 0 < least_change < math.inf:
        raise UsageError(f"least_change={least_change!r}; give a log2 change above 0: every gene changes a little.")
    check_count("n_samples", n_samples, 1)
    seed = check_seed(seed)
    labels = grouping("groupby", groupby, cells.obs)
    group, reference = (None if name is None else group_named(labels, name) for name in (group, reference))
    levels = None if pair_by is None else grouping("pair_by", pair_by, cells.obs)
    sets, names, comparisons = group_cells(labels, levels, group, reference)
    nuisances = _nuisances(fitted, str(labels.name) if is_column(groupby, labels, cells.obs) else None)
    settings = schema.combinations({}, _averaged_conditions(nuisances) if over is None else over)
    codes = dict(zip((condition.name for condition in schema.conditions), cells.codes.T, strict=True))
    warn_of_confounding(
        {nuisance.name: codes[nuisance.name].astype(np.intp) for nuisance in nuisances},
        sets,
        names,
        comparisons,
        reference=reference,
        within=None if levels is None else str(levels.name),
    )
    contexts = [cells.contexts(setting) if setting else None for setting in settings]
    with threads(fitted.threads):
        sums = group_sums(
            fitted.vae,
            cells.source,
            sets,
            contexts,
            n_samples=n_samples,
            seed=seed,
            has_width=fitted.objective.samples_z,
        )
    sums = _sums_of_genes(sums, cells.measured)
    genes = np.array(schema.genes)[cells.measured].tolist()
    against = "rest" if reference is None else reference
    tables = [
        _contrast(sums, pairs, genes, names=(name, against), least=least_change, seed=seed)
        for name, pairs in zip(names, comparisons, strict=True)
    ]
    return pd.concat(tables)


def _nuisances(fitted: Fitted, groupby: str | None) -> list[Condition]:
    """Categorical nuisances, other than the one that groups the cells."""
    return [
        condition
        for condition in fitted.schema.conditions
        if condition.nuisance and condition.levels is not None and condition.name != groupby
    ]


def _averaged_conditions(nuisances: Sequence[Condition]) -> list[str]:
    """Nuisances over whose levels means are taken; none if they have too many levels."""
    names = [condition.name for condition in nuisances]
    if math.prod(len(condition.levels_of_fit) for condition in nuisances) > MOST_COMBINATIONS:
        warn(
            f"{listed(names)} has more than {MOST_COMBINATIONS} levels, too many to average: each cell is decoded "
            "under its own. Name other conditions with over=[...]."
        )
        return []
    return names


class Sums(NamedTuple):
    """Sums and means over the cells of each set, ``(sets, genes)``."""

    share: NDArray[np.float64]
    """Decoded shares of expression under the conditions asked for, mean over cells, ``(n_samples, sets, genes)``."""
    counted: NDArray[np.float64]
    """Sums of counts."""
    expected: NDArray[np.float64]
    """Sums of the expected counts under each cell's own conditions."""
    variance: NDArray[np.float64]
    """Sums of the variances of the counts."""
    n_cells: NDArray[np.intp]
    """``(sets,)``."""


def group_sums(
    vae: VAE,
    source: Source,
    sets: NDArray[np.intp],
    contexts: Sequence[Contexts | None],
    *,
    n_samples: int,
    seed: int,
    has_width: bool = True,
) -> Sums:
    """Add up counts, expected counts and decoded shares over sets of cells, for `fold_changes`.

    Parameters
    ----------
    vae
        A model of counts.
    source
        The cells.
    sets
        Number of each cell's set; -1 for cells of no set.
    contexts
        Contexts to decode under; the mean over them is taken. None for each cell's own.
    n_samples
        Draws of z for each cell.
    seed
        Seed of the draws.
    has_width
        Whether z is drawn from the posterior; else z is mu_z, as in a plain autoencoder.
    """
    n_sets, n_genes, device = int(sets.max()) + 1, source.n_genes, next(vae.parameters()).device
    share = torch.zeros(n_samples, n_sets, n_genes, dtype=torch.float64, device=device)
    counted, expected, variance = (torch.zeros(n_sets, n_genes, dtype=torch.float64, device=device) for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for rows in in_chunks(np.flatnonzero(sets >= 0), _CHUNK):
            cells = take_filled(vae, source, rows)
            own, of_set = context_of(vae, cells), torch.from_numpy(sets[rows]).to(device)
            mu_z, logvar_z = vae.encode(cells.x, own)
            p = vae.likelihood(mu_z, context=own, library=cells.library)
            for total, values in ((counted, cells.x.to_dense()), (expected, p.mean), (variance, p.variance)):
                values = values if cells.observed is None else torch.where(cells.observed, values, 0)
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


def _sums_of_genes(sums: Sums, genes: NDArray[np.bool_]) -> Sums:
    share, counted, expected, variance = (array[..., genes] for array in sums[:4])
    return Sums(share, counted, expected, variance, sums.n_cells)


def fold_changes(sums: Sums, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[NDArray[np.float64], ...]:
    """Compute log2 ratios of the corrected mean shares of sets, and their variances.

    ``log2 (share counted / expected)`` of one side minus that of the other. Counts with a variance above the mean are
    treated as correspondingly fewer Poisson counts. The error is the uncertainty of the log rate that these leave, on
    both sides, and the spread over draws of z.

    Parameters
    ----------
    sums
        Sums over all sets.
    pairs
        Sets on one side and on the other, for each pair. The mean over pairs is returned.

    Returns
    -------
    tuple
        Log2 fold change, its variance, and the corrected mean share on either side; ``(genes,)`` each.
    """
    change, variance, means = [], [], []
    for pair in pairs:
        sides = [_side(sums, np.asarray(sets)) for sets in pair]
        (one, error, spread), (other, other_error, other_spread) = sides
        change.append(np.log2(np.maximum(one, _SMALLEST)) - np.log2(np.maximum(other, _SMALLEST)))
        variance.append((error + other_error + spread + other_spread) / np.log(2) ** 2)
        means.append((one, other))
    one, other = np.mean(means, axis=0)
    return np.mean(change, axis=0), np.sum(variance, axis=0) / len(pairs) ** 2, one, other


def _side(sums: Sums, sets: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Corrected mean share of some sets together; variance of its logarithm from counting, and over draws of z."""
    weight = sums.n_cells[sets] / sums.n_cells[sets].sum()
    share = np.maximum(np.einsum("s,dsg->dg", weight, sums.share[:, sets]), _SMALLEST)
    counted, expected, variance = (part[sets].sum(0) for part in (sums.counted, sums.expected, sums.variance))
    per_count = np.maximum(variance / np.maximum(expected, _SMALLEST), 1)
    ratio = (counted / per_count + _JEFFREYS) / (expected / per_count + _JEFFREYS)
    error = polygamma(1, counted / per_count + _JEFFREYS)
    return share.mean(0) * ratio, error, np.log(share).var(0)


def shrink(change: NDArray[np.float64], variance: NDArray[np.float64], least: float, *, seed: int = 0) -> pd.DataFrame:
    """Shrink log fold changes: their posterior under a mixture of normals around the median, fitted to all genes.

    The median is not exactly 0: shares sum to 1, so a gain of some genes is a loss of all others.

    Parameters
    ----------
    change, variance
        Estimates and their sampling variances, ``(genes,)``.
    least
        Smallest change that matters.
    seed
        Seed of the draws from which intervals are computed.

    Returns
    -------
    pandas.DataFrame
        By gene: ``log2_fold_change`` (posterior mean), its 90 % interval ``lower, upper``, ``probability`` that the
        change is beyond ``least``, and ``fdr``: the expected share of false positives among this gene and surer ones.

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
    uniform, normal = (random_stream(seed, Stream.SHRINKAGE) for _ in range(2))
    pieces = list(in_chunks(np.arange(len(change)), _GENES))
    for piece in pieces:  # the normal numbers come after all uniform ones
        normal.random((len(piece), _DRAWS))
    interval = np.empty((2, len(change)))
    for piece in pieces:
        share = of_gene[piece].cumsum(1)[:, None]
        chosen = (share < uniform.random((len(piece), _DRAWS))[:, :, None]).sum(2).clip(max=_SCALES - 1)
        noise = normal.standard_normal(chosen.shape)
        drawn = np.take_along_axis(mean[piece], chosen, 1) + np.take_along_axis(sd[piece], chosen, 1) * noise
        interval[:, piece] = np.quantile(drawn, [0.05, 0.95], axis=1)
    lower, upper = interval
    columns = {"log2_fold_change": (of_gene * mean).sum(1), "lower": lower, "upper": upper}
    return pd.DataFrame({**columns, "probability": probability, "fdr": false_share(probability)})


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    below = weights[order].cumsum()
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def _contrast(
    sums: Sums,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    genes: Sequence[str],
    *,
    names: tuple[str, str],
    least: float,
    seed: int,
) -> pd.DataFrame:
    """Table of one comparison, surest genes first, without genes that no cell of one side has measured."""
    sides = [list(side) for pair in pairs for side in pair]
    measured = np.all([sums.expected[side].sum(0) > 0 for side in sides], axis=0)
    if not measured.any():
        raise UsageError(f"{names[0]!r} and {names[1]!r} have no gene that was measured in both; compare other groups.")
    sums, genes = _sums_of_genes(sums, measured), [gene for gene, has in zip(genes, measured, strict=True) if has]
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
    """Add up the counts of cells with the same values in these columns of obs, for tools that count donors, not cells.

    Parameters
    ----------
    adata
        The cells.
    by
        Columns of obs: ``["donor", "condition"]``.
    layer
        Layer that holds the counts; None for X.

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
        raise UsageError(f"layer={layer!r} is none of these cells; they have {listed(layer_names(adata)) or 'none'}.")
    counts = adata.X if layer is None else adata.layers[layer]
    obs = n_cells.index.to_frame(index=False).assign(n_cells=n_cells.to_numpy())
    obs.index = pd.Index(obs[list(by)].astype(str).agg(" | ".join, axis=1))
    return AnnData(sparse.csr_matrix(which @ counts), obs=obs, var=adata.var.copy())
