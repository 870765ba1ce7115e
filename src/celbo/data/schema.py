"""Describe what a model expects of an AnnData: the genes in order, the kind of values, and the conditions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from celbo.data.absent import Absent
from celbo.data.conditions import Condition, as_text, column_of
from celbo.data.matching import match_genes
from celbo.errors import DataError, UsageError, columns_there_are, listed

__all__ = ["MOST_COMBINATIONS", "VALUES", "Schema"]

MOST_COMBINATIONS = 100
"""Largest number of combinations of levels over which celbo averages decoded means."""

VALUES = ("counts", "pseudo_counts", "detected", "log_normalised", "real")
"""Kinds of values that a model takes: counts; estimated counts, which need not be whole; 1 if a count is above 0;
``log(1 + 10,000 count / library)``; a layer of real numbers."""


@dataclass(frozen=True)
class Schema:
    """Genes, conditions and kind of values that a model expects of an AnnData, and the encoding of conditions."""

    genes: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()
    layer: str | None = None
    """Layer with the values; None for X."""
    size_factor: str | None = None
    """Column of obs that replaces the sum of counts."""
    library_scale: float = 1.0
    """Factor that scales size factors to counts."""
    values: str = "counts"
    """One of `VALUES`."""
    selection: str | None = None
    """How the genes were chosen, as text; None if all features of the data are modelled."""
    features: str | None = None
    """Type of the modelled features in var; None if the data did not say."""
    labels: Condition | None = None
    """Labels that the classifier predicts."""
    absent: Absent | None = None
    """Genes that were not measured in cells of some levels of a column."""

    def __repr__(self) -> str:
        """Show the number of genes, the conditions with their levels, and the kind of values."""
        conditions = [
            f"{condition.name} ({'continuous' if condition.levels is None else f'{len(condition.levels):,} levels'})"
            for condition in (*self.conditions, *([] if self.labels is None else [self.labels]))
        ]
        place = "X" if self.layer is None else f"layers[{self.layer!r}]"
        absent = [] if self.absent is None else [f"genes masked by {self.absent.column}"]
        parts = [f"{len(self.genes):,} genes", *conditions, *absent]
        return f"Schema({', '.join(parts)}; {self.values} of {place})"

    @property
    def context_dim(self) -> int:
        """Return the total width of the encoded conditions."""
        return sum(condition.dim for condition in self.conditions)

    def encode(self, obs: pd.DataFrame, given: Mapping[str, Any] | None = None, *, unseen: str = "refuse") -> Tensor:
        """Encode the conditions of these cells.

        Parameters
        ----------
        obs
            Table of cells with a column for each condition.
        given
            Conditions with one value for all cells, which replaces the column of ``obs``.
        unseen
            How to read levels not seen in fit, one of `celbo.data.conditions.UNSEEN`.

        Returns
        -------
        Tensor
            Context, ``(cells, context_dim)`` float32: conditions side by side in the schema's order.

        Raises
        ------
        DataError
            If a column is missing, or has values that the condition cannot encode.
        UsageError
            If ``given`` names a condition that the model does not have.

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
        return self.expand(self.codes(obs, given, unseen=unseen))

    @property
    def context_columns(self) -> list[slice]:
        """Return the columns of the context that belong to each condition."""
        ends = np.cumsum([0, *(condition.dim for condition in self.conditions)])
        return [slice(int(start), int(end)) for start, end in pairwise(ends)]

    def codes(
        self, obs: pd.DataFrame, given: Mapping[str, Any] | None = None, *, unseen: str = "refuse"
    ) -> NDArray[np.float32]:
        """Return the position of the level, or the standardised value: ``(cells, conditions)`` float32.

        Parameters and errors are those of `encode`, which expands the result.
        """
        given = given or {}
        if not isinstance(given, Mapping):
            raise UsageError(f"conditions are given as {given!r}; give each its value: {{'treatment': 'treated'}}.")
        known = [condition.name for condition in self.conditions]
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"{listed(unknown)} is not a condition of this model; it has {listed(known) or 'none'}.")
        if several := _lists(given):
            raise UsageError(
                f"{listed(several)} is given a list of values; give one value, the same for all cells. For several "
                "values, ask once for each."
            )
        if empty := [name for name, value in given.items() if pd.isna(value)]:
            raise UsageError(f"{listed(empty)} is given no value; give a level, or leave it out.")
        if missing := [name for name in known if name not in given and name not in obs.columns]:
            known_columns = columns_there_are(missing, obs.columns)
            raise DataError(
                f"obs has no column {listed(missing)}, a condition of this model; {known_columns} "
                "Add the column, or set one value for all cells."
            )
        columns = [
            np.full(len(obs), condition.code(given[condition.name]), np.float32)
            if condition.name in given
            else condition.codes(obs[condition.name], unseen)
            for condition in self.conditions
        ]
        return np.stack(columns, axis=1) if columns else np.empty((len(obs), 0), np.float32)

    def expand(self, codes: NDArray[np.float32]) -> Tensor:
        """Expand the result of `codes` to the context, ``(cells, context_dim)`` float32."""
        columns = [condition.expand(column) for condition, column in zip(self.conditions, codes.T, strict=True)]
        return torch.from_numpy(np.concatenate([np.empty((len(codes), 0), np.float32), *columns], axis=1))

    def pairs(self, interactions: Sequence[str]) -> list[tuple[slice, slice]]:
        """Return the columns of the context for the two conditions of each interaction "one:other".

        Raises
        ------
        UsageError
            If an interaction is not two conditions of the model, is repeated, or has a condition that is embedded.

        Examples
        --------
        >>> two = tuple(Condition(name, levels=("a", "b")) for name in ("batch", "treatment"))
        >>> Schema(genes=("g",), conditions=two).pairs(["batch:treatment"])
        [(slice(0, 2, None), slice(2, 4, None))]
        """
        columns = {
            condition.name: its_columns
            for condition, its_columns in zip(self.conditions, self.context_columns, strict=True)
        }
        if isinstance(interactions, str):
            raise UsageError(f"interactions is the text {interactions!r}; give a list of them: [{interactions!r}].")
        known, pairs = {f"{one}:{other}": (one, other) for one, other in permutations(columns, 2)}, []
        many = {condition.name for condition in self.conditions if condition.embedded}
        for text in interactions:
            if text not in known:
                raise UsageError(
                    f"interaction {text!r} is not two conditions of this model joined by a colon, as "
                    f"'batch:treatment'; it has {listed(columns) or 'none'} (one with a single level is none)."
                )
            if embedded := many.intersection(known[text]):
                raise UsageError(
                    f"interaction {text!r}: {listed(embedded)} has too many levels to learn their combinations. Leave "
                    "it out, or merge levels."
                )
            one, other = known[text]
            if (pair := (columns[one], columns[other])) in pairs or pair[::-1] in pairs:
                raise UsageError(f"interaction {text!r} is named twice (the order does not matter); name it once.")
            pairs.append(pair)
        return pairs

    def columns(self, var_names: pd.Index) -> NDArray[np.intp]:
        """Return the positions of the model's genes among these names, in the model's order; -1 for a missing gene."""
        return match_genes(self.genes, var_names)

    def combinations(self, given: Mapping[str, Any], over: Sequence[str]) -> list[dict[str, Any]]:
        """Combine ``given`` with all levels of fit of the conditions of ``over``; at most 100 combinations.

        Raises
        ------
        UsageError
            If a name in ``over`` is no categorical condition or is in ``given``, or there are more combinations.

        Examples
        --------
        >>> two = tuple(Condition(name, levels=("a", "b")) for name in ("batch", "donor"))
        >>> Schema(genes=("g",), conditions=two).combinations({"donor": "b"}, ["batch"])
        [{'donor': 'b', 'batch': 'a'}, {'donor': 'b', 'batch': 'b'}]
        """
        if not isinstance(given, Mapping):
            raise UsageError(f"given={given!r}; give each condition its value: {{'batch': 'A'}}.")
        if several := _lists(given):
            raise UsageError(
                f"{listed(several)} is given a list of values; give one value. over={several!r} takes the mean over "
                "all levels; for a mean over some of them, ask once for each and take the mean of the answers."
            )
        if isinstance(over, str):
            raise UsageError(f"over is the text {over!r}; give a list of conditions: [{over!r}].")
        levels = {condition.name: condition.levels_of_fit for condition in self.conditions}
        is_list = isinstance(over, Iterable) and not isinstance(over, str)
        over = list(over) if is_list else over
        if not is_list or any(not levels.get(name) or name in given for name in over):
            raise UsageError(
                f"over={over!r}: give a list of categorical conditions that are not given already (one level: given); "
                f"the model has {listed(name for name, known in levels.items() if known) or 'none'}."
            )
        combinations = list(product(*(levels[name] for name in over)))
        if len(combinations) > MOST_COMBINATIONS:
            raise UsageError(
                f"over={list(over)!r} has {len(combinations):,} combinations of levels; at most {MOST_COMBINATIONS} "
                "can be averaged. Give one of them instead."
            )
        return [{**given, **dict(zip(over, levels, strict=True))} for levels in combinations]

    def with_genes(self, positions: NDArray[np.intp], selection: str) -> "Schema":
        """Keep the genes at these positions; ``selection`` describes how they were chosen."""
        return replace(self, genes=tuple(self.genes[position] for position in positions), selection=selection)

    def with_levels_of(self, obs: pd.DataFrame) -> "Schema":
        """Append the levels of these cells that the schema does not have.

        Examples
        --------
        >>> schema = Schema(genes=("g",), conditions=(Condition("batch", levels=("b", "a")),))
        >>> schema.with_levels_of(pd.DataFrame({"batch": ["c", "a"]})).conditions[0].levels
        ('b', 'a', 'c')
        """
        conditions = []
        for condition in self.conditions:
            known = condition.levels
            if known is not None and condition.name in obs.columns:
                column = column_of(obs, condition.name)
                new = sorted(as_text(column[~condition.is_known(column)]).unique())
                condition = replace(condition, levels=(*known, *new), n_mapped=condition.n_mapped + len(new))
            conditions.append(condition)
        return replace(self, conditions=tuple(conditions))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``model.json``, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Schema":
        """Make a schema from the result of `to_json`.

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
                embedded=_typed(item.get("embedded", False), bool),
                nuisance=_typed(item.get("nuisance", False), bool),
                n_mapped=_typed(item.get("n_mapped", 0), int),
                seen=None if item.get("seen") is None else _range(item["seen"]),
            )
            for item in _typed(document["conditions"], list)
        )
        for condition in conditions:
            n_levels = 1 if condition.levels is None else len(condition.levels)
            if not 0 <= condition.n_mapped < n_levels:
                raise ValueError(f"{condition.n_mapped} of the {n_levels} levels of {condition.name!r:.80} are mapped")
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
            selection=None if document.get("selection") is None else _typed(document["selection"], str),
            features=None if document.get("features") is None else _typed(document["features"], str),
            labels=None
            if document.get("labels") is None
            else Condition(_typed(document["labels"]["name"], str), _strings(document["labels"]["levels"])),
            absent=None if document.get("absent") is None else _absent(document["absent"]),
        )


def _lists(given: Mapping[str, Any]) -> list[str]:
    """Names that are given a list of values."""
    return [name for name, value in given.items() if pd.api.types.is_list_like(value)]


def _absent(document: Any) -> Absent:
    pairs = [(_typed(level, str), _strings(genes)) for level, genes in _typed(document["genes"], list)]
    return Absent(_typed(document["column"], str), tuple(pairs))


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.80}")
    return value


def _strings(values: Any) -> tuple[str, ...]:
    return tuple(_typed(value, str) for value in _typed(values, list))


def _range(values: Any) -> tuple[float, float]:
    low, high = map(_finite, _typed(values, list))
    if low > high:
        raise ValueError(f"the range from {low:g} to {high:g} is empty")
    return low, high


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, found {value!r:.80}")
    return float(value)
