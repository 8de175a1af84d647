"""Triton kernel under attention.py: one program a sequence and group of heads, over the positions it has."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_BYTES = 1 << 13  # of keys read at once: three blocks of keys and values are under way


@triton.jit
def attention_kernel(
    q, cache, out, table, lengths, columns, values_at, scale,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`columns`: from one row of the table to the next. `values_at`: where values begin in the cache. `SIZE`: positions
    of a block of it. `ROWS` and `WIDTH` are `QUERIES` and `DIM` as a matrix product takes them: powers of two, 16 at
    least. `WIDE`: products in float32 whatever the type."""
    row = tl.program_id(0)
    group = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    n = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    t0 = tl.arange(0, BLOCK)
    here = (n[:, None] < QUERIES) & (d[None, :] < DIM)
    place = ((row.to(tl.int64) * tl.num_programs(1) + group) * QUERIES + n[:, None]) * DIM + d[None, :]
    queries = tl.load(q + place, mask=here, other=0.0)
    if WIDE:
        queries = queries.to(tl.float32)
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    for start in range(begin, length, BLOCK):
        t = start + t0
        inside = t < length
        block = tl.load(table + row.to(tl.int64) * columns + t // SIZE, mask=inside, other=0).to(tl.int64)
        position = (block * tl.num_programs(1) + group) * SIZE + t % SIZE
        both = cache + position[:, None] * DIM + d[None, :]
        is_real = inside[:, None] & (d[None, :] < DIM)
        keys = tl.load(both, mask=is_real, other=0.0)
        values = tl.load(both + values_at, mask=is_real, other=0.0)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        # a running softmax (Milakov and Gimelshein 2018): what was summed so far is scaled to the new maximum
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp(maximum - higher)
        p = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None]
        result += tl.dot(p.to(queries.dtype), values.to(queries.dtype), input_precision="ieee")
        maximum = higher
    tl.store(out + place, (result / total[:, None]).to(out.dtype.element_ty), mask=here)


def launch(queries: int, dim: int, itemsize: int) -> dict[str, int]:
    """The kernel's constants for n query heads of a size."""
    rows, width = (max(16, triton.next_power_of_2(size)) for size in (queries, dim))
    block = min(128, max(16, _BLOCK_BYTES // (width * itemsize)))
    return {"QUERIES": queries, "DIM": dim, "ROWS": rows, "WIDTH": width, "BLOCK": block, "num_warps": 4}


def cached_attention(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """See reference.py."""
    queries, dim = q.shape[2:]
    out = q.new_empty(q.shape)
    attention_kernel[q.shape[:2]](
        q.contiguous(), cache, out, table, lengths, table.stride(0), cache.stride(0), q.shape[3] ** -0.5,
        WINDOW=window or 0, SIZE=cache.shape[3],
        WIDE=not q.is_cuda,  # the interpreter would multiply the integers that stand for bfloat16
        **launch(queries, dim, q.element_size()),
    )  # fmt: skip
    return out
