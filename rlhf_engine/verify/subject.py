"""The policy as it is loaded, and what the engine and plain formulas say of a few rows of its data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithms.heads import choose, policy_log_probs
from ..config import RolloutConfig
from ..context import Context
from ..experience import pad_rows, spans
from ..launching.build import base_policy
from ..models.stream import forward
from ..rollout.generate import rollout
from ..rollout.sampling import sample_keys, uniforms
from . import plain
from .findings import rms
from .measure import MICRO_BATCH, rows_of
from .rounding import moved

Responses = list[tuple[list[int], list[float]]]  # tokens and log-probs of each


class Subject:
    """The policy and a few rows of its data.

    Args:
        examples: of any phase.
        folder: for what a check has to write.
    """

    def __init__(self, ctx: Context, examples: Sequence[Any], folder: Path):
        self.ctx, self.folder = ctx, folder
        self.policy = base_policy(ctx)
        rows = rows_of(examples)
        self.prompts = [example.prompt or row[: len(row) // 2 + 1] for example, row in zip(examples, rows, strict=True)]
        self.tokens, self.lengths = pad_rows(rows, ctx.mesh.tp)
        self.mask = spans(torch.ones_like(self.lengths), self.lengths, self.tokens.shape[1])
        ends = torch.isin(self.tokens, torch.tensor(list(ctx.tokenizer.end_ids)))
        while bool((banned := ends & self.mask & (self.mask.cumsum(1) <= self.sampling.min_new_tokens)).any()):
            self.mask &= ~banned  # they have no log-prob to compare

    @functools.cached_property
    def sampling(self) -> RolloutConfig:
        """The run's, of the whole distribution and without text that ends a response."""
        config = self.ctx.config.rollout
        return dataclasses.replace(config, greedy=False, top_k=0, top_p=1.0, min_p=0.0, stop=[])

    @property
    def ban(self) -> tuple[Sequence[int], int]:
        return self.ctx.tokenizer.end_ids, self.sampling.min_new_tokens

    def both(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The engine's log-probs and entropies, `(B, T)` each."""
        chosen = choose(self.policy, batch, "mask", self.ban)
        return policy_log_probs(self.policy, hidden, chosen, self.sampling.temperature)

    def stacked(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The same as `(B, 2, T)`."""
        return torch.stack(self.both(hidden, batch), 1).double()

    def plain(self, hidden: Tensor, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
        """Theirs by `plain`, `(B, 2, T)`."""
        options = {"temperature": self.sampling.temperature, "ban": self.ban, **options}
        hidden, head = plain.whole_hidden(self.policy, hidden), plain.whole_head(self.policy)
        return plain.log_probs(hidden, head, batch["tokens"], batch["mask"], **options)

    def infer(self, fn: Callable[[Tensor, Mapping[str, Tensor]], Tensor], **fields: Tensor) -> Tensor:
        """`fn` of the model's output for every row."""
        batch = {"tokens": self.tokens, "lengths": self.lengths, "mask": self.mask, **fields}
        return forward(self.policy, batch, fn, MICRO_BATCH)

    def infer_twice(self, fn: Callable[[Tensor, Mapping[str, Tensor]], Tensor], **fields: Tensor) -> list[Tensor]:
        """The same, and with weights that are off by their last bits."""
        found = self.infer(fn, **fields)
        with self.policy.on_device(), moved(self.policy):
            return [found, self.infer(fn, **fields)]

    @functools.cached_property
    def views(self) -> list[Tensor]:
        """Log-probs and entropies of the rows, `(B, 2, T)` each: the engine's, plain ones in float64, and plain ones in
        the weights' type from the output before the token, from its own, and from the one before that."""
        own = {"dtype": self.policy.dtype}
        ways: list[dict[str, Any]] = [{}, own, {**own, "shift": 0}, {**own, "shift": 2}]

        def fn(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([self.stacked(hidden, batch), *(self.plain(hidden, batch, **way) for way in ways)], 1)

        return list(self.infer(fn).unbind(1))

    def generate(self, order: Sequence[int], slots: int | None = None) -> Responses:
        """Responses to these of the prompts."""
        sampling = self.sampling if slots is None else dataclasses.replace(self.sampling, slots=slots)
        prompts = [self.prompts[i] for i in order]
        found = rollout(self.policy, prompts, self.keys[list(order)], sampling, self.ctx.tokenizer.end_ids)
        return [(response.tokens, response.log_probs) for response in found]

    @functools.cached_property
    def keys(self) -> Tensor:
        """Of the noise of each prompt's response."""
        return sample_keys(self.ctx.config.seed, 0, torch.arange(len(self.prompts)))

    @functools.cached_property
    def responses(self) -> list[Responses]:
        """To all prompts: of one batch, of its reverse in two slots, and of two halves."""
        everyone = list(range(len(self.prompts)))
        half = len(everyone) // 2
        return [
            self.generate(everyone),
            self.generate(everyone[::-1], slots=2)[::-1],
            [*self.generate(everyone[:half]), *self.generate(everyone[half:])],
        ]

    @functools.cached_property
    def sampled(self) -> Sampled:
        """All responses that differ, as the trainer sees them."""
        distinct = {(i, tuple(x[0])): x[1] for way in reversed(self.responses) for i, x in enumerate(way)}
        index = torch.tensor([i for i, _ in distinct])
        tokens, lengths = pad_rows([self.prompts[i] + list(x) for i, x in distinct], self.ctx.mesh.tp)
        starts = torch.tensor([len(prompt) for prompt in self.prompts])[index]
        mask = spans(starts, lengths, tokens.shape[1])
        options = self.sampling.temperature, self.ban

        def fn(hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            whole, head = plain.whole_hidden(self.policy, hidden), plain.whole_head(self.policy)
            borders = plain.intervals(whole, head, batch["tokens"], batch["mask"], *options)
            return torch.cat([self.stacked(hidden, batch)[:, :1], borders], 1)

        found, again = (
            x.transpose(0, 1)[:, mask] for x in self.infer_twice(fn, tokens=tokens, lengths=lengths, mask=mask)
        )
        row, position = mask.nonzero().unbind(1)
        noise = uniforms(self.keys[index][row], position - starts[row])
        return Sampled(
            torch.tensor([x for log_probs in distinct.values() for x in log_probs], dtype=torch.float64) - found[0],
            torch.maximum(found[1] - noise, noise - found[2]).clamp_min(0),
            rms(found[0]),
            [rms(x) for x in found - again],
        )


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Of the tokens `(N,)` that were generated.

    Attributes:
        gaps: nats, the sampler's log-probs less the trainer's.
        misses: by how much a token's noise is outside of the interval that the token has in [0, 1).
        size: of the log-probs.
        rounding: what the last bits of weights do to log-probs and to where an interval starts and stops.
    """

    gaps: Tensor
    misses: Tensor
    size: float
    rounding: list[float]
