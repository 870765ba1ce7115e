"""Groups of cells, as a column of obs or as a value for each cell."""

import numpy as np
import pandas as pd
import pytest

from celbo.data.groups import grouping, is_column
from celbo.errors import UsageError

OBS = pd.DataFrame(
    {"type": pd.Categorical(["B", "T", "B", "NK"]), "batch": ["a", "b", "a", "b"]}, index=["c1", "c2", "c3", "c4"]
)
VALUES = ["B", "T", "B", "NK"]


@pytest.mark.parametrize(
    "given",
    [
        "type",
        VALUES,
        tuple(VALUES),
        np.array(VALUES),
        np.array(VALUES, object),
        pd.Categorical(VALUES),
        pd.Index(VALUES),
        pd.array(VALUES, dtype="string"),
        (value for value in VALUES),
        OBS["type"],
        OBS["type"].iloc[::-1],
        pd.Series([*VALUES, "B"], index=[*OBS.index, "another cell"]),
        pd.Series(VALUES),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_form_of_the_same_groups_is_the_same(given):
    groups = grouping("groupby", given, OBS)
    assert groups.astype(str).tolist() == VALUES
    assert groups.index.equals(OBS.index)


@pytest.mark.parametrize(
    "mask", [[True, False, True, False], np.array([True, False, True, False]), OBS["type"] == "B"], ids=type
)
def test_a_mask_makes_two_groups(mask):
    groups = grouping("groupby", mask, OBS)
    assert groups.tolist() == [True, False, True, False]
    assert groups.name is not None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nothing", "groupby='nothing' is no column of obs; it has 'type', 'batch'"),
        (3, "groupby=3 is no column of obs"),
        (VALUES[:3], "3 values for 4 cells"),
        (np.ones(5, bool), "5 values for 4 cells"),
        (["type"], "names of columns of obs: give one name"),
        (["type", "batch"], "names of columns of obs: give one name"),
        (OBS["type"].iloc[:3], "3 values for 4 cells, and its index has the names of 3 of them"),
        (pd.Series(VALUES, index=["x1", "x2", "x3", "c4"]), "the names of 1 of them"),
        (pd.Series(VALUES, index=["c1", "c1", "c2", "c3"]), "some twice"),
        (pd.Series(VALUES, index=[3, 2, 1, 0]), "the names of 0 of them"),
        (OBS, "table of 2 dimensions"),
        (np.ones((4, 1)), "table of 2 dimensions"),
        ({"c1": "B"}, "groupby is a dict"),
        ({"B"}, "groupby is a set"),
    ],
    ids=str,
)
def test_what_is_not_a_value_for_each_cell_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        grouping("groupby", given, OBS)


def test_a_column_given_as_its_values_is_known_as_this_column():
    other = OBS["type"].astype(str).replace("T", "B")
    for given, is_one in [("type", True), (OBS["type"], True), (OBS["type"].iloc[::-1], True), (other, False)]:
        assert is_column(given, grouping("groupby", given, OBS), OBS) is is_one
    assert not is_column(VALUES, grouping("groupby", VALUES, OBS), OBS)
