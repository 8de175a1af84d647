"""From a role's output on a micro-batch to figures per token or per row. Used by inference and losses alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import linear_log_probs

from ..experience import to_next_token
from ..models.role import RoleModel, head_weight
from ..models.stream import Batch


def policy_log_probs(
    role: RoleModel,
    hidden: Tensor,
    batch: Batch,
    mask: Tensor,
    temperature: float = 1.0,
    ban: tuple[Sequence[int], int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the tokens that `mask` selects; 0 elsewhere. Nothing is computed for the others.

    Args:
        hidden: `(B, T, H)`, under sequence parallelism this rank's part of T.
        mask: `(B, T)` bool, over `batch["tokens"]`. Position 0 has no log-prob.
        ban: (tokens, count): the tokens had no probability among the first `count` that the mask selects in a row,
            as the sampler's minimum length demands.

    Returns:
        `(B, T)` each, float32.
    """
    mesh, weight = role.mesh, head_weight(role.chunks[-1])
    # positions before rows, `(T, B)`: ranks that split the sequence hold neighbouring parts of that order
    chosen = mask.T.clone()
    chosen[0] = False
    tokens = batch["tokens"].T[chosen]
    banned = None
    if ban is not None and ban[1]:
        early = (chosen.cumsum(0) <= ban[1])[chosen]
        banned = early, torch.tensor(ban[0], device=mask.device)
    log_probs, entropy = linear_log_probs(
        hidden.transpose(0, 1),
        weight,
        tokens,
        rows=chosen[1:].flatten().nonzero().squeeze(1),  # output t - 1 speaks of token t
        vocab_start=mesh.tp_rank * len(weight),
        vocab_size=role.model.vocab_size,
        temperature=temperature,
        group=mesh.tp_group if mesh.tp > 1 else None,
        sequence_parallel=mesh.config.sequence_parallel,
        banned=banned,
    )
    zeros = log_probs.new_zeros(chosen.shape)
    return zeros.masked_scatter(chosen, log_probs).T, zeros.masked_scatter(chosen, entropy).T


def token_values(output: Tensor, batch: Batch) -> Tensor:
    """A critic's values `(B, T)`, each at the token that its output precedes, from `(B, T, 1)`."""
    return to_next_token(output.squeeze(-1))


def score_batch(role: RoleModel, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What `last_scores` reads, from right-padded rows `(B, T)`: up to where the model has its score, with its score
    token behind each, if any."""
    if (score_token := role.model.score_token) is not None:
        if int(lengths.max()) == tokens.shape[1]:
            tokens = F.pad(tokens, (0, role.mesh.tp))  # sequence parallelism splits the length
        tokens = tokens.scatter(1, lengths.unsqueeze(1), score_token)
        lengths = lengths + 1
    if (pad := role.model.score_pad) is not None:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        counts = (tokens != pad) & (places < lengths.unsqueeze(1))
        lengths = (places * counts).amax(1) + 1
    return {"tokens": tokens, "lengths": lengths}


def last_scores(output: Tensor, batch: Batch) -> Tensor:
    """A reward model's score of each row `(B,)`, read at the last token of `score_batch` in `(B, T, 1)`."""
    return output.squeeze(-1).gather(1, batch["lengths"].unsqueeze(1) - 1).squeeze(1)
