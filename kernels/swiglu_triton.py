"""Triton kernels under swiglu.py: a program some width of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"forward": {"BLOCK": 1024, "num_warps": 4}, "backward": {"BLOCK": 1024, "num_warps": 4}}


@triton.jit
def swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    """`x` has 2 x `width`, `out` has `width`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    gate = tl.load(x + row * 2 * width + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=here, other=0.0).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (active * up).to(out.dtype.element_ty), mask=here)


@triton.jit
def swiglu_gradient_kernel(grad, x, out, width, BLOCK: tl.constexpr):
    """`out` as `x`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    gate = tl.load(x + row * 2 * width + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=here, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * width + column, mask=here, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    active = (gate * share).to(x.dtype.element_ty).to(tl.float32)
    of_active = (incoming * up).to(x.dtype.element_ty).to(tl.float32)
    of_gate = of_active * share * (1 + gate * (1 - share))
    tl.store(out + row * 2 * width + column, of_gate.to(out.dtype.element_ty), mask=here)
    tl.store(out + row * 2 * width + width + column, (incoming * active).to(out.dtype.element_ty), mask=here)


def forward(x: Tensor) -> Tensor:
    """See reference.py."""
    width, x = x.shape[-1] // 2, x.contiguous()
    out = x.new_empty(*x.shape[:-1], width)
    _run("forward", swiglu_kernel, x, out, width=width)
    return out


def backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `x`."""
    x = x.contiguous()
    out = x.new_empty(x.shape)
    _run("backward", swiglu_gradient_kernel, grad.contiguous(), x, out, width=x.shape[-1] // 2)
    return out


def _run(name: str, kernel, *tensors: Tensor, width: int) -> None:
    rows = tensors[-1].numel() // tensors[-1].shape[-1]
    if rows:
        kernel[(rows, triton.cdiv(width, LAUNCH[name]["BLOCK"]))](*tensors, width, **LAUNCH[name])
