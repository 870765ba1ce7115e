"""Choose the features that are genes, where antibodies, guides or peaks stand beside them, and count genomes."""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celbo.errors import UsageError

__all__ = ["ALL_FEATURES", "Features", "choose_features", "describe_genomes", "features_of_query"]

ALL_FEATURES = "all"
"""Value of the option ``features`` that models every feature, whatever its type."""

_COLUMNS = ("feature_types", "feature_type", "modality")
"""Columns of var that say what each feature is: of Cell Ranger, of other pipelines, and of muon."""
_GENES = ("gene expression", "rna", "gex")
"""Types that are genes, as `_plain` writes them."""
_OTHERS = (
    *("antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "custom", "peaks"),
    *("adt", "hto", "prot", "protein", "guide", "guides", "grna", "crispr", "atac"),
)
"""Types that are not genes, as `_plain` writes them. Other names may be kinds of genes, such as "lncRNA"."""
_GENOMES = (
    re.compile(r"(GRC[a-z]{1,3}\d+|hg\d+|mm\d+|rn\d+|dm\d+|danRer\d+|sacCer\d+|HUMAN|MOUSE)[_-]+"),
    re.compile(r"(ENS[A-Z]*G)\d{6,}"),
)
"""How names of genes begin that name their genome: by a prefix ("GRCh38_CD4", "mm10___Cd4"), or as Ensembl ids."""

_MOST_LISTED = 20


class Features(NamedTuple):
    """Features of the data that are modelled."""

    positions: NDArray[np.intp] | None = None
    """Their positions among the features, increasing; None for all."""
    kind: str | None = None
    """Their type; None if the data do not say, or all types are modelled."""
    selection: str | None = None
    """How they were chosen, as text; None if all features are modelled."""
    doubt: str = ""
    """What the user should know about the choice."""
    fault: str = ""
    """Why the features asked for cannot be chosen."""

    def of(self, var: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of var that describe these features."""
        return var if self.positions is None else var.iloc[self.positions]


def choose_features(var: pd.DataFrame, wanted: str | None = None) -> Features:
    """Choose the features to model by their type in var["feature_types"], var["feature_type"] or var["modality"].

    Parameters
    ----------
    var
        Table of the features.
    wanted
        Type to model, such as "Gene Expression"; capitals do not matter. "all" stands for every feature. If None, the
        genes are chosen where var names them ("Gene Expression", "RNA", "GEX") beside other types.

    Returns
    -------
    Features

    Examples
    --------
    >>> var = pd.DataFrame({"feature_types": ["Gene Expression"] * 2 + ["Antibody Capture"]}, index=["A", "B", "A"])
    >>> chosen = choose_features(var)
    >>> list(chosen.of(var).index), chosen.selection
    (['A', 'B'], "2 of 3 features, those of type 'Gene Expression' in var['feature_types']")
    >>> choose_features(var, "Peaks").fault
    "no feature is of type 'Peaks'; var['feature_types'] has 'Gene Expression' (2), 'Antibody Capture' (1)."
    """
    if not (wanted is None or isinstance(wanted, str)):
        raise UsageError(f"features={wanted!r}; give one type of features, such as 'Gene Expression', or None.")
    tables = {column: types for column in _COLUMNS if (types := _types(var, column)) is not None}
    if wanted is not None:
        return _wanted_features(var, tables, wanted)
    for column, types in tables.items():
        is_gene = types.map(_plain).isin(_GENES)
        if is_gene.any() and not is_gene[types != ""].all():
            kind = types[is_gene].iloc[0]
            doubt = (
                f"var[{column!r}] has features of several types: {_numbers(types)}. celbo models the genes only "
                f"({kind!r}). Choose another type with features (--features); features='all' models all of them."
            )
            return _chosen(column, types, is_gene.to_numpy(), kind)._replace(doubt=doubt)
        if is_gene.any() and is_gene.all():
            return Features(kind=types.iloc[0])
    for column, types in tables.items():
        if len(set(types)) > 1 and types.map(_plain).isin(_OTHERS).any():
            return Features(
                doubt=f"var[{column!r}] has features of several types: {_numbers(types)}. None of them reads as genes, "
                "so celbo models all features. Choose a type with features (--features)."
            )
    return Features()


def features_of_query(var: pd.DataFrame, kind: str | None) -> Features:
    """Choose the features of new cells that a fitted model may know.

    Parameters
    ----------
    var
        Table of the features of the new cells.
    kind
        Type of features that the model was fitted to; None if the data of fit did not say.

    Returns
    -------
    Features
        All features, if the new data do not name this type, or if they name no other. With ``kind`` None the genes, if
        names of features are not unique without this choice.
    """
    if kind is None:
        return Features() if var.index.is_unique else choose_features(var)._replace(doubt="")
    for column in _COLUMNS:
        if (types := _types(var, column)) is None:
            continue
        plain = types.map(_plain)
        is_same = plain.isin(_GENES) if _plain(kind) in _GENES else plain == _plain(kind)
        if is_same.any():
            return _chosen(column, types, is_same.to_numpy(), kind)
    return Features()


def describe_genomes(var: pd.DataFrame) -> str:
    """Describe the genomes that the genes are from, with their numbers of genes; return "" for a single genome.

    Genomes are the values of var["genome"], or the prefixes of names, such as "GRCh38_" and "mm10___".

    Examples
    --------
    >>> describe_genomes(pd.DataFrame(index=["GRCh38_CD4", "GRCh38_CD8A", "mm10___Cd4"]))
    "names of genes begin with 'GRCh38' (2), 'mm10' (1)"
    """
    genomes = _types(var, "genome")
    if genomes is not None and len(set(genomes[genomes != ""].map(_without_version))) > 1:
        return f"var['genome'] has {_numbers(genomes[genomes != ''])}"
    for pattern in _GENOMES:
        prefixes = pd.Series([match[1] for name in var.index if (match := pattern.match(str(name)))], dtype=object)
        if len(set(prefixes)) > 1:
            return f"names of genes begin with {_numbers(prefixes)}"
    return ""


def _wanted_features(var: pd.DataFrame, tables: dict[str, "pd.Series[str]"], wanted: str) -> Features:
    """Choose a type; if there is no such type, choose as if none were wanted, and say so."""
    for column, types in tables.items():
        is_wanted = types.map(_plain) == _plain(wanted)
        if wanted and is_wanted.any():
            return _chosen(column, types, is_wanted.to_numpy(), types[is_wanted].iloc[0])
    if wanted == ALL_FEATURES:
        return Features()
    known = "; ".join(f"var[{column!r}] has {_numbers(types)}" for column, types in tables.items())
    columns = " or ".join(f"var[{column!r}]" for column in _COLUMNS)
    return choose_features(var)._replace(
        doubt="",
        fault=f"no feature is of type {wanted!r}; {known}."
        if known
        else f"no feature is of type {wanted!r}: var has no column of types. Put the types into {columns}, or leave "
        "out features (--features).",
    )


def _chosen(column: str, types: "pd.Series[str]", is_kept: NDArray[np.bool_], kind: str) -> Features:
    """Make the choice of these features; it is no choice if these are all."""
    if is_kept.all():
        return Features(kind=kind)
    words = f"{is_kept.sum():,} of {len(types):,} features, those of type {kind!r} in var[{column!r}]"
    return Features(np.flatnonzero(is_kept), kind, words)


def _types(var: pd.DataFrame, column: str) -> "pd.Series[str] | None":
    """Return a column of var as text, "" where a value is missing; None if there is no such column, or several."""
    if list(var.columns).count(column) != 1:
        return None
    values = var[column].astype(object)
    return values.where(values.notna(), "").map(str).str.strip().reset_index(drop=True)


def _numbers(types: "pd.Series[str]") -> str:
    """List types with their numbers of features, the most frequent first, at most `_MOST_LISTED` of them."""
    counts = types.value_counts(sort=False).sort_values(ascending=False, kind="stable")
    names = [f"{repr(str(name)) if name else 'no type'} ({n:,})" for name, n in counts.items()]
    rest = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + rest


def _without_version(genome: str) -> str:
    """Return the name of a genome without what follows it: "GRCh38" for "GRCh38-2020-A" and "GRCh38_premrna"."""
    return re.split(r"[-_. ]", genome)[0].casefold()


def _plain(kind: str) -> str:
    """Return the same text for types that differ only in capitals and separators."""
    return re.sub(r"[\s_-]+", " ", kind).strip().casefold()
