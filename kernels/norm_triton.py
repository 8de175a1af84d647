"""Triton kernels under norm.py: a program some rows, as many as make a block.

Backward is the gradient of rows, for which a row is read once, and that of the weight, for which each program sums its
rows; the sums of programs are added by a kernel of their own, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"sum": {"ROWS": 16, "BLOCK": 128, "num_warps": 4}}
_PROGRAMS = 256  # of the weight's gradient, at most
_ELEMENTS = 1024  # of a block, at least


@triton.jit
def norm_kernel(
    x, add, weight, out, factors, num_rows, width, eps,
    ADD: tl.constexpr, SAVES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`factors` `(num_rows,)`: what each row was multiplied by."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = (row[:, None] < num_rows) & (column[None, :] < width)
    i = row[:, None] * width + column[None, :]
    value = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
    if ADD:
        rounded = (value + tl.load(add + i, mask=here, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + i, rounded, mask=here)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    if SAVES:
        tl.store(factors + row, factor, mask=row < num_rows)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = value * factor[:, None] * weights[None, :]
    tl.store(out + i, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def norm_gradient_kernel(
    grad, x, weight, factors, out, sums, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of `x` in `out`, and of each program's rows that of the weight in `sums` `(programs, width)`."""
    column = tl.arange(0, BLOCK)
    is_column = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        here = (row[:, None] < num_rows) & is_column[None, :]
        i = row[:, None] * width + column[None, :]
        factor = tl.load(factors + row, mask=row < num_rows, other=0.0)
        normed = tl.load(x + i, mask=here, other=0.0).to(tl.float32) * factor[:, None]
        incoming = tl.load(grad + i, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(incoming * normed, 0)
        incoming *= tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        along = tl.sum(incoming * normed, 1) / width
        result = (incoming - normed * along[:, None]) * factor[:, None]
        tl.store(out + i, result.to(out.dtype.element_ty), mask=here)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + column, total, mask=is_column)


@triton.jit
def sum_kernel(sums, out, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`(num_rows, width)` to `(width,)`."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row[:, None] < num_rows) & (column[None, :] < width)
        total += tl.load(sums + row[:, None] * width + column[None, :], mask=here, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def launch(width: int) -> dict[str, int]:
    """The constants for rows of a length: the same for all kernels, with and without `add`."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, _ELEMENTS // block), "num_warps": min(16, max(4, block // 512))}


def forward(
    x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None, saves: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm, and what each row was multiplied by where that is saved.

    Raises:
        ValueError: `x` is not contiguous and would have something added in place.
    """
    width = x.shape[-1]
    if add is not None and not x.is_contiguous():
        raise ValueError("what is added to in place must be contiguous")
    x = x.contiguous()
    out, rows = torch.empty_like(x), x.numel() // width
    factors = torch.empty(rows if saves else 0, device=x.device)
    config = launch(width)
    if rows:
        norm_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            x, x if add is None else add.contiguous(), weight, out, factors if saves else out, rows, width, eps,
            ADD=add is not None, SAVES=saves, **config,
        )  # fmt: skip
    return out, factors


def backward(x: Tensor, weight: Tensor, factors: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both inputs."""
    width, x = x.shape[-1], x.contiguous()
    rows, config = x.numel() // width, launch(width)
    programs = min(_PROGRAMS, max(1, triton.cdiv(rows, config["ROWS"])))
    sums = torch.empty(programs, width, device=x.device)
    out, total = torch.empty_like(x), torch.empty_like(weight)
    norm_gradient_kernel[(programs,)](grad.contiguous(), x, weight, factors, out, sums, rows, width, **config)
    config = LAUNCH["sum"]
    sum_kernel[(triton.cdiv(width, config["BLOCK"]),)](sums, total, programs, width, **config)
    return out, total
