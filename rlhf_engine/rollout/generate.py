"""Generation on the training weights: a KV cache in slots, refilled as sequences finish.

`generate` knows tensor parallelism only. Under pipeline or expert parallelism `rollout_model` first folds the model:
each rank receives the other stages' layers and the other ranks' experts into a copy, and serves as a replica that
waits for no other.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..config import RolloutConfig
from ..hf.weights import parameters
from ..mesh import ParallelMesh
from ..models.build import build_model
from ..models.layers import CacheView, CoreAttention, LayerCache
from ..models.role import RoleModel, head_weight
from .sampling import Sampler

_BUCKET_NUMEL = 1 << 26  # parameters sent at once when stages fold


@dataclass
class Response:
    """What was generated for one prompt: `tokens` with their `log_probs`; `finished` by the end token or cut."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool


def rollout(
    role: RoleModel, prompts: Sequence[Sequence[int]], keys: Tensor, config: RolloutConfig, end_ids: Sequence[int]
) -> list[Response]:
    """Responses to all prompts, in their order and the same on every rank; each replica generates its share.

    Args:
        prompts: token ids of each.
        keys: `(len(prompts),)`, from `sample_keys`.
        end_ids: the tokens that end a response.

    Raises:
        ValueError: a prompt is empty or leaves no room in the model's context.
    """
    mesh = role.mesh
    context = role.model.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model's context takes 1 to {context - 1}")
    mine = slice(mesh.replica, None, mesh.num_replicas)
    with role.on_device(), rollout_model(role) as gpt:
        responses = generate(gpt, mesh, list(prompts[mine]), keys[mine], config, end_ids, role.model.vocab_size or 0)
    return mesh.gather_replicas(responses)


@contextlib.contextmanager
def rollout_model(role: RoleModel) -> Iterator[GPTModel]:
    """The policy whole but for TP: the training model itself, or under PP or EP a copy freed at the end.

    Sequence parallelism is off within: a decode step has one position to split.
    """
    if role.mesh.is_folded_to_generate:
        yield _fold(role)
        return
    modules = [m for m in role.gpt.modules() if getattr(m, "sequence_parallel", False)]
    embedding = role.gpt.embedding
    scatter = embedding.reduce_scatter_embeddings
    reduce = embedding.word_embeddings.reduce_scatter_embeddings
    role.gpt.config.sequence_parallel = False
    embedding.reduce_scatter_embeddings = embedding.word_embeddings.reduce_scatter_embeddings = False
    for module in modules:
        module.sequence_parallel = False
    was_training = role.gpt.training
    role.gpt.eval()
    try:
        yield role.gpt
    finally:
        role.gpt.train(was_training)
        for module in modules:
            module.sequence_parallel = True
        role.gpt.config.sequence_parallel = role.mesh.config.sequence_parallel
        embedding.reduce_scatter_embeddings = scatter
        embedding.word_embeddings.reduce_scatter_embeddings = reduce


@torch.no_grad()
def _fold(role: RoleModel) -> GPTModel:
    """A copy of the whole depth and all experts (this rank's TP shard)."""
    mesh = role.mesh
    gpt = build_model(role.model, mesh, role.head, role.dtype, folded=True).requires_grad_(False).eval()
    wanted = dict(parameters(gpt))
    # under tied embeddings the last stage has a second copy, which the folded model has no place for
    mine = {name: p for name, p in parameters(role.gpt) if name in wanted}
    _exchange(mine, wanted, mesh.pp_group, mesh)
    # every rank now has its own experts of all layers
    if mesh.ep > 1:
        assert role.model.num_experts is not None
        each = role.model.num_experts // mesh.ep
        numbers = ((name, re.search(r"\.local_experts\.(\d+)\.", name)) for name in wanted)
        own = [name for name, found in numbers if found and int(found[1]) // each == mesh.ep_rank]
        _exchange({name: wanted[name] for name in own}, wanted, mesh.ep_group, mesh)
    return gpt


def _exchange(
    mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor], group: dist.ProcessGroup, mesh: ParallelMesh
) -> None:
    """Every rank of the group sends what it has to the others, in buckets."""
    for rank in dist.get_process_group_ranks(group):
        is_source = rank == mesh.rank
        box = [list(mine) if is_source else None]
        dist.broadcast_object_list(box, rank, group=group, device=mesh.device)
        assert box[0] is not None
        bucket: list[str] = []
        for name in box[0]:
            bucket.append(name)
            sizes = [wanted[n].numel() for n in bucket]
            if name != box[0][-1] and sum(sizes) < _BUCKET_NUMEL:
                continue
            if is_source:
                flat = torch.cat([mine[n].reshape(-1) for n in bucket])
            else:
                flat = torch.empty(sum(sizes), dtype=wanted[name].dtype, device=mesh.device)
            dist.broadcast(flat, rank, group=group)
            for n, values in zip(bucket, flat.split(sizes), strict=True):
                wanted[n].copy_(values.view_as(wanted[n]))
            bucket = []


class Decoder:
    """Megatron's modules driven token by token over a KV cache."""

    def __init__(self, gpt: GPTModel, num_slots: int, length: int):
        self.gpt = gpt
        weight = gpt.embedding.word_embeddings.weight
        self.caches = []
        for module in gpt.modules():
            if isinstance(module, CoreAttention):
                head_dim, groups = gpt.config.kv_channels, gpt.config.num_query_groups
                groups //= gpt.config.tensor_model_parallel_size
                cache = LayerCache(num_slots, groups, length, head_dim, weight.dtype, weight.device)
                module.cache = cache
                self.caches.append(cache)
        has_rotary = gpt.position_embedding_type == "rope"
        self.rotary = gpt.rotary_pos_emb(length) if has_rotary else None  # (L, 1, 1, D)
        self.positions = torch.arange(length, device=weight.device)

    def close(self) -> None:
        for module in self.gpt.modules():
            if isinstance(module, CoreAttention):
                module.cache = None

    def prefill(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Right-padded prompts `(B, S)` into cache rows `slots`: logits `(B, V / tp)` after each one's last token."""
        view = CacheView(slots=slots)
        rotary = self.rotary[: tokens.shape[1]] if self.rotary is not None else None
        return self._forward(tokens, self.positions[: tokens.shape[1]].expand_as(tokens), view, rotary, lengths - 1)

    def decode(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """One token `(B,)` at `positions` `(B,)` for each of the first B slots: logits `(B, V / tp)`.

        Args:
            length: one more than the largest position.
        """
        mask = self.positions[:length] <= positions.unsqueeze(1)
        view = CacheView(positions=positions, mask=mask[:, None, None], length=length)
        # (1, B, 1, D)
        rotary = self.rotary[positions].permute(1, 0, 2, 3) if self.rotary is not None else None
        return self._forward(tokens.unsqueeze(1), positions.unsqueeze(1), view, rotary, torch.zeros_like(positions))

    def _forward(
        self, tokens: Tensor, positions: Tensor, view: CacheView, rotary: Tensor | None, last: Tensor
    ) -> Tensor:
        for cache in self.caches:
            cache.view = view
        hidden = self.gpt.embedding(input_ids=tokens, position_ids=positions)  # (S, B, H)
        hidden = self.gpt.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        hidden = hidden[last, torch.arange(len(last), device=last.device)].unsqueeze(0)
        return F.linear(hidden.squeeze(0), head_weight(self.gpt))

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        for cache in self.caches:
            cache.keys[target, :, :length] = cache.keys[source, :, :length]
            cache.values[target, :, :length] = cache.values[source, :, :length]


@torch.no_grad()
def generate(
    gpt: GPTModel,
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    config: RolloutConfig,
    end_ids: Sequence[int],
    vocab_size: int,
) -> list[Response]:
    """Responses of this replica, in the order of `prompts`.

    Active sequences are always the first rows of the cache: a finished one is overwritten by the last, and waiting
    prompts fill up behind. So every decode step is dense.
    """
    if not prompts:
        return []
    device = mesh.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    budget = (gpt.max_sequence_length - lengths).clamp_max(config.max_new_tokens)
    length = int((lengths + budget).max())
    num_slots = min(config.slots, len(prompts))
    sampler = Sampler(config, vocab_size, end_ids, mesh.tp_group)
    keys = keys.to(device)
    out_tokens = torch.zeros(len(prompts), config.max_new_tokens, dtype=torch.int64, device=device)
    out_log_probs = torch.zeros(len(prompts), config.max_new_tokens, device=device)
    counts = torch.zeros(len(prompts), dtype=torch.int64, device=device)  # tokens generated so far

    ends = torch.tensor(end_ids, device=device)

    decoder = Decoder(gpt, num_slots, length)
    waiting = list(range(len(prompts)))
    rows = torch.empty(0, dtype=torch.int64, device=device)  # the prompt of each active slot
    last = torch.empty(0, dtype=torch.int64, device=device)  # its newest token, not yet in the cache

    def keep(rows: Tensor, logits: Tensor) -> Tensor:
        tokens, log_probs = sampler(logits, keys[rows], counts[rows])
        out_tokens[rows, counts[rows]], out_log_probs[rows, counts[rows]] = tokens, log_probs
        counts[rows] += 1
        return tokens

    try:
        while waiting or len(rows):
            free = num_slots - len(rows)
            # prefills are batched: slots wait until an eighth of them is free
            if waiting and free >= min(len(waiting), max(1, num_slots // 8)):
                batch, waiting = waiting[:free], waiting[free:]
                new = torch.tensor(batch, device=device)
                slots = torch.arange(len(rows), len(rows) + len(batch), device=device)
                width = max(len(prompts[i]) for i in batch)
                tokens = torch.tensor(
                    [list(prompts[i]) + [0] * (width - len(prompts[i])) for i in batch], device=device
                )
                logits = decoder.prefill(tokens, lengths[new], slots)
                last, rows = torch.cat([last, keep(new, logits)]), torch.cat([rows, new])
            else:
                positions = lengths[rows] + counts[rows] - 1
                last = keep(rows, decoder.decode(last, positions, int(positions.max()) + 1))
            done = torch.isin(last, ends) | (counts[rows] >= budget[rows])
            if bool(done.any()):
                rows, last = _compact(decoder, rows, last, done, lengths + counts)
    finally:
        decoder.close()
    return [
        Response(out_tokens[i, :n].tolist(), out_log_probs[i, :n].tolist(), int(out_tokens[i, n - 1]) in end_ids)
        for i, n in enumerate(counts.tolist())
    ]


def _compact(decoder: Decoder, rows: Tensor, last: Tensor, done: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Closes the gaps of finished slots with the last active ones."""
    order = list(range(len(rows)))
    finished = set(done.nonzero().flatten().tolist())
    for slot in sorted(finished):
        while order and order[-1] in finished:
            order.pop()
        if slot < len(order):
            source = order.pop()
            decoder.move(source, slot, int(lengths[rows[source]]))
            order[slot] = source
    index = torch.tensor(order, dtype=torch.int64, device=rows.device)
    return rows[index], last[index]
