r"""Compute log-likelihoods on CPUs, fused with the decoder's last layer, in loops compiled by numba.

One pass over blocks of cells, which stay in the cache, computes the product with the weight, the log-likelihood, and
the products of its derivatives. `celbo.kernels.threads` sets the number of threads that share the blocks.
"""

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from celbo.kernels import compiled
from celbo.kernels.reference import AdamState, DecodedCounts, adam_constants
from celbo.kernels.threads import in_threads, n_threads

__all__ = ["adam", "decoded_log_prob", "sparse_linear"]

Csr = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]

_BLOCK = 128
"""Largest number of cells in a block."""
_LOG_THETA_RANGE = (-60.0, 40.0)
"""This range is wider than that of any model, and no product of sixteen factors overflows in it."""
_DENSEST = 0.2
"""Above this share of non-zero values, a dense product is faster."""
_NUMBERS_OF_A_THREAD = 100_000
"""Adam shares its work among threads if each gets this many numbers."""
_NO_GATES = np.empty((0, 0), np.float32)


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`."""
    if x.layout != torch.sparse_csr or x.values().numel() > _DENSEST * x.numel():
        return x.to_dense() @ weight.t()
    result: Tensor = _SparseLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    """See `celbo.kernels.reference.decoded_log_prob`."""
    if not torch.is_grad_enabled():
        return _run(counts, None)[0]
    result: Tensor = _Fused.apply(*counts)  # type: ignore[no-untyped-call]
    return result


def adam(
    weights: Tensor, gradient: Tensor, state: AdamState, *, factor: float, rate: float, step: int, share: float
) -> None:
    """See `celbo.kernels.reference.adam`."""
    vectors = [vector.detach().numpy() for vector in (weights, gradient, *state)]
    constants = [np.float32(number) for number in (factor, *adam_constants(rate, step), share)]
    n = max(1, min(n_threads(), len(weights) // _NUMBERS_OF_A_THREAD))
    edges = [turn * len(weights) // n for turn in range(n + 1)]

    def work(turn: int) -> None:
        part = slice(edges[turn], edges[turn + 1])
        compiled.adam(*(vector[part] for vector in vectors), *constants)

    in_threads(work, n)


class _Fused(torch.autograd.Function):
    """Compute ``sum_g log p(x_g)``, ``(cells,)``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        # Most losses are a mean over cells. Their gradients are those for weights of 1, times one factor.
        weights = torch.ones(len(DecodedCounts(*inputs).h)) if any(ctx.needs_input_grad) else None  # type: ignore[arg-type]
        value, ctx.gradients = _run(DecodedCounts(*inputs), weights)  # type: ignore[arg-type]
        ctx.save_for_backward(*inputs)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, gradients, ctx.gradients = grad[:1], ctx.gradients, None
        if gradients is None or not bool((grad == factor).all()):
            factor, (_, gradients) = grad.new_ones(1), _run(DecodedCounts(*ctx.saved_tensors), grad)
        return None, *(None if gradient is None else gradient.mul_(factor) for gradient in gradients)


@torch.no_grad()
def _run(inputs: DecodedCounts, weights: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Compute log-likelihoods, and the gradients of their weighted sum in all inputs but x if there are weights."""
    n_cells, n_genes = len(inputs.h), len(inputs.weight)
    by_cell = inputs.log_theta is not None and inputs.log_theta.dim() > 1
    csr = _csr(inputs.x)
    log_library = inputs.log_library.double().reshape(-1).numpy()
    thetas = _thetas(inputs.log_theta, n_genes)
    gradient = weights is not None
    weight = (torch.ones(n_cells) if weights is None else weights).numpy()
    value, d_library = np.empty((2, n_cells))
    d_h = torch.zeros_like(inputs.h)
    d_theta_by_cell = np.zeros((n_cells if by_cell else 0, n_genes), np.float32)
    blocks = list(_blocks(n_cells, n_threads()))
    n = min(n_threads(), len(blocks))

    @torch.no_grad()
    def work(turn: int) -> list[Tensor]:
        """Compute this turn's blocks; return its sums of the gradients in weight, bias, theta and gate."""
        parts = (inputs.weight, inputs.bias, inputs.gate_weight, inputs.gate_bias) if gradient else ()
        sums = [torch.empty_like(part) for part in parts if part is not None]
        d_theta = torch.zeros(n_genes, dtype=torch.float64)
        for number, cells in enumerate(blocks[turn::n]):
            h = inputs.h[cells]
            logits = torch.addmm(inputs.bias, h, inputs.weight.t())
            starts, columns, values = csr
            data = starts[cells.start : cells.stop + 1], columns, values, logits.numpy(), logits.amax(1).numpy()
            outputs = weight[cells], gradient, value[cells], d_library[cells]
            wide = [(logits, inputs.weight)]
            if inputs.log_theta is None:
                compiled.poisson(*data, log_library[cells], *outputs)
            else:
                gates = _NO_GATES
                if inputs.gate_weight is not None and inputs.gate_bias is not None:
                    gate_logits = torch.addmm(inputs.gate_bias, h, inputs.gate_weight.t())
                    gates = gate_logits.numpy()
                    wide.append((gate_logits, inputs.gate_weight))
                of_block = [part[cells] if by_cell else part for part in thetas]
                into = d_theta_by_cell[cells] if by_cell else np.zeros((1, n_genes), np.float32)
                compiled.nb(*data, log_library[cells], *of_block, gates, *outputs, into)
                if not by_cell:
                    d_theta += torch.from_numpy(into[0])
            if gradient:
                for (d_out, its_weight), d_weight, d_bias in zip(wide, sums[::2], sums[1::2], strict=True):
                    d_h[cells].addmm_(d_out, its_weight)
                    d_weight.addmm_(
                        d_out.t(), h, beta=min(number, 1)
                    )  # the first block overwrites uninitialised memory
                    d_bias.copy_(d_out.sum(0) if number == 0 else d_bias + d_out.sum(0))
        return [*sums, d_theta]

    *sums, d_theta = (reduce(torch.Tensor.add_, parts) for parts in zip(*in_threads(work, n), strict=True))
    log_prob = torch.from_numpy(value).to(inputs.h.dtype)
    if not gradient:
        return log_prob, []
    d_log_library = torch.from_numpy(d_library).to(inputs.log_library.dtype).reshape(inputs.log_library.shape)
    d_log_theta = None
    if inputs.log_theta is not None:
        d_log_theta = torch.from_numpy(d_theta_by_cell) if by_cell else d_theta.float().reshape(inputs.log_theta.shape)
    return log_prob, [d_h, *sums[:2], d_log_library, d_log_theta, *(sums[2:] or [None, None])]


def _blocks(n_cells: int, n_threads: int) -> Iterator[slice]:
    """Yield blocks of even size, at least one for each thread."""
    n_blocks = max(1, -(-n_cells // _BLOCK), min(n_threads, n_cells))
    edges = [turn * n_cells // n_blocks for turn in range(n_blocks + 1)]
    yield from (slice(start, stop) for start, stop in pairwise(edges))


def _thetas(log_theta: Tensor | None, n_genes: int) -> list[NDArray[Any]]:
    """Return log theta and theta in float64, theta and its inverse in float32; one row, or a row for each cell."""
    if log_theta is None:
        return []
    exact = log_theta.reshape(-1, n_genes).clamp(*_LOG_THETA_RANGE).double()
    return [exact.numpy(), exact.exp().numpy(), exact.exp().float().numpy(), exact.neg().exp().float().numpy()]


class _SparseLinear(torch.autograd.Function):
    """Compute ``x @ weight.T`` for sparse x, with a gradient in the weight only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.n_genes = weight.shape[1]
        return _times(_csr(x), weight.detach().t().contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        starts, columns, values = _csr(*ctx.saved_tensors)
        by_gene = sp.csr_matrix((values, columns, starts), shape=(len(grad), ctx.n_genes)).tocsc()
        return None, _times((by_gene.indptr, by_gene.indices, by_gene.data), grad.contiguous()).t()


def _times(csr: Csr, dense: Tensor) -> Tensor:
    starts, columns, values = csr
    starts = starts.astype(np.int64, copy=False)
    out, factor = np.empty((len(starts) - 1, dense.shape[1]), np.float32), dense.numpy()
    edges = np.searchsorted(starts, np.linspace(0, starts[-1], n_threads() + 1).astype(int))
    edges[0], edges[-1] = 0, len(out)

    def work(turn: int) -> None:
        first, last = edges[turn], edges[turn + 1]
        compiled.times(starts[first : last + 1], columns, values, factor, out[first:last])

    in_threads(work, n_threads())
    return torch.from_numpy(out)


def _csr(x: Tensor) -> Csr:
    """Return row starts, columns and values; convert a dense tensor to sparse."""
    if x.layout == torch.sparse_csr:
        starts, columns, values = x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy()
    else:
        matrix = sp.csr_matrix(x.detach().numpy())
        starts, columns, values = matrix.indptr, matrix.indices, matrix.data
    return (
        starts.astype(np.int64, copy=False),
        columns.astype(np.int32, copy=False),
        values.astype(np.float32, copy=False),
    )
