"""Threads: each computes few large pieces of work, instead of a part of every small operation."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

__all__ = ["in_threads", "n_threads", "threads"]

T = TypeVar("T")
_here = threading.local()


def n_threads() -> int:
    """Return the number of threads that share a large piece of work: one outside of `threads`."""
    n: int = getattr(_here, "n_threads", 1)
    return n


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Compute on n threads, or on as many as torch has; torch's own operations meanwhile have one each.

    Torch would wake all threads for every small operation, and let them spin until the next one: two processes on one
    machine, or torch beside the kernels' threads, would hinder each other.

    Examples
    --------
    >>> with threads(2):
    ...     n_threads(), torch.get_num_threads()
    (2, 1)
    """
    before, of_torch = n_threads(), torch.get_num_threads()
    _here.n_threads = max(before, of_torch) if n is None else n
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _here.n_threads = before
        torch.set_num_threads(of_torch)


def in_threads(work: Callable[[int], T], n: int) -> list[T]:
    """``[work(0), ..., work(n - 1)]``, the first on this thread, each other on its own; none divides its work again."""
    others = [_pool(os.getpid()).submit(work, turn) for turn in range(1, n)]
    before, _here.n_threads = n_threads(), 1
    try:
        first = work(0)
    finally:
        _here.n_threads = before
        wait(others)
    return [first, *(other.result() for other in others)]


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked child does not have those of its parent."""
    return ThreadPoolExecutor(os.cpu_count(), "celbo", torch.set_num_threads, (1,))
