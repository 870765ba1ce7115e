"""Choose the fastest kernels for a tensor, or force a tier.

``reference.py`` is the definition, in plain torch, on any device that has float64. The faster tiers ``cpu.py`` (numba)
and ``gpu.py`` (Triton) have the same functions, and are tested against it. celbo uses the fastest tier that is
installed and fits the device and dtype; `use` forces one.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor, device, empty, float32

from celbo.errors import UsageError
from celbo.kernels.reference import AdamState, DecodedCounts

__all__ = ["adam", "decoded_log_prob", "load_kernels", "sparse_linear", "use"]

TIERS = ("auto", "reference", "cpu", "gpu")
_NEEDS = {"cpu": "numba", "gpu": "triton"}
_forced = "auto"


def use(tier: str) -> None:
    """Use this tier from now on: "reference", "cpu", "gpu"; or "auto", the fastest that fits.

    Examples
    --------
    >>> use("reference")
    >>> use("auto")
    """
    global _forced
    if tier not in TIERS:
        raise UsageError(f"tier of kernels {tier!r} does not exist; choose one of {', '.join(TIERS)}")
    if tier in _NEEDS and not _is_installed(_NEEDS[tier]):
        raise UsageError(f"the {tier} kernels need {_NEEDS[tier]}, which is not installed; pip install {_NEEDS[tier]}")
    _forced = tier


def load_kernels(of: device) -> None:
    """Import the kernels of a device, with the warnings that this gives."""
    _tier(empty(0, device=of))


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    """See `celbo.kernels.reference.decoded_log_prob`."""
    result: Tensor = _tier(counts.h).decoded_log_prob(counts)
    return result


def adam(
    weights: Tensor, gradient: Tensor, state: AdamState, *, factor: float, rate: float, step: int, share: float
) -> None:
    """See `celbo.kernels.reference.adam`."""
    _tier(weights).adam(weights, gradient, state, factor=factor, rate=rate, step=step, share=share)


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`."""
    result: Tensor = _tier(weight).sparse_linear(x, weight)
    return result


def _tier(tensor: Tensor) -> ModuleType:
    """Return the module of the tier for the device and dtype of this tensor."""
    name = _forced
    if name == "auto":
        name = "gpu" if tensor.is_cuda else "cpu"
        name = name if _is_installed(_NEEDS[name]) else "reference"
    if tensor.dtype != float32:
        name = "reference"
    return import_module(f"celbo.kernels.{name}")


@cache
def _is_installed(library: str) -> bool:
    return find_spec(library) is not None
