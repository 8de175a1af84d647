"""One token per row from vocabulary-parallel logits, with noise that belongs to the sample.

A sample has a key and each of its tokens one uniform number from a counter-based generator under that key; the
token is where the inverse CDF puts that number. So a rollout does not depend on DP, TP, batch size, slot or the
order in which sequences finish, and a split vocabulary needs the sums of its shards, not the logits gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import RolloutConfig


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


@dataclass(frozen=True)
class Sampler:
    """Draws tokens under `config`; every rank of `group` gets the same.

    Args:
        vocab_size: true size; later columns are padding.
        end_ids: tokens that end a response; they have no probability before `config.min_new_tokens`.
        group: the tensor parallel ranks, shard r holding columns [r V, (r + 1) V).
    """

    config: RolloutConfig
    vocab_size: int
    end_ids: Sequence[int]
    group: dist.ProcessGroup

    def __call__(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(B,)` and their log-probs `(B,)` under the distribution that they were drawn from.

        Args:
            logits: `(B, V)`, this rank's columns.
            keys: `(B,)`, from `sample_keys`.
            steps: `(B,)`, how many tokens each response already has.

        Raises:
            FloatingPointError: a row of logits is not finite.
        """
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        start = rank * logits.shape[1]
        x = logits.float() / self.config.temperature
        num_valid = max(0, min(x.shape[1], self.vocab_size - start))
        x[:, num_valid:] = -torch.inf
        for end in (i - start for i in self.end_ids if start <= i < start + x.shape[1]):
            x[:, end] = torch.where(steps < self.config.min_new_tokens, -torch.inf, x[:, end])
        maximum = x.amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        if not bool(maximum.isfinite().all()):
            row = int((~maximum.isfinite()).nonzero()[0])
            raise FloatingPointError(f"logits of row {row} are not finite (rank {dist.get_rank()})")
        if not self.config.greedy and (self.config.top_k or self.config.top_p < 1):
            x = torch.where(x < self._threshold(x, size).unsqueeze(1), -torch.inf, x)
        # float64: a sum over 128k columns in float32 would eat the tail
        p = (x - maximum.unsqueeze(1)).double().exp()
        sums = self._gather(p.sum(1), size)  # (shards, B)
        # the same on every rank, so a number falls to exactly one shard
        borders = torch.cat([torch.zeros_like(sums[:1]), sums.cumsum(0)])
        total = borders[-1]
        if self.config.greedy:
            ties = torch.where(x == maximum.unsqueeze(1), 1, 0)
            local, mine = ties.argmax(1), ties.any(1)
        else:
            target = uniforms(keys, steps) * total
            target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
            mine = (target >= borders[rank]) & (target < borders[rank + 1])
            local = torch.searchsorted(p.cumsum(1), (target - borders[rank]).unsqueeze(1), right=True).squeeze(1)
            # rounding may step past the last column that has any probability
            likely = torch.where(p > 0, torch.arange(p.shape[1], device=p.device), 0).amax(1)
            local = torch.minimum(local, likely)
        token = torch.where(mine, local + start, self.vocab_size)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=self.group)  # ties of greedy: the lowest id
        here = (token >= start) & (token < start + x.shape[1])
        chosen = x.gather(1, (token - start).clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
        log_prob = torch.where(here, (chosen - maximum).double() - total.log(), 0.0)
        dist.all_reduce(log_prob, group=self.group)
        return token, log_prob.float()

    def _gather(self, values: Tensor, size: int) -> Tensor:
        """`(...)` of every shard as `(shards, ...)`."""
        if size == 1:
            return values.unsqueeze(0)
        parts = [torch.empty_like(values) for _ in range(size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def _threshold(self, x: Tensor, size: int) -> Tensor:
        """The smallest logit that top-k and top-p keep, `(B,)`. Ties with it are kept, as elsewhere."""
        whole = self._gather(x, size).transpose(0, 1).flatten(1)
        top = whole.sort(1, descending=True).values
        if self.config.top_k:
            top = top[:, : self.config.top_k]
        if self.config.top_p >= 1:
            return top[:, -1]
        p = top.double().softmax(1)
        before = p.cumsum(1) - p  # mass of the likelier tokens: the nucleus ends where it reaches top_p
        count = (before < self.config.top_p).sum(1)
        return top.gather(1, (count - 1).unsqueeze(1)).squeeze(1)
