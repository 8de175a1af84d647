"""What we put into megatron's layers: norms, attention on torch's SDPA, and the two heads.

Neither transformer-engine nor apex is needed, and the same code runs on CPU and CUDA. Legend for shapes:
S sequence, B batch, N query heads and G key-value heads of this rank, D head size, H hidden size.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from rlhf_kernels import rms_norm, rotate, swiglu

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
        """`(..., H)` of the same shape."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Mean and variance norm with a bias (arXiv:1607.06450)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., H)` of the same shape."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class SwiGLU(MLP):
    """Megatron's feed-forward layer whose gate and activation are one operation."""

    def forward(self, hidden_states: Tensor, per_token_scale=None, **unused) -> tuple[Tensor, Tensor | None]:
        """`(S, B, H)` to the same and a bias that is yet to be added."""
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(x if bias is None else x + bias))


@functools.cache
def without_bias(linear: type[nn.Module]) -> type[nn.Module]:
    """A linear layer's class without bias: megatron's config gives one to all linear layers or to none."""

    class WithoutBias(linear):  # type: ignore[valid-type,misc]
        def __init__(self, *args, bias: bool, **kwargs):
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def bias_of(module) -> Tensor | None:
    """Of a norm or a linear layer; transformer-engine's have an empty one where there is none."""
    bias = getattr(module, "bias", None)
    return None if bias is None or bias.numel() == 0 else bias


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


class Rotary(RotaryEmbedding):
    """Megatron's, with cosines and sines in place of angles, in the type that heads are turned in: made once for all
    layers and micro-batches, as far as the longest of them goes."""

    dtype: torch.dtype
    table: Tensor | None = None

    def forward(self, max_seq_len: int, **unused) -> Tensor:  # type: ignore[override]
        """`(2, S, 1, 1, D)`, which megatron hands to the attention of each layer as it would the angles."""
        if self.table is None or self.table.shape[1] < max_seq_len:
            angles = self.get_emb(max_seq_len)
            self.table = torch.stack([angles.cos(), angles.sin()]).to(self.dtype)
        return self.table[:, :max_seq_len]


def _turned(heads: Tensor, table: Tensor, interleaved: bool = False) -> Tensor:
    """`(S, B, N, D)` by `Rotary`'s table."""
    return rotate(heads, *table)


rope_utils.fused_apply_rotary_pos_emb = _turned  # in the place of transformer-engine's, under `apply_rope_fusion`


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """What a token sees of `(S, S)` positions: `window` of them, itself included. None: all up to itself."""
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, N, S, D)`, `(B, G, S, D)`, `(B, G, S, D)` to `(B, N, S, D)`; causal where there is no mask."""
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and not _has_grouped_kernel(query, mask):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        is_grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
    )


def _has_grouped_kernel(query: Tensor, mask: Tensor | None) -> bool:
    """Whether torch computes grouped heads without holding all scores. On CUDA flash attention alone does, which knows
    neither float32 nor masks; what comes next in torch's list, the plain formula, takes S x S numbers of each head."""
    return not query.is_cuda or (mask is None and query.dtype is not torch.float32)


class CoreAttention(MegatronModule):
    """Causal attention with grouped heads through `scaled_dot_product_attention`.

    With a `window` a token sees that many tokens, itself included.
    """

    window: int | None = None

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused):
        super().__init__(config=config)

    def forward(self, query, key, value, attention_mask=None, **unused) -> Tensor:
        """`(S, B, N, D)`, `(S, B, G, D)`, `(S, B, G, D)` to `(S, B, N * D)`."""
        length, batch, num_heads, head_dim = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = causal_attention(q, k, v, causal_mask(length, self.window, q.device))
        return out.permute(2, 0, 1, 3).reshape(length, batch, num_heads * head_dim)


class LMHead(tensor_parallel.ColumnParallelLinear):
    """Holds the weight of the LM head and passes hidden states on.

    `rlhf_kernels.linear_log_probs` makes log-probs of the two without ever holding the logits, and the sampler makes
    logits of the one position that it needs.
    """

    def forward(self, hidden: Tensor, weight=None, runtime_gather_output=None) -> tuple[Tensor, None]:
        """The hidden states themselves: their product with the head is left to the loss."""
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
