"""From a role's output on a micro-batch to figures per token or per row. Used by inference and losses alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from rlhf_kernels import check_tokens, linear_kl, linear_log_probs

from ..experience import to_next_token
from ..models.role import RoleModel, head_weight
from ..models.work import Batch


def choose(role: RoleModel, batch: Batch, mask: str, ban: tuple[Sequence[int], int] | None = None) -> dict[str, Tensor]:
    """The batch and what `policy_log_probs` reads of it: which tokens, and where. To be called on the CPU, as a `Work`
    prepares its micro-batches, since how many tokens there are is known only when the mask has been read.

    Args:
        mask: the field, `(B, T)` bool over the tokens, that selects. Position 0 has no log-prob.
        ban: (tokens, count): the tokens had no probability among the first `count` that the mask selects in a row,
            as the sampler's minimum length demands.

    Raises:
        ValueError: a token lies outside the vocabulary, or is banned where it stands.
    """
    assert role.model.vocab_size is not None
    # positions before rows, `(T, B)`: ranks that split the sequence hold neighbouring parts of that order
    chosen = batch[mask].T.clone()
    chosen[0] = False
    fields = {
        "chosen_tokens": batch["tokens"].T[chosen],
        "chosen_rows": chosen[1:].flatten().nonzero().squeeze(1),  # output t - 1 speaks of token t
    }
    if ban is not None and ban[1]:
        fields["chosen_early"] = (chosen.cumsum(0) <= ban[1])[chosen]
        fields["banned"] = torch.tensor(ban[0], device=chosen.device)
    chosen_tokens, rows = fields["chosen_tokens"], fields["chosen_rows"]
    check_tokens(chosen_tokens, rows, chosen.numel(), range(role.model.vocab_size), _banned(fields))
    return {**batch, **fields}


def _banned(batch: Batch) -> tuple[Tensor, Tensor] | None:
    return (batch["chosen_early"], batch["banned"]) if "banned" in batch else None


def policy_log_probs(role: RoleModel, hidden: Tensor, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of the tokens that `choose` has found; 0 elsewhere. Nothing is computed for the others, and
    the device is not waited for.

    Args:
        hidden: `(B, T, H)`, under sequence parallelism this rank's part of T.
        batch: of `choose`.

    Returns:
        `(B, T)` each, float32.
    """
    weight, options = head_weight(role.chunks[-1]), _options(role, batch, temperature)
    found = linear_log_probs(hidden.transpose(0, 1), weight, batch["chosen_tokens"], checked=True, **options)
    log_probs, entropy = (_at_tokens(x, batch) for x in found)
    return log_probs, entropy


def _options(role: RoleModel, batch: Batch, temperature: float) -> dict[str, Any]:
    """What kernels are told of a role's head."""
    mesh = role.mesh
    return {
        "rows": batch["chosen_rows"],
        "vocab_start": mesh.tp_rank * len(head_weight(role.chunks[-1])),
        "vocab_size": role.model.vocab_size,
        "temperature": temperature,
        "group": mesh.tp_group if mesh.tp > 1 else None,
        "sequence_parallel": mesh.config.sequence_parallel,
        "banned": _banned(batch),
    }


def _at_tokens(found: Tensor, batch: Batch) -> Tensor:
    """`(N,)` of the chosen tokens as `(B, T)`, 0 elsewhere."""
    num_rows, length = batch["tokens"].shape
    places = batch["chosen_rows"] + num_rows
    return found.new_zeros(length * num_rows).index_copy(0, places, found).view(length, num_rows).T


def teacher_kl(role: RoleModel, hidden: Tensor, batch: Batch, teacher_weight: Tensor, temperature: float) -> Tensor:
    """KL(policy || teacher) over the whole vocabulary before each token that `choose` has found, `(B, T)` float32, 0
    elsewhere.

    Args:
        hidden, batch: as for `policy_log_probs`; the batch with `teacher_hidden`, and `taught_rows` of `choose_taught`.
        teacher_weight: this rank's part of the teacher's head.
    """
    weight, options = head_weight(role.chunks[-1]), _options(role, batch, temperature)
    teacher_hidden, rows = batch["teacher_hidden"], batch["taught_rows"]
    found = linear_kl(hidden.transpose(0, 1), weight, teacher_hidden, teacher_weight, teacher_rows=rows, **options)
    return _at_tokens(found, batch)


def choose_taught(batch: Batch, mask: str) -> dict[str, Tensor]:
    """Where `teacher_hidden` `(B, R, H)`, flattened, has what stands before each token that `choose` finds, in its
    order. Position 0 is none of them."""
    ranks = batch[mask].long().cumsum(1) - 1
    first = torch.arange(len(ranks), device=ranks.device).unsqueeze(1) * batch["teacher_hidden"].shape[1]
    return {**batch, "taught_rows": (first + ranks).T[batch[mask].T]}


def outputs_before(role: RoleModel, hidden: Tensor) -> Tensor:
    """`(B, H, T)` float32, the output before each token, whole on every rank, of hidden states as a stage has them."""
    hidden = hidden.transpose(0, 1)
    if role.mesh.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return to_next_token(hidden.permute(1, 2, 0).float())


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
