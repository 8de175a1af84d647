"""What the engine computes, written down a second time: float64, loops, no kernels, nothing shared with the first.

Shapes: B rows, T positions, V the vocabulary. Position t of a result speaks of token t, as everywhere.
Sources: Schulman et al. 2015, arXiv:1506.02438, eq. 16 (advantages); Schulman et al. 2017, arXiv:1707.06347, eq. 7
(policy loss); Ziegler et al. 2019, arXiv:1909.08593, eq. 2 (rewards); Ouyang et al. 2022, arXiv:2203.02155, eq. 1
(pairs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import PPOConfig
from ..mesh import ParallelMesh
from ..models.role import RoleModel, head_weight

_COLUMNS = 8192  # of the vocabulary that are float64 at once


def gathered(part: Tensor, dim: int, mesh: ParallelMesh) -> Tensor:
    """The tensor parallel ranks' parts side by side."""
    parts = [torch.empty_like(part) for _ in range(mesh.tp)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim)


def whole_hidden(role: RoleModel, hidden: Tensor) -> Tensor:
    """`(B, T, H)` from what the last pipeline stage gives, of which each rank may hold a part of T."""
    return gathered(hidden, 1, role.mesh) if role.mesh.config.sequence_parallel else hidden


def whole_head(role: RoleModel) -> Tensor:
    """`(V, H)`, the LM head without the vocabulary's padding, on the last pipeline stage."""
    return gathered(head_weight(role.chunks[-1]).detach(), 0, role.mesh)[: role.model.vocab_size]


def distributions(
    hidden: Tensor, head: Tensor, mask: Tensor, temperature: float, ban: tuple[Sequence[int], int],
    shift: int = 1, dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[int, list[int], Tensor]]:  # fmt: skip
    """For each row which of the positions that the mask selects have an output, and their log-probs `(N, V)`.

    Args:
        hidden, head: `(B, T, H)` and `(V, H)`, of any type.
        ban: tokens that have no probability among the first so many that the mask selects in a row.
        shift: the output that speaks of a token stands so many positions before it.
        dtype: of the logits; narrower ones than float32 are widened then.
    """
    for row in range(len(hidden)):
        positions = [t for t in mask[row].nonzero().flatten().tolist() if t and t >= shift]
        x = hidden[row, [t - shift for t in positions]].to(dtype)
        logits = torch.cat([x @ part.to(dtype).T for part in head.split(_COLUMNS)], 1)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        logits[: ban[1], list(ban[0])] = -torch.inf
        yield row, positions, (logits / temperature).log_softmax(1)


def log_probs(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor, *options: Any, **more: Any) -> Tensor:
    """Log-probs and entropies `(B, 2, T)` of the tokens that the mask selects, 0 elsewhere, by `distributions`."""
    log_prob = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    entropy = torch.zeros_like(log_prob)
    for row, positions, found in distributions(hidden, head, mask, *options, **more):
        log_prob[row, positions] = found.gather(1, tokens[row, positions].unsqueeze(1)).squeeze(1).double()
        finite = found.masked_fill(found.isinf(), 0.0)  # p log p is 0 where p is, and so is its gradient
        entropy[row, positions] = -(found.exp() * finite).sum(1).double()
    return torch.stack([log_prob, entropy], 1)


def intervals(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor, *options: Any) -> Tensor:
    """Between which numbers the inverse CDF gives the tokens that the mask selects, `(B, 2, T)`: tokens stand side by
    side in [0, 1) in the order of their ids, each as wide as it is probable."""
    start, stop = torch.zeros(2, *tokens.shape, dtype=torch.float64, device=tokens.device)
    for row, positions, found in distributions(hidden, head, mask, *options):
        index = tokens[row, positions].unsqueeze(1)
        stop[row, positions] = found.exp().cumsum(1).gather(1, index).squeeze(1)
        start[row, positions] = stop[row, positions] - found.gather(1, index).squeeze(1).exp()
    return torch.stack([start, stop], 1)


def shaped_scores(scores: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """Scores of the first iteration as they enter the reward, `(B,)`."""
    scores = scores.double()
    if config.score_min is not None or config.score_max is not None:
        scores = scores.clamp(config.score_min, config.score_max)
    mean, std = scores.mean(), scores.std(correction=0)
    if config.score_center:
        scores = scores - mean
    if config.score_scale:
        scores = scores / (std + 1e-8)
    return scores - config.missing_eos_penalty * (~finished).double()


def advantages(
    log_probs: Tensor, ref_log_probs: Tensor, values: Tensor, scores: Tensor, mask: Tensor, config: PPOConfig
) -> Tensor:
    """Generalised advantages `(B, T)` of rewards that hold the KL of each token and, at the last, the score."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(len(mask)):
        after, value_after = 0.0, 0.0
        positions = mask[row].nonzero().flatten().tolist()
        for t in reversed(positions):
            reward = -config.kl_coef * (float(log_probs[row, t]) - float(ref_log_probs[row, t]))
            reward += float(scores[row]) if t == positions[-1] else 0.0
            value = float(values[row, t])
            after = reward + config.gamma * value_after - value + config.gamma * config.gae_lambda * after
            found[row, t], value_after = after, value
    return found


def policy_losses(
    log_probs: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PPOConfig
) -> Tensor:
    """The clipped surrogate of each response token, less the entropy's share, `(N,)` from `(B, T)`.

    Args:
        advantages: whitened, if they are to be.
    """
    ratio = (log_probs - old.double()).exp()
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    return (-torch.minimum(ratio * advantages, clipped * advantages) - config.entropy_coef * entropy)[mask]


def value_losses(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    """The clipped squared error of each response token, halved, `(N,)` from `(B, T)`."""
    near = old.double() + (values - old.double()).clamp(-config.clip_value, config.clip_value)
    return 0.5 * torch.maximum((values - returns.double()) ** 2, (near - returns.double()) ** 2)[mask]


def pair_losses(scores: Tensor) -> Tensor:
    """log(1 + exp(rejected - chosen)) of each pair `(N,)`, from scores `(2 N,)`, chosen before rejected."""
    pairs = scores.double().view(-1, 2)
    return torch.log1p((pairs[:, 1] - pairs[:, 0]).exp())
