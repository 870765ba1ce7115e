r"""Kernels for CUDA devices: matrix products by cuBLAS, softmax and log-likelihood fused in Triton.

Values and all derivatives come from one kernel over the logits; `celbo.kernels.blocks` has it. Products are float32 in
full: TF32, with three digits, is used only where ``torch.backends.cuda.matmul.allow_tf32`` was switched on. Nothing
waits for the device and nothing depends on values, so that a training step can be captured in a CUDA graph. Sums have
a fixed order: the same inputs give the same bits.

Where Triton interprets its kernels (``TRITON_INTERPRET=1`` in the environment before triton is imported), tensors on
the processor are taken too: slow, for tests.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from celbo.errors import UsageError
from celbo.kernels import blocks
from celbo.kernels.reference import DecodedCounts

__all__ = ["decoded_log_prob", "sparse_linear"]

_INTERPRETED = not isinstance(blocks.nb, triton.JITFunction)
_BLOCK = 65536 if _INTERPRETED else 512
"""Cells times genes that a program computes at a time: on a device four for each of its threads, as many as their
registers hold; in the interpreter many cost little more than one."""
_FEWEST_GENES, _MOST_GENES = 16, 512


def sparse_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `celbo.kernels.reference.sparse_linear`; on a GPU minibatches are dense, and so is the product."""
    return x.to_dense() @ weight.t()


def decoded_log_prob(counts: DecodedCounts) -> Tensor:
    """See `celbo.kernels.reference.decoded_log_prob`."""
    device = counts.h.device
    if device.type != "cuda" and not _INTERPRETED:
        raise UsageError(
            f"the gpu kernels take tensors on a CUDA device, these are on {device}; use('auto') finds the kernels that"
            " fit, and with TRITON_INTERPRET=1 in the environment from the start Triton's interpreter takes them"
        )
    if not torch.is_grad_enabled():
        return _run(counts, want=False)[0]
    result: Tensor = _Fused.apply(*counts)  # type: ignore[no-untyped-call]
    return result


class _Fused(torch.autograd.Function):
    """``sum_g log p(x_g)``, ``(cells,)``; its derivatives, for a weight of one each, come with it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        given = DecodedCounts(*inputs)  # type: ignore[arg-type]
        value, derivatives = _run(given, want=any(ctx.needs_input_grad))
        ctx.save_for_backward(given.h, given.weight, given.gate_weight, *derivatives)
        ctx.of_library = given.log_library.shape
        ctx.of_theta = None if given.log_theta is None else given.log_theta.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, gate_weight, *derivatives = ctx.saved_tensors
        d_library, d_logits, d_theta, d_gates = _Derivatives(*derivatives)
        # The weights of cells go to the narrow factor of each product, and no wide matrix is written again.
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
    """Compute log-likelihoods, ``(cells,)``, and derivatives; without ``want``, matrices have no meaning."""
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
        with torch.cuda.device_of(x):  # Triton would take the current one
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
