"""What we put into megatron's layers: norms, attention on torch's SDPA with a KV cache, and the two heads.

Neither transformer-engine nor apex is needed, and the same code runs on CPU and CUDA. Legend for shapes:
S sequence, B batch, N query heads and G key-value heads of this rank, D head size, H hidden size, L cache length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from ..config import RopeScaling
from ..cpu import parameter_device


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467). Unlike megatron's torch norm it works under sequence parallelism:
    its weight is replicated while the ranks see different positions, so it asks for its gradient to be reduced."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Mean and variance norm with a bias (arXiv:1607.06450)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class ColumnWithoutBias(tensor_parallel.ColumnParallelLinear):
    """Megatron's config gives a bias to all linear layers or to none."""

    def __init__(self, *args, bias: bool, **kwargs):
        super().__init__(*args, bias=False, **kwargs)


class RowWithoutBias(tensor_parallel.RowParallelLinear):
    def __init__(self, *args, bias: bool, **kwargs):
        super().__init__(*args, bias=False, **kwargs)


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies (radians per position) for a stretched context.

    `linear` divides all of them; `llama3` divides those that turn less than `low_freq_factor` times in the original
    context, keeps those that turn more than `high_freq_factor` times, and blends in between. `dynamic` divides
    beyond `max_position_embeddings` only.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "dynamic":
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


@dataclass
class CacheView:
    """The rows and positions of one forward over a KV cache.

    With `slots` `(B,)` the forward is a prefill of those slots from position 0. Without, it decodes one token for each
    of the first B slots at `positions` `(B,)`, seeing the first `length` of them through `mask` `(B, 1, 1, length)`.
    """

    slots: Tensor | None = None
    positions: Tensor | None = None
    mask: Tensor | None = None
    length: int = 0


class LayerCache:
    """Keys and values of one layer, `(slots, G, L, D)`."""

    def __init__(self, num_slots: int, num_groups: int, length: int, head_dim: int, dtype, device):
        self.keys = torch.zeros(num_slots, num_groups, length, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.view: CacheView | None = None


class CoreAttention(MegatronModule):
    """Causal attention with grouped heads through `scaled_dot_product_attention`, with or without a KV cache.

    With a `window` a token sees that many tokens, itself included.
    """

    window: int | None = None

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused):
        super().__init__(config=config)
        self.cache: LayerCache | None = None

    def forward(self, query, key, value, attention_mask=None, **unused) -> Tensor:
        """`(S, B, N, D)`, `(S, B, G, D)`, `(S, B, G, D)` to `(S, B, N * D)`."""
        length, batch, num_heads, head_dim = query.shape
        if self.cache is not None and self.cache.view is not None and self.cache.view.slots is None:
            return self._decode(query, key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None and (view := self.cache.view) is not None:
            self.cache.keys[view.slots, :, :length] = k
            self.cache.values[view.slots, :, :length] = v
        mask = None
        if self.window is not None and self.window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != num_heads
        )
        return out.permute(2, 0, 1, 3).reshape(length, batch, num_heads * head_dim)

    def _decode(self, query, key, value) -> Tensor:
        assert self.cache is not None and self.cache.view is not None
        view = self.cache.view
        _, batch, num_heads, head_dim = query.shape
        groups = key.shape[2]
        rows = torch.arange(batch, device=query.device)
        self.cache.keys[rows, :, view.positions] = key[0]
        self.cache.values[rows, :, view.positions] = value[0]
        k, v = self.cache.keys[:batch, :, : view.length], self.cache.values[:batch, :, : view.length]
        # the query heads of a group stand as its query positions, so keys and values are never expanded
        q = query.view(batch, groups, num_heads // groups, head_dim)
        mask = view.mask
        assert mask is not None and view.positions is not None
        if self.window is not None and self.window < view.length:
            oldest = (view.positions + 1 - self.window)[:, None, None, None]
            mask = mask & (torch.arange(view.length, device=query.device) >= oldest)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.reshape(1, batch, num_heads * head_dim)


class LMHead(tensor_parallel.ColumnParallelLinear):
    """Holds the weight of the LM head and passes hidden states on.

    `rlhf_kernels.linear_log_probs` makes log-probs of the two without ever holding the logits, and the sampler makes
    logits of the one position that it needs.
    """

    def forward(self, hidden: Tensor, weight=None, runtime_gather_output=None) -> tuple[Tensor, None]:
        return hidden, None


class ScalarHead(MegatronModule):
    """One scalar per position, in place of the LM head: the head of critics and reward models.

    Replicated over tensor parallel ranks. `bias` centres a reward model's scores.
    """

    def __init__(self, config, tp_group):
        super().__init__(config=config)
        device = parameter_device()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight=None, runtime_gather_output=None) -> tuple[Tensor, None]:
        """`(S, B, H)`, or its sequence shard, to `(S, B, 1)` in float32."""
        # a score of 8 bits would be too coarse to rank answers by
        out = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.sequence_parallel:
            # every rank computes the same loss from the whole sequence: backward takes its own part, unsummed
            out = tensor_parallel.gather_from_sequence_parallel_region(
                out, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return out, None
