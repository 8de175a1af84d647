"""Language-model head, log-probability and entropy without the logits.

The vocabulary is cut into slices. Forward multiplies the selected rows with one slice of the weight after another
and reduces each slice of logits to four numbers a row, which combine as those of ranks do (log_prob.py). Backward
knows the log-sum-exp, so it needs no order either: it recomputes a slice, turns it into its gradient in place, and
is done with it. Slices of the vocabulary, and not chunks of rows, because then each row of the weight's gradient
comes from one matrix product over all tokens, accumulated inside it and rounded once; only the hidden gradient,
smaller by far, is summed over slices, in float32.

The idea of never holding the logits: Wijmans et al. 2024, "Cut Your Losses", arXiv:2411.09009.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .log_prob import Banned, Vocabulary, check_shapes, check_tokens, gather_stats, implementation, make_vocabulary

# Bytes of one slice of logits, and of logits that forward keeps so that backward need not recompute them.
# A slice must keep a matrix product efficient: narrower ones read the hidden states more often.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
KEEP_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}
MIN_COLUMNS = 64


def _slices(num_rows: int, num_columns: int, itemsize: int, chunk_bytes: int) -> list[slice]:
    """Slices of equal width, but for the last, in multiples of `MIN_COLUMNS`."""
    most = max(MIN_COLUMNS, chunk_bytes // max(1, num_rows * itemsize) // MIN_COLUMNS * MIN_COLUMNS)
    count = max(1, -(-num_columns // most))
    width = -(-num_columns // count // MIN_COLUMNS) * MIN_COLUMNS
    return [slice(i, min(i + width, num_columns)) for i in range(0, num_columns, max(1, width))]


def wide_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` of matrices, in float32 at least: logits between 16 and 32 would lie an eighth apart in bfloat16."""
    if a.element_size() >= 4:
        return torch.mm(a, b, out=out)
    if a.is_cuda:  # where products of 16 bits add up in float32 in any case
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def wide_addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `a @ b` of matrices to a total in float32 at least, inside the product where torch has that: nothing is
    rounded to 16 bits, and nothing of its size comes and goes."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += wide_mm(a, b)


class Head:
    """The selected hidden states and the slices of the weight that they are multiplied with."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: Tensor | None, options: Options):
        self.weight = weight
        if options.sequence_parallel:
            hidden = _gather(hidden, options.vocabulary.group)
        self.num_rows = len(hidden)
        self.x = hidden if rows is None else hidden[rows]
        self.wide = torch.promote_types(hidden.dtype, torch.float32)  # the logits' type
        self.slices = _slices(len(self.x), options.vocabulary.num_valid, self.wide.itemsize, options.chunk_bytes)
        self._buffers: dict[torch.dtype, Tensor] = {}

    def logits(self, columns: slice, keep: bool = False) -> Tensor:
        """`(N, slice)`; the next call overwrites it unless it is to be kept."""
        return wide_mm(self.x, self.weight[columns].T, None if keep else self.buffer(columns, self.wide))

    def buffer(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """Room for `(N, slice)`, the same one for every slice."""
        num_rows, width = len(self.x), columns.stop - columns.start
        if dtype not in self._buffers:
            self._buffers[dtype] = self.x.new_empty(num_rows * self.slices[0].stop, dtype=dtype)
        return self._buffers[dtype][: num_rows * width].view(num_rows, width)


class Options(NamedTuple):
    vocabulary: Vocabulary
    sequence_parallel: bool
    chunk_bytes: int
    keep_bytes: int


class Gradients:
    """Of the hidden states and of the weight, each if it is needed, from those of one slice of logits after another."""

    def __init__(self, head: Head, needs_hidden: bool, needs_weight: bool):
        self.head = head
        self.x = torch.zeros_like(head.x, dtype=head.wide) if needs_hidden else None
        self.weight = torch.empty_like(head.weight) if needs_weight else None

    def add(self, columns: slice, grad: Tensor) -> None:
        """The gradient of a slice `(N, slice)`, in the type of the hidden states."""
        if self.weight is not None:
            torch.mm(grad.T, self.head.x, out=self.weight[columns])
        if self.x is not None:
            wide_addmm_(self.x, grad, self.head.weight[columns])

    def finish(self, rows: Tensor | None, options: Options) -> tuple[Tensor | None, Tensor | None]:
        """Both as those of what was given."""
        if self.weight is not None:
            self.weight[options.vocabulary.num_valid :] = 0
        x = None if self.x is None else self.x.to(self.head.x.dtype)
        return None if x is None else _scatter(x, rows, self.head.num_rows, options), self.weight


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, rows, banned, options):
        vocabulary, temperature = options.vocabulary, options.vocabulary.temperature
        head = Head(hidden, weight, rows, options)
        run = implementation(hidden)
        room = options.keep_bytes
        kept: list[Tensor | None] = []
        parts = []
        for columns in head.slices:
            num_bytes = len(tokens) * (columns.stop - columns.start) * head.wide.itemsize
            is_kept = num_bytes <= room
            room -= num_bytes if is_kept else 0
            logits = head.logits(columns, is_kept)
            kept.append(logits if is_kept else None)
            start = vocabulary.start + columns.start
            parts.append(run.token_stats(logits, tokens - start, None, _from(banned, start), temperature))
        if not parts:  # all of this rank's columns are padding
            parts.append(run.token_stats(head.x[:, :0].to(head.wide), tokens, None, None, temperature))
        stats = gather_stats(torch.cat(parts), vocabulary, run.merge_stats)
        log_probs, entropy, maximum, log_total = run.combine_stats(stats, temperature)
        ctx.save_for_backward(hidden, weight, tokens, rows, maximum, log_total, entropy, *(banned or ()))
        ctx.options, ctx.kept = options, kept
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, *grads):
        nothing = (None,) * 6
        if all(grad is None for grad in grads):
            return nothing
        hidden, weight, tokens, rows, maximum, log_total, entropy, *banned = ctx.saved_tensors
        options, vocabulary = ctx.options, ctx.options.vocabulary
        head = Head(hidden, weight, rows, options)
        run = implementation(hidden)
        kept, ctx.kept = ctx.kept or [None] * len(head.slices), None  # they become gradients: good for once
        found = Gradients(head, *ctx.needs_input_grad[:2])
        for i, columns in enumerate(head.slices):
            logits, kept[i] = head.logits(columns) if kept[i] is None else kept[i], None
            # over the logits, or where the products that follow take a narrower type, beside them
            grad = logits if head.wide is hidden.dtype else head.buffer(columns, hidden.dtype)
            start = vocabulary.start + columns.start
            run.token_gradient(
                logits, logits.shape[1], tokens - start, None, _from(tuple(banned) or None, start),
                vocabulary.temperature, (maximum, log_total, entropy), grads, out=grad,
            )  # fmt: skip
            found.add(columns, grad)
            del logits, grad
        return *found.finish(rows, options), *nothing[2:]


def _from(banned: Banned | None, start: int) -> Banned | None:
    """Banned ids as indices of the columns from `start` on."""
    return None if banned is None else (banned[0], banned[1] - start)


def _gather(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`(R / ranks, H)` of each rank as `(R, H)`."""
    whole = hidden.new_empty(len(hidden) * dist.get_world_size(group), hidden.shape[1])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _scatter(grad: Tensor, rows: Tensor | None, num_rows: int, options: Options) -> Tensor:
    """The gradient `(N, H)` of selected rows, summed over the ranks, as that of the hidden states given."""
    group = options.vocabulary.group
    if group is not None and not options.sequence_parallel:
        dist.all_reduce(grad, group=group)  # of the selected rows alone
    if rows is not None:
        grad = grad.new_zeros(num_rows, grad.shape[1]).index_copy_(0, rows, grad)
    if not options.sequence_parallel:
        return grad
    mine = grad.new_empty(num_rows // dist.get_world_size(group), grad.shape[1])
    dist.reduce_scatter_tensor(mine, grad, group=group)
    return mine


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    rows: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    banned: Banned | None = None,
    checked: bool = False,
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs(hidden @ weight.T, tokens)` in memory that does not grow with tokens x vocabulary.

    Beyond inputs and their gradients it holds one slice of logits (`chunk_bytes`), the logits kept for backward
    (`keep_bytes`), the selected hidden states and their gradient. Logits are float32 at least, and their gradient has
    the type of `hidden`, as that of a linear layer does. With `group` it stands where Megatron's ColumnParallelLinear
    stood: the hidden gradient is summed over the group, the weight's gradient is this rank's own, and is returned,
    never added to a `main_grad`.

    Args:
        hidden: `(..., H)`. With `sequence_parallel`, this rank's part of the leading dimension.
        weight: `(V, H)`, this rank's rows, of the same type.
        tokens: `(...)` as the gathered hidden states, or `(N,)` with `rows`.
        rows: `(N,)` int64, increasing, into the flattened (and gathered) hidden states. Only these are multiplied.
        vocab_start, vocab_size, temperature, group, banned: as for `token_log_probs`.
        checked: `check_tokens` has seen these tokens on the CPU, where it costs no synchronisation.
        sequence_parallel: hidden states are gathered over `group`, and their gradient is reduce-scattered.
        chunk_bytes: of a slice of logits; None for 16 MiB on a CPU and 256 MiB on a GPU.
        keep_bytes: of logits kept from forward, which saves their second product; None for 48 MiB and 1 GiB.

    Returns:
        `log_probs` and `entropy`, shaped as `tokens`, in float32 (float64 for float64), differentiable.

    Raises:
        ValueError: as for `token_log_probs`, or `sequence_parallel` without a group.
    """
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel=True needs the group that the sequence is split over")
    vocabulary = make_vocabulary(vocab_start, weight.shape[0], vocab_size, temperature, group)
    num_rows = hidden.numel() // hidden.shape[-1] * (dist.get_world_size(group) if sequence_parallel else 1)
    if banned is not None:
        banned = banned[0].reshape(-1), banned[1]
    flat = tokens.reshape(-1)
    if checked:
        check_shapes(flat, rows, num_rows, banned)
    else:
        check_tokens(flat, rows, num_rows, vocabulary.ids, banned)
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    chunk_bytes = CHUNK_BYTES[kind] if chunk_bytes is None else chunk_bytes
    keep_bytes = KEEP_BYTES[kind] if keep_bytes is None else keep_bytes
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = Options(vocabulary, sequence_parallel, chunk_bytes, keep_bytes if needs_grad else 0)
    x = hidden.reshape(-1, hidden.shape[-1])
    log_probs, entropy = _LinearLogProbs.apply(x, weight, flat, rows, banned, options)
    return log_probs.view(tokens.shape), entropy.view(tokens.shape)
