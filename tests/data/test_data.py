"""The contract with an AnnData: genes by name, values checked, conditions encoded, any storage the same."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from celbo import DataError, UsageError
from celbo.data.checks import check_adata
from celbo.data.read import read_adata
from celbo.data.schema import Schema
from celbo.data.sources import open_source
from celbo.minibatch import gene_moments

COUNTS = np.array([[0, 2, 1], [3, 0, 0], [0, 0, 7], [1, 5, 0]], dtype=np.float32)


def some_cells(x=COUNTS, **obs):
    n_cells, n_genes = x.shape
    names = pd.DataFrame({"batch": ["a", "b", "a", "b"][:n_cells], **obs}, index=[f"c{i}" for i in range(n_cells)])
    return anndata.AnnData(x, obs=names, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def schema_of(cells, **options):
    return check_adata(cells, **options).accept()


def dense(source, rows=None):
    cells = source.take(np.arange(source.n_cells) if rows is None else np.asarray(rows)).to("cpu")
    return cells._replace(x=cells.x.to_dense())


STORAGES = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": np.array,
    "fortran": np.asfortranarray,
    "int64 csr": lambda x: sp.csr_matrix(x.astype(np.int64)),
    "uint16 dense": lambda x: x.astype(np.uint16),
    "float16 dense": lambda x: x.astype(np.float16),
    "float64 csr": lambda x: sp.csr_matrix(x.astype(np.float64)),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_gives_the_same_counts(storage):
    cells = some_cells(STORAGES[storage](COUNTS))
    x, context, library, observed, labels = dense(open_source(cells, schema_of(cells, conditions=["batch"])))
    assert x.dtype == context.dtype == library.dtype == torch.float32
    assert observed is None
    assert labels is None
    np.testing.assert_array_equal(x, COUNTS)
    np.testing.assert_array_equal(library, COUNTS.sum(1, keepdims=True))
    np.testing.assert_array_equal(context, [[1, 0], [0, 1], [1, 0], [0, 1]])


def test_unsorted_and_duplicate_indices_are_summed_and_the_callers_array_stays():
    x = sp.csr_matrix((np.float32([1, 2, 4]), [2, 0, 2], [0, 3]), shape=(1, 3))
    cells = some_cells(sp.csr_matrix((1, 3), dtype=np.float32))
    cells.X = x
    before = cells.X.indices.copy(), cells.X.data.copy()
    np.testing.assert_array_equal(dense(open_source(cells, schema_of(cells))).x, [[2, 0, 5]])
    np.testing.assert_array_equal(cells.X.indices, before[0])
    np.testing.assert_array_equal(cells.X.data, before[1])


def test_a_view_is_read_in_its_own_order():
    cells = some_cells(sp.csr_matrix(COUNTS))
    view = cells[[3, 0], ["g1", "g0"]]
    np.testing.assert_array_equal(dense(open_source(view, schema_of(view))).x, [[5, 1], [2, 0]])


def test_rows_come_in_the_order_asked_for():
    cells = some_cells()
    np.testing.assert_array_equal(dense(open_source(cells, schema_of(cells)), [3, 1, 3]).x, COUNTS[[3, 1, 3]])


def test_minibatches_stay_sparse_until_they_are_moved():
    cells = some_cells()
    assert open_source(cells, schema_of(cells)).take(np.array([0, 1])).x.layout == torch.sparse_csr


def test_genes_are_aligned_by_name_and_others_ignored():
    cells = some_cells()
    schema = schema_of(cells[:, ["g2", "g0"]])
    source = open_source(cells, schema)
    np.testing.assert_array_equal(dense(source).x, COUNTS[:, [2, 0]])
    np.testing.assert_array_equal(dense(source).library[:, 0], COUNTS[:, [2, 0]].sum(1))


def test_missing_genes_are_counted_and_named():
    cells = some_cells()
    with pytest.raises(DataError, match=r"1 of the model's 3 genes.*'g1'"):
        open_source(cells[:, ["g0", "g2"]], schema_of(cells))


def test_genes_that_occur_twice_are_refused_in_fit_and_query():
    cells, twice = some_cells(), some_cells()
    twice.var_names = ["g0", "g1", "g1"]
    with pytest.raises(DataError, match=r"more than once: 'g1'.*var_names_make_unique"):
        schema_of(twice)
    with pytest.raises(DataError, match="more than once"):
        open_source(twice, schema_of(cells))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"X is 0.5 in cell 'c1' \(row 1\), gene 'g0'; 1 of 6 stored values are not whole"),
        (-2.0, r"X is -2 in cell 'c1' \(row 1\), gene 'g0'; 1 of 6 stored values are negative"),
        (np.nan, r"X is nan in cell 'c1' \(row 1\), gene 'g0'; 1 of 6 stored values are not finite"),
        (np.inf, r"X is inf in cell 'c1'"),
    ],
)
@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_a_value_that_is_no_count_is_refused_with_its_place(value, message, storage):
    x = np.array([[0, 2, 1], [value, 0, 0], [0, 0, 0], [1, 5, 4]])
    cells = some_cells(STORAGES[storage](x))
    with pytest.raises(DataError, match=message):
        open_source(cells, schema_of(cells))


def test_a_layer_with_counts_is_suggested():
    cells = some_cells(COUNTS / 3)
    cells.layers["counts"] = sp.csr_matrix(COUNTS)
    with pytest.raises(DataError, match=r"layers\['counts'\] holds whole numbers: use layer='counts'"):
        open_source(cells, schema_of(cells))


def test_a_layer_is_read_by_name():
    cells = some_cells(COUNTS / 3)
    cells.layers["counts"] = sp.csc_matrix(COUNTS)
    np.testing.assert_array_equal(dense(open_source(cells, schema_of(cells, layer="counts"))).x, COUNTS)
    with pytest.raises(DataError, match="no layer 'raw'; they have 'counts'"):
        schema_of(cells, layer="raw")


def test_gaussian_values_are_log_normalised_counts():
    cells = some_cells()
    source = open_source(cells, schema_of(cells, values="real"))
    library = np.maximum(COUNTS.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(dense(source).x, np.log1p(COUNTS / library * 1e4), rtol=1e-6)
    np.testing.assert_array_equal(source.library, COUNTS.sum(1))


def test_a_named_layer_of_reals_is_taken_as_it_is_and_x_is_not():
    reals = np.array([[-1.5, 0, 2], [0.25, 1, 0], [0, 0, 0], [3, -2, 1]])
    cells = some_cells(reals)
    cells.layers["scaled"] = reals
    np.testing.assert_allclose(dense(open_source(cells, schema_of(cells, values="real", layer="scaled"))).x, reals)
    with pytest.raises(DataError, match=r"X is -1\.5"):
        open_source(cells, schema_of(cells, values="real"))


def test_detection_is_zero_or_one():
    cells = some_cells()
    np.testing.assert_array_equal(dense(open_source(cells, schema_of(cells, values="detected"))).x, COUNTS > 0)


def test_size_factors_replace_the_sum_of_counts_on_the_scale_of_counts():
    factors = np.array([1.0, 0.5, 0.5, 2.0])
    cells = some_cells(size_factor=factors)
    schema = schema_of(cells, size_factor="size_factor")
    source = open_source(cells, schema)
    np.testing.assert_allclose(source.library, factors * COUNTS.sum() / factors.sum())
    query = some_cells(size_factor=np.full(4, 2.0))
    np.testing.assert_allclose(open_source(query, schema).library, 2 * COUNTS.sum() / factors.sum())


@pytest.mark.parametrize(("bad", "message"), [(0.0, "not above 0"), (np.nan, "no value in 1 of 4"), (np.inf, "finite")])
def test_size_factors_that_are_no_factors_are_refused(bad, message):
    cells = some_cells(size_factor=[1.0, bad, 1.0, 1.0])
    with pytest.raises(DataError, match=message):
        schema_of(cells, size_factor="size_factor")


def test_conditions_are_one_hot_or_standardised_side_by_side():
    cells = some_cells(dose=[0.0, 1.0, 2.0, 3.0], run=[7, 7, 9, 9])
    schema = schema_of(cells, conditions=["batch", "dose", "run"])
    assert [condition.levels for condition in schema.conditions] == [("a", "b"), None, ("7", "9")]
    assert schema.context_dim == 5
    context = schema.encode(cells.obs)
    np.testing.assert_array_equal(context[:, :2], [[1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_allclose(context[:, 2], (np.arange(4) - 1.5) / np.arange(4).std(), rtol=1e-6)
    np.testing.assert_array_equal(context[:, 3:], [[1, 0], [1, 0], [0, 1], [0, 1]])


def test_categories_keep_their_order_and_unused_ones_are_dropped():
    cells = some_cells(stim=pd.Categorical(["late", "early", "late", "early"], categories=["late", "never", "early"]))
    assert schema_of(cells, conditions=["stim"]).conditions[0].levels == ("late", "early")


def test_the_order_of_a_querys_categories_does_not_matter():
    schema = schema_of(some_cells(), conditions=["batch"])
    column = pd.Categorical(["b", "a", "b", "b"], categories=["z", "b", "a"])
    np.testing.assert_array_equal(schema.encode(pd.DataFrame({"batch": column}))[:, 1], [1, 0, 1, 1])


def test_given_conditions_overrule_obs():
    schema = schema_of(some_cells(), conditions=["batch"])
    np.testing.assert_array_equal(schema.encode(some_cells().obs, given={"batch": "b"}), [[0, 1]] * 4)
    with pytest.raises(UsageError, match="'treatment' is not a condition of this model; it has 'batch'"):
        schema.encode(some_cells().obs, given={"treatment": "b"})


def test_unseen_levels_are_all_named_and_counted():
    schema = schema_of(some_cells(), conditions=["batch"])
    with pytest.raises(DataError, match=r"not seen in fit: 'x', 'y' \(3 cells; known: 'a', 'b'\)"):
        schema.encode(pd.DataFrame({"batch": ["x", "y", "x", "a"]}))


def test_missing_values_and_columns_are_refused_in_words():
    cells = some_cells(batch=["a", None, "b", "b"])
    with pytest.raises(DataError, match=r"'batch' has no value in 1 of 4 cells, the first 'c1'"):
        schema_of(cells, conditions=["batch"])
    with pytest.raises(DataError, match="no column 'stim', 'dose'; it has 'batch'"):
        schema_of(some_cells(), conditions=["stim", "dose"])
    with pytest.raises(DataError, match="no column 'batch', a condition of this model"):
        schema_of(some_cells(), conditions=["batch"]).encode(pd.DataFrame(index=range(4)))


def test_a_condition_with_one_level_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="'batch' is 'a' in every cell"):
        schema = schema_of(some_cells(batch="a"), conditions=["batch"])
    assert schema.conditions == ()
    assert schema.context_dim == 0


def test_a_schema_survives_json():
    cells = some_cells(dose=[0.0, 1.0, 2.0, 3.0])
    schema = schema_of(cells, conditions=["batch", "dose"])
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    mapped = schema.with_levels_of(some_cells(batch="new", dose=[0.0, 1.0, 2.0, 3.0]).obs)
    assert Schema.from_json(json.loads(json.dumps(mapped.to_json()))) == mapped
    assert mapped.conditions[0].levels_of_fit == schema.conditions[0].levels


@pytest.mark.parametrize(
    "forged", [{"n_mapped": 2}, {"n_mapped": -1}, {"n_mapped": 1.0}, {"seen": [3.0, 1.0]}, {"levels": []}]
)
def test_a_forged_schema_is_refused(forged):
    document = schema_of(some_cells(), conditions=["batch"]).to_json()
    document["conditions"] = [{**json.loads(json.dumps(document["conditions"][0])), **forged}]
    document["genes"] = list(document["genes"])
    with pytest.raises((TypeError, ValueError)):
        Schema.from_json(document)


@pytest.mark.parametrize("write", ["write_h5ad", "write_zarr"])
def test_files_are_read_by_their_kind(tmp_path, write):
    cells = some_cells(sp.csr_matrix(COUNTS))
    path = tmp_path / ("cells.zarr" if write == "write_zarr" else "cells with spaces.h5ad")
    getattr(cells, write)(path)
    np.testing.assert_array_equal(read_adata(path).X.toarray(), COUNTS)


def test_files_that_are_not_there_or_no_anndata_are_refused_in_words(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_adata(tmp_path / "none.h5ad")
    (tmp_path / "text.h5ad").write_text("not counts")
    with pytest.raises(DataError, match=r"text.h5ad is no AnnData: it is a text file"):
        read_adata(tmp_path / "text.h5ad")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DataError, match=r"empty.zarr is an empty folder"):
        read_adata(tmp_path / "empty.zarr")


def test_backed_files_are_read(tmp_path):
    some_cells(sp.csr_matrix(COUNTS)).write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(dense(open_source(backed, schema_of(backed))).x, COUNTS)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_to_fit_is_said(shape):
    with pytest.raises(DataError, match="a model needs both"):
        schema_of(anndata.AnnData(np.zeros(shape, np.float32)))


def test_moments_are_sums_over_the_chosen_cells_whatever_the_chunk():
    cells = some_cells(sp.csr_matrix(COUNTS))
    rows = np.array([3, 0, 1])
    moments = gene_moments(open_source(cells, schema_of(cells)), rows, chunk=2)
    x, library = COUNTS[rows], COUNTS[rows].sum(1)
    assert moments.n_cells == 3
    np.testing.assert_allclose(moments.x, x.sum(0))
    np.testing.assert_allclose(moments.x_squared, (x**2).sum(0))
    np.testing.assert_allclose(moments.x_library, (x * library[:, None]).sum(0))
    np.testing.assert_allclose(moments.detected, (x > 0).sum(0))
    np.testing.assert_allclose([moments.library, moments.library_squared], [library.sum(), (library**2).sum()])


@pytest.mark.parametrize("n_cells", [3, 60, 200])
@pytest.mark.parametrize("value", [0.1, 0.3, 37.2])
def test_a_constant_number_is_no_condition_whatever_rounding_says(n_cells, value):
    cells = anndata.AnnData(np.ones((n_cells, 2), np.float32), obs=pd.DataFrame({"dose": np.full(n_cells, value)}))
    with pytest.warns(UserWarning, match="'dose' is"):
        assert schema_of(cells, conditions=["dose"]).conditions == ()


def test_levels_that_read_the_same_are_refused():
    with pytest.raises(DataError, match="are the same as text"):
        schema_of(some_cells(mixed=pd.Categorical([1, "1", 1, "1"])), conditions=["mixed"])


def test_no_cells_are_refused_in_a_query_too():
    with pytest.raises(DataError, match="no cells"):
        open_source(some_cells()[:0], schema_of(some_cells()))


def test_levels_that_are_tuples_are_read_as_text():
    cells = anndata.AnnData(
        COUNTS, obs=pd.DataFrame({"pair": pd.Categorical([("a", 1), ("b", 2), ("a", 1), ("b", 2)])})
    )
    schema = check_adata(cells, conditions=["pair"]).accept()
    assert schema.conditions[0].levels == ("('a', 1)", "('b', 2)")
    np.testing.assert_array_equal(schema.encode(cells.obs), [[1, 0], [0, 1], [1, 0], [0, 1]])


def test_duplicates_of_small_integers_are_summed_without_overflow():
    parts = (np.array([200, 100], np.uint8), np.array([0, 0]), np.array([0, 2, 2]))
    cells = anndata.AnnData(sp.csr_matrix(parts, shape=(2, 2)))
    source = open_source(cells, schema_of(cells))
    np.testing.assert_array_equal(dense(source).x, [[300, 0], [0, 0]])


def test_numbers_and_texts_that_read_the_same_are_refused():
    cells = anndata.AnnData(COUNTS)
    cells.obs["batch"] = pd.Series([1, "1", 2, 2], index=cells.obs_names, dtype=object)
    with pytest.raises(DataError, match="are the same as text"):
        check_adata(cells, conditions=["batch"]).accept()


def test_a_hint_that_cannot_be_read_hides_nothing(tmp_path):
    cells = anndata.AnnData(COUNTS / 3, layers={"odd": COUNTS.astype(complex), "raw": COUNTS})
    with pytest.raises(DataError, match=r"not whole.*--layer raw"):
        check_adata(cells).accept()
    for path in (tmp_path / "cells.zarr", tmp_path / "cells.h5ad"):
        logged = anndata.AnnData(np.log1p(COUNTS), layers={"raw": COUNTS})
        getattr(logged, f"write_{path.suffix[1:]}")(path)
        with pytest.raises(DataError, match="--layer raw"):
            check_adata(read_adata(path)).accept()
        read, moved = read_adata(path), path.rename(path.with_stem("moved"))
        assert moved.exists()
        with pytest.raises(DataError, match="not whole"):
            check_adata(read).accept()


@pytest.mark.parametrize("options", [{"unseen": "refused"}, {"genes_present": 7}, {"genes_present": 0.0}])
def test_words_and_shares_that_mean_nothing_are_refused(options):
    cells = anndata.AnnData(COUNTS)
    with pytest.raises(UsageError, match=r"choose one of refuse, nearest, marginal|give a share"):
        open_source(cells, schema_of(cells), **options)
