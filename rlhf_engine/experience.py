"""Experience: the batch that flows through the stages of an iteration.

Between stages it is whole, on the CPU, and the same on every rank. Rows are right-padded: prompt, response,
padding. Per-token fields speak of the token at their own position: `log_probs[b, t]` is
log p(tokens[b, t] | tokens[b, :t]) and `values[b, t]` was computed at position t - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Experience:
    """Shapes: B rows, T positions. A field is None until a stage writes it."""

    # what an iteration starts from
    prompts: list[list[int]] | None = None  # B lists of token ids
    reward_prompts: list[list[int]] | None = None  # the same as the reward model reads them
    row_fields: list[str] | None = None  # B JSON objects: what else their rows have, for reward functions
    sample_ids: Tensor | None = None  # (B,) int64, the key of each sample's noise
    redrawn: Tensor | None = None  # (B,) bool, rows that further prompts have taken the place of
    noise_keys: Tensor | None = None  # (B,) int64, of samples that earlier iterations have drawn
    # sequences
    tokens: Tensor | None = None  # (B, T) int64
    lengths: Tensor | None = None  # (B,) int64, real tokens in a row
    loss_mask: Tensor | None = None  # (B, T) bool, tokens that supervised training learns
    desirable: Tensor | None = None  # (rows that are learned,) bool, good answers; the others are bad
    # (B, T) bool, generated tokens, the end token included; between turns it has gaps, and a row whose environment has
    # failed has none
    response_mask: Tensor | None = None
    finished: Tensor | None = None  # (B,) bool, the response has its end token, and its environment has ended it
    failed: Tensor | None = None  # (B,) bool, the environment has, so that nothing is rewarded
    older: Tensor | None = None  # (B, T) bool, generated tokens that earlier iterations have begun the response with
    # the likeliest response to each of the P different prompts
    greedy_tokens: Tensor | None = None  # (P, T) int64; T of their own
    greedy_lengths: Tensor | None = None  # (P,) int64
    greedy_response_mask: Tensor | None = None  # (P, T) bool
    greedy_finished: Tensor | None = None  # (P,) bool
    # measurements of them
    sampler_log_probs: Tensor | None = None  # (B, T) float32, as the sampler computed them
    log_probs: Tensor | None = None  # (B, T) float32, the policy before this iteration's updates
    ref_log_probs: Tensor | None = None  # (B, T) float32, of the policy that the KL is taken to
    # (B, R, H of the teacher) in its type, its outputs before each of at most R response tokens of a row
    teacher_hidden: Tensor | None = None
    answer_log_probs: Tensor | None = None  # (B,) float64, the policy's of all tokens of loss_mask together
    ref_answer_log_probs: Tensor | None = None  # (B,) float64, likewise
    values: Tensor | None = None  # (B, T) float32, the critic before this iteration's updates
    scores: Tensor | None = None  # (B,) float32, one per response
    # (B, T) float32, what the environment rewarded each turn with, at the turn's last token; their sum is in the score
    turn_rewards: Tensor | None = None
    baselines: Tensor | None = None  # (P,) float32, the scores of the likeliest responses
    golds: Tensor | None = None  # (B,) float32, the true preference; None where it is not known
    # what the updates aim at
    # (B, T) float32, of each token: the KL's share, at a turn's last its reward, and at the row's last the rest of the
    # score
    rewards: Tensor | None = None
    advantages: Tensor | None = None  # (B, T) float32, not whitened yet
    importance: Tensor | None = None  # (B, T) float32, how much each token counts that the sampler has drawn
    advantage_moments: Tensor | None = None  # (3,) float32, count, mean and variance of the whole batch's
    returns: Tensor | None = None  # (B, T) float32
    # how far the iteration has come with it
    stages: list[str] = field(default_factory=list)  # that are done
    steps: dict[str, int] = field(default_factory=dict)  # updates that each train stage has made

    def widen(self, multiple: int) -> None:
        """Pads the rows to a multiple of tokens, as `pad_rows` does, for a mesh that they were not made on."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dim() == 2 and name != "advantage_moments":
                setattr(self, name, F.pad(value, (0, -value.shape[1] % multiple)))


FIELDS = frozenset(field.name for field in fields(Experience)) - {"stages", "steps"}  # that stages read and write


def pad_rows(rows: Sequence[Sequence[int]], multiple: int = 1, value: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists to right-padded `(B, T)` int64 and their lengths `(B,)`; T is a multiple of `multiple`."""
    longest = max(map(len, rows))
    width = (longest + multiple - 1) // multiple * multiple
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded, torch.tensor([len(row) for row in rows])


def spans(start: Tensor, stop: Tensor, width: int) -> Tensor:
    """Mask `(B, width)` that is True from `start` `(B,)` up to and without `stop` `(B,)`."""
    position = torch.arange(width, device=start.device)
    return (position >= start.unsqueeze(1)) & (position < stop.unsqueeze(1))


def last_turns(mask: Tensor, lengths: Tensor) -> Tensor:
    """Where the last tokens begin that a mask `(B, T)` selects without a gap up to `lengths` `(B,)`: `(B,)`."""
    position = torch.arange(mask.shape[1])
    return torch.where(mask, -1, position).masked_fill(position >= lengths.unsqueeze(1), -1).amax(1) + 1


def last_of(mask: Tensor) -> Tensor:
    """The last position that a mask `(B, T)` selects in each row, `(B,)`; -1 in a row without any."""
    return (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(1) - 1


def reach(mask: Tensor) -> Tensor:
    """Positions from the first that a mask `(B, T)` selects in each row to the last, gaps included, `(B,)`."""
    return torch.where(mask.any(1), last_of(mask) + 1 - mask.int().argmax(1), 0)


def packed(x: Tensor, mask: Tensor) -> Tensor:
    """`(B, R, H)`, the columns of `(B, H, T)` that a mask `(B, T)` selects, of each row from its start, then 0."""
    lengths = mask.sum(1)
    found = x.new_zeros(len(x), int(lengths.max()), x.shape[1])
    found[spans(torch.zeros_like(lengths), lengths, found.shape[1])] = x.transpose(1, 2)[mask]
    return found


def to_next_token(outputs: Tensor) -> Tensor:
    """Outputs of the model at position t - 1 moved to t, where the token is that they speak of; 0 at t = 0.

    The only place where the shift between a causal model's outputs and its tokens is made. `(B, ..., T)` to the same.
    """
    return F.pad(outputs[..., :-1], (1, 0))


_NAMED = 8  # samples that a line names


def numbered(samples: Sequence[int]) -> str:
    """Samples as a line names them."""
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return f"sample{'s' if len(samples) > 1 else ''} {', '.join(map(str, samples[:_NAMED]))}{more}"
