"""The policy's forward for generation: plain torch over the parameters of the model that trains, with a KV cache.

Megatron's modules spend their time on what training needs: sequence-first layouts, autograd functions around every
collective, checks and hooks in each module; the window of the cache that they read was that of the longest sequence.
This walk took 0.95 s where they took 1.55 s (stories260K, 256 prompts, 64 tokens each, one thread; 5.1 against 7.3 s
of a 6M Llama). It reads the same tensors: there is no second copy of the weights.
`tests/test_hf_architectures.py` holds it equal to megatron's forward for every architecture.

Legend for shapes: B sequences, S prompt positions, T tokens, H hidden size; G key-value heads of this rank with n query
heads each, D head size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rlhf_kernels import cached_attention, wide_mm

from ..models.layers import LayerNorm, RMSNorm, causal_attention, causal_mask
from ..models.role import head_weight
from .attention import LEAST, BlockReading
from .cache import BLOCK, KVCache

Attend = Callable[[int, Tensor], Tensor]  # the layer's number and its input to attention, to the output


class Decoder:
    """
    Args:
        gpt: whole but for TP.
        group: its tensor parallel ranks.
        length: the longest sequence that there will be.
    """

    def __init__(self, gpt: GPTModel, group: dist.ProcessGroup, length: int):
        config = gpt.config
        self.gpt, self.config = gpt, config
        self.tp_size, self.tp_rank, self.group = dist.get_world_size(group), dist.get_rank(group), group
        self.num_groups = config.num_query_groups // self.tp_size
        self.num_queries = config.num_attention_heads // config.num_query_groups  # n
        self.head_dim = config.kv_channels
        self.embedding = gpt.embedding.word_embeddings.weight
        self.head = head_weight(gpt)
        # whether a product is added to something in one go, and rounded once: in bfloat16 it is rounded as often as in
        # training, which makes of the two forwards' hidden states the same bits, but for attention over the cache
        self.fuses = self.head.dtype is torch.float32
        self.windows = [layer.self_attention.core_attention.window for layer in gpt.decoder.layers]
        self.length = length
        self.rotary = self._rotary_tables(length) if gpt.position_embedding_type == "rope" else None

    def new_cache(self, num_blocks: int) -> KVCache:
        """An empty cache of so many blocks."""
        shape = (len(self.windows), self.num_groups, self.head_dim, num_blocks)
        return KVCache(*shape, self.head.dtype, self.head.device)

    @property
    def is_static(self) -> bool:
        """Whether a step does the same whatever its numbers are; experts take as many rows as they are given."""
        return self.config.num_moe_experts is None

    def _rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `(L, 1, n + 2, D)` that turn a group's queries and its key, and leave its value."""
        angles = self.gpt.rotary_pos_emb(length).view(length, 1, 1, self.head_dim)
        sign = torch.ones(self.head_dim, device=angles.device)
        sign[: self.head_dim // 2] = -1
        heads = (1, 1, self.num_queries + 2, 1)
        cos, sin = angles.cos().repeat(heads), (angles.sin() * sign).repeat(heads)
        cos[:, :, -1], sin[:, :, -1] = 1, 0
        return cos.to(self.head.dtype), sin.to(self.head.dtype)

    # -- the two forwards ------------------------------------------------------------------------------------

    def prefill(
        self, tokens: Tensor, shapes: Sequence[tuple[int, int]], last: Tensor, source: Tensor, places: Tensor,
        cache: KVCache,
    ) -> Tensor:  # fmt: skip
        """Right-padded prompts `(T,)`, one behind the other, into the cache: logits `(L, V / tp)`.

        Args:
            shapes: how many prompts have one width and that width, as they come.
            last: `(L,)`, tokens whose logits are wanted.
            source: `(P,)`, tokens that are written, as often as they are.
            places: of the cache, where that is.
        """
        cuts = [batch * width for batch, width in shapes]
        masks = {(w, width): causal_mask(width, w, tokens.device) for w in set(self.windows) for _, width in shapes}

        def attend(i: int, qkv: Tensor) -> Tensor:
            cache.write(i, places, qkv[source, :, -2:])
            outs = []
            for part, (batch, width) in zip(qkv.split(cuts), shapes, strict=True):
                part = part.unflatten(0, (batch, width))
                q = part[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
                k, v = (part[:, :, :, j].transpose(1, 2) for j in (-2, -1))
                out = causal_attention(q, k, v, masks[self.windows[i], width])
                outs.append(out.transpose(1, 2).reshape(batch * width, -1))
            return torch.cat(outs)

        # where padding reaches beyond the longest sequence, any position will do
        positions = [torch.arange(width, device=tokens.device).repeat(batch) for batch, width in shapes]
        x = self._layers(tokens, torch.cat(positions).clamp(max=self.length - 1), attend)
        return self._logits(x, last)

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        table: Tensor,
        cache: KVCache,
        reading: BlockReading | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The next token `(B,)` of every row: logits `(B, V / tp)`. Rows may be tokens of one sequence, all of which
        are in the cache before any is read.

        Args:
            positions: `(B,)`, of these tokens in their sequences.
            table: `(B, C)`, the blocks of each row.
            reading: of the same table, by which attention reads all blocks at once, which suits a CPU; None: it reads
                row by row, and all shapes depend on those of the table alone.
            last: `(L,)`, the rows whose logits are wanted; None: all.
        """
        count, fill = len(tokens), len(reading.pieces) - len(tokens) if reading is not None else 0
        if fill:  # with rows of nothing
            tokens, positions, table = (
                F.pad(tokens, (0, fill)),
                F.pad(positions, (0, fill)),
                F.pad(table, (0, 0, 0, fill)),
            )
        blocks = table.gather(1, positions.unsqueeze(1) // BLOCK).squeeze(1)
        places = cache.places(blocks, positions % BLOCK)
        read = self._read(positions, table, cache, reading)

        def attend(i: int, qkv: Tensor) -> Tensor:
            cache.write(i, places, qkv[:, :, -2:])
            # the query heads of a group stand as its query positions, so keys and values are never expanded
            return read(i, qkv[:, :, :-2]).reshape(len(tokens), -1)

        return self._logits(self._layers(tokens, positions, attend), last)[:count]

    def _read(self, positions: Tensor, table: Tensor, cache: KVCache, reading: BlockReading | None) -> Attend:
        if reading is None:
            lengths = positions + 1
            return lambda i, q: cached_attention(q, cache.store[i], table, lengths, self.windows[i])
        masks = {window: reading.mask(positions, window) for window in set(self.windows)}
        return lambda i, q: reading(q, cache.store[i], masks[self.windows[i]])

    # -- what they share -------------------------------------------------------------------------------------

    def _layers(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedding and all layers, `(T,)` to `(T, H)`; `attend` takes a layer's `(T, G, n + 2, D)`."""
        x = self._embed(tokens, positions)
        if self.rotary is not None:
            cos, sin = (table[positions] for table in self.rotary)
        for i, layer in enumerate(self.gpt.decoder.layers):
            attention = layer.self_attention
            qkv = _linear(attention.linear_qkv, _norm(layer.input_layernorm, x))
            qkv = qkv.view(len(tokens), self.num_groups, self.num_queries + 2, self.head_dim)
            if self.config.qk_layernorm:
                qkv[:, :, :-2] = _norm(attention.q_layernorm, qkv[:, :, :-2])
                qkv[:, :, -2] = _norm(attention.k_layernorm, qkv[:, :, -2])
            if self.rotary is not None:
                turned = qkv.roll(self.head_dim // 2, -1)
                qkv = torch.addcmul(qkv * cos, turned, sin) if self.fuses else qkv * cos + turned * sin
            self._add(x, attention.linear_proj, attend(i, qkv))
            h = _norm(layer.pre_mlp_layernorm, x)
            if self.config.num_moe_experts is None:
                self._add(x, layer.mlp.linear_fc2, self._activate(_linear(layer.mlp.linear_fc1, h)))
            else:
                x += self._reduce(self._experts(layer.mlp, h))
        return x

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.tp_size == 1:
            x = F.embedding(tokens, self.embedding)
        else:
            local = tokens - self.tp_rank * len(self.embedding)
            others = (local < 0) | (local >= len(self.embedding))
            x = F.embedding(local.masked_fill(others, 0), self.embedding)
            x = self._reduce(x.masked_fill_(others.unsqueeze(1), 0))
        if self.rotary is None:
            x = x + F.embedding(positions, self.gpt.embedding.position_embeddings.weight)
        return x

    def _add(self, x: Tensor, linear, value: Tensor) -> None:
        """Adds what a row-parallel linear layer makes of `value` to the residual, in place."""
        if self.tp_size == 1 and self.fuses:
            x.addmm_(value, linear.weight.t())
            if linear.bias is not None:
                x += linear.bias
        else:
            value = self._reduce(F.linear(value, linear.weight))
            x += value if linear.bias is None else value + linear.bias

    def _reduce(self, x: Tensor) -> Tensor:
        if self.tp_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def _activate(self, x: Tensor) -> Tensor:
        if not self.config.gated_linear_unit:
            return self.config.activation_func(x)
        gate, up = x.chunk(2, -1)
        return self.config.activation_func(gate).mul_(up)

    def _experts(self, mlp, x: Tensor) -> Tensor:
        """A mixture of experts, this rank's shard of each, `(T, H)`. The router is float32, as it is in training: whom
        bfloat16 chooses, its last digit decides."""
        top = self.config.moe_router_topk
        scores = F.linear(x.float(), mlp.router.weight.float())
        if self.config.moe_router_pre_softmax:
            weights, chosen = scores.softmax(-1).topk(top)
        else:
            scores, chosen = scores.topk(top)
            weights = scores.softmax(-1)
        # rows by expert; the number of each one's is all that is waited for
        chosen, order = chosen.flatten().sort(stable=True)
        totals = torch.zeros(len(mlp.experts.local_experts), dtype=torch.int64, device=x.device)
        counts = totals.index_add_(0, chosen, torch.ones_like(chosen)).tolist()
        rows, weights = order // top, weights.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(x)
        parts = zip(mlp.experts.local_experts, rows.split(counts), weights.split(counts), strict=True)
        for expert, mine, weight in parts:
            if len(mine):
                inner = self._activate(_linear(expert.linear_fc1, x[mine]))
                out.index_add_(0, mine, F.linear((inner * weight).to(x.dtype), expert.linear_fc2.weight))
        return out

    def _logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self._logits(x[F.pad(rows, (0, -len(rows) % LEAST))])[: len(rows)]
        return wide_mm(_norm(self.gpt.decoder.final_layernorm, x), self.head.T)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _linear(linear, x: Tensor) -> Tensor:
    if linear.bias is None or x.dtype is torch.float32:
        return F.linear(x, linear.weight, linear.bias)
    return F.linear(x, linear.weight).add_(linear.bias)  # rounded twice, see `Decoder.fuses`
