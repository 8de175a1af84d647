"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with experts in every layer."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture
from .llama import ATTENTION, EMBEDDING, HF
from .mixtral import EXPERT, EXPERT_KEYS, load_balancing
from .qwen2 import sliding_window
from .qwen3 import QK_NORMS, QWEN3
from .rows import LAYER, Gated, Row


def plain(hf: dict[str, Any]) -> None:
    sliding_window(hf)
    load_balancing(hf)
    hf["first_sliding_layer"] = 0  # `max_window_layers` is not read
    hf["num_experts"] = hf.pop("num_local_experts", None) or hf["num_experts"]
    hf.pop("intermediate_size", None)  # of dense layers, of which there are none


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    lm="Qwen3MoeForCausalLM",
    scalar="Qwen3MoeForSequenceClassification",
    keys={key: ours for key, ours in QWEN3.keys.items() if key != "intermediate_size"}
    | EXPERT_KEYS
    | {
        "num_experts": "num_experts",
        "moe_intermediate_size": "intermediate_size",
        "norm_topk_prob": "normalize_experts",
    },
    defaults={
        **QWEN3.defaults,
        "head_dim": None,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    constants={"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []},
    fields={"qk_norm": True},
    normalize=plain,
    rows=(
        *EMBEDDING,
        *ATTENTION,
        *QK_NORMS,
        Row(f"{LAYER}mlp.router.weight", f"{HF}mlp.gate.weight"),
        Gated(
            f"{EXPERT}linear_fc1.weight",
            f"{HF}mlp.experts.*.gate_proj.weight {HF}mlp.experts.*.up_proj.weight",
        ),
        Row(f"{EXPERT}linear_fc2.weight", f"{HF}mlp.experts.*.down_proj.weight", 1),
    ),
)
