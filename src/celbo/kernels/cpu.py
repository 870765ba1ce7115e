r"""The same functions for processors: fused with the softmax, compiled by numba, gradients with the values.

A cell costs one pass over its genes as if every count were zero, in float32 and free of branches, so that the
compiler makes vector instructions of it. Its non-zero counts alone pay for ratios of Gamma functions, in float64.
Rows are shared among threads in pieces of a fixed size whose sums are added in order: the number of threads changes
no bit of the result.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from celbo.kernels import compiled

__all__ = ["softmax_nb", "softmax_poisson", "softmax_zinb", "sparse_linear"]

Floats = NDArray[np.float32]
Csr = tuple[NDArray[np.int64], NDArray[np.int32], Floats]

_LOG_THETA_RANGE = (-60.0, 40.0)
"""Wider than any model's, and narrow enough that no product of sixteen factors overflows."""
_NOTHING = np.empty((0, 0), np.float32)
_DENSEST = 0.2
"""Share of non-zero values above which a dense product is the faster one."""


def softmax_nb(x: Tensor, logits: Tensor, log_library: Tensor, log_theta: Tensor) -> Tensor:
    """See `celbo.kernels.reference.softmax_nb`."""
    result: Tensor = _Fused.apply(x, logits, log_library, log_theta, None)  # type: ignore[no-untyped-call]
    return result


def softmax_zinb(x: Tensor, logits: Tensor, log_library: Tensor, log_theta: Tensor, gate_logits: Tensor) -> Tensor:
    """See `celbo.kernels.reference.softmax_zinb`."""
    result: Tensor = _Fused.apply(x, logits, log_library, log_theta, gate_logits)  # type: ignore[no-untyped-call]
    return result


def softmax_poisson(x: Tensor, logits: Tensor, log_library: Tensor) -> Tensor:
    """See `celbo.kernels.reference.softmax_poisson`."""
    result: Tensor = _Fused.apply(x, logits, log_library, None, None)  # type: ignore[no-untyped-call]
    return result


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`."""
    if x.layout != torch.sparse_csr or x.values().numel() > _DENSEST * x.numel():
        return x.to_dense() @ weight.t()
    result: Tensor = _SparseLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class _Found(NamedTuple):
    """Log-likelihood of each cell, and the gradient of their weighted sum in each input."""

    value: Tensor
    logits: Tensor
    log_library: Tensor
    log_theta: Tensor | None
    gate: Tensor | None


class _Fused(torch.autograd.Function):
    """``sum_g log p(x_g)``, ``(cells,)``: Poisson without theta, negative binomial, zero-inflated with a gate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, logits: Tensor, log_library: Tensor, log_theta: Tensor | None, gate: Tensor | None
    ) -> Tensor:
        weight = np.ones(len(logits), np.float32) if any(ctx.needs_input_grad) else None
        found = _run(x, logits, log_library, log_theta, gate, weight)
        ctx.save_for_backward(x, logits, log_library, log_theta, gate)
        ctx.found = found
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A loss is a mean over cells, nearly always; what forward found then needs but one factor.
        factor, found = grad[:1], ctx.found
        if not bool((grad == factor).all()):
            x, logits, log_library, log_theta, gate = ctx.saved_tensors
            factor, found = grad.new_ones(1), _run(x, logits, log_library, log_theta, gate, grad.numpy())
        gradients = found.logits, found.log_library, found.log_theta, found.gate
        return None, *(None if gradient is None else gradient * factor for gradient in gradients)


def _run(
    x: Tensor,
    logits: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None,
    gate: Tensor | None,
    weight: Floats | None,
) -> _Found:
    """Call the compiled kernel on every thread; without a weight it finds the value alone."""
    n_cells, n_genes = logits.shape
    gradients = weight is not None
    logits, log_library = logits.detach().contiguous(), log_library.detach()
    cells = (*_csr(x), logits.numpy(), logits.amax(1).numpy(), log_library.double().reshape(-1).numpy())
    weight = np.ones(n_cells, np.float32) if weight is None else weight
    value, d_library = np.empty((2, n_cells))
    d_logits = np.empty((n_cells if gradients else 1, n_genes), np.float32)
    d_gate = np.empty_like(d_logits) if gate is not None else _NOTHING
    d_theta = None

    if log_theta is None:
        _in_threads(compiled.poisson, *cells, weight, gradients, value, d_logits, d_library)
    else:
        by_cell = log_theta.dim() > 1
        log_thetas = log_theta.detach().reshape(-1, n_genes).clamp(*_LOG_THETA_RANGE).double()
        theta, inverse = log_thetas.exp(), log_thetas.neg().exp()
        thetas = log_thetas.numpy(), theta.numpy(), theta.float().numpy(), inverse.float().numpy()
        gates = _NOTHING if gate is None else gate.detach().contiguous().numpy()
        sums = np.zeros((n_cells if by_cell else -(-n_cells // compiled.PIECE), n_genes), np.float32)
        _in_threads(compiled.nb, *cells, *thetas, gates, weight, gradients, value, d_logits, d_library, sums, d_gate)
        d_theta = torch.from_numpy(sums if by_cell else sums.sum(0, dtype=np.float64)).to(log_theta.dtype)

    return _Found(
        torch.from_numpy(value).to(logits.dtype),
        torch.from_numpy(d_logits),
        torch.from_numpy(d_library).to(log_library.dtype).reshape(log_library.shape),
        None if log_theta is None or d_theta is None else d_theta.reshape(log_theta.shape),
        None if gate is None else torch.from_numpy(d_gate),
    )


class _SparseLinear(torch.autograd.Function):
    """``x @ weight.T`` for sparse x; only the weight has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.n_genes = weight.shape[1]
        by_gene = weight.detach().t().contiguous().numpy()
        out = np.empty((len(x), len(weight)), np.float32)
        _in_threads(compiled.times, *_csr(x), by_gene, out)
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        by_gene = np.empty((ctx.n_genes, grad.shape[1]), np.float32)
        grads, transposed = grad.contiguous().numpy(), _transposed(_csr(x), ctx.n_genes)
        _in_threads(compiled.times, *transposed, grads, by_gene)
        return None, torch.from_numpy(by_gene).t()


def _csr(x: Tensor) -> Csr:
    """Row starts, columns and values; a dense tensor is made sparse."""
    if x.layout == torch.sparse_csr:
        parts = x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy()
    else:
        matrix = sp.csr_matrix(x.detach().numpy())
        parts = matrix.indptr, matrix.indices, matrix.data
    starts, columns, values = parts
    return (
        starts.astype(np.int64, copy=False),
        columns.astype(np.int32, copy=False),
        values.astype(np.float32, copy=False),
    )


def _transposed(csr: Csr, n_genes: int) -> Csr:
    starts, columns, values = csr
    by_gene = sp.csr_matrix((values, columns, starts), shape=(len(starts) - 1, n_genes)).tocsc()
    return by_gene.indptr.astype(np.int64), by_gene.indices, by_gene.data


def _in_threads(work: Callable[..., None], *arrays: Any) -> None:
    """Call ``work(turn, n_threads, *arrays)`` on as many threads as torch has; each takes its turns of the rows."""
    n_threads = torch.get_num_threads()
    others = [_pool(os.getpid()).submit(work, turn, n_threads, *arrays) for turn in range(1, n_threads)]
    work(0, n_threads, *arrays)
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="celbo")
