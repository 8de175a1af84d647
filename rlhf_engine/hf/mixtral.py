"""Mixtral (arXiv:2401.04088): Mistral with experts. Experts are split over tensor parallel ranks like a dense MLP."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture
from .llama import ATTENTION, DEFAULTS, EMBEDDING, HF, KEYS
from .rows import LAYER, Gated, Row

EXPERT = f"{LAYER}mlp.experts.local_experts.*."
EXPERT_KEYS = {"num_experts_per_tok": "experts_per_token", "router_aux_loss_coef": "router_aux_loss_coef"}


def load_balancing(hf: dict[str, Any]) -> None:
    """transformers adds the load-balancing loss where it is asked for the router's logits."""
    if not hf.pop("output_router_logits", False):
        hf["router_aux_loss_coef"] = 0.0


MIXTRAL = Architecture(
    name="mixtral",
    lm="MixtralForCausalLM",
    scalar="MixtralForSequenceClassification",
    keys=KEYS | EXPERT_KEYS | {"num_local_experts": "num_experts", "sliding_window": "sliding_window"},
    defaults={
        **DEFAULTS,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    constants={"hidden_act": "silu", "router_jitter_noise": 0.0},
    normalize=load_balancing,
    rows=(
        *EMBEDDING,
        *ATTENTION,
        Row(f"{LAYER}mlp.router.weight", f"{HF}block_sparse_moe.gate.weight"),
        Gated(
            f"{EXPERT}linear_fc1.weight",
            f"{HF}block_sparse_moe.experts.*.w1.weight {HF}block_sparse_moe.experts.*.w3.weight",
        ),
        Row(f"{EXPERT}linear_fc2.weight", f"{HF}block_sparse_moe.experts.*.w2.weight", 1),
    ),
)
