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

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from rlhf_kernels import HeadNorms, attention_heads, cached_attention, rms_norm, swiglu, wide_mm

from ..models.experts import by_expert, waits_for_sizes
from ..models.layers import SwiGLU, bias_of, causal_attention, causal_mask
from ..models.role import head_weight
from .attention import LEAST, BlockReading
from .cache import BLOCK, KVCache

# queries, keys and values as attention takes them; given a layer's cache and places in it, the latter two go there
Heads = Callable[..., Tensor]
Attend = Callable[[int, Heads], Tensor]  # the layer's number and these, to attention's output


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
        """Whether a step does the same whatever its numbers are: the host need not know how many rows an expert has."""
        if self.config.num_moe_experts is None:
            return True
        return not any(waits_for_sizes(layer.mlp.experts.weight1) for layer in self.gpt.decoder.layers)

    def _rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `(L, 1, n + 2, D)` that turn a group's queries and its key, and leave its value."""
        cos, sin = self.gpt.rotary_pos_emb(length).repeat(1, 1, 1, self.num_queries + 2, 1)
        sin[..., : self.head_dim // 2] *= -1
        cos[:, :, -1], sin[:, :, -1] = 1, 0
        return cos, sin

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

        def attend(i: int, heads: Heads) -> Tensor:
            qkv = heads()
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

        def attend(i: int, heads: Heads) -> Tensor:
            # the query heads of a group stand as its query positions, so keys and values are never expanded
            return read(i, heads(cache.store[i], places)).reshape(len(tokens), -1)

        return self._logits(self._layers(tokens, positions, attend), last)[:count]

    def _read(
        self, positions: Tensor, table: Tensor, cache: KVCache, reading: BlockReading | None
    ) -> Callable[[int, Tensor], Tensor]:
        if reading is None:
            lengths = positions + 1
            return lambda i, q: cached_attention(q, cache.store[i], table, lengths, self.windows[i])
        masks = {window: reading.mask(positions, window) for window in set(self.windows)}
        return lambda i, q: reading(q, cache.store[i], masks[self.windows[i]])

    # -- what they share -------------------------------------------------------------------------------------

    def _layers(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedding and all layers, `(T,)` to `(T, H)`. What a layer's half makes is added where the next one's norm
        reads the sum, unless its product has added it: on a GPU nine launches a layer."""
        x, made = self._embed(tokens, positions), None
        rotary = None if self.rotary is None else (self.rotary[0][positions], self.rotary[1][positions])
        for i, layer in enumerate(self.gpt.decoder.layers):
            attention = layer.self_attention
            heads = self._heads(attention, _norm(layer.input_layernorm, x, made), rotary)
            made = self._product(x, attention.linear_proj, attend(i, heads))
            h = _norm(layer.pre_mlp_layernorm, x, made)
            if self.config.num_moe_experts is None:
                inner = _linear(layer.mlp.linear_fc1, h)
                inner = swiglu(inner) if isinstance(layer.mlp, SwiGLU) else self._activate(inner)
                made = self._product(x, layer.mlp.linear_fc2, inner)
            else:
                made = self._reduce(self._experts(layer.mlp, h))
        return x if made is None else x.add_(made)

    def _heads(self, attention, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Heads:
        linear, norms = attention.linear_qkv, None
        within = self.fuses or bias_of(attention.q_layernorm) is not None
        qkv, bias = (_linear(linear, x), None) if within else (F.linear(x, linear.weight), bias_of(linear))
        qkv = qkv.view(len(x), self.num_groups, self.num_queries + 2, self.head_dim)
        if self.config.qk_layernorm:
            query, key = attention.q_layernorm, attention.k_layernorm
            if bias_of(query) is not None:
                qkv[:, :, :-2], qkv[:, :, -2] = _norm(query, qkv[:, :, :-2]), _norm(key, qkv[:, :, -2])
            else:
                norms = HeadNorms(query.weight, key.weight, query.eps)
        return functools.partial(attention_heads, qkv, bias, rotary, norms)

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

    def _product(self, x: Tensor, linear, value: Tensor) -> Tensor | None:
        """What a row-parallel linear layer makes of `value`; None where that is added to the residual `x` already."""
        if self.tp_size == 1 and self.fuses:
            x.addmm_(value, linear.weight.t())
            if (bias := bias_of(linear)) is not None:
                x += bias
            return None
        value, bias = self._reduce(F.linear(value, linear.weight)), bias_of(linear)
        return value if bias is None else value + bias

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
        chosen, order = chosen.sort()  # in which a token's experts are added up, as in training
        least = 1 if x.is_cuda else LEAST  # rows of an expert that are rounded alike, whoever is decoded with them
        places = by_expert(chosen, self.config.num_moe_experts, least)
        return mlp.experts.mix(x, weights.gather(1, order), places)

    def _logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self._logits(x[F.pad(rows, (0, -len(rows) % LEAST))])[: len(rows)]
        return wide_mm(_norm(self.gpt.decoder.final_layernorm, x), self.head.T)


def _norm(norm, x: Tensor, add: Tensor | None = None) -> Tensor:
    """Of `x`, to which something is added first, in place."""
    if (bias := bias_of(norm)) is None:
        return rms_norm(x, norm.weight, norm.eps, add)
    if add is not None:
        x += add
    return F.layer_norm(x, norm.weight.shape, norm.weight, bias, norm.eps)


def _linear(linear, x: Tensor) -> Tensor:
    bias = bias_of(linear)
    if bias is None or x.dtype is torch.float32:
        return F.linear(x, linear.weight, bias)
    return F.linear(x, linear.weight).add_(bias)  # rounded twice, see `Decoder.fuses`
