"""The fastest kernels that fit a tensor: which tier computes, and a way to force one.

``reference.py`` is the definition, in plain torch, on any device that has float64. The faster tiers ``cpu.py`` (numba)
and ``gpu.py`` (Triton) have the fused functions under the same names and signatures, and are tested against it. The
fastest tier that is installed and fits device and dtype computes; `use` forces one.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor, float32

from celbo.errors import UsageError

__all__ = ["softmax_nb", "softmax_poisson", "softmax_zinb", "sparse_linear", "use"]

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


def softmax_nb(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, log_library: Tensor, log_theta: Tensor) -> Tensor:
    """See `celbo.kernels.reference.softmax_nb`."""
    result: Tensor = _tier(h).softmax_nb(x, h, weight, bias, log_library, log_theta)
    return result


def softmax_zinb(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_library: Tensor,
    log_theta: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
) -> Tensor:
    """See `celbo.kernels.reference.softmax_zinb`."""
    result: Tensor = _tier(h).softmax_zinb(x, h, weight, bias, log_library, log_theta, gate_weight, gate_bias)
    return result


def softmax_poisson(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, log_library: Tensor) -> Tensor:
    """See `celbo.kernels.reference.softmax_poisson`."""
    result: Tensor = _tier(h).softmax_poisson(x, h, weight, bias, log_library)
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
