"""Sets of cells to compare: the groups, what each is compared with, and whether they share levels of the nuisances."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celbo.data.conditions import as_text, level_positions, text_or_none
from celbo.errors import DataError, UsageError, listed, warn

__all__ = ["FEWEST", "group_cells", "group_named", "warn_of_confounding"]

FEWEST = 2
"""Smallest number of cells of a group."""
Pairs = list[tuple[list[int], list[int]]]
"""Sets on one side of a comparison and on the other, for each pair."""


def group_named(labels: "pd.Series[Any]", name: object) -> str:
    """Return the group with this name as the labels write it, or the name itself if there is no such group."""
    groups = as_text(labels).unique()
    position = level_positions(groups, as_text(pd.Series([name])))[0]
    return str(name) if position < 0 else str(groups[position])


def group_cells(
    labels: "pd.Series[Any]", levels: "pd.Series[Any] | None", group: str | None, reference: str | None
) -> tuple[NDArray[np.intp], list[str], list[Pairs]]:
    """Number the sets of cells, one for each group and each level within which groups are compared.

    Parameters
    ----------
    labels
        The group of each cell. Its name is what messages call it.
    levels
        Level of each cell, such as its donor, within which groups are compared; None for all cells together.
    group, reference
        As `celbo.ExpressionVAE.differential_expression` takes them.

    Returns
    -------
    tuple
        The number of each cell's set, -1 where a value is missing; the groups to compare; for each of them the pairs
        of sets that `fold_changes` takes.

    Raises
    ------
    UsageError
        If groups are not there, or have too few cells to be compared.
    """
    groupby, is_number = labels.name, pd.api.types.is_float_dtype(labels)
    labels = text_or_none(labels)
    sizes = labels.value_counts()
    if unknown := [name for name in (group, reference) if name is not None and name not in sizes]:
        raise UsageError(f"{groupby!r} has no {listed(unknown)}; it has {listed(sorted(sizes.index))}.")
    if group is not None and group == reference:
        raise UsageError(f"group and reference are both {group!r}; give two groups, or leave the reference out.")
    if is_number:
        raise UsageError(f"{groupby!r} holds floating-point numbers, which are no groups; cut it into some.")
    if n_missing := int(labels.isna().sum()):
        warn(f"{n_missing:,} cells have no {groupby!r}, and are left out.")
    if not len(sizes):
        raise DataError(f"no cell has a {groupby!r}: there is nothing to compare.")
    if len(sizes) < 2:
        raise UsageError(f"{groupby!r} has a single group, {listed(sizes.index)}: there is nothing to compare it with.")
    if few := [name for name in (group, reference) if name is not None and sizes[name] < FEWEST]:
        raise UsageError(f"{listed(few)} has fewer than {FEWEST} cells, too few to compare.")
    wanted = [group] if group is not None else sorted(name for name in sizes.index if name != reference)
    groups = [name for name in wanted if sizes[name] >= FEWEST]
    if few := sorted(set(wanted) - set(groups)):
        warn(f"groups of one cell are left out: {listed(few)}.")
    if not groups:
        raise UsageError(
            f"none of the {len(sizes):,} groups of {groupby!r} has {FEWEST} cells; group by a coarser column."
        )
    both = pd.DataFrame({"level": "" if levels is None else text_or_none(levels), "group": labels})
    numbered = both.groupby(["level", "group"], sort=True)
    sets = numbered.ngroup().to_numpy()
    sets = np.where(both.notna().all(axis=1), sets, -1).astype(np.intp)
    of_sets = {key: int(number) for number, key in enumerate(numbered.size().index)}
    enough = {key for key, n in numbered.size().items() if n >= FEWEST}
    comparisons, unpaired = [], []
    for one in groups:
        pairs = []
        for level in dict.fromkeys(level for level, _ in of_sets):
            others = [name for at, name in of_sets if at == level and name != one and reference in (None, name)]
            if (level, one) in enough and any((level, name) in enough for name in others):
                pairs.append(([of_sets[level, one]], [of_sets[level, name] for name in others]))
        if pairs:
            comparisons.append(pairs)
        else:
            unpaired.append(one)
    within = "" if levels is None else f", or none, in each level of {levels.name!r}"
    few_left = f"{listed(unpaired)}, or what it is compared with, has a single cell{within}"
    if not comparisons:
        raise UsageError(f"{few_left}.")
    if unpaired:
        warn(f"{few_left}, and is left out.")
    return sets, [name for name in groups if name not in unpaired], comparisons


def warn_of_confounding(
    nuisances: Mapping[str, NDArray[np.integer[Any]]],
    sets: NDArray[np.intp],
    names: Sequence[str],
    comparisons: Sequence[Pairs],
    *,
    reference: str | None,
    within: str | None = None,
) -> None:
    """Warn about groups that share no level of a nuisance with what they are compared with.

    Parameters
    ----------
    nuisances
        Number of each cell's level, by the name of the nuisance.
    sets, names, comparisons
        As `group_cells` returns them.
    reference
        What the groups are compared with; None for all other cells.
    within
        Name of the levels within which groups are compared; None if they are not.
    """
    for nuisance, levels in nuisances.items():
        seen = np.zeros((int(sets.max()) + 1, int(levels.max()) + 1), bool)
        seen[sets[sets >= 0], levels[sets >= 0]] = True
        apart = [
            name
            for name, pairs in zip(names, comparisons, strict=True)
            if not any((seen[one].any(0) & seen[other].any(0)).any() for one, other in pairs)
        ]
        if not apart:
            continue
        pronoun = "it is" if len(apart) == 1 else "they are"
        against = f"the cells {pronoun} compared with" if reference is None else repr(reference)
        who = f"group {apart[0]!r} shares" if len(apart) == 1 else f"groups {listed(apart)} share"
        at = "" if within is None else f" within a level of {within!r}"
        warn(
            f"{who} no level of the nuisance {nuisance!r} with {against}{at}. All of the "
            f"difference may come from {nuisance!r}, so nothing can be told about genes that differ. Compare groups "
            f"that have cells in the same level of {nuisance!r}. If each group has several levels, you can instead add "
            "up the counts of each level (celbo.pseudobulk) and compare the sums."
        )
