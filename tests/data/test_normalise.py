"""Log-normalisation, and the fingerprint of values."""

import numpy as np
import scipy.sparse as sp

from celbo.data.fingerprint import fingerprint
from celbo.data.normalise import log_normalise
from celbo.data.stored import stored_values


def test_counts_are_scaled_to_ten_thousand_before_the_logarithm():
    x, library = np.array([[1.0, 0.0], [3.0, 1.0]]), np.array([[1.0], [4.0]])
    truth = np.log([[10_001, 1], [7501, 2501]])
    np.testing.assert_allclose(log_normalise(x, library), truth)
    np.testing.assert_allclose(log_normalise(sp.csr_matrix(x), library).toarray(), truth)


def test_a_cell_without_counts_stays_zero():
    assert not log_normalise(np.zeros((1, 3)), np.zeros((1, 1))).any()


def test_explicit_zeros_do_not_change_the_fingerprint(cells):
    cells = cells.copy()
    cells.X = sp.csr_matrix(cells.X)
    before = fingerprint(stored_values(cells, None), cells, None)
    row, column = np.argwhere(cells.X.toarray() == 0)[0]
    with_zero = cells.X.tocoo()
    parts = np.append(with_zero.data, 0), (np.append(with_zero.row, row), np.append(with_zero.col, column))
    cells.X = sp.csr_matrix(parts, shape=cells.shape)
    assert cells.X.nnz == with_zero.nnz + 1
    assert fingerprint(stored_values(cells, None), cells, None) == before
    cells.X.data[0] += 1
    assert fingerprint(stored_values(cells, None), cells, None) != before
