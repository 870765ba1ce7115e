"""Check cells before a model is fitted or applied to them, and collect all problems."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from celbo.data.absent import (
    Absent,
    CellsWithGene,
    LackingLevel,
    columns_to_watch,
    describe_lacking_levels,
    find_lacking_levels,
    levels_too_small,
    n_missing_values,
    why_not_watched,
)
from celbo.data.conditions import UNSEEN, Condition, as_text, doubt_levels, doubt_numbers, make_condition, size_factors
from celbo.data.features import Features, choose_features, describe_genomes, features_of_query
from celbo.data.fingerprint import Fingerprint
from celbo.data.matching import explain_mismatch
from celbo.data.schema import Schema
from celbo.data.stored import Stored, place_of, stored_values
from celbo.data.values import (
    Scan,
    describe_rounded,
    describe_values,
    find_counts,
    holds_counts,
    scan_values,
    seem_joined,
    value_faults,
)
from celbo.errors import DataError, UsageError, columns_there_are, listed, warn

__all__ = ["Check", "Problem", "check_adata", "check_query"]

_GENES_PRESENT = 0.8
"""Default share of the model's genes that a query must have."""

_FEW = 10
"""A column with at most this many different whole numbers looks like codes."""

_MOSTLY = 0.9
"""A mask is enough if it explains this share of the missing values that the best column explains."""

_READ_AS = {
    "marginal": "read as all levels of fit in equal parts",
    "nearest": "each read as the known level that fits its cells best",
    "adapt": "each learned from its cells",
}
"""How the model reads levels not seen in fit, for each way but "refuse"."""

_NOT_COUNTS = ("not-finite", "negative", "not-whole", "too-large")
"""Kinds of bad values, of `celbo.data.values.KINDS`, that make values no counts."""

_ADVICE = {
    "not-finite": "Counts are never missing: find the source of these values. Drop or correct these cells or genes.",
    "too-large": "No experiment gives such large counts: look for a mistake in the export of the values.",
    "negative": "celbo models raw counts: give it those, in X or in a layer.",
    "not-whole": (
        "celbo models raw counts: give it those, in X or in a layer. To fit estimated counts, allow them "
        "(--allow-noninteger). The gaussian likelihood also takes real numbers, from a named layer."
    ),
}

_JOINED = "Many cells lack the same genes, as after a join of samples with other genes (join='outer'). If so, "
_ADVICE_JOINED = {
    "counts": (
        f"{_JOINED}join sparse matrices, or write zeros (numpy.nan_to_num), and name the column of samples as "
        "mask_absent (--mask-absent): then the model knows that these genes were not measured there. Or join the "
        "samples with join='inner'."
    ),
    "real": f"{_JOINED}join the samples with join='inner'.",
    "query": f"{_JOINED}leave out these genes, or ask for each sample by itself: the model fills in missing genes.",
}
"""For a fit to counts, a fit to real numbers, and cells of a fitted model."""


class Problem(NamedTuple):
    """A problem in the data."""

    name: str
    """Kind of problem, for programs."""
    severity: str
    """ "error": celbo cannot compute; "warning": it can."""
    message: str
    """What is wrong, what was expected, and what to do."""


@dataclass
class Check:
    """Result of checking an AnnData, for a model to be fitted or for a fitted one."""

    n_cells: int
    n_genes: int
    n_values: int | None = None
    """Number of stored values; all were checked. None if they could not be read."""
    problems: list[Problem] = field(default_factory=list)
    schema: Schema | None = None
    """How a model reads these cells; None if there are errors."""
    genes: pd.Index = field(default_factory=lambda: pd.Index([]), repr=False)
    """Names of the features that a model may read, ``(n_genes,)``."""
    stored: Stored | None = field(default=None, repr=False)
    """The values of these features; None if they cannot be read."""
    fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    """Shape and hashes of values and names, if requested; see `celbo.data.fingerprint`."""
    lacking_levels: Mapping[str, Sequence[LackingLevel]] = field(default_factory=dict, repr=False)
    """By column of obs, the levels whose cells lack genes."""

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that must be corrected."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def accept(self) -> Schema:
        """Show the warnings, and return the schema.

        Raises
        ------
        DataError
            If there are errors. The message lists all of them.
        """
        if self.errors or self.schema is None:
            raise DataError("\n".join(problem.message for problem in self.errors))
        for problem in self.problems:
            warn(problem.message)
        return self.schema

    def to_json(self) -> dict[str, Any]:
        """Return plain values for programs, without the schema."""
        return {
            "ok": not self.errors,
            "n_cells": self.n_cells,
            "n_genes": self.n_genes,
            "n_values": self.n_values,
            "problems": [problem._asdict() for problem in self.problems],
        }

    def add(self, name: str, severity: str, message: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(name, severity, message))

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Record a `DataError` as an error of this name, and continue."""
        try:
            yield
        except DataError as error:
            self.add(name, "error", str(error))


def check_adata(
    adata: AnnData,
    *,
    values: str = "counts",
    conditions: Sequence[str] = (),
    nuisance: Sequence[str] = (),
    layer: str | None = None,
    size_factor: str | None = None,
    allow_noninteger: bool = False,
    features: str | None = None,
    mask_absent: str | None = None,
    fingerprint: bool = False,
) -> Check:
    """Check names, every stored value, conditions and size factors of cells before a model is fitted to them.

    Parameters
    ----------
    adata
        The cells. They stay unchanged.
    values
        Kind of values that the likelihood takes: "counts", "detected" or "real". For "real", whole numbers (in X or in
        a layer) are log-normalised as counts; other numbers must come from a named layer, and are used unchanged.
    conditions
        Columns of obs that the model conditions on: floating-point columns are continuous, others categorical. A column
        with the same value in all cells is left out with a warning.
    nuisance
        Further conditions, whose effects the model removes.
    layer
        Layer with the values; None for X.
    size_factor
        Column of obs that replaces the sum of counts, scaled to the same mean.
    allow_noninteger
        Whether counts may be fractions, as estimated counts are.
    features
        Type of features to model; see `celbo.data.features.choose_features`. Other features are not checked.
    mask_absent
        Column of obs whose levels may lack genes; see `celbo.data.absent`.
    fingerprint
        Whether to hash all values, also those of other features, in the same pass over the data.

    Returns
    -------
    Check
        It has the schema if there are no errors.

    Examples
    --------
    >>> check = check_adata(AnnData(np.array([[1.5, 2.0], [0.0, 3.0]])))
    >>> [problem.name for problem in check.problems]
    ['not-whole']
    """
    for option, names in {"conditions": conditions, "nuisance": nuisance}.items():
        if isinstance(names, str):
            raise UsageError(f"{option} is the text {names!r}; give a list of columns: [{names!r}].")
    check = Check(adata.n_obs, adata.n_vars)
    if not (adata.n_obs and adata.n_vars):
        size = f"{adata.n_obs} cells and {adata.n_vars} genes"
        check.add("empty", "error", f"these data have {size}; a model needs both.")
        return check
    kept = choose_features(adata.var, features)
    _check_features(check, adata, kept)
    _check_names(check, adata)
    scan = None
    with check.noting("values"):
        stored = stored_values(adata, layer)
        check.stored = stored.of_genes(kept.positions)
        if values == "real" and (layer is None or holds_counts(check.stored)):
            values = "log_normalised"
        if allow_noninteger and values == "counts":
            values = "pseudo_counts"
        elif allow_noninteger:
            raise DataError(
                "allow_noninteger (--allow-noninteger) is for likelihoods of counts (nb, zinb, poisson). Leave it out; "
                "to give the gaussian likelihood real numbers, name their layer."
            )
        hashes = Fingerprint() if fingerprint else None
        watched = [name for name in (mask_absent, *conditions, *nuisance) if name is not None]
        columns = [] if values == "real" else columns_to_watch(adata.obs, watched)
        cells_with_gene = CellsWithGene(adata.obs, columns, len(check.genes))
        scan = scan_values(stored, genes=kept.positions, hashes=hashes, also=cells_with_gene.add)
        _check_values(check, adata, layer, scan, values)
        check.fingerprint = None if hashes is None else hashes.of(adata, layer)
        _check_emptiness(check, adata, scan, values)
        if not check.errors:  # sums of values that are not finite say nothing
            check.lacking_levels = find_lacking_levels(cells_with_gene, scan.library, watched)
            if mask_absent is not None and mask_absent in check.lacking_levels:
                _check_small_levels(check, mask_absent, levels_too_small(cells_with_gene, scan.library, mask_absent))
            _check_lacking_levels(check, adata.obs, mask_absent)
    library_scale = 1.0
    if size_factor is not None:
        with check.noting("size-factor"):
            factors = size_factors(adata.obs, size_factor)
            library_scale = float(scan.library.sum() / factors.sum()) if scan else 1.0
    model_conditions = _check_conditions(check, adata.obs, conditions, nuisance)
    if not check.errors:
        check.schema = Schema(
            genes=tuple(check.genes.astype(str)),
            conditions=model_conditions,
            layer=layer,
            size_factor=size_factor,
            library_scale=library_scale,
            values=values,
            selection=kept.selection,
            features=kept.kind,
        )
    return check


def check_query(
    adata: AnnData, schema: Schema, *, unseen: str = "refuse", genes_present: float = _GENES_PRESENT
) -> Check:
    """Check the model's genes, every stored value and the conditions of cells before a fitted model is applied to them.

    Of features of several types, those of the model's type are read (`celbo.data.features.features_of_query`).

    Parameters
    ----------
    adata
        The cells. They stay unchanged.
    schema
        Schema of the model.
    unseen
        What to do with levels not seen in fit, one of `celbo.data.conditions.UNSEEN`.
    genes_present
        Smallest share of the model's genes that the data must have. The model fills in the others by their expectation.

    Returns
    -------
    Check
    """
    if unseen not in UNSEEN:
        raise UsageError(f"unseen is {unseen!r}; choose one of {', '.join(UNSEEN)}.")
    if not (isinstance(genes_present, int | float | np.number) and 0 < genes_present <= 1):
        raise UsageError(f"genes_present={genes_present!r}; give a share above 0 and at most 1.")
    check = Check(adata.n_obs, adata.n_vars, schema=schema)
    if not adata.n_obs:
        check.add("empty", "error", "these data have no cells.")
        return check
    kept = features_of_query(adata.var, schema.features)
    var = kept.of(adata.var)
    check.genes, check.n_genes = var.index, len(var)
    _check_names(check, adata)
    n_present = int((schema.columns(var.index) >= 0).sum()) if var.index.is_unique else len(schema.genes)
    enough = n_present >= genes_present * len(schema.genes) and n_present > 0
    if n_present < len(schema.genes):
        rest = (
            "The model fills them in by their expectation."
            if enough
            else f"At least {genes_present:.0%} are needed (genes_present, --genes-present)."
        )
        message = f"{explain_mismatch(schema.genes, var)} {rest}"
        check.add("genes", "warning" if enough else "error", message)
    with check.noting("values"):
        check.stored = stored_values(adata, schema.layer).of_genes(kept.positions)
        scan = scan_values(check.stored, summed=check.genes.isin(schema.genes))
        _check_values(check, adata, schema.layer, scan, schema.values, of_model=True)
        if enough:  # else all genes that match may be empty, because the names are wrong
            _check_emptiness(check, adata, scan, schema.values, of_model=True)
    if schema.size_factor is not None:
        with check.noting("size-factor"):
            size_factors(adata.obs, schema.size_factor)
    if schema.absent is not None:
        _check_mask(check, adata.obs, schema.absent)
    with check.noting("conditions"):
        schema.codes(adata.obs, unseen=unseen)
        for condition in schema.conditions:
            column = adata.obs[condition.name]
            if not (known := condition.is_known(column)).all():
                levels = listed(sorted(as_text(column[~known]).unique()))
                check.add(
                    "unseen-levels",
                    "warning",
                    f"condition {condition.name!r}: {(~known).sum():,} cells have levels not seen in fit ({levels}), "
                    f"{_READ_AS[unseen]}.",
                )
            if doubt := condition.doubt(column):
                check.add("outside", "warning", doubt)
    return check


def _check_features(check: Check, adata: AnnData, kept: Features) -> None:
    """Keep the chosen features, and say what was left out and which genomes the genes are from."""
    var = kept.of(adata.var)
    check.genes, check.n_genes = var.index, len(var)
    if kept.fault:
        check.add("features", "error", kept.fault)
    if kept.doubt:
        check.add("features", "warning", kept.doubt)
    if genomes := describe_genomes(var):
        check.add(
            "genomes",
            "warning",
            f"the genes are from several genomes: {genomes}. If the cells are of one species, keep its genes only. If "
            "they are of several, fit each species separately: otherwise the latent space separates the species first.",
        )


def _check_names(check: Check, adata: AnnData) -> None:
    if (twice := check.genes[check.genes.duplicated()]).size:
        check.add(
            "duplicate-genes",
            "error",
            f"{twice.nunique():,} gene names occur more than once: {listed(twice.unique())}. celbo matches genes by "
            "name: sum these genes, or number their names (--make-unique, adata.var_names_make_unique()).",
        )
    if (twice := adata.obs_names[adata.obs_names.duplicated()]).size:
        check.add(
            "duplicate-cells",
            "warning",
            f"{twice.nunique():,} cell names occur more than once: {listed(twice.unique())}. Results keep the order of "
            "the cells; to join them by name, number the names (adata.obs_names_make_unique()).",
        )


def _check_values(
    check: Check, adata: AnnData, layer: str | None, scan: Scan, values: str, *, of_model: bool = False
) -> None:
    assert check.stored is not None
    names = adata.obs_names, check.genes, place_of(layer)
    check.n_values = scan.n_values
    kinds = {"real": _NOT_COUNTS[:1], "pseudo_counts": tuple(kind for kind in _NOT_COUNTS if kind != "not-whole")}
    faults = value_faults(scan, *names, kinds.get(values, _NOT_COUNTS))
    advice = {kind: _ADVICE[kind] for kind in faults}
    if "not-finite" in faults and seem_joined(check.stored, scan):
        advice["not-finite"] = _ADVICE_JOINED["real" if values == "real" else "query" if of_model else "counts"]
    if wrong_kind := {"negative", "not-whole"} & faults.keys():
        # The last of these sentences also says what the values are, and where counts are.
        last = max(wrong_kind)
        description = describe_values(check.stored, scan)
        hints = [f"The values {description}." if description else "", find_counts(adata, layer) or _ADVICE[last]]
        advice |= dict.fromkeys(wrong_kind, "") | {last: " ".join(filter(None, hints))}
    for kind, sentence in faults.items():
        check.add(kind, "error", f"{sentence} {advice[kind]}".strip())
    if "inexact" in scan.faults and "too-large" not in scan.faults and values != "real":
        sentence = value_faults(scan, *names, ("inexact",))["inexact"]
        check.add(
            "inexact",
            "warning",
            f"{sentence} float32 rounds such numbers to a few units; check that they are counts.",
        )
    if values in ("counts", "pseudo_counts") and not scan.faults:
        _warn_of_rounded(check, adata, layer, scan)


def _warn_of_rounded(check: Check, adata: AnnData, layer: str | None, scan: Scan) -> None:
    """Warn about whole numbers that are no counts."""
    assert check.stored is not None
    if description := describe_rounded(check.stored, scan):
        check.add(
            "rounded",
            "warning",
            f"{place_of(layer)} holds whole numbers, but they {description}. The noise of such values is not that of "
            f"counts, so a likelihood of counts does not fit them. {find_counts(adata, layer) or _ADVICE['negative']}",
        )


def _check_emptiness(check: Check, adata: AnnData, scan: Scan, values: str, *, of_model: bool = False) -> None:
    if values == "real":
        return
    which = " of the model's genes" if of_model else ""
    if (empty := scan.library == 0).all():
        check.add(
            "no-counts", "error", f"these data have no counts{which}: all values are 0. Look for the counts elsewhere."
        )
    elif empty.any():
        check.add(
            "empty-cells",
            "warning",
            f"{empty.sum():,} of {len(empty):,} cells have no counts{which}, the first {adata.obs_names[empty][0]!r}. "
            "celbo keeps them; an embedding marks them in obs['celbo_empty'], because their position means nothing.",
        )
    if not of_model and (silent := scan.detected == 0).any():
        check.add(
            "empty-genes",
            "warning",
            f"{silent.sum():,} of {len(silent):,} genes have no counts: {listed(check.genes[silent], 3)}. celbo "
            "keeps them, but can learn nothing about them.",
        )


def _check_small_levels(check: Check, column: str, levels: Sequence[str]) -> None:
    if levels:
        check.add(
            "absent-genes",
            "warning",
            f"{listed(levels)} of {column!r} have too few counts to tell which genes they lack; all their genes count "
            "as measured (mask_absent, --mask-absent). Leave these cells out if their genes differ.",
        )


def _check_lacking_levels(check: Check, obs: pd.DataFrame, mask_absent: str | None) -> None:
    """Warn if cells of some levels lack genes that are not masked: by the column that explains most."""
    if mask_absent is not None:
        if mask_absent not in obs.columns:
            known = columns_there_are([mask_absent], obs.columns)
            check.add("absent-genes", "error", f"obs has no column {mask_absent!r} (mask_absent); {known}")
            return
        if mask_absent not in check.lacking_levels:
            why = why_not_watched(obs, mask_absent) or "the values are real numbers, of which a zero says nothing"
            message = f"mask_absent={mask_absent!r} (--mask-absent) cannot be used: {why}. Name a column of samples."
            check.add("absent-genes", "error", message)
            return
        if not check.lacking_levels[mask_absent]:
            check.add(
                "absent-genes",
                "warning",
                f"no level of {mask_absent!r} lacks so many genes that chance cannot explain it: nothing is masked "
                "(mask_absent, --mask-absent).",
            )
    explained = {name: n_missing_values(lacking_levels) for name, lacking_levels in check.lacking_levels.items()}
    most = max(explained, key=lambda name: explained[name], default="")
    if not explained.get(most) or explained.get(mask_absent or "", 0) >= _MOSTLY * explained[most]:
        return
    check.add("absent-genes", "warning", describe_lacking_levels(check.lacking_levels[most], check.genes))


def _check_mask(check: Check, obs: pd.DataFrame, absent: Absent) -> None:
    """Warn about cells of which a fitted model cannot know which genes were measured."""
    if absent.column not in obs.columns:
        found = f"obs has no column {absent.column!r}"
    elif n := int((absent.codes(obs) < 0).sum()):
        unknown = as_text(obs[absent.column][absent.codes(obs) < 0]).unique()
        found = f"{n:,} cells have levels of {absent.column!r} that fit did not see ({listed(sorted(unknown))})"
    else:
        return
    message = (
        f"{found}. That column says which genes were not measured (mask_absent of the fit), so all genes of these "
        "cells count as measured. If they are zeros because they were not measured, leave them out of the file."
    )
    check.add("absent-genes", "warning", message)


def _check_conditions(
    check: Check, obs: pd.DataFrame, conditions: Sequence[str], nuisance: Sequence[str]
) -> tuple[Condition, ...]:
    names = [*conditions, *nuisance]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        check.add("conditions", "error", f"condition {listed(twice)} is named more than once; name it once.")
    if missing := [name for name in names if name not in obs.columns]:
        known = columns_there_are(missing, obs.columns, names)
        check.add("conditions", "error", f"obs has no column {listed(missing)}; {known}")
    model_conditions = []
    for name in dict.fromkeys(name for name in names if name in obs.columns):
        with check.noting("conditions"):
            condition = make_condition(name, obs[name])
            if condition is None:
                check.add(
                    "one-level",
                    "warning",
                    f"condition {name!r} is {str(obs[name].iloc[0])!r} in every cell: it has no effect, and is left "
                    "out.",
                )
                continue
            model_conditions.append(replace(condition, nuisance=name in nuisance))
            _warn_of_codes(check, condition, obs[name])
            if doubt := doubt_numbers(condition, len(obs)):
                check.add("text-numbers", "warning", doubt)
            else:
                _warn_of_rare_levels(check, condition, obs[name])
            for doubt in doubt_levels(condition):
                check.add("levels", "warning", doubt)
    return tuple(model_conditions)


def _warn_of_codes(check: Check, condition: Condition, column: "pd.Series[Any]") -> None:
    """Warn if a continuous condition has few values, all whole numbers: often they are names of batches."""
    if condition.levels is None and column.nunique() <= _FEW and (column == column.round()).all():
        check.add(
            "numbers",
            "warning",
            f"condition {condition.name!r} has {column.nunique()} different numbers, and is read as continuous. If "
            f"they are names, make them text: adata.obs[{condition.name!r}] = "
            f"adata.obs[{condition.name!r}].astype(int).astype(str).",
        )


def _warn_of_rare_levels(check: Check, condition: Condition, column: "pd.Series[Any]") -> None:
    if condition.levels is None:
        return
    n_cells = np.bincount(condition.codes(column).astype(int), minlength=condition.dim)
    if rare := [level for level, n in zip(condition.levels, n_cells, strict=True) if n == 1]:
        check.add(
            "rare-levels",
            "warning",
            f"condition {condition.name!r} has levels with one cell: {listed(rare)}. A model can learn nothing from "
            "one cell: merge such levels with others, or drop them.",
        )
