"""Which text names which level, and numbers that arrive as text."""

import re
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import celbo
from celbo.ask.labels import label_codes
from celbo.data.checks import check_adata
from celbo.data.conditions import as_text, level_positions

QUICK = {"latent_dim": 2, "hidden_dims": (8,), "train": celbo.TrainConfig(max_epochs=2, seed=0)}
WRITTEN = {
    "int": lambda numbers: numbers,
    "float": lambda numbers: numbers.astype(float),
    "float32": lambda numbers: numbers.astype(np.float32),
    "text": lambda numbers: numbers.astype(str),
    "text with decimals": lambda numbers: numbers.astype(float).astype(str),
    "category of text": lambda numbers: pd.Categorical(numbers.astype(float).astype(str)),
    "category of numbers": lambda numbers: pd.Categorical(numbers),
    "nullable": lambda numbers: pd.array(numbers, "Int64"),
}


@pytest.fixture(scope="module")
def numbered():
    """Cells of batches 1, 2 and 10."""
    cells = celbo.simulate_cells(n_cells=180, n_genes=30, n_types=2, median_library=200, seed=0)
    cells.obs["batch"] = np.array([1, 2, 10])[np.arange(180) % 3]
    return cells


def with_batch(cells, values):
    changed = cells.copy()
    changed.obs["batch"] = values
    return changed


def codes_of(numbers):
    """Positions of 1, 2 and 10 among the labels "1.0", "10.0", "2.0"."""
    return np.select([numbers == 1, numbers == 10], [0, 1], 2)


def fit(cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celbo.ExpressionVAE(**options, **QUICK).fit(cells)


@pytest.mark.parametrize("of_fit", ["int", "text", "category of text"])
def test_a_batch_is_known_however_its_number_is_written(numbered, of_fit, tmp_path):
    numbers = numbered.obs["batch"].to_numpy()
    model = fit(with_batch(numbered, WRITTEN[of_fit](numbers)), conditions=["batch"])
    z = model.embed(with_batch(numbered, WRITTEN[of_fit](numbers)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for write in WRITTEN.values():
            query = with_batch(numbered, write(numbers))
            np.testing.assert_array_equal(model.embed(query), z)
            assert model.map_query(query) is model
        query.write_h5ad(tmp_path / "query.h5ad")
        np.testing.assert_array_equal(model.embed(tmp_path / "query.h5ad"), z)
        expected = [
            model.expected_expression(query, given={"batch": one}) for one in (2, 2.0, np.float32(2), "2", "2.0")
        ]
    for one in expected[1:]:
        np.testing.assert_array_equal(one, expected[0])
    assert model.sample(5, conditions={"batch": 10.0}, seed=1).obs["batch"].astype(float).tolist() == [10.0] * 5
    with pytest.raises(celbo.DataError, match=r"not seen in fit: '3\.0'"):
        model.embed(with_batch(numbered, 3.0))
    mapped = model.map_query(with_batch(numbered, "3"))
    assert mapped.schema_.conditions[0].levels_of_fit == model.schema_.conditions[0].levels_of_fit
    assert mapped.map_query(with_batch(numbered, 3.0)) is mapped


def test_a_command_reads_a_batch_however_its_number_is_written(numbered, tmp_path, celbo_command):
    numbers = numbered.obs["batch"].to_numpy()
    with_batch(numbered, WRITTEN["category of text"](numbers)).write_h5ad(tmp_path / "fit.h5ad")
    with_batch(numbered, WRITTEN["float"](numbers)).write_h5ad(tmp_path / "query.h5ad")
    fit_options = ["--nuisance", "batch", "--epochs", "1", "--hidden-dim", "8"]
    assert celbo_command("fit", tmp_path / "fit.h5ad", "-o", tmp_path / "run", *fit_options).returncode == 0
    done = celbo_command("check", tmp_path / "query.h5ad", "--model", tmp_path / "run")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["ready to embed"])
    asked = ["--given", "batch=10", "-n", "3", "-o", tmp_path / "new.h5ad"]
    assert celbo_command("sample", tmp_path / "run", *asked).returncode == 0
    assert anndata.read_h5ad(tmp_path / "new.h5ad").obs["batch"].astype(str).tolist() == ["10.0"] * 3


def test_labels_and_groups_that_are_numbers_are_found(numbered):
    numbers = numbered.obs["batch"].to_numpy()
    cells = with_batch(numbered, np.where(np.arange(180) < 20, "-1.0", numbers.astype(float).astype(str)))
    model = fit(cells, labels="batch", unlabelled="-1")
    assert model.schema_.labels.levels == ("1.0", "10.0", "2.0")
    tables = [
        model.differential_expression(cells, groupby="batch", group=group, reference=reference)
        for group, reference in ((1, 2), ("1.0", "2.0"), (1.0, "2"))
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    for write in WRITTEN.values():
        np.testing.assert_array_equal(
            label_codes(model.schema_, with_batch(cells, write(numbers)).obs), codes_of(numbers)
        )
    with pytest.raises(celbo.UsageError, match="has no '3'"):
        model.differential_expression(cells, groupby="batch", group=3)


def test_levels_that_differ_only_in_how_they_are_written_stay_apart():
    levels = ("1", "1.0", "2.0", "b")
    text = as_text(pd.Series(["1", "1.0", "1.00", "2", 2, 2.0, "b", "B", None], dtype=object))
    assert level_positions(levels, text).tolist() == [0, 1, -1, 2, 2, 2, 3, -1, -1]


@pytest.mark.parametrize(
    ("level", "text"),
    [
        ("1", "01"),
        ("1", "+1"),
        ("1", "1 "),
        ("1", "1_0"),
        ("10", "1"),
        ("1", "-1"),
        ("0.1", "0.10000001"),
        ("10000000000000001", "10000000000000000"),
        ("10000000000000001", "1e+16"),
        ("nan", "0"),
        ("inf", "Infinity"),
        ("True", "1"),
        ("", "0"),
        ("1.2.3", "1.2"),
    ],
)
def test_what_is_not_the_same_number_is_another_level(level, text):
    assert level_positions([level, "other"], pd.Series([text, level])).tolist() == [-1, 0]


@given(
    levels=st.lists(
        st.sampled_from(["1", "1.0", "01", "2", "2.50", "a", "nan", "-0", "0.0", "1e2", "100"]), unique=True
    ),
    text=st.lists(st.sampled_from(["1", "1.0", "01", "2.0", "2.5", "a", "nan", "0", "100.0", "1E+2", ""]), max_size=8),
)
def test_a_level_that_is_written_the_same_always_wins(levels, text):
    positions = level_positions(levels, pd.Series(text, dtype=object))
    for one, position in zip(text, positions, strict=True):
        if one in levels:
            assert levels[position] == one
        elif position >= 0:
            assert float(levels[position]) == float(one)
            assert sum(level not in ("a", "nan", "01") and float(level) == float(one) for level in levels) == 1


def problems_of(column, n_cells=300):
    cells = anndata.AnnData(
        np.ones((n_cells, 2), np.float32),
        obs=pd.DataFrame({"column": column}, index=[f"c{at}" for at in range(n_cells)]),
        var=pd.DataFrame(index=["a", "b"]),
    )
    return check_adata(cells, conditions=["column"]).problems


@pytest.mark.parametrize(
    "column",
    [
        [f"{1001 + at % 60}.0" for at in range(300)],
        pd.Categorical([f"{1001 + at % 200}.0" for at in range(300)]),
        [f"{at}" for at in range(300)],
        [f"{0.5 * (at % 3)}" for at in range(300)],
        [f"{(at % 20) * 1e-5}" for at in range(300)],
        [f"-{at % 11}.0" for at in range(300)],
        [18 + at % 40 for at in range(300)],
    ],
)
def test_measured_numbers_that_are_text_are_told_with_the_way_back(column):
    (problem,) = problems_of(column)
    assert (problem.name, problem.severity) == ("text-numbers", "warning")
    assert "levels that read as numbers" in problem.message
    obs = pd.DataFrame({"column": column})
    way = "adata.obs['column'] = adata.obs['column'].astype(str).astype(float)"
    assert way in problem.message
    exec(way, {"adata": anndata.AnnData(obs=obs)})
    obs["column"] = obs["column"].astype(str).astype(float)
    assert all(problem.name != "text-numbers" for problem in problems_of(obs["column"].to_numpy()))


@pytest.mark.parametrize(
    "column",
    [
        [f"{1 + at % 8}" for at in range(300)],
        [f"{1 + at % 8}.0" for at in range(300)],
        [1 + at % 8 for at in range(300)],
        [f"{1001 + at % 25}" for at in range(300)],
        [f"{1001 + at % 30}" for at in range(300)],
        [f"d{at % 60}.0" for at in range(300)],
        [f"{at % 20}.0" if at else "none" for at in range(300)],
        [f"{at % 60:03}" for at in range(300)],
        [f"{at % 5},{at % 7}" for at in range(300)],
        ["1,000", "2,500", "10,000"] * 100,
        [["a", "b"][at % 2] for at in range(300)],
    ],
)
def test_names_of_groups_stay_silent(column):
    assert "text-numbers" not in [problem.name for problem in problems_of(column)]


@pytest.mark.parametrize(
    ("column", "lost"),
    [
        (["NA" if at % 50 == 0 else f"{0.5 * (at % 3)}" for at in range(300)], 6),
        (["nan" if at % 100 == 0 else f"{at % 7}.5" for at in range(300)], 3),
    ],
)
def test_missing_values_among_numbers_are_told_with_the_way_back(column, lost):
    (message,) = (problem.message for problem in problems_of(column) if problem.name == "text-numbers")
    way = re.search(r"make them numbers: (adata.obs.* = .*?)(, then fill in|\. If they)", message)[1]
    assert ("then fill in or drop the cells with" in message) == (lost > 0)
    cells = anndata.AnnData(obs=pd.DataFrame({"column": column}))
    exec(way, {"adata": cells, "pandas": pd})
    is_number = [value not in ("NA", "nan") for value in column]
    assert cells.obs["column"][is_number].tolist() == [float(value) for value in column if value not in ("NA", "nan")]
    assert cells.obs["column"].isna().sum() == lost


@pytest.mark.parametrize("name", ["gbm_panobinostat", "papalexi_thp1", "kang_ifnb", "luad_laughney", "yeast_bulk48"])
def test_columns_of_real_cells_stay_silent(real_data, name):
    cells = real_data(name)
    columns = [column for column in cells.obs.columns if column != "id"]
    problems = check_adata(cells, conditions=columns).problems
    assert "text-numbers" not in [problem.name for problem in problems]
