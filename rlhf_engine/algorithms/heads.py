"""From a role's output on a micro-batch to figures per token or per row. Used by inference and losses alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import token_log_probs

from ..experience import to_next_token
from ..models.role import Batch, RoleModel


def policy_log_probs(
    role: RoleModel,
    logits: Tensor,
    batch: Batch,
    mask: Tensor,
    temperature: float = 1.0,
    ban: tuple[Sequence[int], int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the tokens that `mask` selects; 0 elsewhere.

    Args:
        logits: `(B, T, V / tp)`.
        mask: `(B, T)` bool, over `batch["tokens"]`. Position 0 has no log-prob.
        ban: (tokens, count): the tokens had no probability among the first `count` that the mask selects in a row,
            as the sampler's minimum length demands.

    Returns:
        `(B, T)` each, float32.
    """
    mesh = role.mesh
    mask = mask.clone()
    mask[:, 0] = False
    chosen = logits[:, :-1][mask[:, 1:]]  # output t - 1 speaks of token t
    tokens = batch["tokens"][mask]
    start = mesh.tp_rank * logits.shape[-1]
    if ban is not None and ban[1]:
        early = ((mask.cumsum(1) - 1) < ban[1])[mask]
        columns = torch.arange(start, start + logits.shape[-1], device=logits.device)
        banned = torch.isin(columns, torch.tensor(ban[0], device=logits.device))
        chosen = chosen.masked_fill(early.unsqueeze(1) & banned, -torch.inf)
    log_probs, entropy = token_log_probs(
        chosen,
        tokens,
        vocab_start=start,
        vocab_size=role.model.vocab_size,
        temperature=temperature,
        group=mesh.tp_group if mesh.tp > 1 else None,
    )
    zeros = log_probs.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, log_probs), zeros.masked_scatter(mask, entropy)


def token_values(output: Tensor, batch: Batch) -> Tensor:
    """A critic's values `(B, T)`, each at the token that its output precedes, from `(B, T, 1)`."""
    return to_next_token(output.squeeze(-1))


def score_batch(role: RoleModel, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What `last_scores` reads, from right-padded rows `(B, T)`: with the model's score token behind each, if any."""
    if (score_token := role.model.score_token) is not None:
        if int(lengths.max()) == tokens.shape[1]:
            tokens = F.pad(tokens, (0, role.mesh.tp))  # sequence parallelism splits the length
        tokens = tokens.scatter(1, lengths.unsqueeze(1), score_token)
        lengths = lengths + 1
    return {"tokens": tokens, "lengths": lengths}


def last_scores(output: Tensor, batch: Batch) -> Tensor:
    """A reward model's score of each row `(B,)`, read at the last real token of `(B, T, 1)`."""
    return output.squeeze(-1).gather(1, batch["lengths"].unsqueeze(1) - 1).squeeze(1)
