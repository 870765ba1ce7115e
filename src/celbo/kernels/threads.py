"""Run few large pieces of work in threads, instead of dividing every small operation among them."""

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
_of_thread = threading.local()


def n_threads() -> int:
    """Return the number of threads that share a large piece of work; it is one outside of `threads`."""
    n: int = getattr(_of_thread, "n_threads", 1)
    return n


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Compute on n threads, or on as many as torch has; limit torch's own operations to one thread meanwhile.

    Torch would wake all its threads for every small operation, and let them spin until the next one. They would slow
    down the kernels' threads and other processes.

    Examples
    --------
    >>> with threads(2):
    ...     n_threads(), torch.get_num_threads()
    (2, 1)
    """
    before, of_torch = n_threads(), torch.get_num_threads()
    _of_thread.n_threads = max(before, of_torch) if n is None else n
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _of_thread.n_threads = before
        torch.set_num_threads(of_torch)


def in_threads(work: Callable[[int], T], n: int) -> list[T]:
    """Return ``[work(0), ..., work(n - 1)]``, each computed on one thread, the first on this one."""
    others = [_pool(os.getpid()).submit(work, turn) for turn in range(1, n)]
    before, _of_thread.n_threads = n_threads(), 1
    try:
        first = work(0)
    finally:
        _of_thread.n_threads = before
        wait(others)
    return [first, *(other.result() for other in others)]


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked child needs its own."""
    return ThreadPoolExecutor(os.cpu_count(), "celbo", torch.set_num_threads, (1,))
