r"""Compute log-likelihoods on CUDA devices: matrix products by cuBLAS, softmax and log-likelihood fused in Triton.

One kernel over the logits, in `celbo.kernels.blocks`, computes values and all derivatives. Products have full float32
precision; TF32, with three digits, is used only if ``torch.backends.cuda.matmul.allow_tf32`` is on. No step waits for
the device or depends on values, so that a CUDA graph can capture a training step. Sums have a fixed order, so that the
same inputs give the same bits.

If Triton interprets its kernels (``TRITON_INTERPRET=1`` in the environment before triton is imported), they also take
tensors on the CPU. This is slow, and meant for tests.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from celbo.errors import UsageError
from celbo.kernels import blocks
from celbo.kernels.reference import DecodedCounts, adam

__all__ = ["adam", "decoded_log_prob", "sparse_linear"]

_INTERPRETED = not isinstance(blocks.nb, triton.JITFunction)
_BLOCK = 65536 if _INTERPRETED else 512
"""Cells times genes that a program computes at a time: on a device four per thread, as many as the registers hold; in
the interpreter many, because a large block costs little more than a small one."""
_FEWEST_GENES, _MOST_GENES = 16, 512


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`; on a GPU, minibatches and the product are dense."""
    return x.to_dense() @ weight.t()


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    """See `celbo.kernels.reference.decoded_log_prob`."""
    device = counts.h.device
    if device.type != "cuda" and not _INTERPRETED:
        raise UsageError(
            f"the gpu kernels take tensors on a CUDA device, these are on {device}; use('auto') chooses kernels that "
            "fit. To use Triton's interpreter, set TRITON_INTERPRET=1 in the environment before Python starts."
        )
    if not torch.is_grad_enabled():
        return _run(counts, want=False)[0]
    result: Tensor = _Fused.apply(*counts)  # type: ignore[no-untyped-call]
    return result


class _Fused(torch.autograd.Function):
    """Compute ``sum_g log p(x_g)``, ``(cells,)``, with its derivatives for cells of weight one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        counts = DecodedCounts(*inputs)  # type: ignore[arg-type]
        value, derivatives = _run(counts, want=any(ctx.needs_input_grad))
        ctx.save_for_backward(counts.h, counts.weight, counts.gate_weight, *derivatives)
        ctx.of_library = counts.log_library.shape
        ctx.of_theta = None if counts.log_theta is None else counts.log_theta.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, gate_weight, *derivatives = ctx.saved_tensors
        d_library, d_logits, d_theta, d_gates = _Derivatives(*derivatives)
        # Weights of cells scale the narrow factor of each product, so that no wide matrix is rewritten.
        by_cell = grad[:, None]
        weighted = by_cell * h
        d_h = d_logits @ weight
        d_log_theta = d_gate_weight = d_gate_bias = None
        if d_theta is not None:
            summed = by_cell * d_theta if len(ctx.of_theta) > 1 else grad @ d_theta
            d_log_theta = summed.reshape(ctx.of_theta)
        if d_gates is not None:
            d_h.addmm_(d_gates, gate_weight)
            d_gate_weight, d_gate_bias = d_gates.t() @ weighted, grad @ d_gates
        d_log_library = (grad * d_library).reshape(ctx.of_library)
        d_weight, d_bias = d_logits.t() @ weighted, grad @ d_logits
        return None, by_cell * d_h, d_weight, d_bias, d_log_library, d_log_theta, d_gate_weight, d_gate_bias


class _Derivatives(NamedTuple):
    """Derivatives of each cell's log-likelihood: in log library ``(cells,)``, in the others ``(cells, genes)``."""

    log_library: Tensor
    logits: Tensor
    log_theta: Tensor | None = None
    gates: Tensor | None = None


@torch.no_grad()
def _run(inputs: DecodedCounts, want: bool) -> tuple[Tensor, _Derivatives]:
    """Compute log-likelihoods, ``(cells,)``, and derivatives; without ``want``, matrices of these are invalid."""
    n_cells, n_genes = len(inputs.h), len(inputs.weight)
    x = inputs.x.to_dense().float().contiguous()
    logits = torch.addmm(inputs.bias, inputs.h, inputs.weight.t())
    log_library = inputs.log_library.float().contiguous()
    value, d_library = logits.new_empty(2, n_cells)
    d_logits = torch.empty_like(logits) if want else logits

    genes = min(max(triton.next_power_of_2(n_genes), _FEWEST_GENES), _MOST_GENES)
    block = {"WANT": want, "CELLS": _BLOCK // genes, "GENES": genes}
    programs = (triton.cdiv(n_cells, _BLOCK // genes),)
    if inputs.log_theta is None:
        of_poisson = value, d_library, d_logits
        with torch.cuda.device_of(x):  # Triton uses the current device
            blocks.poisson[programs](x, logits, log_library, *of_poisson, n_cells, n_genes, **block)
        return value, _Derivatives(d_library, d_logits)
    log_theta = inputs.log_theta.float().contiguous()
    theta_step = n_genes if log_theta.dim() > 1 else 0
    d_theta = torch.empty_like(logits) if want else logits
    gates = None
    if inputs.gate_weight is not None and inputs.gate_bias is not None:
        gates = torch.addmm(inputs.gate_bias, inputs.h, inputs.gate_weight.t())
    outputs = gates, value, d_library, d_logits, d_theta
    block["INFLATED"] = gates is not None
    with torch.cuda.device_of(x):
        blocks.nb[programs](x, logits, log_library, log_theta, *outputs, theta_step, n_cells, n_genes, **block)
    return value, _Derivatives(d_library, d_logits, d_theta, gates)
