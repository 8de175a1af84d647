"""One token per row from vocabulary-parallel logits, with noise that belongs to the sample.

A sample has a key and each of its tokens one uniform number from a counter-based generator under that key; the
token is where the inverse CDF puts that number. So a rollout does not depend on DP, TP, batch size, slot or the
order in which sequences finish, and a split vocabulary needs the sums of its shards, not the logits gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import RolloutConfig

_BLOCK = 128  # columns that are summed first; vocabularies are padded to a multiple of it


def _as_int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


_GOLDEN, _MIX1, _MIX2 = map(_as_int64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64 tensors, whose arithmetic wraps."""

    def shift(value: Tensor, bits: int) -> Tensor:  # logical, where >> on int64 is arithmetic
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift(x, 30)) * _MIX1
    x = (x ^ shift(x, 27)) * _MIX2
    return x ^ shift(x, 31)


def sample_keys(seed: int, iteration: int, sample_ids: Tensor) -> Tensor:
    """The key of each sample's noise, `(B,)` int64."""
    key = _mix(torch.tensor([seed], dtype=torch.int64) * _GOLDEN + 1)
    key = _mix(key + torch.tensor([iteration], dtype=torch.int64) * _GOLDEN)
    return _mix(key + sample_ids * _GOLDEN)


def uniforms(keys: Tensor, steps: Tensor) -> Tensor:
    """The number in [0, 1) of each sample's `steps`-th token: `(B,)`, `(B,)` to `(B,)` float64."""
    bits = _mix(keys + (steps + 1) * _GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


class Sampler:
    """Draws tokens under `config`; every rank of `group` gets the same.

    Args:
        vocab_size: true size; later columns are padding.
        end_ids: tokens that end a response; they have no probability before `config.min_new_tokens`.
        group: the tensor parallel ranks, shard r holding columns [r V, (r + 1) V).
    """

    def __init__(self, config: RolloutConfig, vocab_size: int, end_ids: Sequence[int], group: dist.ProcessGroup):
        self.config, self.vocab_size, self.end_ids, self.group = config, vocab_size, end_ids, group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __call__(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(B,)` and their log-probs `(B,)` under the distribution that they were drawn from.

        A row of logits that is not finite gives a log-prob that is not: whoever looks at the tokens next can tell,
        without the device being waited for here.

        Args:
            logits: `(B, V)`, this rank's columns. Overwritten.
            keys: `(B,)`, from `sample_keys`.
            steps: `(B,)`, how many tokens each response already has.
        """
        width = logits.shape[1]
        start = self.rank * width
        x = logits.float()
        if self.config.temperature != 1:
            x /= self.config.temperature
        x[:, max(0, self.vocab_size - start) :] = -torch.inf
        if self.config.min_new_tokens:
            for end in (i - start for i in self.end_ids if start <= i < start + width):
                x[:, end].masked_fill_(steps < self.config.min_new_tokens, -torch.inf)
        maxima = self._gather(x.amax(1))  # (shards, B)
        maximum = maxima.amax(0)
        x -= maximum.unsqueeze(1)
        threshold = self._threshold(x)
        if threshold is not None:
            x.masked_fill_(x < threshold, -torch.inf)
        likeliest = x.argmax(1) if self.config.greedy else None  # of equals the first; exp makes more of them equal
        # Two levels: one float32 sum over 128k columns would eat the tail, one over a block of them does not.
        p = x.exp_().unflatten(1, (-1, math.gcd(width, _BLOCK)))
        blocks = p.sum(2).cumsum(1, dtype=torch.float64)
        # the same borders on every rank, so a number falls to exactly one shard
        borders = self._gather(blocks[:, -1]).cumsum(0)
        total = borders[-1]
        if likeliest is not None:
            local = likeliest
            mine = maxima.argmax(0) == self.rank
        else:
            target = torch.minimum(uniforms(keys, steps) * total, total.nextafter(torch.zeros_like(total)))
            below = borders[self.rank - 1] if self.rank else torch.zeros_like(total)
            mine = (target >= below) & (target < borders[self.rank])
            local = _column(p, blocks, target - below)
        local = local.clamp(max=width - 1)  # of a row that is not finite
        log_prob = x.gather(1, local.unsqueeze(1)).squeeze(1).double().log() - total.log()
        if self.size == 1:
            return local, log_prob.float()
        # only one shard has the token; 53 bits hold any
        both = torch.where(mine & total.isfinite(), torch.stack([(local + start).double(), log_prob]), 0.0)
        dist.all_reduce(both, group=self.group)
        return both[0].long(), torch.where(total.isfinite(), both[1], torch.nan).float()

    def _gather(self, values: Tensor) -> Tensor:
        """`(...)` of every shard as `(shards, ...)`."""
        if self.size == 1:
            return values.unsqueeze(0)
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def _threshold(self, x: Tensor) -> Tensor | float | None:
        """The least of `x`, logits over their maximum, that is kept: `(B, 1)` or one for all; None keeps everything.

        Ties with it are kept, as elsewhere. top-p takes from what top-k left; min-p asks for a share of the likeliest
        token's probability, which neither changes.
        """
        config = self.config
        if config.greedy:
            return None
        least = math.log(config.min_p) if config.min_p else None
        if not config.top_k and config.top_p >= 1:
            return least
        whole = self._gather(x).transpose(0, 1).flatten(1)
        num = min(config.top_k or whole.shape[1], whole.shape[1])
        top = whole.topk(num, 1).values
        last = top[:, -1:]
        if config.top_p < 1:
            p = top.double().softmax(1)
            before = p.cumsum(1) - p  # mass of the likelier tokens: the nucleus ends where it reaches top_p
            last = top.gather(1, (before < config.top_p).sum(1, keepdim=True) - 1)
        return last if least is None else last.clamp_min(least)


def _column(p: Tensor, blocks: Tensor, target: Tensor) -> Tensor:
    """Where the running sum of a row passes its target, `(B,)`: the block by the blocks' sums, the column within it.

    Args:
        p: `(B, N, block)`.
        blocks: `(B, N)` float64, the running sum of the blocks.
        target: `(B,)` float64; where another shard has it, what comes out means nothing.
    """
    row, zero = torch.arange(len(p), device=p.device), torch.zeros_like(target)
    # rounding must not step past the last column that has any probability: neither here nor within the block
    target = torch.minimum(target, blocks[:, -1].nextafter(zero))
    n = torch.searchsorted(blocks, target.unsqueeze(1), right=True).squeeze(1).clamp_(max=blocks.shape[1] - 1)
    sums = p[row, n].cumsum(1, dtype=torch.float64)
    rest = target - torch.where(n > 0, blocks[row, n - 1], 0.0)
    rest = torch.minimum(rest, sums[:, -1].nextafter(zero))
    return n * p.shape[2] + torch.searchsorted(sums, rest.unsqueeze(1), right=True).squeeze(1)
