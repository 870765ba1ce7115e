"""Simulate counts of single cells with known truth, and store all effects with the counts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy import sparse

from celbo.errors import DataError, UsageError

__all__ = ["simulate_cells", "true_share"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# The position of an ingredient selects its random stream: append new ones, never reorder.
_INGREDIENTS = (
    *("base", "theta", "lineage_lfc", "type_lfc", "programme_lfc", "batch_lfc", "treatment_lfc"),
    *("type", "batch", "treatment", "programme", "library"),
    *("overdispersion", "count", "gate"),
)
_TREATMENTS = ("ctrl", "treated")
_EFFECTS = ("type_lfc", "programme_lfc", "batch_lfc", "treatment_lfc")  # in varm, and in _Genes
_LIKELIHOODS = ("nb", "poisson", "zinb")

_BASE_SD = 1.8  # natural log; by default four counts in five are zero
_THETA_SD = 0.7  # natural log, between genes
_LINEAGE_GENES, _MARKER_GENES, _PROGRAMME_GENES = 0.06, 0.05, 0.2  # shares of the genes
_MARKERS_UP, _TREATMENT_UP = 0.8, 0.5  # shares of effects that are up: most markers, half of the treatment effects
_BLOCK_ENTRIES = 1 << 19  # entries drawn at a time, 4 MiB per array: a block fits the cache, and memory is bounded
_LARGEST_LIBRARY = 1e6  # float32 is exact up to 1.6e7: overdispersed counts may be larger than the library

_BOUNDS: dict[str, tuple[type, float, float]] = {
    "n_cells": (Integral, 1, 1e9),
    "n_genes": (Integral, 2, 1e6),
    "n_types": (Integral, 1, 1e4),
    "type_strength": (Real, 0, 10),
    "n_programmes": (Integral, 0, 1e4),
    "programme_strength": (Real, 0, 10),
    "n_batches": (Integral, 1, 1e4),
    "batch_strength": (Real, 0, 10),
    "batch_depth": (Real, 0, 10),
    "treatment_strength": (Real, 0, 10),
    "treatment_fraction": (Real, 0, 0.5),
    "treatment_shared": (Real, 0, 1),
    "median_library": (Real, 1e-3, _LARGEST_LIBRARY),
    "library_sd": (Real, 0, 10),
    "median_theta": (Real, 1e-3, 1e8),
    "gate": (Real, 0, 0.999),
    "seed": (Integral, 0, 2**63 - 1),
    "threads": (Integral, 1, 1e4),
}


class _Genes(NamedTuple):
    """Effects of each gene, as natural logarithms before the softmax."""

    log_base: FloatArray  # (genes,)
    theta: FloatArray  # (genes,), inverse dispersion
    type_lfc: FloatArray  # (types, genes)
    programme_lfc: FloatArray  # (programmes, genes)
    batch_lfc: FloatArray  # (batches, genes)
    treatment_lfc: FloatArray  # (types, genes)


class _Cells(NamedTuple):
    """Levels and activities of each cell."""

    types: IntArray  # (cells,)
    batches: IntArray  # (cells,)
    treated: IntArray  # (cells,), 0 or 1
    programme: FloatArray  # (cells, programmes)

    def take(self, rows: slice) -> "_Cells":
        return _Cells(self.types[rows], self.batches[rows], self.treated[rows], self.programme[rows])


def simulate_cells(
    n_cells: int = 3000,
    n_genes: int = 1000,
    *,
    n_types: int = 6,
    type_proportions: Sequence[float] | None = None,
    type_strength: float = 1.0,
    n_programmes: int = 3,
    programme_strength: float = 0.4,
    n_batches: int = 2,
    batch_strength: float = 0.3,
    batch_depth: float = 0.25,
    treated_types: Sequence[str] | Literal["half", "all"] = "half",
    treatment_strength: float = 1.0,
    treatment_fraction: float = 0.05,
    treatment_shared: float = 0.5,
    median_library: float = 500.0,
    library_sd: float = 0.4,
    likelihood: Literal["nb", "poisson", "zinb"] = "nb",
    median_theta: float = 3.0,
    gate: float | None = None,
    keep_mean: bool = False,
    threads: int = 4,
    seed: int = 0,
) -> AnnData:
    r"""Simulate droplet-like counts of cells with types, programmes, batches and a treatment, and their truth.

    Cell :math:`i` of type :math:`t` in batch :math:`b`, treated (:math:`s = 1`) or not (:math:`s = 0`), has

    .. math::
        \eta_{ig} &= \log \beta_g + \tau_{gt} + \sum_k a_{ik} \pi_{gk} + \delta_{gb} + s \, \omega_{gt} \\
        \mu_{ig} &= l_i \, \mathrm{softmax}_g(\eta_{ig}), \qquad \log l_i = \log \bar l + d_b + \sigma \epsilon_i \\
        x_{ig} &\sim \mathrm{NB}(\mu_{ig}, \theta_g), \qquad \mathrm{var}(x_{ig}) = \mu_{ig} + \mu_{ig}^2 / \theta_g

    with :math:`a_{ik}, \epsilon_i \sim N(0, 1)`. Marker and treatment effects are sparse: up or down by the strength
    times a number in [0.5, 1.5], zero elsewhere. Each type has its own markers on 5 % of the genes. Types 0 and 1, 2
    and 3, ... also share the markers of a lineage on 6 %, so that they are similar. Each programme changes about 20 %
    of the genes, and each batch all genes, by normal effects. Types and batches have exact proportions and are
    independent; treatment is balanced within every type and batch. The treatment does not change genes with more than
    five times the average base share, so that its effects change the shares of other genes little.

    Each ingredient has its own random stream. With the same seed, ``batch_strength=0`` gives the same cells without
    batch effects, and "zinb" gives the counts of "nb" with some set to zero.

    Parameters
    ----------
    n_cells, n_genes
        Number of cells and of genes.
    n_types, n_programmes, n_batches
        Number of cell types (``type_0``, ...), of continuous programmes that vary within all types, and of technical
        batches (``batch_0``, ...).
    type_proportions
        Share of the cells in each type, summing to 1. By default the last type is a third as common as the first.
    type_strength, programme_strength, batch_strength, treatment_strength
        Size of the effects, natural log; 0 for no effects.
    batch_depth
        :math:`d_b` runs evenly from ``-batch_depth`` (first batch) to ``batch_depth`` (last), natural log.
    treated_types
        Types that respond to the treatment: "half" (every second one, so that each has a close relative that does
        not), "all", or a list of names.
    treatment_fraction
        Share of the genes that respond in each responding type, at most 0.5.
    treatment_shared
        Share of these genes that respond by the same amount in all responding types; the others are drawn for each
        type. With 1 and ``treated_types="all"``, the treatment has the same effect on every cell.
    median_library, library_sd
        :math:`\bar l`, counts per cell, and :math:`\sigma`, natural log.
    likelihood
        "nb", "poisson" (theta is infinite), or "zinb": an NB count is replaced by zero with probability `gate`.
    median_theta
        Median over genes of the inverse dispersion theta, log-normal with standard deviation 0.7.
    gate
        Probability of an additional zero, for "zinb" only; 0.2 by default.
    keep_mean
        Whether to store the expected counts too, as a dense matrix of cells x genes x 4 bytes.
    threads
        Number of threads that draw counts; it does not change the result.
    seed
        Random seed; the same options and seed give the same cells.

    Returns
    -------
    AnnData
        - ``X``: integer counts, (cells, genes), CSR float32; ``X > 0`` serves as Bernoulli data.
        - ``obs``: ``cell_type``, ``batch``, ``treatment`` ("ctrl" or "treated"), categorical; ``library``, the expected
          total (before zero inflation), counts.
        - ``var``: ``base_share`` (beta, sums to 1), ``theta``, ``is_marker``, ``treatment_gene``.
        - ``varm``: ``type_lfc``, ``batch_lfc`` and ``treatment_lfc``, frames of genes by level; ``programme_lfc``,
          (genes, programmes). These are the tau, delta, omega and pi of the formula: the change in the log share of
          a gene, up to a constant common to all genes of a cell. `true_share` computes the shares.
        - ``obsm``: ``programme``, the activities a, (cells, programmes).
        - ``layers``: with `keep_mean`, ``mean``: expected counts (after zero inflation), float32.
        - ``uns``: ``simulation``, the options, plain JSON.

    Raises
    ------
    UsageError
        If options are out of range or contradict each other. The message names all of them.

    Notes
    -----
    Counts are drawn in blocks of cells; besides the result, each thread needs some tens of MiB.

    References
    ----------
    Zappia, Phipson & Oshlack (2017), "Splatter: simulation of single-cell RNA sequencing data", Genome Biology 18,
    is a similar simulation. Here all effects are log-linear, so that the truth is one number per gene and level.

    Examples
    --------
    >>> adata = simulate_cells(200, 100, n_types=4)
    >>> adata.obs["cell_type"].value_counts().to_dict()
    {'type_0': 85, 'type_1': 50, 'type_2': 37, 'type_3': 28}
    >>> adata.varm["treatment_lfc"].any().to_dict()  # which types respond?
    {'type_0': True, 'type_1': False, 'type_2': True, 'type_3': False}
    """
    options: dict[str, Any] = {
        "n_cells": n_cells,
        "n_genes": n_genes,
        "n_types": n_types,
        "type_proportions": type_proportions,
        "type_strength": type_strength,
        "n_programmes": n_programmes,
        "programme_strength": programme_strength,
        "n_batches": n_batches,
        "batch_strength": batch_strength,
        "batch_depth": batch_depth,
        "treated_types": treated_types,
        "treatment_strength": treatment_strength,
        "treatment_fraction": treatment_fraction,
        "treatment_shared": treatment_shared,
        "median_library": median_library,
        "library_sd": library_sd,
        "likelihood": likelihood,
        "median_theta": median_theta,
        "gate": (0.2 if likelihood == "zinb" else 0.0) if gate is None else gate,
        "seed": seed,
    }
    _check_bounds(options | {"threads": threads})
    options = _settle(options)

    base = _rng(seed, "base").normal(0.0, _BASE_SD, n_genes)
    log_base = base - np.log(np.exp(base).sum())
    theta = median_theta * np.exp(_rng(seed, "theta").normal(0.0, _THETA_SD, n_genes))
    lineage = np.arange(n_types) // 2
    lineage_lfc = _marker_effects(_rng(seed, "lineage_lfc"), lineage[-1] + 1, n_genes, _LINEAGE_GENES)
    own_lfc = _marker_effects(_rng(seed, "type_lfc"), n_types, n_genes, _MARKER_GENES)
    treatment_lfc = _treatment_effects(
        _rng(seed, "treatment_lfc"), log_base, n_types, treatment_fraction, treatment_shared
    )
    responds = np.isin(_names("type", n_types), options["treated_types"])
    genes = _Genes(
        log_base=log_base,
        type_lfc=type_strength * (lineage_lfc[lineage] + own_lfc),
        programme_lfc=programme_strength * _programme_effects(_rng(seed, "programme_lfc"), n_programmes, n_genes),
        batch_lfc=batch_strength * _rng(seed, "batch_lfc").normal(size=(n_batches, n_genes)),
        treatment_lfc=treatment_strength * treatment_lfc * responds[:, None],
        theta=np.full(n_genes, np.inf) if likelihood == "poisson" else theta,
    )
    cells = _draw_cells(seed, n_cells, options["type_proportions"], n_batches, n_programmes)
    depth = np.linspace(-batch_depth, batch_depth, n_batches) if n_batches > 1 else np.zeros(1)
    noise = _rng(seed, "library").normal(0.0, library_sd, n_cells)
    library = median_library * np.exp(depth[cells.batches] + noise)
    _check_largest_library(library, median_library)
    mean = np.empty((n_cells, n_genes), np.float32) if keep_mean else None
    counts = _draw_counts(seed, genes, cells, library, options["gate"], threads, mean)
    return AnnData(
        counts,
        obs=_obs_frame(cells, library, n_types, n_batches),
        var=_var_frame(genes),
        obsm={"programme": cells.programme},
        varm=_varm(genes),
        layers={} if mean is None else {"mean": mean},
        uns={"simulation": options},
    )


def _check_largest_library(library: FloatArray, median_library: float) -> None:
    if library.max() > _LARGEST_LIBRARY:
        raise UsageError(
            f"the largest library is {library.max():.3g} counts, expected at most {_LARGEST_LIBRARY:.0e} so that "
            f"counts are exact in float32; lower median_library ({median_library}), library_sd or batch_depth"
        )


def true_share(adata: AnnData, *, treatment: str | None = None, batch: str | None = None) -> FloatArray:
    """Compute the true mean share of every gene in simulated cells, as they are or in another batch or treatment.

    The share is the softmax over genes in `simulate_cells`, computed from the stored effects. Multiplied by
    ``obs["library"]`` it is the expected count (before zero inflation). For a subset of the genes, shares sum to 1 over
    this subset.

    Parameters
    ----------
    adata
        Cells of `simulate_cells`, or a subset.
    treatment
        "ctrl" or "treated", for all cells; None for each cell's own.
    batch
        Name of a batch, for all cells; None for each cell's own.

    Returns
    -------
    numpy.ndarray
        Mean shares, (cells, genes), float64, each row summing to 1.

    Raises
    ------
    DataError
        If `adata` lacks entries that `simulate_cells` stores.
    UsageError
        If `treatment` or `batch` was not simulated.

    Examples
    --------
    >>> adata = simulate_cells(100, 50)
    >>> change = np.log(true_share(adata, treatment="treated") / true_share(adata, treatment="ctrl"))
    >>> bool((change[adata.obs["cell_type"] == "type_1"] == 0).all())  # a type that does not respond
    True
    """
    stored = {"varm": _EFFECTS, "obs": ("cell_type", "batch", "treatment"), "obsm": ("programme",)}
    missing = [f"{part}[{key!r}]" for part, keys in stored.items() for key in keys if key not in getattr(adata, part)]
    if missing:
        raise DataError(f"the AnnData lacks {', '.join(missing)}; expected one made by simulate_cells")
    types, batches = adata.varm["type_lfc"].columns, adata.varm["batch_lfc"].columns
    cells = _Cells(
        types=_codes(adata, "cell_type", None, types),
        batches=_codes(adata, "batch", batch, batches),
        treated=_codes(adata, "treatment", treatment, _TREATMENTS),
        programme=np.asarray(adata.obsm["programme"]),
    )
    log_base, theta = np.log(adata.var["base_share"].to_numpy()), adata.var["theta"].to_numpy()
    return _share(_Genes(log_base, theta, *(np.asarray(adata.varm[key]).T for key in _EFFECTS)), cells)


def _share(genes: _Genes, cells: _Cells) -> FloatArray:
    """Compute the mean share of each gene in each cell, ``(cells, genes)``: the softmax in `simulate_cells`."""
    # einsum uses no BLAS threads, which would compete with ours.
    eta: FloatArray = np.einsum("ik,kg->ig", cells.programme, genes.programme_lfc)
    eta += (genes.log_base + genes.type_lfc)[cells.types]
    eta += genes.batch_lfc[cells.batches]
    eta += cells.treated[:, None] * genes.treatment_lfc[cells.types]
    eta -= eta.max(axis=1, keepdims=True)
    np.exp(eta, out=eta)
    eta /= eta.sum(axis=1, keepdims=True)
    return eta


def _rng(seed: int, ingredient: str, block: int = 0) -> np.random.Generator:
    """Return the random stream of an ingredient and a block of cells, as two levels of ``SeedSequence.spawn`` would."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_INGREDIENTS.index(ingredient), block)))


def _names(kind: str, n: int) -> list[str]:
    return [f"{kind}_{i}" for i in range(n)]


def _check_bounds(options: dict[str, Any]) -> None:
    """Raise a `UsageError` that names all options out of range."""
    faults = [
        f"{name} is {options[name]!r}, expected {'an integer' if kind is Integral else 'a number'} "
        f"from {low:g} to {high:g}"
        for name, (kind, low, high) in _BOUNDS.items()
        if not (isinstance(options[name], kind) and low <= options[name] <= high)
    ]
    if options["likelihood"] not in _LIKELIHOODS:
        faults.append(f"likelihood is {options['likelihood']!r}, expected one of {', '.join(_LIKELIHOODS)}")
    if faults:
        raise UsageError("; ".join(faults))


def _settle(options: dict[str, Any]) -> dict[str, Any]:
    """Check options that depend on each other, fill in defaults, and convert all of them to plain JSON."""
    types = _names("type", options["n_types"])
    proportions, treated, faults = options["type_proportions"], options["treated_types"], []
    if proportions is None:
        weights = 1 / np.linspace(1, 3, len(types))
        proportions = weights / weights.sum()
    elif len(proportions) != len(types) or min(proportions) <= 0 or not np.isclose(sum(proportions), 1):
        faults.append(f"type_proportions are {proportions}, expected {len(types)} positive shares that sum to 1")
    if isinstance(treated, str) and treated in ("half", "all"):
        treated = types[::2] if treated == "half" else types
    elif isinstance(treated, str) or not set(treated) <= set(types):
        faults.append(
            f"treated_types is {treated!r}, expected 'half', 'all' or a list of names from {', '.join(types)}"
        )
    if options["gate"] > 0 and options["likelihood"] != "zinb":
        faults.append(f"gate is {options['gate']}, but likelihood {options['likelihood']!r} has none; use 'zinb'")
    if faults:
        raise UsageError("; ".join(faults))
    numbers = {
        name: (int if kind is Integral else float)(options[name])
        for name, (kind, *_) in _BOUNDS.items()
        if name in options
    }
    return {
        **options,
        **numbers,
        "type_proportions": [float(share) for share in proportions],
        "treated_types": list(treated),
    }


def _sizes(rng: np.random.Generator, n: int, share_up: float) -> FloatArray:
    """Draw effects with sizes in [0.5, 1.5], up or down."""
    return rng.uniform(0.5, 1.5, n) * np.where(rng.random(n) < share_up, 1.0, -1.0)


def _marker_effects(rng: np.random.Generator, n_rows: int, n_genes: int, fraction: float) -> FloatArray:
    """Draw sparse effects, (rows, genes)."""
    effects = np.zeros((n_rows, n_genes))
    for row in effects:
        chosen = rng.permutation(n_genes)[: round(fraction * n_genes)]
        row[chosen] = _sizes(rng, len(chosen), _MARKERS_UP)
    return effects


def _programme_effects(rng: np.random.Generator, n_programmes: int, n_genes: int) -> FloatArray:
    is_member = rng.random((n_programmes, n_genes)) < _PROGRAMME_GENES
    return is_member * rng.normal(size=(n_programmes, n_genes))


def _treatment_effects(
    rng: np.random.Generator, log_base: FloatArray, n_types: int, fraction: float, shared: float
) -> FloatArray:
    """Draw effects on the same number of genes in each type, (types, genes); some are common to all types."""
    n_changed = round(fraction * len(log_base))
    n_shared = round(shared * n_changed)
    # At most a fifth of the genes can exceed five times the average, so that enough are left for fraction <= 0.5.
    order = rng.permutation(np.flatnonzero(log_base <= np.log(5 / len(log_base))))
    effects = np.zeros((n_types, len(log_base)))
    effects[:, order[:n_shared]] = _sizes(rng, n_shared, _TREATMENT_UP)
    for row in effects:
        own = rng.permutation(order[n_shared:])[: n_changed - n_shared]
        row[own] = _sizes(rng, len(own), _TREATMENT_UP)
    return effects


def _draw_cells(seed: int, n_cells: int, proportions: list[float], n_batches: int, n_programmes: int) -> _Cells:
    """Assign types, batches and treatment in exact numbers, and draw the activities of the programmes."""
    last = np.rint(np.cumsum(proportions[:-1]) * n_cells)
    types = _rng(seed, "type").permutation(np.searchsorted(last, np.arange(n_cells), side="right"))
    batches = _rng(seed, "batch").permutation(np.arange(n_cells) % n_batches)
    # Treat every other cell, in random order within type and batch: numbers differ by one cell at most.
    treated = np.empty(n_cells, np.int64)
    treated[np.lexsort((_rng(seed, "treatment").random(n_cells), batches, types))] = np.arange(n_cells) % 2
    return _Cells(types, batches, treated, _rng(seed, "programme").normal(size=(n_cells, n_programmes)))


def _draw_counts(
    seed: int,
    genes: _Genes,
    cells: _Cells,
    library: FloatArray,
    gate: float,
    threads: int,
    mean: npt.NDArray[np.float32] | None,
) -> sparse.csr_matrix:
    """Draw the counts of all cells block by block, and write the expected counts into `mean` unless it is None."""
    n_cells, n_genes = len(library), len(genes.theta)
    n_rows = max(1, _BLOCK_ENTRIES // n_genes)

    def draw(block: int) -> sparse.csr_matrix:
        rows = slice(block * n_rows, (block + 1) * n_rows)
        mu = library[rows, None] * _share(genes, cells.take(rows))
        if mean is not None:
            mean[rows] = (1 - gate) * mu
        if np.isfinite(genes.theta).all():  # an NB is a Poisson with a gamma-distributed rate
            mu *= _rng(seed, "overdispersion", block).standard_gamma(genes.theta, mu.shape) / genes.theta
        x = _rng(seed, "count", block).poisson(mu)
        if gate > 0:
            x[_rng(seed, "gate", block).random(x.shape) < gate] = 0
        return sparse.csr_matrix(x.astype(np.float32))

    indptr = np.zeros(n_cells + 1, np.int64)
    indices, data = np.empty(0, np.int32), np.empty(0, np.float32)
    done, stop = 0, 0
    pool = ThreadPoolExecutor(threads)
    try:
        for part in pool.map(draw, range(-(-n_cells // n_rows))):
            start, stop = stop, stop + part.nnz
            indptr[done + 1 : done + part.shape[0] + 1] = start + part.indptr[1:]
            done += part.shape[0]
            if stop > len(data):  # reserve memory for all cells at the density so far, in place
                _resize(int(1.05 * stop * n_cells / done), indices, data)
            indices[start:stop], data[start:stop] = part.indices, part.data
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt cancels the queued blocks
    _resize(stop, indices, data)
    return sparse.csr_matrix((data, indices, indptr), shape=(n_cells, n_genes))


def _resize(size: int, *arrays: npt.NDArray[Any]) -> None:
    for array in arrays:
        array.resize(size, refcheck=False)


def _obs_frame(cells: _Cells, library: FloatArray, n_types: int, n_batches: int) -> pd.DataFrame:
    frame = pd.DataFrame(index=pd.Index(_names("cell", len(library))))
    frame["cell_type"] = pd.Categorical.from_codes(cells.types, pd.Index(_names("type", n_types)))
    frame["batch"] = pd.Categorical.from_codes(cells.batches, pd.Index(_names("batch", n_batches)))
    frame["treatment"] = pd.Categorical.from_codes(cells.treated, pd.Index(_TREATMENTS))
    frame["library"] = library
    return frame


def _var_frame(genes: _Genes) -> pd.DataFrame:
    frame = pd.DataFrame({"base_share": np.exp(genes.log_base), "theta": genes.theta})
    frame["is_marker"] = genes.type_lfc.any(axis=0)
    frame["treatment_gene"] = genes.treatment_lfc.any(axis=0)
    return frame.set_axis(_names("gene", len(genes.theta)))


def _varm(genes: _Genes) -> dict[str, Any]:
    """Return gene effects with genes as rows; effects of named levels are frames."""
    gene_names = _names("gene", len(genes.theta))
    varm: dict[str, Any] = {"programme_lfc": genes.programme_lfc.T}
    for key, kind in (("type_lfc", "type"), ("batch_lfc", "batch"), ("treatment_lfc", "type")):
        effects = getattr(genes, key)
        varm[key] = pd.DataFrame(effects.T, index=gene_names, columns=_names(kind, len(effects)))
    return varm


def _codes(adata: AnnData, column: str, level: str | None, known: Sequence[str]) -> IntArray:
    """Return the position of each cell's level, or of ``level`` for all cells, among the known levels."""
    levels = list(adata.obs[column]) if level is None else [level] * adata.n_obs
    if unknown := set(map(str, levels)) - set(known):
        names, choice = ", ".join(sorted(unknown)), ", ".join(known)
        raise UsageError(f"{column} {names} was not simulated; choose among {choice}")
    position = {name: code for code, name in enumerate(known)}
    return np.array([position[name] for name in levels], dtype=np.int64)
