"""Columns of obs that do not exist: the message names the one that is meant."""

import re

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import celbo


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("btch", "Did you mean 'batch'?"),
        ("Batch", "Did you mean 'batch'?"),
        ("batch,donor", r"give one column or, for options that take several, a list \['batch', 'donor'\]"),
        ("something", r"it has 'batch', 'donor'\.$"),
    ],
)
@pytest.mark.parametrize("option", ["nuisance", "labels", "mask_absent", "size_factor"])
def test_a_column_that_does_not_exist_is_refused_with_the_one_that_is_meant(option, name, says):
    obs = pd.DataFrame({"batch": ["a", "b"] * 20, "donor": ["x", "y", "z", "w"] * 10})
    cells = AnnData(np.ones((40, 5)), obs=obs.set_index(np.arange(40).astype(str)))
    model = celbo.ExpressionVAE(**{option: [name] if option == "nuisance" else name})
    (problem,) = (problem for problem in model.check(cells).problems if problem.severity == "error")
    assert re.search(says, problem.message)


def test_every_column_is_looked_for_and_one_that_is_named_already_is_not_meant():
    cells = AnnData(np.ones((4, 2)), obs=pd.DataFrame({"batch": list("abab"), "donor": list("xyzw")}, list("1234")))
    (problem,) = celbo.ExpressionVAE(nuisance=["btch", "dnor"]).check(cells).errors
    assert problem.message.endswith("Did you mean 'batch', 'donor'?")
    (problem,) = celbo.ExpressionVAE(nuisance=["batch", "batch2"]).check(cells).errors
    assert "Did you mean" not in problem.message


def test_a_column_whose_name_is_no_text_disturbs_nobody():
    cells = AnnData(np.ones((40, 5)), obs=pd.DataFrame({1: list("ab") * 20}, map(str, range(40))))
    assert not celbo.ExpressionVAE().check(cells).errors


@pytest.mark.parametrize("option", ["nuisance", "conditions"])
@pytest.mark.parametrize("ask", ["check", "fit"])
def test_a_name_that_is_no_text_is_refused_before_training(option, ask):
    """JSON of a saved model would not read it."""
    cells = AnnData(np.ones((40, 5)), obs=pd.DataFrame({1: list("ab") * 20}, map(str, range(40))))
    with pytest.raises(celbo.UsageError, match=r"has 1, which is no text; .*columns.astype\(str\)"):
        getattr(celbo.ExpressionVAE(**{option: [1]}), ask)(cells)
