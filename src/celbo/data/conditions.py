"""Conditions: columns of obs given to the model, encoded as numbers; and size factors."""

import difflib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celbo.errors import DataError, UsageError, listed, warn

__all__ = [
    "UNLABELLED",
    "UNSEEN",
    "Condition",
    "as_text",
    "column_of",
    "doubt_levels",
    "known_labels",
    "make_condition",
    "size_factors",
    "spelling",
]

_MOST_ONE_HOT = 50
"""Conditions with more levels are embedded: the model learns a few numbers for each level."""
_BEYOND = 0.1
"""A value may lie outside the range of fit by this share of the range without a warning."""
_NA_AS_LEVEL = ", or let them be a level of their own (--na-as-level)"
UNLABELLED = "unknown"
"""Default value of a label that is not known; it need not occur."""
_ENDS = re.compile(r"^[\s_]+|[\s_]+$|\.0$")
_SEPARATORS = re.compile(r"(?<=[^\W\d_])[\s_.\-]+(?=[^\W_])|(?<=\d)[\s_.\-]+(?=[^\W\d_])")
"""Between two letters, or a letter and a digit; of "-1" and "KO-" it is a sign, and of "1.5" and "1_1" a number's."""
_READ_AS_MISSING = ("", "nan", "NaN", "NA", "na", "N/A", "n/a", "None", "<NA>", "NaT")
"""Levels that are more likely to say that there is no value; "none" is a treatment, too."""
_READ_AS_UNKNOWN = ("", "nan", "na", "n/a", "<na>", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "-1")
"""Labels, in lower case, that probably say that the label is not known."""
_TOLD = ("label", "probability", "p_known", "none of these")
"""Names of columns of predictions, which labels may not have."""

UNSEEN = ("refuse", "nearest", "marginal", "adapt")
"""What to do with a level that fit did not see: refuse it, take the likeliest known one, all of fit in equal parts, or
learn weights of its own from these cells."""


@dataclass(frozen=True)
class Condition:
    """A known covariate given to the model: categorical (one-hot by level) or continuous (standardised).

    Examples
    --------
    >>> Condition("batch", levels=("a", "b")).encode(pd.Series(["b", "a"]))
    array([[0., 1.],
           [1., 0.]], dtype=float32)
    >>> Condition("dose", levels=None, mean=2.0, sd=2.0).encode(pd.Series([0.0, 4.0]))
    array([[-1.],
           [ 1.]], dtype=float32)
    """

    name: str
    levels: tuple[str, ...] | None
    """Levels in order; None for a continuous condition."""
    mean: float = 0.0
    sd: float = 1.0
    embedded: bool = False
    """Whether the model learns a few numbers for each level; else levels are one-hot."""
    nuisance: bool = False
    """Whether its effect is removed; else it is studied."""
    n_mapped: int = 0
    """Number of levels that were mapped after fit; they come last, and means over levels leave them out."""
    seen: tuple[float, float] | None = None
    """Smallest and largest value of a continuous condition in fit."""

    @property
    def dim(self) -> int:
        """Width of the encoded condition."""
        return 1 if self.levels is None else len(self.levels)

    @property
    def levels_of_fit(self) -> tuple[str, ...]:
        """Levels that fit saw, without those mapped afterwards; empty for a continuous condition."""
        levels = self.levels or ()
        return levels[: len(levels) - self.n_mapped]

    def codes(self, column: "pd.Series[Any]", unseen: str = "refuse") -> NDArray[np.float32]:
        """Return the number of the level, or the standardised value, ``(cells,)`` float32.

        Parameters
        ----------
        column
            A value for each cell.
        unseen
            One of `UNSEEN`; unless refused, a level that fit did not see has the number -1.

        Raises
        ------
        DataError
            If there are missing values, values that are not numbers, or levels not seen in fit.
        """
        _refuse_missing(self.name, column, "" if self.levels is None else _NA_AS_LEVEL)
        if self.levels is None:
            return ((_numbers(self.name, column) - self.mean) / self.sd).astype(np.float32)
        text = as_text(column)
        codes = pd.Index(self.levels).get_indexer(text)
        if unseen == "refuse" and (codes < 0).any():
            strange = text[codes < 0]
            raise DataError(
                f"condition {self.name!r} has levels not seen in fit: {listed(sorted(strange.unique()))} "
                f"({len(strange):,} cells; known: {listed(self.levels)}). Refit with them, correct their spelling, "
                "drop these cells, take them into the model (map_query, celbo map), or, to embed, predict or score, "
                "say how to read them: unseen='nearest', 'marginal' or 'adapt' (--unseen)."
            )
        return codes.astype(np.float32)

    def code(self, value: object) -> float:
        """`codes` of one value that somebody asks for."""
        if self.levels is not None and (asked := as_text(pd.Series([value]))[0]) not in self.levels:
            near = difflib.get_close_matches(asked, self.levels, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"condition {self.name!r} has no level {asked!r} in fit; it has {listed(self.levels)}.{meant}"
            )
        if self.levels is None and not (isinstance(value, int | float | np.number) and np.isfinite(float(value))):
            raise DataError(f"condition {self.name!r} is continuous; give a finite number, not {value!r}.")
        return float(self.codes(pd.Series([value]))[0])

    def encode(self, column: "pd.Series[Any]", unseen: str = "refuse") -> NDArray[np.float32]:
        """Encode a column of obs, ``(cells, dim)`` float32; as `codes`, then `expand`."""
        return self.expand(self.codes(column, unseen))

    def expand(self, codes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode what `codes` returned, ``(cells, dim)`` float32; -1 becomes equal parts of all levels of fit."""
        if self.levels is None:
            return codes[:, None]
        encoded = np.zeros((len(codes), self.dim), np.float32)
        known = np.flatnonzero(codes >= 0)
        encoded[known, codes[known].astype(int)] = 1
        if len(known) < len(codes):
            n_of_fit = len(self.levels_of_fit)
            encoded[codes < 0, :n_of_fit] = 1 / n_of_fit
        return encoded

    def doubt(self, column: "pd.Series[Any]") -> str:
        """Return a warning about values beyond the range of fit by more than a tenth of it; empty if there are none."""
        if self.seen is None:
            return ""
        (low, high), values = self.seen, _numbers(self.name, column)
        margin = _BEYOND * (high - low)
        outside = (values < low - margin) | (values > high + margin)
        if not outside.any():
            return ""
        return (
            f"condition {self.name!r}: {outside.sum():,} of {len(column):,} values, the first {values[outside][0]:g}, "
            f"lie outside of what fit saw ({low:g} to {high:g}); what is said there is a guess. Is the unit the same?"
        )

    def is_known(self, column: "pd.Series[Any]") -> NDArray[np.bool_]:
        """Whether fit saw the level of each cell, ``(cells,)``; every number of a continuous condition is known."""
        if self.levels is None:
            return np.ones(len(column), bool)
        return np.asarray(column.isna() | as_text(column).isin(self.levels))


def spelling(level: str) -> str:
    """Return the same text for levels that differ only in case, separators and surrounding blanks.

    Examples
    --------
    >>> {spelling(level) for level in ("Donor 1", "donor_1", "donor-1 ")}
    {'donor_1'}
    >>> [spelling(level) for level in ("1.0", "1", "1_1", "-1", "KO-")]
    ['1', '1', '1_1', '-1', 'ko-']
    """
    return _SEPARATORS.sub("_", _ENDS.sub("", level)).casefold()


def doubt_levels(condition: Condition) -> list[str]:
    """Return warnings about levels that may be mistakes: spelt nearly as another, or as a missing value."""
    alike: dict[str, list[str]] = {}
    for level in condition.levels or ():
        alike.setdefault(spelling(level) or level, []).append(level)
    doubts = [
        f"condition {condition.name!r} has levels that read nearly the same, {listed(several)}; if one is meant, mend "
        "their spelling."
        for several in alike.values()
        if len(several) > 1
    ]
    if odd := [level for level in condition.levels or () if level.strip() in _READ_AS_MISSING]:
        doubts.append(
            f"condition {condition.name!r}: {listed(odd)} is taken for a level of its own. If it says that the value "
            "is missing, fill it in, or drop these cells."
        )
    return doubts


def as_text(column: "pd.Series[Any]") -> "pd.Series[str]":
    """Return levels as text; a missing one is "nan".

    Examples
    --------
    >>> as_text(pd.Series(pd.Categorical([("a", 1), 2, None]))).tolist()
    ["('a', 1)", '2', 'nan']
    """
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype(str).where(column.notna(), "nan")
    names = np.array([*map(str, column.cat.categories), "nan"], object)  # pandas cannot make text of tuples
    return pd.Series(names[column.cat.codes], index=column.index)


def known_labels(column: "pd.Series[str]", unlabelled: str) -> tuple[Condition, NDArray[np.int32]]:
    """Return the labels, and each cell's number: -1 where the label is not known (missing, or ``unlabelled``).

    Raises
    ------
    DataError
        If fewer than two labels are known, they are floating-point numbers, or one reads as a table of predictions
        does itself: "label", "probability", "p_known", "none of these".
    UsageError
        If ``unlabelled``, other than "unknown", is what no cell reads.

    Examples
    --------
    >>> labels, codes = known_labels(pd.Series(["T", "unknown", None, "B"], name="type"), "unknown")
    >>> labels.levels, codes
    (('B', 'T'), array([ 1, -1, -1,  0], dtype=int32))
    """
    if pd.api.types.is_float_dtype(column):
        raise DataError(
            f"obs column {column.name!r} holds floating-point numbers, which are no labels. If they name types, make "
            f"them text: adata.obs[{column.name!r}].map('{{:g}}'.format, na_action='ignore')."
        )
    text, unlabelled = as_text(column), str(unlabelled)
    if unlabelled != UNLABELLED and not (text == unlabelled).any():
        raise UsageError(
            f"unlabelled={unlabelled!r} (--unlabelled) occurs nowhere in obs column {column.name!r}; give what it "
            "reads where the label is not known, or leave it out."
        )
    is_known = (column.notna() & (text != unlabelled)).to_numpy()
    levels = tuple(sorted(text[is_known].unique()))
    if taken := set(levels).intersection(_TOLD):
        raise DataError(
            f"obs column {column.name!r} has the label {listed(sorted(taken))}, which a table of predictions says "
            "itself; rename it, or, if it says that the type is not known, give it as unlabelled (--unlabelled)."
        )
    if len(levels) < 2:
        raise DataError(
            f"obs column {column.name!r} has {len(levels)} known labels ({listed(levels)}) in {is_known.sum():,} "
            f"cells; a classifier needs two or more. Those that are missing or read {unlabelled!r} are unknown."
        )
    codes = pd.Index(levels).get_indexer(pd.Index(text)).astype(np.int32)
    codes[~is_known] = -1
    if odd := [level for level in levels if level.strip().casefold() in _READ_AS_UNKNOWN]:
        warn(
            f"obs column {column.name!r}: {listed(odd)} ({text.isin(odd).sum():,} cells) is taken for a type. "
            f"If it says that the label is not known, give unlabelled={odd[0]!r} (--unlabelled)."
        )
    if (single := np.bincount(codes[is_known]) == 1).mean() > 0.5:
        warn(
            f"obs column {column.name!r}: {single.sum():,} of {len(levels):,} labels have one cell, from which nothing "
            "can be learned; is it a column of types?"
        )
    return Condition(str(column.name), levels), codes


def size_factors(obs: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Read size factors from obs, ``(cells,)``: finite and above 0, or a `DataError`."""
    if name not in obs.columns:
        raise DataError(f"obs has no column {name!r} for size factors; it has {listed(obs.columns) or 'no column'}.")
    _refuse_missing(name, obs[name])
    factors = _numbers(name, obs[name])
    if (bad := factors <= 0).any():
        raise DataError(
            f"size factor {name!r} is {factors[bad][0]:g} in cell {obs.index[bad][0]!r} "
            f"({bad.sum():,} cells are not above 0); size factors are positive numbers."
        )
    return factors


def make_condition(name: str, column: "pd.Series[Any]") -> Condition | None:
    """Make the condition of a model that is to be fitted to these cells; None if all have the same value.

    Floating-point numbers make a continuous condition; anything else (text, categories, integers, booleans) a
    categorical one.

    Raises
    ------
    DataError
        If values are missing, not finite, or different and the same as text.

    Examples
    --------
    >>> make_condition("batch", pd.Series(["b", "a", "b"])).levels
    ('a', 'b')
    """
    _refuse_missing(name, column, "" if pd.api.types.is_float_dtype(column) else _NA_AS_LEVEL)
    if pd.api.types.is_float_dtype(column):
        values = _numbers(name, column)
        if values.min() == values.max():
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            spread = values.std()
        if not 0 < spread < np.inf:
            raise DataError(f"obs column {name!r} goes from {values.min():g} to {values.max():g}: rescale it.")
        seen = float(values.min()), float(values.max())
        return Condition(name, levels=None, mean=float(values.mean()), sd=float(values.std()), seen=seen)
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels = tuple(map(str, column.cat.remove_unused_categories().cat.categories))
    else:
        levels = tuple(sorted(as_text(column).unique()))
    if len(levels) < _n_different(column) or len(set(levels)) < len(levels):
        raise DataError(f"obs column {name!r} has levels that read the same as text ({listed(levels)}); rename some.")
    return Condition(name, levels, embedded=len(levels) > _MOST_ONE_HOT) if len(levels) > 1 else None


def column_of(obs: pd.DataFrame, name: str) -> "pd.Series[Any]":
    """Return the column of this name; raise a `DataError` if there are several."""
    column = obs[name]
    _refuse_several(name, column)
    return column


def _refuse_several(name: str, column: "pd.Series[Any] | pd.DataFrame") -> None:
    if isinstance(column, pd.DataFrame):
        raise DataError(f"obs has {column.shape[1]} columns {name!r}; rename all but one.")


def _refuse_missing(name: str, column: "pd.Series[Any]", more: str = "") -> None:
    _refuse_several(name, column)
    if (missing := column.isna()).any():
        raise DataError(
            f"obs column {name!r} has no value in {missing.sum():,} of {len(column):,} cells, "
            f"the first {column.index[missing][0]!r}. Fill it in, or drop these cells{more}."
        )


def _numbers(name: str, column: "pd.Series[Any]") -> NDArray[np.float64]:
    try:
        values = column.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"obs column {name!r} is to be numbers, and is not: {error}") from error
    if not (finite := np.isfinite(values)).all():
        raise DataError(
            f"obs column {name!r} is not finite in {(~finite).sum():,} cells, the first {column.index[~finite][0]!r}."
        )
    return values


def _n_different(column: "pd.Series[Any]") -> int:
    """Count different values; 0 if they cannot be compared."""
    try:
        return int(column.nunique())
    except TypeError:
        return 0
