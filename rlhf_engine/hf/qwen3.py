"""Qwen3 (arXiv:2505.09388): queries and keys normalised per head, a head size of its own."""

from __future__ import annotations

from .architecture import Architecture
from .llama import HF, KEYS, LLAMA
from .qwen2 import QWEN2, SLIDING_KEYS, sliding_window
from .rows import LAYER, norm

QK_NORMS = tuple(row for x in "qk" for row in norm(f"{LAYER}self_attention.{x}_layernorm", f"{HF}self_attn.{x}_norm"))

QWEN3 = Architecture(
    name="qwen3",
    lm="Qwen3ForCausalLM",
    scalar="Qwen3ForSequenceClassification",
    keys=KEYS | SLIDING_KEYS | {"attention_bias": "qkv_bias proj_bias"},
    defaults={**QWEN2.defaults, "head_dim": 128},
    constants={"hidden_act": "silu"},
    fields={"qk_norm": True},
    normalize=sliding_window,
    rows=(*LLAMA.rows, *QK_NORMS),
)
