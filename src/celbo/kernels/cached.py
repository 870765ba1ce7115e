"""Keep the compiled code of kernels on disk for later processes, where a folder can be written to."""

import pickle
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numba.core.config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache
from numba.core.registry import cpu_target

from celbo.caches import private_folder
from celbo.errors import warn

__all__ = ["cached"]

_settings: Any = numba.core.config


class _Place(CompileResultCacheImpl):
    """Names of the files. Each type of processor has its own.

    Numba lets processors share an index. If computers of two types fill it at once, one may then load the code of the
    other and be killed by an unknown instruction.
    """

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Return the name of numba, and a number for the processor's type and instructions."""
        processor = repr(cpu_target.target_context.codegen().magic_tuple())
        return f"{super().get_filename_base(fullname, abiflags)}-{zlib.crc32(processor.encode()):08x}"


class _Cache(FunctionCache):
    """Keep the code of one function. A fault of the disk costs a compilation and nothing else."""

    _impl_class = _Place

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for these types, or None if it must be compiled."""
        try:
            return super().load_overload(sig, target_context)
        except OSError as error:
            self._give_up(error)
        except (EOFError, pickle.UnpicklingError):  # a computer that loses power can leave a part of a file
            self._start_again()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the code for these types."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._give_up(error)

    def _start_again(self) -> None:
        try:
            self.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.disable()
        _warn(f"{self.cache_path} cannot keep compiled kernels: {error.strerror or error}.")


def cached(compiled: Any) -> Any:
    """Let a function of numba keep its code in the first folder that can be written to.

    The folders are those of numba (``NUMBA_CACHE_DIR``, ``__pycache__`` beside the source, the user's cache), then a
    private temporary one. If there is none, celbo warns, and each process compiles anew.

    Parameters
    ----------
    compiled
        What ``numba.njit`` returns. It must not have been called yet.

    Returns
    -------
    The same function.
    """
    compiled._cache = _cache_of(compiled.py_func)  # as numba's enable_caching does, which fails without a folder
    return compiled


def _cache_of(function: Callable[..., Any]) -> FunctionCache | NullCache:
    found = _cache_in(_settings.CACHE_DIR, function)
    if found is None and (folder := private_folder()) is not None:
        found = _cache_in(str(folder), function)
    if found is None:
        _warn("no folder for compiled kernels can be written to.")
    return found or NullCache()


def _cache_in(folder: str, function: Callable[..., Any]) -> FunctionCache | None:
    """Make a cache in this folder, or in one of numba's; None if none of them can be written to."""
    before = _settings.CACHE_DIR
    _settings.CACHE_DIR = folder
    try:
        return _Cache(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return None
    finally:
        _settings.CACHE_DIR = before


@cache
def _warn(fault: str) -> None:
    warn(f"{fault} Each process compiles them again, for up to a minute: set NUMBA_CACHE_DIR to a folder to keep them.")
