"""Compare generated cells with real ones: by classifiers, by statistics of genes, and by the types of cells."""

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from celbo.data.features import features_of_query
from celbo.data.normalise import log_normalise
from celbo.data.stored import layer_names
from celbo.errors import DataError, UsageError, check_count, check_seed, columns_there_are, listed
from celbo.streams import Stream, random_stream, short_seed

__all__ = ["Agreement", "Realism", "check_realism"]

Floats = NDArray[np.float64]

_HARD, _EASY = 0.65, 0.8
"""Generated cells are called hard to tell from real ones up to the first AUC, and easy above the second."""
_FOLDS = 5
_COMPONENTS = 50
_CLUSTERS = 12
_NEIGHBOURS = 15
_GENES_OF_CORRELATION = 200
_GENES_SHOWN = 10
_FEWEST = 20
"""Fewer cells of a kind are refused."""
_MISSING = 0.25
"""A type is missing if fewer than this share of its expected cells are there, and chance does not explain it."""
_CHANCE = 0.01
_PENALTY = 0.01
"""Inverse strength of the linear classifier's ridge; it is strong because genes outnumber cells."""


class Agreement(NamedTuple):
    """Agreement of the genes of generated and of real cells: R2 around identity, 1 if they are equal."""

    means: float
    """R2 of the means of ``log(1 + 10,000 x / library)``, over genes."""
    variances: float
    """R2 of the logarithms of its variances."""
    zeros: float
    """R2 of the shares of cells without a count of the gene."""
    correlations: float
    """R2 of the correlations between the 200 most abundant genes, over pairs."""


@dataclass(frozen=True)
class Realism:
    """Result of comparing generated cells with real ones."""

    verdict: str
    """One line."""
    auc: float
    """The highest of ``aucs``: 0.5 if no classifier tells generated cells from real ones, 1 if one always does."""
    auc_real: float
    """The same between two halves of the real cells: what chance and the choice of the highest make of it."""
    aucs: dict[str, float]
    """AUC by classifier and its input."""
    agreement: Agreement
    agreement_real: Agreement
    """Between two halves of the real cells."""
    types: dict[str, tuple[float, float]]
    """Share of real and of generated cells, by type or cluster."""
    missing: tuple[str, ...]
    """Types of real cells that generated cells lack."""
    genes: dict[str, float]
    """Genes that the linear classifier uses most, with their weights: log odds of being generated, per sd."""
    n_cells: int
    """Number of cells of each kind."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        document = asdict(self)
        document |= {name: getattr(self, name)._asdict() for name in ("agreement", "agreement_real")}
        plain: dict[str, Any] = json.loads(json.dumps(document))
        return plain

    def __str__(self) -> str:
        """Print the verdict, then the figures."""
        lines = [self.verdict, "", f"{self.n_cells:,} cells of each kind; in brackets: real cells among themselves"]
        lines += [f"AUC {self.auc:.3f} ({self.auc_real:.3f})"]
        lines += [f"  {name}: {value:.3f}" for name, value in self.aucs.items()]
        lines += ["genes, R2 around identity"]
        pairs = zip(self.agreement._asdict().items(), self.agreement_real, strict=True)
        lines += [f"  {name}: {value:.3f} ({real:.3f})" for (name, value), real in pairs]
        lines += ["types, share of real and of generated cells"]
        lines += [f"  {name}: {real:.3f} {generated:.3f}" for name, (real, generated) in self.types.items()]
        used = ", ".join(f"{gene} ({'more' if weight > 0 else 'less'})" for gene, weight in self.genes.items())
        return "\n".join([*lines, f"genes that give generated cells away most: {used}"])


def check_realism(
    generated: AnnData,
    real: AnnData,
    *,
    layer: str | None = None,
    labels: str | None = None,
    max_cells: int = 2000,
    seed: int = 0,
) -> Realism:
    """Compare generated cells with real ones, best with cells that the model never saw.

    Both kinds have the same number of cells. A logistic regression and gradient-boosted trees try to tell them apart in
    5-fold cross-validation (a classifier two-sample test; Lopez-Paz & Oquab 2017, arXiv 1610.06545). Their input is
    all genes (``log(1 + 10,000 x / library)``; values that are not counts stay as they are), or depth and 50 principal
    components. The same is done with two halves of the real cells.

    Parameters
    ----------
    generated
        Cells as `celbo.ExpressionVAE.sample` draws them.
    real
        Cells with the same genes, and maybe more, in any order.
    layer
        Layer of the real cells' counts; X if None.
    labels
        Column of obs of the real cells with their types; generated cells get the types of their real neighbours. If
        None, types are 12 clusters of both kinds together.
    max_cells
        Largest number of cells of each kind, chosen at random. More cells show smaller differences, and take longer.
    seed
        Seed of halves, folds and clusters.

    Returns
    -------
    Realism
        Prints its verdict first.

    Raises
    ------
    DataError
        If real cells lack genes, if gene names recur, or if there are fewer than 20 generated or 40 real cells.
    UsageError
        If there is no such column or layer, or only one kind of cells has counts.

    Examples
    --------
    >>> import celbo
    >>> cells = celbo.simulate_cells(n_cells=400, n_genes=50, seed=0)
    >>> realism = celbo.check_realism(cells[:200], cells[200:])
    >>> realism.auc < 0.65, realism.missing
    (True, ())
    """
    seed = check_seed(seed)
    check_count("max_cells", max_cells, 1)
    names, kept = generated.var_names, features_of_query(real.var, None)
    real_names = kept.of(real.var).index
    if not real_names.is_unique:
        raise DataError("names of genes occur more than once among the real cells; make them unique.")
    columns = real_names.get_indexer(names)
    if (columns < 0).any():
        lacking = names[columns < 0]
        raise DataError(f"the real cells lack {len(lacking):,} of {len(names):,} genes: {listed(lacking)}.")
    if min(generated.n_obs, real.n_obs // 2, max_cells) < _FEWEST:
        raise DataError(
            f"{generated.n_obs:,} generated and {real.n_obs:,} real cells, of each at most {max_cells:,}, are too few; "
            f"give at least {_FEWEST} and {2 * _FEWEST}."
        )
    if labels is not None and labels not in real.obs.columns:
        raise UsageError(
            f"labels={labels!r} is no column of obs of the real cells; {columns_there_are([labels], real.obs.columns)}"
        )
    if layer is not None and layer not in real.layers:
        raise UsageError(f"layer={layer!r} is none of the real cells; they have {listed(layer_names(real)) or 'none'}.")
    rng = random_stream(seed, Stream.REALISM)
    order, rows = (rng.permutation(adata.n_obs) for adata in (real, generated))
    n, half = min(len(rows), len(order), max_cells), min(len(order) // 2, max_cells)
    order = order[: max(n, 2 * half)]
    x, y = _dense(generated.X, rows[:n]), _dense(real.X if layer is None else real.layers[layer], order)
    y = y[:, columns if kept.positions is None else kept.positions[columns]]
    is_count, real_is_count = (bool((part >= 0).all() and (part == np.round(part)).all()) for part in (x, y))
    if is_count != real_is_count:
        one, other = ("counts", "not") if is_count else ("not counts", "are")
        raise UsageError(f"generated cells are {one}, and real cells {other}; name the layer of their counts.")
    generated_cells, real_cells, one_half, other_half = (
        _Cells(part, log_normalise(part, part.sum(1, keepdims=True)) if is_count else part)
        for part in (x, y[:n], y[:half], y[half : 2 * half])
    )
    aucs = _aucs(generated_cells, real_cells, seed)
    auc, auc_real = max(aucs.values()), max(_aucs(one_half, other_half, seed).values())
    types = None if labels is None else real.obs[labels].astype(str).to_numpy()[order][:n]
    shares = _shares(generated_cells, real_cells, types, seed)
    missing = tuple(name for name, (expected, share) in shares.items() if _is_missing(share, expected, n))
    return Realism(
        verdict=_verdict(auc, auc_real, missing, len(shares), "cluster" if types is None else "type"),
        auc=auc,
        auc_real=auc_real,
        aucs=aucs,
        agreement=_agreement(generated_cells, real_cells),
        agreement_real=_agreement(one_half, other_half),
        types=shares,
        missing=missing,
        genes=_separating_genes(generated_cells, real_cells, names),
        n_cells=n,
    )


class _Cells(NamedTuple):
    """Cells of one kind, ``(cells, genes)``."""

    values: Floats
    logged: Floats

    @property
    def depth(self) -> Floats:
        """``(cells, 1)``."""
        total = self.values.sum(1, keepdims=True)
        return total if self.values is self.logged else np.log1p(total)


def _dense(x: Any, rows: NDArray[np.intp]) -> Floats:
    chosen = x[rows]
    return np.asarray(chosen.toarray() if sparse.issparse(chosen) else chosen, np.float64)


def _principal(a: _Cells, b: _Cells, seed: int) -> Floats:
    """Compute principal components of both kinds together, ``a`` first: ``(cells, 50 at most)``."""
    from sklearn.decomposition import PCA

    x = np.concatenate([a.logged, b.logged])
    pca = PCA(min(_COMPONENTS, *x.shape), svd_solver="randomized", random_state=short_seed(seed))
    components: Floats = pca.fit_transform(x)
    return components


def _aucs(a: _Cells, b: _Cells, seed: int) -> dict[str, float]:
    """Compute the area under the curve of each classifier and input, as a mean over folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_a = np.repeat([1, 0], [len(a.values), len(b.values)])
    depth = np.concatenate([a.depth, b.depth])
    inputs = {
        "genes": np.concatenate([a.logged, b.logged]),
        "depth and components": np.hstack([depth, _principal(a, b, seed)]),
    }
    classifiers = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=_PENALTY, max_iter=200)),
        "trees": HistGradientBoostingClassifier(random_state=short_seed(seed)),
    }
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=short_seed(seed))
    return {
        f"{classifier_name}, {input_name}": float(
            cross_val_score(classifier, x, is_a, cv=folds, scoring="roc_auc").mean()
        )
        for input_name, x in inputs.items()
        for classifier_name, classifier in classifiers.items()
    }


def _agreement(a: _Cells, b: _Cells) -> Agreement:
    abundant = np.argsort(-b.logged.mean(0), kind="stable")[:_GENES_OF_CORRELATION]
    varies = (a.logged.var(0) > 0) & (b.logged.var(0) > 0)
    both = abundant[varies[abundant]]
    pairs = np.triu_indices(len(both), 1)
    return Agreement(
        means=_r2(a.logged.mean(0), b.logged.mean(0)),
        variances=_r2(*(np.log(kind.logged.var(0)[varies]) for kind in (a, b))),
        zeros=_r2(*((kind.values == 0).mean(0) for kind in (a, b))),
        correlations=_r2(*(np.atleast_2d(np.corrcoef(kind.logged[:, both].T))[pairs] for kind in (a, b))),
    )


def _r2(values: Floats, truth: Floats) -> float:
    """Compute R2 around identity; 1 if nothing differs, also for fewer than two values, which scikit-learn refuses."""
    from sklearn.metrics import r2_score

    return float(np.array_equal(values, truth)) if len(truth) < 2 else float(r2_score(truth, values))


def _shares(a: _Cells, b: _Cells, types: NDArray[Any] | None, seed: int) -> dict[str, tuple[float, float]]:
    """Compute the share of b and of a in each type, by the types of neighbours in b, or in each cluster of both."""
    from sklearn.cluster import KMeans
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    components = _principal(a, b, seed)
    if types is None:
        size = min(_CLUSTERS, len(components) // _FEWEST)
        clusters = KMeans(size, n_init=3, random_state=short_seed(seed)).fit_predict(components)
        of_a, of_b, names = clusters[: len(a.values)], clusters[len(a.values) :], list(range(size))
    else:
        of_real, by_neighbours = components[len(a.values) :], KNeighborsClassifier(_NEIGHBOURS)
        of_a = by_neighbours.fit(of_real, types).predict(components[: len(a.values)])
        folds = KFold(10, shuffle=True, random_state=short_seed(seed))
        of_b = cross_val_predict(by_neighbours, of_real, types, cv=folds)  # as for generated cells
        names = sorted(set(types))
    return {str(name): (float((of_b == name).mean()), float((of_a == name).mean())) for name in names}


def _is_missing(share: float, expected: float, n: int) -> bool:
    """Return whether a type has less than a quarter of its expected share, by more than chance."""
    from scipy.stats import poisson

    return share < _MISSING * expected and bool(poisson.cdf(round(share * n), expected * n) < _CHANCE)


def _separating_genes(a: _Cells, b: _Cells, names: Any) -> dict[str, float]:
    """Return the genes that a linear classifier uses most to tell a from b, with their weights."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit_transform(np.concatenate([a.logged, b.logged]))
    is_a = np.repeat([1, 0], [len(a.values), len(b.values)])
    weights = LogisticRegression(C=_PENALTY, max_iter=200).fit(x, is_a).coef_[0]
    most = np.argsort(-np.abs(weights), kind="stable")[:_GENES_SHOWN]
    return {str(names[gene]): float(weights[gene]) for gene in most}


def _verdict(auc: float, auc_real: float, missing: tuple[str, ...], n_types: int, unit: str) -> str:
    how = "hardly" if auc <= _HARD else "in part" if auc <= _EASY else "easily"
    lacking = f"{len(missing)} of {n_types} {unit}s missing ({listed(missing)})" if missing else f"no {unit} is missing"
    return (
        f"Generated cells are {how} told from real ones: AUC {auc:.2f}, where real cells among themselves give "
        f"{auc_real:.2f}; {lacking}."
    )
