"""The fastest kernels that fit a tensor: which tier computes, and a way to force one.

``reference.py`` is the definition, in plain torch, on any device that has float64. The faster tiers ``cpu.py`` (numba)
and ``gpu.py`` (Triton) have the same functions, and are tested against it. The
fastest tier that is installed and fits device and dtype computes; `use` forces one.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor, float32

from celbo.errors import UsageError
from celbo.kernels.reference import DecodedCounts

__all__ = ["DecodedCounts", "decoded_log_prob", "sparse_linear", "use"]

TIERS = ("auto", "reference", "cpu", "gpu")
_NEEDS = {"cpu": "numba", "gpu": "triton"}
_forced = "auto"


def use(tier: str) -> None:
    """Take this tier from now on: "reference", "cpu", "gpu"; or "auto", the fastest that fits.

    Examples
    --------
    >>> use("reference")
    >>> use("auto")
    """
    global _forced
    if tier not in TIERS:
        raise UsageError(f"there is no tier of kernels {tier!r}; choose one of {', '.join(TIERS)}")
    if tier in _NEEDS and not _is_there(_NEEDS[tier]):
        raise UsageError(f"the {tier} kernels need {_NEEDS[tier]}, which is not installed; pip install {_NEEDS[tier]}")
    _forced = tier


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    """See `celbo.kernels.reference.decoded_log_prob`."""
    result: Tensor = _tier(counts.h).decoded_log_prob(counts)
    return result


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`."""
    result: Tensor = _tier(weight).sparse_linear(x, weight)
    return result


def _tier(tensor: Tensor) -> ModuleType:
    """The tier for where and what this tensor is."""
    name = _forced
    if name == "auto":
        name = "gpu" if tensor.is_cuda else "cpu"
        name = name if _is_there(_NEEDS[name]) else "reference"
    if tensor.dtype != float32:
        name = "reference"
    return import_module(f"celbo.kernels.{name}")


@cache
def _is_there(library: str) -> bool:
    return find_spec(library) is not None
