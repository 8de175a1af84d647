"""Triton kernels under attention.py: a program for each sequence and group of heads, over the positions it has; where
those are too few for the device, a sequence is split over several (Dao et al. 2023, flash-decoding).

Into how many follows from shapes alone, so that a captured step stays as it is; where it is cut, from its length. What
each program has summed is put together in order, by a second kernel, so that the result is the same each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_BYTES = 1 << 13  # of keys read at once: three blocks of keys and values are under way
_PROGRAMS = 528  # that are worth having: four on each multiprocessor of an H100
_LEAST = 256  # positions of the longest sequence that a program should have


@triton.jit
def attention_kernel(
    q, cache, out, sums, table, lengths, columns, values_at, scale,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`columns`: from one row of the table to the next. `values_at`: where values begin in the cache. `SIZE`: positions
    of a block of it. `ROWS` and `WIDTH` are `QUERIES` and `DIM` as a matrix product takes them: powers of two, 16 at
    least. `SPLITS`: programs to a sequence; of several, `out` and `sums` take what `merge_kernel` needs. `WIDE`:
    products in float32 whatever the type."""
    row = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    groups = tl.num_programs(1)
    length = tl.load(lengths + row).to(tl.int32)
    n = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    t0 = tl.arange(0, BLOCK)
    here = (n[:, None] < QUERIES) & (d[None, :] < DIM)
    heads = (row.to(tl.int64) * groups + group) * QUERIES + n
    queries = tl.load(q + heads[:, None] * DIM + d[None, :], mask=here, other=0.0)
    if WIDE:
        queries = queries.to(tl.float32)
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    end = length
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK) * BLOCK
        begin += split * share
        end = tl.minimum(begin + share, length)
    for start in range(begin, end, BLOCK):
        t = start + t0
        inside = t < end
        block = tl.load(table + row.to(tl.int64) * columns + t // SIZE, mask=inside, other=0).to(tl.int64)
        position = (block * groups + group) * SIZE + t % SIZE
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
    if SPLITS > 1:
        heads = heads * SPLITS + split
        tl.store(sums + 2 * heads, maximum, mask=n < QUERIES)
        tl.store(sums + 2 * heads + 1, total, mask=n < QUERIES)
    else:
        result = result / total[:, None]
    tl.store(out + heads[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=here)


@triton.jit
def merge_kernel(parts, sums, out, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """A program for each sequence and head: what the parts have, scaled to their common maximum. A part that had no
    positions has the maximum -inf, and so no weight."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    maximum = tl.load(sums + 2 * head * SPLITS)
    for split in range(1, SPLITS):
        maximum = tl.maximum(maximum, tl.load(sums + 2 * (head * SPLITS + split)))
    total = 0.0
    result = tl.zeros((WIDTH,), tl.float32)
    for split in range(SPLITS):
        place = head * SPLITS + split
        weight = tl.exp(tl.load(sums + 2 * place) - maximum)
        total += weight * tl.load(sums + 2 * place + 1)
        result += weight * tl.load(parts + place * DIM + d, mask=d < DIM, other=0.0)
    tl.store(out + head * DIM + d, (result / total).to(out.dtype.element_ty), mask=d < DIM)


def launch(queries: int, dim: int, itemsize: int) -> dict[str, int]:
    """The kernel's constants for n query heads of a size."""
    rows, width = (max(16, triton.next_power_of_2(size)) for size in (queries, dim))
    block = min(128, max(16, _BLOCK_BYTES // (width * itemsize)))
    return {"QUERIES": queries, "DIM": dim, "ROWS": rows, "WIDTH": width, "BLOCK": block, "num_warps": 4}


def merge_launch(dim: int) -> dict[str, int]:
    """The constants of the kernel that puts parts together."""
    return {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "num_warps": 1}


def num_splits(sequences: int, groups: int, positions: int) -> int:
    """Programs to a sequence of so many positions at most: a power of two, as each number is a kernel of its own."""
    useful = min(_PROGRAMS // (sequences * groups), positions // _LEAST)
    return 1 << max(0, useful.bit_length() - 1)


def cached_attention(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """See reference.py."""
    batch, groups, queries, dim = q.shape
    positions = table.shape[1] * cache.shape[3]
    splits = num_splits(batch, groups, min(positions, window or positions))
    out = q.new_empty(q.shape)
    is_split = splits > 1
    parts = out.new_empty(batch, groups, queries, splits, dim, dtype=torch.float32) if is_split else out
    sums = out.new_empty(batch, groups, queries, splits, 2, dtype=torch.float32) if is_split else out
    attention_kernel[batch, groups, splits](
        q.contiguous(), cache, parts, sums, table, lengths, table.stride(0), cache.stride(0), dim**-0.5,
        WINDOW=window or 0, SIZE=cache.shape[3], SPLITS=splits,
        WIDE=not q.is_cuda,  # the interpreter would multiply the integers that stand for bfloat16
        **launch(queries, dim, q.element_size()),
    )  # fmt: skip
    if is_split:
        merge_kernel[batch * groups * queries,](parts, sums, out, SPLITS=splits, **merge_launch(dim))
    return out
