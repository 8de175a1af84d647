"""Qwen2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture
from .llama import DEFAULTS, KEYS, LLAMA


def sliding_window(hf: dict[str, Any]) -> None:
    """Qwen's configs always name a window; `use_sliding_window` and `max_window_layers` say who has it."""
    first = hf.pop("max_window_layers", 28)
    if hf.pop("use_sliding_window", False) and hf.get("sliding_window"):
        hf["first_sliding_layer"] = first
    else:
        hf["sliding_window"] = None


SLIDING_KEYS = {"sliding_window": "sliding_window", "first_sliding_layer": "first_sliding_layer"}

QWEN2 = Architecture(
    name="qwen2",
    lm="Qwen2ForCausalLM",
    scalar="Qwen2ForSequenceClassification",
    keys=KEYS | SLIDING_KEYS,
    defaults=DEFAULTS | {"sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    constants={"hidden_act": "silu", "use_mrope": False},
    fields={"qkv_bias": True},
    normalize=sliding_window,
    rows=LLAMA.rows,
)
