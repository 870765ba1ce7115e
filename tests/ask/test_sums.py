"""Sums of rows that arrive in pieces are those of torch, to the bit."""

import pytest
import torch

from celbo.ask.sums import RowSum


def spread(n_rows, n_columns):
    """Numbers of very different sizes, so that every other order of the sum has other bits."""
    generator = torch.Generator().manual_seed(n_rows + n_columns)
    return torch.rand(n_rows, n_columns, generator=generator) * (9 * torch.rand(n_columns, generator=generator)).exp()


@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 17, 64, 256, 257, 3200, 5000])
@pytest.mark.parametrize("n_columns", [1, 3, 31, 64, 100, 127, 128, 1001])
def test_pieces_have_the_sum_of_the_whole(n_rows, n_columns):
    rows = spread(n_rows, n_columns)
    for size in (1 if n_rows < 300 else 10, 7, 16, 50, 64, n_rows):
        total = RowSum(n_rows, n_columns)
        for piece in rows.split(size):
            total.add(piece)
        assert torch.equal(total.result(), rows.sum(0)), size


def test_another_order_would_be_seen():
    rows = spread(64, 1000)
    plain = torch.zeros(1000)
    for row in rows:
        plain += row
    assert not torch.equal(plain, rows.sum(0))
