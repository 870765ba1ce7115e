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
_limited = dict[int, int]()
"""For each Python thread inside of `threads`: how many threads torch had in it before."""
_in_parent = 1
"""How many threads torch had in the process from which this one was forked."""
_change = threading.RLock()
"""Guards the number of torch's threads, of which torch keeps one for new Python threads."""


def n_threads() -> int:
    """Return the number of threads that share a large piece of work; it is one outside of `threads`."""
    n: int = getattr(_of_thread, "n_threads", 1)
    return n


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Compute on n threads, or on as many as torch has; limit torch's own operations to one thread meanwhile.

    Torch would wake all its threads for every small operation, and let them spin until the next one. They would slow
    down the kernels' threads and other processes. Several Python threads may compute at the same time: each has the
    number of threads that it would have alone.

    Examples
    --------
    >>> with threads(2):
    ...     n_threads(), torch.get_num_threads()
    (2, 1)
    """
    before, thread = n_threads(), threading.get_ident()
    with _change:
        of_torch = torch.get_num_threads()
        if is_first := thread not in _limited:  # a new thread starts with the limit that another one has set
            of_torch = max(of_torch, *_limited.values(), 1)
    try:
        with _change:
            _limited.setdefault(thread, of_torch)
            torch.set_num_threads(1)
        _of_thread.n_threads = max(before, of_torch, _in_parent) if n is None else n
        yield
    finally:
        _of_thread.n_threads = before
        with _change:
            if is_first:
                _limited.pop(thread, None)
            torch.set_num_threads(of_torch)


def _after_fork() -> None:
    """Limit torch to one thread in a forked process: its other threads stay in the parent, and it would wait for them.

    The kernels' threads are started anew, as many as in the parent.
    """
    global _in_parent
    _in_parent = max(_in_parent, torch.get_num_threads(), *_limited.values())
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
