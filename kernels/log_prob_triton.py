"""Triton kernels under log_prob.py: the parts of a distribution, their combination, and the gradient of logits.

Bytes: forward reads each logit once; backward reads it once and writes its gradient once. That is the floor.
Everything is computed in float32. No autotuning: `LAUNCH` holds the one configuration of each kernel, which the
tests compile ahead of time to see that no register spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Banned

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # stands for log 0 where a probability of 0 multiplies it

# A block is 16 KiB of logits: wide loads in flight without spilling, with several programs on a multiprocessor.
LAUNCH = {
    "stats": {"BLOCK_BYTES": 16384, "num_warps": 8},
    "combine": {"BLOCK": 256, "num_warps": 4},
    "gradient": {"BLOCK_BYTES": 8192, "num_warps": 4},
}
VECTOR_BYTES = 16  # the widest load of one thread

# Below this many programs a GPU is not full, and long rows are split between several.
FULL = 1024


@triton.jit
def _ban(x, columns, is_early, banned, NUM_BANNED: tl.constexpr):
    if NUM_BANNED:  # noqa: SIM102 (decided when the kernel is compiled, the other one when it runs)
        if is_early:
            for k in tl.static_range(NUM_BANNED):
                x = tl.where(columns == tl.load(banned + k).to(tl.int32), -float("inf"), x)
    return x


@triton.jit
def _update(x, maximum, total, weighted, scale):
    """One more block `(LANES, VECTOR)` into the running parts of each lane; `scale` is log2(e) / T.

    Each lane, not the block, has its own maximum, so no thread waits for another before the row ends. The
    difference comes before the product: a product with large logits would round away what matters.
    """
    grown = tl.maximum(maximum, tl.max(x, 1))
    finite = tl.where(grown == -float("inf"), 0.0, grown)
    y = (x - finite[:, None]) * scale
    exp = tl.exp2(y)
    shift = tl.maximum((maximum - finite) * scale, LOWEST)
    old = tl.exp2(shift)
    weighted = old * (weighted + shift * total) + tl.sum(exp * tl.maximum(y, LOWEST), 1)
    return grown, old * total + tl.sum(exp, 1), weighted


@triton.jit
def stats_kernel(
    logits, tokens, rows, early, banned, out, num_rows, row_stride, num_columns, split_columns, scale,
    HAS_ROWS: tl.constexpr, NUM_BANNED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program reads the columns [split * split_columns, ...) of one row and writes its part of `out`
    `(splits, 4, N)`."""
    n = tl.program_id(0)
    split = tl.program_id(1)
    BLOCK: tl.constexpr = LANES * VECTOR
    row = tl.load(rows + n).to(tl.int64) if HAS_ROWS else n.to(tl.int64)
    base = logits + row * row_stride
    token = tl.load(tokens + n)
    is_early = (tl.load(early + n) != 0) if NUM_BANNED else False
    first = split * split_columns
    last = tl.minimum(first + split_columns, num_columns)
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full((LANES,), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    # whole blocks without a mask, which would keep loads from being wide; then what remains
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        x = tl.load(base + start + lane).to(tl.float32)
        x = _ban(x, start + lane, is_early, banned, NUM_BANNED)
        maximum, total, weighted = _update(x, maximum, total, weighted, scale)
    if whole < last:
        x = tl.load(base + whole + lane, mask=whole + lane < last, other=-float("inf")).to(tl.float32)
        x = _ban(x, whole + lane, is_early, banned, NUM_BANNED)
        maximum, total, weighted = _update(x, maximum, total, weighted, scale)
    row_maximum = tl.max(maximum, 0)
    shift = tl.maximum((maximum - tl.where(row_maximum == -float("inf"), 0.0, row_maximum)) * scale, LOWEST)
    old = tl.exp2(shift)
    here = (token >= first) & (token < last)
    out += split.to(tl.int64) * 4 * num_rows + n
    tl.store(out, row_maximum)
    tl.store(out + num_rows, tl.sum(old * total, 0))
    tl.store(out + 2 * num_rows, tl.sum(old * (weighted + shift * total), 0) * LN_2)
    tl.store(out + 3 * num_rows, tl.load(base + token, mask=here, other=0.0).to(tl.float32))


# a number of rows equal to 1 would come as a constant, which has no `.to`, and one that divides by 16 as another kernel
@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def combine_kernel(
    parts, out, num_parts, num_rows, inverse_temperature, FINISH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Parts `(P, 4, N)`, added in their order, as one part `(4, N)`; with FINISH as log-prob, entropy, maximum and
    log of the total."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < num_rows
    stride = num_rows.to(tl.int64)
    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    for p in range(num_parts):
        maximum = tl.maximum(maximum, tl.load(parts + p * 4 * stride + n, mask=mask, other=0.0))
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for p in range(num_parts):
        part = parts + p * 4 * stride + n
        shift = tl.load(part, mask=mask, other=0.0) - finite
        shift = tl.maximum(shift * inverse_temperature, LOWEST)
        old = tl.exp2(shift * LOG2_E)
        part_total = tl.load(part + stride, mask=mask, other=1.0)
        total += old * part_total
        weighted += old * (tl.load(part + 2 * stride, mask=mask, other=0.0) + shift * part_total)
        target += tl.load(part + 3 * stride, mask=mask, other=0.0)
    if FINISH:
        log_total = tl.log(total)
        tl.store(out + n, (target - maximum) * inverse_temperature - log_total, mask=mask)
        tl.store(out + stride + n, log_total - weighted / total, mask=mask)
        tl.store(out + 2 * stride + n, maximum, mask=mask)
        tl.store(out + 3 * stride + n, log_total, mask=mask)
    else:
        tl.store(out + n, maximum, mask=mask)
        tl.store(out + stride + n, total, mask=mask)
        tl.store(out + 2 * stride + n, weighted, mask=mask)
        tl.store(out + 3 * stride + n, target, mask=mask)


@triton.jit
def _gradient(x, columns, local, maximum, scale, slope, factor, at_token):
    y = (x - maximum) * scale
    grad = tl.exp2(y) * (slope * tl.maximum(y, LOWEST) + factor)
    return tl.where(columns == local, grad + at_token, grad)


@triton.jit
def gradient_kernel(
    logits, out, tokens, inverse, early, banned, saved, grad_log_prob, grad_entropy, num_rows, row_stride,
    out_stride, num_columns, width, num_blocks, inverse_temperature,
    HAS_ROWS: tl.constexpr, HAS_ENTROPY: tl.constexpr, NUM_BANNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program turns a block of one row into its gradient; `saved` is `(3, N)`: maximum, log total, entropy.
    `inverse` `(R,)` is the place of a row among the selected ones, -1 for the others, whose gradient is 0."""
    pid = tl.program_id(0)
    row = pid // num_blocks
    start = (pid % num_blocks) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    target = out + row.to(tl.int64) * out_stride + columns
    n = tl.load(inverse + row).to(tl.int32) if HAS_ROWS else row
    if n < 0:
        tl.store(target, tl.zeros((BLOCK,), out.dtype.element_ty), mask=columns < width)
    else:
        source = logits + row.to(tl.int64) * row_stride + columns
        local = tl.load(tokens + n).to(tl.int32)
        maximum = tl.load(saved + n)
        log_total = tl.load(saved + num_rows + n)
        at_token = tl.load(grad_log_prob + n) * inverse_temperature
        # see reference.py; here y is in units of log 2
        inverse_total = tl.exp2(-log_total * LOG2_E)
        factor = -at_token
        slope = 0.0
        if HAS_ENTROPY:
            slope = -tl.load(grad_entropy + n) * inverse_temperature
            factor += slope * (tl.load(saved + 2 * num_rows + n) - log_total)
        slope *= inverse_total * LN_2
        factor *= inverse_total
        scale = inverse_temperature * LOG2_E
        is_early = (tl.load(early + n) != 0) if NUM_BANNED else False
        if start + BLOCK <= num_columns:
            x = tl.load(source).to(tl.float32)
            x = _ban(x, columns, is_early, banned, NUM_BANNED)
            grad = _gradient(x, columns, local, maximum, scale, slope, factor, at_token)
            tl.store(target, grad.to(out.dtype.element_ty))
        else:  # the last columns, and the padding after them
            x = tl.load(source, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
            x = _ban(x, columns, is_early, banned, NUM_BANNED)
            grad = _gradient(x, columns, local, maximum, scale, slope, factor, at_token)
            grad = tl.where(columns < num_columns, grad, 0.0)
            tl.store(target, grad.to(out.dtype.element_ty), mask=columns < width)


# -- the functions of reference.py, by these kernels ---------------------------------------------------------------


def stats_config(itemsize: int) -> dict[str, int]:
    vector = VECTOR_BYTES // itemsize
    return {
        "VECTOR": vector,
        "LANES": LAUNCH["stats"]["BLOCK_BYTES"] // VECTOR_BYTES,
        "num_warps": LAUNCH["stats"]["num_warps"],
    }


def gradient_config(itemsize: int) -> dict[str, int]:
    return {"BLOCK": LAUNCH["gradient"]["BLOCK_BYTES"] // itemsize, "num_warps": LAUNCH["gradient"]["num_warps"]}


def _banned_arguments(banned: Banned | None, nothing: Tensor) -> tuple[Tensor, Tensor, int]:
    if banned is None:
        return nothing, nothing, 0
    return banned[0].view(torch.uint8), banned[1], len(banned[1])


def token_stats(
    logits: Tensor, tokens: Tensor, rows: Tensor | None, banned: Banned | None, temperature: float
) -> Tensor:
    """See reference.py. Few long rows come as several parts `(P, 4, N)`."""
    config = stats_config(logits.element_size())
    block = config["LANES"] * config["VECTOR"]
    num_rows, num_columns = len(tokens), logits.shape[1]
    splits = min(triton.cdiv(FULL, max(1, num_rows)), triton.cdiv(num_columns, 4 * block), 64)
    split_columns = triton.cdiv(triton.cdiv(num_columns, max(1, splits)), block) * block
    splits = max(1, triton.cdiv(num_columns, max(1, split_columns)))
    out = torch.empty(splits, 4, num_rows, dtype=torch.float32, device=logits.device)
    early, ids, num_banned = _banned_arguments(banned, tokens)
    if num_rows:
        stats_kernel[(num_rows, splits)](
            logits, tokens, tokens if rows is None else rows, early, ids, out, num_rows, logits.stride(0),
            num_columns, split_columns, 1.4426950408889634 / temperature,
            HAS_ROWS=rows is not None, NUM_BANNED=num_banned, **config,
        )  # fmt: skip
    return out


def _combine(parts: Tensor, temperature: float, finish: bool) -> Tensor:
    num_rows = parts.shape[2]
    out = torch.empty(4, num_rows, dtype=torch.float32, device=parts.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, LAUNCH["combine"]["BLOCK"]),)
        combine_kernel[grid](parts, out, len(parts), num_rows, 1 / temperature, FINISH=finish, **LAUNCH["combine"])
    return out


def merge_stats(parts: Tensor, temperature: float) -> Tensor:
    """See reference.py."""
    return parts[0] if len(parts) == 1 else _combine(parts, temperature, finish=False)


def combine_stats(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.py."""
    log_probs, entropy, maximum, log_total = _combine(parts, temperature, finish=True)
    return log_probs, entropy, maximum, log_total


def token_gradient(
    logits: Tensor,
    num_valid: int,
    tokens: Tensor,
    rows: Tensor | None,
    banned: Banned | None,
    temperature: float,
    saved: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    out: Tensor,
) -> None:
    """See reference.py."""
    config = gradient_config(logits.element_size())
    num_rows, width = logits.shape
    num_blocks = triton.cdiv(width, config["BLOCK"])
    if not num_rows * num_blocks:
        return
    grad_log_prob, grad_entropy = (None if grad is None else grad.contiguous() for grad in grads)
    if grad_log_prob is None:
        grad_log_prob = torch.zeros_like(saved[0])
    inverse = tokens
    if rows is not None:
        inverse = torch.full((num_rows,), -1, dtype=torch.int32, device=logits.device)
        inverse[rows] = torch.arange(len(rows), dtype=torch.int32, device=logits.device)
    early, ids, num_banned = _banned_arguments(banned, tokens)
    gradient_kernel[(num_rows * num_blocks,)](
        logits, out, tokens, inverse, early, ids, torch.stack(saved), grad_log_prob,
        grad_log_prob if grad_entropy is None else grad_entropy, len(tokens), logits.stride(0), out.stride(0),
        num_valid, width, num_blocks, 1 / temperature,
        HAS_ROWS=rows is not None, HAS_ENTROPY=grad_entropy is not None, NUM_BANNED=num_banned, **config,
    )  # fmt: skip
