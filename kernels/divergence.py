"""KL(policy || teacher) over the whole vocabulary, from the hidden states and heads of both, without the logits.

As linear_log_prob.py, and with its parts: the vocabulary is cut into slices, of each both logits x (the policy's) and y
(the teacher's) are made, divided by the temperature, and reduced to five numbers a row:

    max x, sum of exp(x - max x), max y, sum of exp(y - max y), sum of exp(x - max x) ((x - max x) - (y - max y)).

Such parts combine exactly, those of slices as those of ranks, which exchange them in one all-gather of `(5, N)`.
Backward makes a slice of both once more, unless forward kept it: with log p and log q the two log-probs of a column,

    KL = sum of p (log p - log q);  d KL / d x = p (log p - log q - KL).

In plain torch on every device: its products are those of the heads, and what follows them reads a slice a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .linear_log_prob import CHUNK_BYTES, KEEP_BYTES, Gradients, Head, Options
from .log_prob import Banned, Vocabulary, check_shapes, gather_stats, make_vocabulary

_SLICES = 4  # tensors as large as a slice of logits that are there at once
_LOWEST = -1e5  # stands for log 0; its exponential is 0 in float64 too


def _above(x: Tensor, maximum: Tensor) -> Tensor:
    """`x` less a number of each row; what has no probability stays finite, so that its difference to another is 0."""
    return (x - maximum.unsqueeze(1)).clamp_min_(_LOWEST)


def _stats(x: Tensor, y: Tensor) -> Tensor:
    """`(1, 5, N)` of a slice."""
    if not x.shape[1]:  # all of a rank's columns are padding
        lowest, nothing = x.new_full((len(x),), torch.finfo(x.dtype).min), x.new_zeros(len(x))
        return torch.stack([lowest, nothing, lowest, nothing, nothing]).unsqueeze(0)
    maximum, other = (logits.amax(1).clamp_min(torch.finfo(x.dtype).min) for logits in (x, y))
    x, y = _above(x, maximum), _above(y, other)
    p = x.exp()
    weighted = (p * x.sub_(y)).sum(1)
    return torch.stack([maximum, p.sum(1), other, y.exp_().sum(1), weighted]).unsqueeze(0)


def _merge(parts: Tensor, temperature: float) -> Tensor:
    """Parts `(P, 5, N)` of distinct columns, already divided by the temperature, as one `(5, N)`."""
    maxima, totals, others, other_totals, weighted = parts.unbind(1)
    maximum, other = maxima.amax(0), others.amax(0)
    shift, other_shift = (maxima - maximum).clamp_min(_LOWEST), (others - other).clamp_min(_LOWEST)
    scale = shift.exp()
    return torch.stack([
        maximum, (scale * totals).sum(0), other, (other_shift.exp() * other_totals).sum(0),
        (scale * (weighted + (shift - other_shift) * totals)).sum(0),
    ])  # fmt: skip


def _logits(
    heads: tuple[Head, Head], columns: slice, vocabulary: Vocabulary, banned: Banned | None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Both slices, divided by the temperature; what is banned has none."""
    ids = torch.arange(columns.start, columns.stop, device=heads[0].x.device) + vocabulary.start
    found = []
    for head in heads:
        logits = head.logits(columns, keep)
        if vocabulary.temperature != 1:
            logits.div_(vocabulary.temperature)
        if banned is not None:
            logits.masked_fill_(banned[0].unsqueeze(1) & torch.isin(ids, banned[1]), -torch.inf)
        found.append(logits)
    return found[0], found[1]


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows, banned, options):
        inputs = hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows
        heads = _heads(inputs, options)
        room, kept, parts = options.keep_bytes, [], []
        for columns in heads[0].slices:
            num_bytes = 2 * len(heads[0].x) * (columns.stop - columns.start) * heads[0].wide.itemsize
            is_kept = num_bytes <= room
            room -= num_bytes if is_kept else 0
            both = _logits(heads, columns, options.vocabulary, banned, is_kept)
            kept.append(both if is_kept else None)
            parts.append(_stats(*both))
        empty = heads[0].x[:, :0].to(heads[0].wide)
        stats = gather_stats(torch.cat(parts or [_stats(empty, empty)]), options.vocabulary, _merge)
        maximum, total, other, other_total, weighted = _merge(stats, options.vocabulary.temperature)
        kl = weighted / total - total.log() + other_total.log()
        saved = maximum, total.log(), other, other_total.log(), kl
        ctx.save_for_backward(*inputs, *saved, *(banned or ()))
        ctx.options, ctx.kept = options, kept
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        inputs, (maximum, log_total, other, other_log_total, kl) = ctx.saved_tensors[:6], ctx.saved_tensors[6:11]
        banned, options = ctx.saved_tensors[11:] or None, ctx.options
        heads = _heads(inputs, options)
        kept, ctx.kept = ctx.kept or [None] * len(heads[0].slices), None  # let go of as they are used
        found = Gradients(heads[0], *ctx.needs_input_grad[:2])
        scale = (grad_kl / options.vocabulary.temperature).unsqueeze(1)
        for i, columns in enumerate(heads[0].slices):
            both, kept[i] = kept[i] or _logits(heads, columns, options.vocabulary, banned), None
            x, y = _above(both[0], maximum), _above(both[1], other)
            gap = y.neg_().add_(x).add_((other_log_total - log_total - kl).unsqueeze(1))
            grad = x.sub_(log_total.unsqueeze(1)).exp_().mul_(gap).mul_(scale)
            found.add(columns, grad.to(inputs[0].dtype))
            del both, x, y, gap, grad
        return *found.finish(inputs[4], options), *(None,) * 6


def _heads(inputs: Sequence[Any], options: Options) -> tuple[Head, Head]:
    hidden, weight, teacher_hidden, teacher_weight, rows, teacher_rows = inputs
    teacher = Head(teacher_hidden, teacher_weight, teacher_rows, options._replace(sequence_parallel=False))
    return Head(hidden, weight, rows, options), teacher


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    banned: Banned | None = None,
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
) -> Tensor:
    """KL(p || q) in nats of each row, p of `hidden @ weight.T` and q of `teacher_hidden @ teacher_weight.T`, in memory
    that does not grow with rows x vocabulary (Agarwal et al. 2023, arXiv:2306.13649, section 2, the reverse KL).

    Gradient flows to `hidden` and `weight` alone, as in `linear_log_probs`: that of `hidden` is summed over the group.

    Args:
        hidden, weight: `(..., H)` and `(V, H)`, the policy's, as for `linear_log_probs`.
        teacher_hidden, teacher_weight: `(..., G)` and `(V, G)`, the teacher's, of any width and of the same type. Under
            sequence parallelism too all ranks hold the same teacher's states.
        rows, teacher_rows: `(N,)` int64 into the flattened states of each, whose rows are compared in this order; those
            of the policy increase. None: all.
        vocab_start, vocab_size, temperature, group, sequence_parallel: as for `linear_log_probs`, of both alike.
        banned: (bool `(N,)`, ids `(K,)`): those tokens have no probability in those rows, in p nor in q.
        chunk_bytes: of a slice of logits; None for 4 MiB on a CPU and 64 MiB on a GPU, of which four are there at once.
        keep_bytes: of logits kept from forward; None for 48 MiB and 1 GiB.

    Returns:
        `(N,)`, or without `rows` and of a whole sequence shaped as `hidden` without its last dimension, in float32
        (float64 for float64).
        Infinity has a stand-in: a column that q lacks and p has counts 1e5 nats.

    Raises:
        ValueError: shapes or types of both do not fit each other, or `sequence_parallel` has no group.
    """
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel=True needs the group that the sequence is split over")
    if len(weight) != len(teacher_weight) or hidden.dtype is not teacher_hidden.dtype:
        raise ValueError(
            f"a head of {len(weight)} columns on {hidden.dtype} and the teacher's of {len(teacher_weight)} on"
            f" {teacher_hidden.dtype} must be of one vocabulary and type"
        )
    x, y = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    num_rows = len(x) * (dist.get_world_size(group) if sequence_parallel else 1)
    compared = rows if rows is not None else range(num_rows)
    if len(compared) != (len(y) if teacher_rows is None else len(teacher_rows)):
        raise ValueError(f"{len(compared)} rows of the policy for {len(y)} of the teacher")
    if banned is not None:
        banned = banned[0].reshape(-1), banned[1]
        check_shapes(banned[0], rows, num_rows, banned)
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    chunk_bytes = CHUNK_BYTES[kind] // _SLICES if chunk_bytes is None else chunk_bytes
    keep_bytes = KEEP_BYTES[kind] if keep_bytes is None else keep_bytes
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    vocabulary = make_vocabulary(vocab_start, weight.shape[0], vocab_size, temperature, group)
    options = Options(vocabulary, sequence_parallel, chunk_bytes, keep_bytes if needs_grad else 0)
    kl = _LinearKL.apply(x, weight, y.detach(), teacher_weight.detach(), rows, teacher_rows, banned, options)
    return kl if rows is not None or sequence_parallel else kl.view(hidden.shape[:-1])
