"""Triton kernels under rotary.py: a program some heads of one position."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .reference import HeadNorms

_HEADS = 8  # of a program in `rotate`, at most


@triton.jit
def _turned(a, b, cos, sin, dtype: tl.constexpr):
    """Both halves, each product rounded and then the sums, as separate operations would."""
    first = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    second = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    return first.to(dtype), second.to(dtype)


@triton.jit
def rotate_kernel(
    x, cos, sin, out, batch, heads, by_position, by_row, by_head,
    FORWARD: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """`by_...`: from one to the next in `x`; `out` is contiguous. Backward turns the other way."""
    token = tl.program_id(0).to(tl.int64)
    position, row = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    here = (head[:, None] < heads) & (d[None, :] < DIM // 2)
    source = x + position * by_position + row * by_row + head[:, None] * by_head + d[None, :]
    a = tl.load(source, mask=here, other=0.0).to(tl.float32)
    b = tl.load(source + DIM // 2, mask=here, other=0.0).to(tl.float32)
    cosines = tl.load(cos + position * DIM + d, mask=d < DIM // 2, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sin + position * DIM + d, mask=d < DIM // 2, other=0.0).to(tl.float32)[None, :]
    if not FORWARD:
        sines = -sines
    a, b = _turned(a, b, cosines, sines, out.dtype.element_ty)
    target = out + (token * heads + head[:, None]) * DIM + d[None, :]
    tl.store(target, a, mask=here)
    tl.store(target + DIM // 2, b, mask=here)


@triton.jit
def heads_kernel(
    qkv, bias, cos, sin, of_query, of_key, cache, places, out, table_stride, eps,
    BIAS: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, CACHE: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program a token and group. `table_stride`: from one token's cosines to the next one's."""
    token = tl.program_id(0).to(tl.int64)
    group = token * tl.num_programs(1) + tl.program_id(1)
    dtype: tl.constexpr = qkv.dtype.element_ty
    j = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    here = (j < QUERIES + 2) & (d < DIM // 2)
    source = qkv + (group * (QUERIES + 2) + j) * DIM + d
    a, b = tl.load(source, mask=here, other=0.0), tl.load(source + DIM // 2, mask=here, other=0.0)
    if BIAS:
        added = bias + (tl.program_id(1) * (QUERIES + 2) + j) * DIM + d
        a = (a.to(tl.float32) + tl.load(added, mask=here, other=0.0).to(tl.float32)).to(dtype)
        b = (b.to(tl.float32) + tl.load(added + DIM // 2, mask=here, other=0.0).to(tl.float32)).to(dtype)
    is_value = j == QUERIES + 1
    if NORM:
        x, y = a.to(tl.float32), b.to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x + y * y, 1) / DIM + eps)[:, None]
        weights = tl.where(j == QUERIES, of_key, of_query) + d
        x = x * factor * tl.load(weights, mask=here, other=0.0).to(tl.float32)
        y = y * factor * tl.load(weights + DIM // 2, mask=here, other=0.0).to(tl.float32)
        a, b = tl.where(is_value, a, x.to(dtype)), tl.where(is_value, b, y.to(dtype))
    if ROTARY:
        table = token * table_stride + d
        cosines = tl.load(cos + table, mask=d < DIM // 2, other=0.0).to(tl.float32)
        sines = tl.load(sin + table + DIM // 2, mask=d < DIM // 2, other=0.0).to(tl.float32)  # of the second half: +
        x, y = _turned(a.to(tl.float32), b.to(tl.float32), cosines, sines, dtype)
        a, b = tl.where(is_value, a, x), tl.where(is_value, b, y)
    if CACHE:
        target = out + (group * QUERIES + j) * DIM + d
        is_cached = here & (j >= QUERIES)
        place = tl.load(places + group * 2 + j - QUERIES, mask=(j >= QUERIES) & (j < QUERIES + 2), other=0)
        tl.store(cache + place * DIM + d, a, mask=is_cached)
        tl.store(cache + place * DIM + d + DIM // 2, b, mask=is_cached)
        here = here & (j < QUERIES)
    else:
        target = out + (group * (QUERIES + 2) + j) * DIM + d
    tl.store(target, a, mask=here)
    tl.store(target + DIM // 2, b, mask=here)


def launch(heads: int, dim: int) -> dict[str, int]:
    """The constants for a program's heads of a size."""
    half = triton.next_power_of_2(dim // 2)
    rows = triton.next_power_of_2(heads)
    return {"DIM": dim, "HEADS": rows, "HALF": half, "num_warps": min(8, max(1, rows * half // 256))}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, forward: bool) -> Tensor:
    """See reference.py; or the gradient of its input, from that of its result."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    length, batch, heads, dim = x.shape
    out = x.new_empty(x.shape)
    if x.numel():
        config = launch(min(heads, _HEADS), dim)
        rotate_kernel[(length * batch, triton.cdiv(heads, config["HEADS"]))](
            x, cos, sin, out, batch, heads, *x.stride()[:3], FORWARD=forward, **config
        )
    return out


def attention_heads(
    qkv: Tensor, bias: Tensor | None, rotary: tuple[Tensor, Tensor] | None, norms: HeadNorms | None,
    cache: Tensor | None, places: Tensor | None,
) -> Tensor:  # fmt: skip
    """See reference.py."""
    tokens, groups, heads, dim = qkv.shape
    qkv, queries = qkv.contiguous(), heads - 2
    out = qkv.new_empty(tokens, groups, heads if cache is None else queries, dim)
    # what is not there is not read
    cos, sin = (qkv, qkv) if rotary is None else rotary
    of_query, of_key, eps = (qkv, qkv, 0.0) if norms is None else norms
    into, where = (qkv, qkv) if cache is None else (cache, places)
    if tokens:
        heads_kernel[(tokens, groups)](
            qkv, qkv if bias is None else bias, cos, sin, of_query, of_key, into, where, out, cos.stride(0), eps,
            BIAS=bias is not None, ROTARY=rotary is not None, NORM=norms is not None, CACHE=cache is not None,
            QUERIES=queries, **launch(heads, dim),
        )  # fmt: skip
    return out
