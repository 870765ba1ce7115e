"""The contract with an AnnData: which genes in which order, which values, which conditions with which levels."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from celbo.data.checks import holds_counts
from celbo.errors import DataError, UsageError

__all__ = ["VALUES", "Condition", "Schema", "build_schema", "layer_values", "size_factors"]

VALUES = ("counts", "detected", "log_normalised", "real")
"""What the model sees: counts; 1 where a count is above 0; ``log(1 + 10,000 count / library)``; a layer of reals."""

_SHOWN = 8
"""Names listed in a message before "and N more"."""


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

    @property
    def dim(self) -> int:
        """Width of the encoded condition."""
        return 1 if self.levels is None else len(self.levels)

    def codes(self, column: "pd.Series[Any]") -> NDArray[np.float32]:
        """Number of the level, or the standardised value, ``(cells,)`` float32.

        Raises
        ------
        DataError
            If there are missing values, values that are not numbers, or levels not seen in fit.
        """
        _refuse_missing(self.name, column)
        if self.levels is None:
            return ((_numbers(self.name, column) - self.mean) / self.sd).astype(np.float32)
        codes = pd.Index(self.levels).get_indexer(column.astype(str))
        if (codes < 0).any():
            unseen = column.astype(str)[codes < 0]
            raise DataError(
                f"condition {self.name!r} has levels not seen in fit: {_listed(sorted(unseen.unique()))} "
                f"({len(unseen):,} cells; known: {_listed(self.levels)}). "
                "Refit with them, correct their spelling, or drop these cells."
            )
        return codes.astype(np.float32)

    def encode(self, column: "pd.Series[Any]") -> NDArray[np.float32]:
        """Encode a column of obs, ``(cells, dim)`` float32; raises as `codes` does."""
        codes = self.codes(column)
        return codes[:, None] if self.levels is None else np.eye(self.dim, dtype=np.float32)[codes.astype(int)]


@dataclass(frozen=True)
class Schema:
    """What a model expects of an AnnData, and how it turns one into numbers."""

    genes: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()
    layer: str | None = None
    """Layer the values come from; None for X."""
    size_factor: str | None = None
    """Column of obs used in place of the sum of counts."""
    library_scale: float = 1.0
    """What a size factor is multiplied with, so that library sizes are on the scale of counts."""
    values: str = "counts"
    """One of `VALUES`."""

    @property
    def context_dim(self) -> int:
        """Width of the encoded conditions together."""
        return sum(condition.dim for condition in self.conditions)

    def encode(self, obs: pd.DataFrame, given: Mapping[str, Any] | None = None) -> Tensor:
        """Encode the conditions of these cells.

        Parameters
        ----------
        obs
            Table of cells with a column for each condition.
        given
            Conditions set to one value for all cells, whatever ``obs`` says.

        Returns
        -------
        Tensor
            Context, ``(cells, context_dim)`` float32: conditions side by side in the schema's order.

        Raises
        ------
        DataError
            If a column is missing, or holds what fit did not see.
        UsageError
            If ``given`` names what is no condition of the model.

        Examples
        --------
        >>> schema = Schema(genes=("g",), conditions=(Condition("batch", levels=("a", "b")),))
        >>> schema.encode(pd.DataFrame({"batch": ["b", "a"]}))
        tensor([[0., 1.],
                [1., 0.]])
        >>> schema.encode(pd.DataFrame({"batch": ["b", "a"]}), given={"batch": "a"})
        tensor([[1., 0.],
                [1., 0.]])
        """
        given = given or {}
        known = [condition.name for condition in self.conditions]
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"{_listed(unknown)} is not a condition of this model; it has {_listed(known) or 'none'}.")
        if missing := [name for name in known if name not in given and name not in obs.columns]:
            raise DataError(
                f"obs has no column {_listed(missing)}, a condition of this model; it has {_listed(obs.columns)}. "
                "Add the column, or set one value for all cells."
            )
        columns = [
            condition.encode(
                pd.Series([given[condition.name]] * len(obs)) if condition.name in given else obs[condition.name]
            )
            for condition in self.conditions
        ]
        return torch.from_numpy(np.concatenate([np.empty((len(obs), 0), np.float32), *columns], axis=1))

    def codes(self, obs: pd.DataFrame) -> NDArray[np.float32]:
        """Number of the level, or the standardised value, of each condition: ``(cells, conditions)`` float32."""
        codes = [condition.codes(obs[condition.name]) for condition in self.conditions]
        return np.stack(codes, axis=1) if codes else np.empty((len(obs), 0), np.float32)

    def columns(self, var_names: pd.Index) -> NDArray[np.intp]:
        """Positions of the model's genes in an AnnData, matched by name, in the model's order.

        Raises
        ------
        DataError
            If a gene of the model is missing, or a name occurs twice.
        """
        _refuse_duplicate_genes(var_names)
        positions = var_names.get_indexer(pd.Index(self.genes))
        if (positions < 0).any():
            missing = [gene for gene, position in zip(self.genes, positions, strict=True) if position < 0]
            raise DataError(
                f"{len(missing):,} of the model's {len(self.genes):,} genes are not in these data: {_listed(missing)}; "
                f"their names look like {_listed(var_names[:3])}, the model's like {_listed(self.genes[:3])}. "
                "Give var_names the model's kind of identifier, and keep all of its genes."
            )
        return positions

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``model.json``; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Schema":
        """Read what `to_json` wrote.

        Raises
        ------
        TypeError, ValueError, KeyError
            If the document has other keys or types.
        """
        conditions = tuple(
            Condition(
                name=_typed(item["name"], str),
                levels=None if item["levels"] is None else _strings(item["levels"]),
                mean=_finite(item["mean"]),
                sd=_finite(item["sd"]),
            )
            for item in _typed(document["conditions"], list)
        )
        if any(condition.sd <= 0 for condition in conditions):
            raise ValueError("the standard deviation of a condition is not above 0")
        if document["values"] not in VALUES:
            raise ValueError(f"unknown kind of values {document['values']!r:.80}")
        return cls(
            genes=_strings(document["genes"]),
            conditions=conditions,
            layer=None if document["layer"] is None else _typed(document["layer"], str),
            size_factor=None if document["size_factor"] is None else _typed(document["size_factor"], str),
            library_scale=_finite(document["library_scale"]),
            values=document["values"],
        )


def build_schema(
    adata: AnnData,
    *,
    values: str = "counts",
    conditions: Sequence[str] = (),
    layer: str | None = None,
    size_factor: str | None = None,
) -> Schema:
    """Make the schema of a model that is to be fitted to these cells.

    A condition of floating-point numbers is continuous; anything else (text, categories, integers, booleans) is
    categorical. A condition with one level says nothing, and is left out with a warning.

    Parameters
    ----------
    adata
        The cells.
    values
        What the likelihood takes: "counts", "detected" or "real". For "real", whole numbers (in X or in a layer) are
        taken for counts and log-normalised; a named layer of other numbers is used as it is.
    conditions
        Columns of obs given to the model.
    layer
        Layer the values come from; None for X.
    size_factor
        Column of obs used in place of the sum of counts; scaled so that both have the same mean.

    Returns
    -------
    Schema

    Raises
    ------
    DataError
        If a column or layer is missing or cannot be used, or gene names occur twice.
    """
    if not (adata.n_obs and adata.n_vars):
        raise DataError(f"these data have {adata.n_obs} cells and {adata.n_vars} genes; a model needs some of both.")
    _refuse_duplicate_genes(adata.var_names)
    if isinstance(conditions, str):
        raise UsageError(f"conditions is the text {conditions!r}; give a list of columns: [{conditions!r}].")
    if missing := [name for name in conditions if name not in adata.obs.columns]:
        raise DataError(f"obs has no column {_listed(missing)}; it has {_listed(adata.obs.columns) or 'no column'}.")
    if twice := sorted({name for name in conditions if list(conditions).count(name) > 1}):
        raise DataError(f"condition {_listed(twice)} is named more than once; name it once.")
    matrix = layer_values(adata, layer)
    if values == "real" and (layer is None or holds_counts(matrix)):
        values = "log_normalised"
    library_scale = 1.0
    if size_factor is not None:
        library_scale = float(matrix.sum() / size_factors(adata.obs, size_factor).sum())
    found = []
    for name in conditions:
        found.append(_condition(name, adata.obs[name]))  # noqa: PERF401 (a comprehension would add a frame to warnings)
    return Schema(
        genes=tuple(adata.var_names.astype(str)),
        conditions=tuple(condition for condition in found if condition is not None),
        layer=layer,
        size_factor=size_factor,
        library_scale=library_scale,
        values=values,
    )


def layer_values(adata: AnnData, layer: str | None) -> Any:
    """X, or a layer, as it is stored: sparse or dense, ``(cells, genes)``."""
    if layer is None:
        if adata.X is None:
            raise DataError(f"these data have no X; name one of their layers: {_listed(adata.layers) or 'none'}.")
        return adata.X
    if layer not in adata.layers:
        raise DataError(
            f"these data have no layer {layer!r}; they have {_listed(adata.layers) or 'none'}. "
            "A model reads new cells from the layer it was fitted to."
        )
    return adata.layers[layer]


def size_factors(obs: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Read size factors from obs, ``(cells,)``: finite and above 0, or a `DataError`."""
    if name not in obs.columns:
        raise DataError(f"obs has no column {name!r} for size factors; it has {_listed(obs.columns) or 'no column'}.")
    _refuse_missing(name, obs[name])
    factors = _numbers(name, obs[name])
    if (bad := factors <= 0).any():
        raise DataError(
            f"size factor {name!r} is {factors[bad][0]:g} in cell {obs.index[bad][0]!r} "
            f"({bad.sum():,} cells are not above 0); size factors are positive numbers."
        )
    return factors


def _condition(name: str, column: "pd.Series[Any]") -> Condition | None:
    _refuse_missing(name, column)
    if pd.api.types.is_float_dtype(column):
        values = _numbers(name, column)
        if values.min() == values.max():
            return _warn_left_out(name, f"{values[0]:g}")
        return Condition(name, levels=None, mean=float(values.mean()), sd=float(values.std()))
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels = tuple(column.cat.remove_unused_categories().cat.categories.astype(str))
    else:
        levels = tuple(sorted(column.astype(str).unique()))
    if len(set(levels)) < len(levels):
        raise DataError(f"obs column {name!r} has levels that read the same as text ({_listed(levels)}); rename some.")
    return Condition(name, levels) if len(levels) > 1 else _warn_left_out(name, levels[0])


def _warn_left_out(name: str, level: str) -> Condition | None:
    warnings.warn(
        f"condition {name!r} is {level!r} in every cell: it cannot be told from the rest, and is left out", stacklevel=5
    )
    return None


def _refuse_missing(name: str, column: "pd.Series[Any]") -> None:
    if (missing := column.isna()).any():
        raise DataError(
            f"obs column {name!r} has no value in {missing.sum():,} of {len(column):,} cells, "
            f"the first {column.index[missing][0]!r}. Fill it in, or drop these cells."
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


def _refuse_duplicate_genes(var_names: pd.Index) -> None:
    if (twice := var_names[var_names.duplicated()]).size:
        raise DataError(
            f"{twice.nunique():,} gene names occur more than once: {_listed(twice.unique())}. "
            "Genes are matched by name: sum or rename them (adata.var_names_make_unique())."
        )


def _listed(names: Any) -> str:
    names = [repr(str(name)) for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.80}")
    return value


def _strings(values: Any) -> tuple[str, ...]:
    return tuple(_typed(value, str) for value in _typed(values, list))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, found {value!r:.80}")
    return float(value)
