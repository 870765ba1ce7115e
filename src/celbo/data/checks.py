"""Check cells before a model is fitted to them, or computes with them, and collect all problems."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from celbo.data.conditions import UNSEEN, Condition, as_text, doubt_levels, make_condition, size_factors
from celbo.data.fingerprint import Fingerprint
from celbo.data.matching import explain_mismatch
from celbo.data.schema import Schema
from celbo.data.stored import Stored, stored_values
from celbo.data.values import Scan, diagnose, find_counts, holds_counts, scan_values, value_faults
from celbo.errors import DataError, UsageError, listed, warn

__all__ = ["Check", "Problem", "check_adata", "check_query"]

_GENES_PRESENT = 0.8
"""Default share of the model's genes that a query must have."""

_FEW = 10
"""A column with at most this many different whole numbers looks like codes."""

_READ_AS = {
    "marginal": "read as all levels of fit in equal parts",
    "nearest": "each of which is read as the known one that suits its cells best",
    "adapt": "each of which is learned from its cells",
}
"""How levels that fit did not see are read, unless they are refused."""

_NOT_COUNTS = ("not-finite", "negative", "not-whole", "too-large")
"""Rows of `celbo.data.values.KINDS` that counts may not have."""

_ADVICE = {
    "not-finite": "Find out where they came from; counts are never missing. Drop or mend these cells or genes.",
    "too-large": "No experiment counts that much: look for a mistake in how the values were exported.",
    "negative": "celbo models raw counts: give it those, in X or in a layer.",
    "not-whole": (
        "celbo models raw counts: give it those, in X or in a layer. Estimated counts can be let through "
        "in fit (--allow-noninteger); the gaussian likelihood also takes real numbers, from a layer that is named."
    ),
}


class Problem(NamedTuple):
    """A problem in the data."""

    name: str
    """Kind of problem, for programs."""
    severity: str
    """ "error": nothing can be computed; "warning": something to know."""
    message: str
    """One message: what was found, what was expected, what to do."""


@dataclass
class Check:
    """Result of checking an AnnData, for a model to be fitted or for a fitted one."""

    n_cells: int
    n_genes: int
    n_values: int = 0
    """Number of stored values; all were checked."""
    problems: list[Problem] = field(default_factory=list)
    schema: Schema | None = None
    """How a model reads these cells; None if it cannot."""
    stored: Stored | None = field(default=None, repr=False)
    """The values, if they were found."""
    fingerprint: dict[str, Any] | None = field(default=None, repr=False)
    """Shape and hashes of values and names, if they were asked for; see `celbo.data.fingerprint`."""

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that must be mended."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def accept(self) -> Schema:
        """Give the warnings, and return the schema.

        Raises
        ------
        DataError
            If there are errors; it lists them all.
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
        """Turn a `DataError` into an error of this name, and continue."""
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
    fingerprint: bool = False,
) -> Check:
    """Check cells to which a model will be fitted: names, every stored value, conditions, size factors.

    Parameters
    ----------
    adata
        The cells; left as they are.
    values
        What the likelihood takes: "counts", "detected" or "real". For "real", whole numbers (in X or in a layer) are
        taken for counts and log-normalised; a named layer of other numbers is used as it is.
    conditions
        Columns of obs given to the model: floating-point ones are continuous, others categorical. One that has the same
        value in all cells says nothing, and is left out with a warning.
    nuisance
        More of them, which are to be removed.
    layer
        Layer the values come from; None for X.
    size_factor
        Column of obs used in place of the sum of counts; scaled so that both have the same mean.
    allow_noninteger
        Whether counts may be fractions, as estimated ones are.
    fingerprint
        Whether to hash all values in the same pass.

    Returns
    -------
    Check
        With the schema, if there are no errors.

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
        check.add("empty", "error", f"these data have {size}; a model needs some of both.")
        return check
    _check_names(check, adata)
    scan = None
    with check.noting("values"):
        check.stored = stored = stored_values(adata, layer)
        if values == "real" and (layer is None or holds_counts(stored)):
            values = "log_normalised"
        if allow_noninteger and values == "counts":
            values = "pseudo_counts"
        elif allow_noninteger:
            raise DataError(
                "allow_noninteger (--allow-noninteger) lets estimated counts through to the likelihoods of counts (nb, "
                "zinb, poisson); leave it out, and name a layer where the gaussian is to take real numbers."
            )
        hashes = Fingerprint() if fingerprint else None
        scan = _check_values(check, adata, layer, stored, values, hashes)
        check.fingerprint = None if hashes is None else hashes.of(adata, layer)
        _check_emptiness(check, adata, scan, values)
    library_scale = 1.0
    if size_factor is not None:
        with check.noting("size-factor"):
            factors = size_factors(adata.obs, size_factor)
            library_scale = float(scan.library.sum() / factors.sum()) if scan else 1.0
    made = _check_conditions(check, adata.obs, conditions, nuisance)
    if not check.errors:
        check.schema = Schema(
            genes=tuple(adata.var_names.astype(str)),
            conditions=made,
            layer=layer,
            size_factor=size_factor,
            library_scale=library_scale,
            values=values,
        )
    return check


def check_query(
    adata: AnnData, schema: Schema, *, unseen: str = "refuse", genes_present: float = _GENES_PRESENT
) -> Check:
    """Check cells with which a fitted model will compute: its genes, every stored value, its conditions.

    Parameters
    ----------
    adata
        The cells; left as they are.
    schema
        Of the model.
    unseen
        What to do with levels not seen in fit, one of `celbo.data.conditions.UNSEEN`.
    genes_present
        Share of the model's genes that must be there. The model fills in the rest by what it expects of them.

    Returns
    -------
    Check
    """
    if unseen not in UNSEEN:
        raise UsageError(f"unseen is {unseen!r}; choose one of {', '.join(UNSEEN)}.")
    if not (isinstance(genes_present, int | float | np.number) and 0 < genes_present <= 1):
        raise UsageError(f"genes_present={genes_present!r}; it is a share, above 0 and at most 1.")
    check = Check(adata.n_obs, adata.n_vars, schema=schema)
    if not adata.n_obs:
        check.add("empty", "error", "these data have no cells.")
        return check
    _check_names(check, adata)
    n_present = int((schema.columns(adata.var_names) >= 0).sum()) if adata.var_names.is_unique else len(schema.genes)
    if n_present < len(schema.genes):
        enough = n_present >= genes_present * len(schema.genes) and n_present > 0
        rest = (
            "The model fills them in by what it expects of them."
            if enough
            else f"At least {genes_present:.0%} are needed."
        )
        message = f"{explain_mismatch(schema.genes, adata.var)} {rest}"
        check.add("genes", "warning" if enough else "error", message)
    with check.noting("values"):
        check.stored = stored_values(adata, schema.layer)
        scan = _check_values(check, adata, schema.layer, check.stored, schema.values)
        _check_emptiness(check, adata, scan, schema.values, genes=False)
    if schema.size_factor is not None:
        with check.noting("size-factor"):
            size_factors(adata.obs, schema.size_factor)
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


def _check_names(check: Check, adata: AnnData) -> None:
    if (twice := adata.var_names[adata.var_names.duplicated()]).size:
        check.add(
            "duplicate-genes",
            "error",
            f"{twice.nunique():,} gene names occur more than once: {listed(twice.unique())}. Genes are matched by "
            "name: sum them, or number them (--make-unique, adata.var_names_make_unique()).",
        )
    if (twice := adata.obs_names[adata.obs_names.duplicated()]).size:
        check.add(
            "duplicate-cells",
            "warning",
            f"{twice.nunique():,} cell names occur more than once: {listed(twice.unique())}. Results keep the order of "
            "the cells; to join them by name, number the names (adata.obs_names_make_unique()).",
        )


def _check_values(
    check: Check,
    adata: AnnData,
    layer: str | None,
    stored: Stored,
    values: str,
    hashes: Fingerprint | None = None,
) -> Scan:
    scan = scan_values(stored, hashes=hashes)
    check.n_values = scan.n_values
    kinds = {"real": _NOT_COUNTS[:1], "pseudo_counts": tuple(kind for kind in _NOT_COUNTS if kind != "not-whole")}
    faults = value_faults(scan, adata, layer, kinds.get(values, _NOT_COUNTS))
    advice = {kind: _ADVICE[kind] for kind in faults}
    if wrong_kind := {"negative", "not-whole"} & faults.keys():
        # What the values are, and where counts lie, belongs to the last of these sentences.
        last = max(wrong_kind)
        named = diagnose(stored, scan)
        hints = [f"The values {named}." if named else "", find_counts(adata, layer) or _ADVICE[last]]
        advice |= dict.fromkeys(wrong_kind, "") | {last: " ".join(filter(None, hints))}
    for kind, sentence in faults.items():
        check.add(kind, "error", f"{sentence} {advice[kind]}".strip())
    if "inexact" in scan.faults and "too-large" not in scan.faults and values != "real":
        sentence = value_faults(scan, adata, layer, ("inexact",))["inexact"]
        check.add(
            "inexact",
            "warning",
            f"{sentence} In 32 bits such numbers are rounded to a few units; look whether they are counts at all.",
        )
    return scan


def _check_emptiness(check: Check, adata: AnnData, scan: Scan, values: str, *, genes: bool = True) -> None:
    if values == "real":
        return
    if (empty := scan.library == 0).all():
        check.add("no-counts", "error", "there is no count in these data: all values are 0. Look where the counts are.")
    elif empty.any():
        check.add(
            "empty-cells",
            "warning",
            f"no counts in {empty.sum():,} of {len(empty):,} cells, the first {adata.obs_names[empty][0]!r}. They are "
            "kept, and marked in obs['celbo_empty'] of an embedding: nothing tells where they belong.",
        )
    if genes and (silent := scan.detected == 0).any():
        check.add(
            "empty-genes",
            "warning",
            f"no counts of {silent.sum():,} of {len(silent):,} genes: {listed(adata.var_names[silent], 3)}. They are "
            "kept; nothing can be learned about them.",
        )


def _check_conditions(
    check: Check, obs: pd.DataFrame, conditions: Sequence[str], nuisance: Sequence[str]
) -> tuple[Condition, ...]:
    names = [*conditions, *nuisance]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        check.add("conditions", "error", f"condition {listed(twice)} is named more than once; name it once.")
    if missing := [name for name in names if name not in obs.columns]:
        known = listed(obs.columns) or "no column"
        check.add("conditions", "error", f"obs has no column {listed(missing)}; it has {known}.")
    made = []
    for name in dict.fromkeys(name for name in names if name in obs.columns):
        with check.noting("conditions"):
            condition = make_condition(name, obs[name])
            if condition is None:
                check.add(
                    "one-level",
                    "warning",
                    f"condition {name!r} is {str(obs[name].iloc[0])!r} in every cell: it cannot be told from the rest, "
                    "and is left out.",
                )
                continue
            made.append(replace(condition, nuisance=name in nuisance))
            _warn_of_codes(check, condition, obs[name])
            _warn_of_rare_levels(check, condition, obs[name])
            for doubt in doubt_levels(condition):
                check.add("levels", "warning", doubt)
    return tuple(made)


def _warn_of_codes(check: Check, condition: Condition, column: "pd.Series[Any]") -> None:
    """Warn about a few whole numbers stored as floating-point numbers: often they are names of batches."""
    if condition.levels is None and column.nunique() <= _FEW and (column == column.round()).all():
        check.add(
            "numbers",
            "warning",
            f"condition {condition.name!r} has {column.nunique()} different numbers, read as amounts of something. If "
            f"they are names, make them text: adata.obs[{condition.name!r}].astype(int).astype(str).",
        )


def _warn_of_rare_levels(check: Check, condition: Condition, column: "pd.Series[Any]") -> None:
    if condition.levels is None:
        return
    n_cells = np.bincount(condition.codes(column).astype(int), minlength=condition.dim)
    if rare := [level for level, n in zip(condition.levels, n_cells, strict=True) if n == 1]:
        check.add(
            "rare-levels",
            "warning",
            f"condition {condition.name!r} has levels of one cell: {listed(rare)}. Nothing can be learned from one "
            "cell: join such levels to others, or drop them.",
        )
