"""Mistral (arXiv:2310.06825): Llama with a sliding window."""

from __future__ import annotations

from .architecture import Architecture
from .llama import DEFAULTS, KEYS, LLAMA

MISTRAL = Architecture(
    name="mistral",
    lm="MistralForCausalLM",
    scalar="MistralForSequenceClassification",
    keys=KEYS | {"sliding_window": "sliding_window"},
    defaults=DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    constants={"hidden_act": "silu"},
    rows=LLAMA.rows,
)
