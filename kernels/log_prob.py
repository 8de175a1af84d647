"""Log-probability of tokens and entropy of their distributions, over a vocabulary that ranks may share.

Every holder of columns (a rank, a slice of columns, a split of a long row) reduces them to four numbers a row:

    maximum m, sum of exp((x - m) / T), sum of exp((x - m) / T) (x - m) / T, and the token's logit if it is there.

Such parts combine exactly (the online softmax of Milakov & Gimelshein 2018, arXiv:1805.02867, with a second
moment), always in the same order. Ranks exchange them in one all-gather of float32 `(4, N)`; with one rank the
same code runs without it. The third number gives the entropy and costs no memory traffic. Backward reads the
logits once more and needs of forward only the log-sum-exp and the entropy of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .dispatch import use_triton

Banned = tuple[Tensor, Tensor]


def implementation(x: Tensor) -> Any:
    """The module whose token_stats, combine_stats and token_gradient run for `x`."""
    if not use_triton(x):
        return reference
    from . import log_prob_triton

    return log_prob_triton


class Vocabulary(NamedTuple):
    """The columns that a rank holds of a vocabulary, and how they become probabilities."""

    start: int  # global id of the first column
    num_columns: int  # columns held
    size: int  # true size of the whole vocabulary
    temperature: float
    group: dist.ProcessGroup | None

    @property
    def num_valid(self) -> int:
        """Columns held that are not padding."""
        return max(0, min(self.num_columns, self.size - self.start))

    @property
    def ids(self) -> range:
        """Tokens that have a probability on some rank."""
        return range(self.size) if self.group is not None else range(self.start, self.start + self.num_valid)


def make_vocabulary(start: int, num_columns: int, size: int | None, temperature: float, group) -> Vocabulary:
    """Raises ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    return Vocabulary(start, num_columns, size if size is not None else start + num_columns, temperature, group)


def check_tokens(tokens: Tensor, rows: Tensor | None, num_rows: int, ids: range, banned: Banned | None) -> None:
    """Refuses what no distribution gives; one synchronisation on CUDA.

    Args:
        tokens: `(N,)`.
        rows: `(N,)` or None, and `num_rows` that it may select from.
        ids: of tokens that have a probability.
        banned: as for `token_log_probs`.

    Raises:
        ValueError: a token outside the vocabulary or banned; rows that do not increase or do not exist; shapes.
    """
    check_shapes(tokens, rows, num_rows, banned)
    if not len(tokens):
        return
    bad = outside = (tokens < ids.start) | (tokens >= ids.stop)
    if banned is not None:
        bad = outside | (banned[0] & (tokens.unsqueeze(1) == banned[1]).any(1))
    any_bad = bad.any()
    if rows is not None:
        any_bad = any_bad | (rows[1:] <= rows[:-1]).any() | (rows[0] < 0) | (rows[-1] >= num_rows)
    if not bool(any_bad):
        return
    if bool(outside.any()):
        raise ValueError(f"token id {int(tokens[outside][0])} lies outside the vocabulary [{ids.start}, {ids.stop})")
    if bool(bad.any()):
        raise ValueError(f"token id {int(tokens[bad][0])} is banned where it stands")
    raise ValueError(f"rows must increase and lie in [0, {num_rows})")


def check_shapes(tokens: Tensor, rows: Tensor | None, num_rows: int, banned: Banned | None) -> None:
    """What of `check_tokens` can be seen without the numbers."""
    selected = num_rows if rows is None else len(rows)
    if len(tokens) != selected:
        raise ValueError(f"{len(tokens)} tokens for {selected} rows")
    if banned is not None and banned[0].shape != tokens.shape:
        raise ValueError(f"banned rows have shape {tuple(banned[0].shape)}, tokens {tuple(tokens.shape)}")


def gather_stats(parts: Tensor, vocabulary: Vocabulary, merge: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Parts `(P, K, N)` of this rank, which `merge` makes one of, as `(ranks, K, N)` of all ranks in their order;
    without a group as they are."""
    group = vocabulary.group
    if group is None or not parts.shape[-1]:
        return parts
    mine = merge(parts, vocabulary.temperature)
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather_into_tensor(everyone.view(-1, mine.shape[1]), mine, group=group)
    return everyone


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, rows, vocabulary, banned, inplace_grad):
        run = implementation(logits)
        local = tokens - vocabulary.start
        ids = None if banned is None else (banned[0], banned[1] - vocabulary.start)
        valid = logits[:, : vocabulary.num_valid]
        parts = run.token_stats(valid, local, rows, ids, vocabulary.temperature)
        stats = gather_stats(parts, vocabulary, run.merge_stats)
        log_probs, entropy, maximum, log_total = run.combine_stats(stats, vocabulary.temperature)
        ctx.save_for_backward(logits, local, rows, maximum, log_total, entropy, *(ids or ()))
        ctx.vocabulary, ctx.inplace_grad = vocabulary, inplace_grad
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, *grads):
        logits, local, rows, maximum, log_total, entropy, *ids = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return None, None, None, None, None, None
        if ctx.inplace_grad:
            # a second backward would read gradients as logits: autograd refuses it by this count
            torch.autograd.graph.increment_version(logits)
        implementation(logits).token_gradient(
            logits,
            ctx.vocabulary.num_valid,
            local,
            rows,
            tuple(ids) or None,
            ctx.vocabulary.temperature,
            (maximum, log_total, entropy),
            grads,
            out=(out := logits.detach() if ctx.inplace_grad else torch.empty_like(logits)),
        )
        return out, None, None, None, None, None


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    rows: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    banned: Banned | None = None,
    inplace_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy (nats) of the distribution that it was drawn from.

    The result does not depend on how many ranks share the vocabulary, but for rounding, and is the same each time.

    Args:
        logits: `(..., V)`, this rank's columns of the vocabulary, in any floating type. Rows may lie any distance
            apart; leading dimensions that no view flattens (`logits[:, :-1]`) are copied: select `rows` instead.
        tokens: `(...)`, global token ids; `(N,)` with `rows`.
        rows: `(N,)` int64, increasing: the rows of the flattened logits that are read. Others get gradient 0.
        vocab_start: global id of the first local column.
        vocab_size: true size of the whole vocabulary; later columns are padding and have no probability.
        temperature: divides the logits.
        group: the ranks among which the vocabulary is split; None where it is whole.
        banned: (bool of `tokens`' shape, ids `(K,)`): those tokens have no probability in those rows. K is small.
        inplace_grad: backward writes the gradient over the logits, which nobody may read any more.

    Returns:
        `log_probs` and `entropy`, shaped as `tokens`, in float32 (float64 for float64 logits), differentiable.

    Raises:
        ValueError: a token lies outside the vocabulary or is banned in its row; rows or a shape do not fit.
    """
    vocabulary = make_vocabulary(vocab_start, logits.shape[-1], vocab_size, temperature, group)
    if rows is None and tokens.shape != logits.shape[:-1]:
        raise ValueError(f"tokens {tuple(tokens.shape)} do not fit logits {tuple(logits.shape)}")
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    flat_banned = None if banned is None else (banned[0].reshape(-1), banned[1])
    check_tokens(tokens.reshape(-1), rows, len(flat), vocabulary.ids, flat_banned)
    log_probs, entropy = _TokenLogProbs.apply(flat, tokens.reshape(-1), rows, vocabulary, flat_banned, inplace_grad)
    return log_probs.view(tokens.shape), entropy.view(tokens.shape)
