"""Encode conditions, the columns of obs that a model conditions on, as numbers; read labels and size factors."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celbo.errors import DataError, UsageError, columns_there_are, listed, warn

__all__ = [
    "UNLABELLED",
    "UNSEEN",
    "Condition",
    "as_text",
    "column_of",
    "doubt_levels",
    "doubt_numbers",
    "known_labels",
    "level_positions",
    "make_condition",
    "refuse_floats",
    "size_factors",
    "spelling",
    "text_or_none",
]

_MOST_ONE_HOT = 50
"""Conditions with more levels are embedded: the model learns a short vector for each level."""
_BEYOND = 0.1
"""A value may lie outside the range of fit by this share of the range without a warning."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
"""A number as programs write it: "1", "1.0", "-0.5", "1e-05"; "01" and "+1" are names."""
_FEW_NUMBERS, _MANY_NUMBERS = 10, 30
"""Whole numbers in text: up to so many levels are read as names; from so many on as numbers, if each has few cells."""
_FEW_CELLS_OF_A_NUMBER = 10
"""Mean number of cells of a level below which many different numbers are no names of groups."""
_NA_AS_LEVEL = ", or let them be a level of their own (--na-as-level)"
UNLABELLED = "unknown"
"""Default value of an unknown label; it need not occur in the data."""
_ENDS = re.compile(r"^[\s_]+|[\s_]+$|\.0$")
_SEPARATORS = re.compile(r"(?<=[^\W\d_])[\s_.\-]+(?=[^\W_])|(?<=\d)[\s_.\-]+(?=[^\W\d_])")
"""Separators between two letters, or a letter and a digit; not the sign of "-1" or "KO-", nor those in "1.5", "1_1"."""
_READ_AS_MISSING = ("", "nan", "NaN", "NA", "na", "N/A", "n/a", "None", "<NA>", "NaT")
"""Levels that probably mean a missing value; "none" is not among them, because it may be a treatment."""
_READ_AS_UNKNOWN = ("", "nan", "na", "n/a", "<na>", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "-1")
"""Labels, in lower case, that probably mean an unknown label."""
_RESERVED_LABELS = ("label", "probability", "p_known", "unlike", "none of these")
"""Names in a table of predictions, which labels may not have."""

UNSEEN = ("refuse", "nearest", "marginal", "adapt")
"""Ways to read a level not seen in fit: raise an error, use the known level that fits best, use all levels of fit in
equal parts, or learn weights for it from these cells."""


@dataclass(frozen=True)
class Condition:
    """A known covariate that the model conditions on: categorical (one-hot by level) or continuous (standardised).

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
    """Whether the model learns a vector for each level; otherwise levels are one-hot."""
    nuisance: bool = False
    """Whether the model removes its effect; otherwise its effect is studied."""
    n_mapped: int = 0
    """Number of levels mapped after fit. They come last, and means over levels exclude them."""
    seen: tuple[float, float] | None = None
    """Smallest and largest value of a continuous condition in fit."""

    @property
    def dim(self) -> int:
        """Return the width of the encoded condition."""
        return 1 if self.levels is None else len(self.levels)

    @property
    def levels_of_fit(self) -> tuple[str, ...]:
        """Return the levels of fit, without those mapped later; empty for a continuous condition."""
        levels = self.levels or ()
        return levels[: len(levels) - self.n_mapped]

    def codes(self, column: "pd.Series[Any]", unseen: str = "refuse") -> NDArray[np.float32]:
        """Return the position of each cell's level, or the standardised value, ``(cells,)`` float32.

        Parameters
        ----------
        column
            A value for each cell.
        unseen
            One of `UNSEEN`. For all but "refuse", a level not seen in fit has position -1.

        Raises
        ------
        DataError
            If there are missing values, values that are not numbers, or levels not seen in fit.
        """
        _check_no_missing(self.name, column, "" if self.levels is None else _NA_AS_LEVEL)
        if self.levels is None:
            return ((_numbers(self.name, column) - self.mean) / self.sd).astype(np.float32)
        text = as_text(column)
        codes = level_positions(self.levels, text)
        if unseen == "refuse" and (codes < 0).any():
            unknown = text[codes < 0]
            raise DataError(
                f"condition {self.name!r} has levels not seen in fit: {listed(sorted(unknown.unique()))} "
                f"({len(unknown):,} cells; known: {listed(self.levels)}). Refit with them, correct their spelling, "
                "drop these cells, or add the levels to the model (map_query, celbo map). To embed, predict or score, "
                "you can also choose how to read them: unseen='nearest', 'marginal' or 'adapt' (--unseen)."
            )
        return codes.astype(np.float32)

    def code(self, value: object) -> float:
        """Return the code of one value; raise a `DataError` if the condition cannot have it."""
        one = pd.Series([value])
        if self.levels is not None and not self.is_known(one)[0]:
            level = as_text(one)[0]
            similar = difflib.get_close_matches(level, self.levels, 1)
            suggestion = f" Did you mean {similar[0]!r}?" if similar else ""
            raise DataError(
                f"condition {self.name!r} has no level {level!r} in fit; it has {listed(self.levels)}.{suggestion}"
            )
        if self.levels is None and not (isinstance(value, int | float | np.number) and np.isfinite(float(value))):
            raise DataError(f"condition {self.name!r} is continuous; give a finite number, not {value!r}.")
        return float(self.codes(one)[0])

    def encode(self, column: "pd.Series[Any]", unseen: str = "refuse") -> NDArray[np.float32]:
        """Encode a column of obs by `codes` and `expand`, ``(cells, dim)`` float32."""
        return self.expand(self.codes(column, unseen))

    def expand(self, codes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode the result of `codes`, ``(cells, dim)`` float32; -1 becomes equal parts of all levels of fit."""
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
        """Return a warning if values lie outside the range of fit by more than a tenth of it; otherwise ""."""
        if self.seen is None:
            return ""
        (low, high), values = self.seen, _numbers(self.name, column)
        margin = _BEYOND * (high - low)
        outside = (values < low - margin) | (values > high + margin)
        if not outside.any():
            return ""
        return (
            f"condition {self.name!r}: {outside.sum():,} of {len(column):,} values, the first {values[outside][0]:g}, "
            f"lie outside the range of fit ({low:g} to {high:g}), where the model extrapolates. Is the unit the same?"
        )

    def is_known(self, column: "pd.Series[Any]") -> NDArray[np.bool_]:
        """Return whether each cell's level is known from fit, ``(cells,)``; all are for a continuous condition."""
        if self.levels is None:
            return np.ones(len(column), bool)
        return np.asarray(column.isna()) | (level_positions(self.levels, as_text(column)) >= 0)


def level_positions(levels: Sequence[str], text: "pd.Series[str]") -> NDArray[np.intp]:
    """Return the position of the level that each text names, ``(cells,)``; -1 for none.

    A text names the level with the same text. If there is none, it names the level that is the same number, unless
    several levels are.

    Parameters
    ----------
    levels
        Different levels.
    text
        Levels of cells, as `as_text` returns them.

    Examples
    --------
    >>> level_positions(("1", "2.0", "b"), pd.Series(["1.0", "2", "b", "3"])).tolist()
    [0, 1, 2, -1]
    >>> level_positions(("1", "1.0"), pd.Series(["1.0", "1.00"])).tolist()
    [1, -1]
    """
    codes, different = pd.factorize(text)
    positions = pd.Index(levels, dtype=object).get_indexer(pd.Index(different, dtype=object))
    if (positions < 0).any():
        numbers = [_number(level) for level in levels]
        n_levels = Counter(numbers)
        of_number = {number: at for at, number in enumerate(numbers) if number is not None and n_levels[number] == 1}
        for place in np.flatnonzero(positions < 0):
            if (number := _number(different[place])) is not None:
                positions[place] = of_number.get(number, -1)
    return positions[codes]


def _number(level: str) -> Decimal | None:
    """Return the number that a level is, exactly; None if it is a name."""
    return Decimal(level) if _NUMBER.fullmatch(level) else None


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
    """Return warnings about levels that look like another level or like a missing value."""
    alike: dict[str, list[str]] = {}
    for level in condition.levels or ():
        alike.setdefault(spelling(level) or level, []).append(level)
    doubts = [
        f"condition {condition.name!r} has levels with nearly the same spelling: {listed(levels)}. If they are the "
        "same level, correct their spelling."
        for levels in alike.values()
        if len(levels) > 1
    ]
    if suspects := [level for level in condition.levels or () if level.strip() in _READ_AS_MISSING]:
        doubts.append(
            f"condition {condition.name!r}: {listed(suspects)} is used as a level. If it means that the value is "
            "missing, fill it in, or drop these cells."
        )
    return doubts


def doubt_numbers(condition: Condition, n_cells: int) -> str:
    """Return a warning if all levels read as numbers that were measured, and not as names; otherwise "".

    Measured are fractions, more than ten numbers with decimals, and thirty numbers or more with few cells each. Levels
    that mean a missing value do not count.

    Examples
    --------
    >>> doubt_numbers(Condition("batch", ("1", "2", "3")), n_cells=100)
    ''
    >>> "'0.5', '1.0'" in doubt_numbers(Condition("dose", ("0.5", "1.0")), n_cells=100)
    True
    """
    missing = [level for level in condition.levels or () if level.strip() in _READ_AS_MISSING]
    levels = [level for level in condition.levels or () if level not in missing]
    numbers = [number for level in levels if (number := _number(level)) is not None]
    n = len(numbers)
    if not n or n < len(levels):
        return ""
    has_decimals = any("." in level for level in levels)
    is_fraction = any(number != number.to_integral_value() for number in numbers)
    is_many = n >= _MANY_NUMBERS and n_cells < _FEW_CELLS_OF_A_NUMBER * n
    if not (is_fraction or is_many or (has_decimals and n > _FEW_NUMBERS)):
        return ""
    column = f"adata.obs[{condition.name!r}]"
    text = f"{column}.astype(str)"
    numbers_of = f"pandas.to_numeric({text}, errors='coerce')" if missing else f"{text}.astype(float)"
    return (
        f"condition {condition.name!r} has {n:,} levels that read as numbers ({listed(levels, 3)}), but each "
        f"is a level of its own. If they were measured, make them numbers: {column} = {numbers_of}"
        f"{f', then fill in or drop the cells with {listed(missing)}' if missing else ''}. If they are names of "
        "groups, leave them as they are."
    )


def as_text(column: "pd.Series[Any]") -> "pd.Series[str]":
    """Return levels as text; a missing level becomes "nan".

    Examples
    --------
    >>> as_text(pd.Series(pd.Categorical([("a", 1), 2, None]))).tolist()
    ["('a', 1)", '2', 'nan']
    """
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype(str).where(column.notna(), "nan")
    names = np.array([*map(str, column.cat.categories), "nan"], object)  # pandas cannot make text of tuples
    return pd.Series(names[column.cat.codes], index=column.index)


def refuse_floats(column: "pd.Series[Any]") -> None:
    """Raise a `DataError` if a column of labels or types holds floating-point numbers."""
    if pd.api.types.is_float_dtype(column):
        raise DataError(
            f"obs column {column.name!r} holds floating-point numbers, but labels are text. If they name cell types, "
            f"make them text: adata.obs[{column.name!r}].map('{{:g}}'.format, na_action='ignore')."
        )


def text_or_none(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return values as text, None where a value is missing."""
    return as_text(column).astype(object).where(column.notna(), None)


def known_labels(column: "pd.Series[str]", unlabelled: str) -> tuple[Condition, NDArray[np.int32]]:
    """Return the labels, and the position of each cell's label: -1 if it is missing or ``unlabelled``.

    Raises
    ------
    DataError
        If there are fewer than two labels, labels are floating-point numbers, or a label is a reserved name of tables
        of predictions: "label", "probability", "p_known", "unlike", "none of these".
    UsageError
        If no cell has the value ``unlabelled``, and it is not "unknown".

    Examples
    --------
    >>> labels, codes = known_labels(pd.Series(["T", "unknown", None, "B"], name="type"), "unknown")
    >>> labels.levels, codes
    (('B', 'T'), array([ 1, -1, -1,  0], dtype=int32))
    """
    refuse_floats(column)
    text, unlabelled = as_text(column), str(unlabelled)
    is_unlabelled = level_positions([unlabelled], text) == 0
    if unlabelled != UNLABELLED and not is_unlabelled.any():
        raise UsageError(
            f"unlabelled={unlabelled!r} (--unlabelled) does not occur in obs column {column.name!r}; give its "
            "value for unknown labels, or leave it out."
        )
    is_known = column.notna().to_numpy() & ~is_unlabelled
    levels = tuple(sorted(text[is_known].unique()))
    if reserved := set(levels).intersection(_RESERVED_LABELS):
        raise DataError(
            f"obs column {column.name!r} has the label {listed(sorted(reserved))}, a reserved name of tables of "
            "predictions. Rename it; or, if it means an unknown label, give it as unlabelled (--unlabelled)."
        )
    if len(levels) < 2:
        raise DataError(
            f"obs column {column.name!r} has {len(levels)} known labels ({listed(levels)}) in {is_known.sum():,} "
            f"cells; a classifier needs two or more. Missing labels and {unlabelled!r} count as unknown."
        )
    codes = pd.Index(levels).get_indexer(pd.Index(text)).astype(np.int32)
    codes[~is_known] = -1
    if suspects := [level for level in levels if level.strip().casefold() in _READ_AS_UNKNOWN]:
        names = [*suspects, *([unlabelled] if is_unlabelled.any() else [])]
        one, obs = names[-1], f"adata.obs[{str(column.name)!r}]"
        advice = (
            f"give unlabelled={one!r} (--unlabelled)"
            if len(names) == 1
            else f"give all of them one name, {obs} = {obs}.astype(object).replace({names[:-1]!r}, {one!r}), and "
            f"unlabelled={one!r} (--unlabelled)"
        )
        warn(
            f"obs column {column.name!r}: {listed(suspects)} ({text.isin(suspects).sum():,} cells) "
            f"{'is used as a label. If it means' if len(suspects) == 1 else 'are used as labels. If they mean'} an "
            f"unknown label, {advice}."
        )
    if (single := np.bincount(codes[is_known]) == 1).mean() > 0.5:
        warn(
            f"obs column {column.name!r}: {single.sum():,} of {len(levels):,} labels have one cell, too few to learn "
            "from. Is this a column of cell types?"
        )
    return Condition(str(column.name), levels), codes


def size_factors(obs: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Read size factors from obs, ``(cells,)``; raise a `DataError` unless all are finite and above 0."""
    if name not in obs.columns:
        raise DataError(f"obs has no column {name!r} for size factors; {columns_there_are([name], obs.columns)}")
    _check_no_missing(name, obs[name])
    factors = _numbers(name, obs[name])
    if (bad := factors <= 0).any():
        raise DataError(
            f"size factor {name!r} is {factors[bad][0]:g} in cell {obs.index[bad][0]!r} "
            f"({bad.sum():,} cells are not above 0); size factors are positive numbers."
        )
    return factors


def make_condition(name: str, column: "pd.Series[Any]") -> Condition | None:
    """Make a condition of a model that will be fitted to these cells; None if all cells have the same value.

    Floating-point numbers make a continuous condition. Text, categories, integers and booleans make a categorical one.

    Raises
    ------
    DataError
        If values are missing or not finite, or different values are the same as text.

    Examples
    --------
    >>> make_condition("batch", pd.Series(["b", "a", "b"])).levels
    ('a', 'b')
    """
    _check_no_missing(name, column, "" if pd.api.types.is_float_dtype(column) else _NA_AS_LEVEL)
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
        raise DataError(
            f"obs column {name!r} has different levels that are the same as text ({listed(levels)}); rename some."
        )
    return Condition(name, levels, embedded=len(levels) > _MOST_ONE_HOT) if len(levels) > 1 else None


def column_of(obs: pd.DataFrame, name: str) -> "pd.Series[Any]":
    """Return the column with this name; raise a `DataError` if there are several."""
    column = obs[name]
    _check_single(name, column)
    return column


def _check_single(name: str, column: "pd.Series[Any] | pd.DataFrame") -> None:
    if isinstance(column, pd.DataFrame):
        raise DataError(f"obs has {column.shape[1]} columns {name!r}; rename all but one.")


def _check_no_missing(name: str, column: "pd.Series[Any]", advice: str = "") -> None:
    _check_single(name, column)
    if (missing := column.isna()).any():
        raise DataError(
            f"obs column {name!r} has no value in {missing.sum():,} of {len(column):,} cells, "
            f"the first {column.index[missing][0]!r}. Fill it in, or drop these cells{advice}."
        )


def _numbers(name: str, column: "pd.Series[Any]") -> NDArray[np.float64]:
    try:
        values = column.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"obs column {name!r} must hold numbers: {error}") from error
    if not (finite := np.isfinite(values)).all():
        raise DataError(
            f"obs column {name!r} is not finite in {(~finite).sum():,} cells, the first {column.index[~finite][0]!r}."
        )
    return values


def _n_different(column: "pd.Series[Any]") -> int:
    """Count different values; return 0 if they cannot be compared."""
    try:
        return int(column.nunique())
    except TypeError:
        return 0
