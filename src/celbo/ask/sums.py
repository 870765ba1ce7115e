"""Add up rows that arrive in pieces, in the order in which torch adds them when it has them all."""

import torch
from torch import Tensor

__all__ = ["RowSum"]

_COLUMNS = 64
"""torch adds the columns of four vector registers at a time: 64 of float32 with AVX-512, and a divisor of 64 else."""
_LEVELS = 4


class RowSum:
    """Sum over rows, the same to the bit as ``rows.sum(0)`` of all rows together.

    On a CPU torch adds 16 rows one after the other (more if there are over 500,000), then 16 of these sums, and so on:
    a cascade of four levels. The last columns, which do not fill four vector registers, are added in another order.
    These are kept, and added by torch at the end.

    Parameters
    ----------
    n_rows, n_columns
        Of all rows together.
    device
        Where they are.

    Examples
    --------
    >>> rows = torch.rand(40, 200)
    >>> total = RowSum(40, 200)
    >>> for piece in rows.split(7):
    ...     total.add(piece)
    >>> torch.equal(total.result(), rows.sum(0))
    True
    """

    def __init__(self, n_rows: int, n_columns: int, device: torch.device | str = "cpu"):
        self._n_rows, self._n_added = n_rows, 0
        self._step = 1 << max(4, (n_rows - 1).bit_length() // _LEVELS)
        self._levels: list[Tensor] = []
        self._start = max(0, n_columns // _COLUMNS - 1) * _COLUMNS
        self._last = torch.empty(n_rows, n_columns - self._start, device=device)

    def add(self, rows: Tensor) -> None:
        """Add the next rows, ``(rows, columns)``."""
        if len(rows) == self._n_rows:  # all of them
            self._levels = [rows.sum(0)]
            return
        self._last[self._n_added : self._n_added + len(rows)] = rows[:, self._start :]
        while len(rows):
            piece = rows[: self._step - self._n_added % self._step]
            if len(piece) == self._step:
                self._add_to(0, piece.sum(0))
            else:
                for row in piece:
                    self._add_to(0, row)
            self._n_added += len(piece)
            rows = rows[len(piece) :]
            for level in range(1, _LEVELS):
                if self._n_added % self._step**level:
                    break
                self._add_to(level, self._levels[level - 1])
                self._levels[level - 1].zero_()

    def _add_to(self, level: int, row: Tensor) -> None:
        if level == len(self._levels):
            self._levels.append(torch.zeros_like(row))
        self._levels[level] += row

    def result(self) -> Tensor:
        """Return the sum, ``(columns,)``."""
        total = self._levels[0].clone()
        for level in self._levels[1:]:
            total += level
        if self._n_added:
            total[self._start :] = self._last.sum(0)
        return total
