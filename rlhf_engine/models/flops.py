"""FLOPs of a model, a product and a sum counted as two (Narayanan et al. 2021, arXiv:2104.04473, appendix).

Unlike there, attention counts the pairs that a causal model looks at, half of the square, and the LM head the positions
whose log-prob is asked for. Norms and activations are left out. What backward computes again is no use to the model and
is not counted either, so that utilisation compares runs with and without it (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config import ModelConfig

BACKWARD = 2  # times the forward: the gradients of inputs and of weights


def matmul_parameters(model: ModelConfig) -> int:
    """Weights of a layer that each token is multiplied with."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads + model.num_attention_heads
    mlp = (3 if model.gated_mlp else 2) * model.hidden_size * model.intermediate_size
    if model.num_experts is not None:
        mlp = model.experts_per_token * mlp + model.num_experts * model.hidden_size
    return heads * model.head_size * model.hidden_size + mlp


def attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included, in a sequence."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def layer_flops(model: ModelConfig, length: int, sliding: bool = False) -> int:
    """Forward of one layer over one sequence."""
    pairs = attended(length, model.sliding_window if sliding else None)
    return 2 * matmul_parameters(model) * length + 4 * pairs * model.num_attention_heads * model.head_size


def head_flops(model: ModelConfig, head: str, outputs: int) -> int:
    """The head at so many positions."""
    return 2 * model.hidden_size * outputs * ((model.vocab_size or 0) if head == "lm" else 1)


def forward_flops(model: ModelConfig, head: str, lengths: Iterable[int], outputs: int) -> int:
    """The whole model over sequences of these lengths.

    Args:
        outputs: positions at which the head is evaluated, over all sequences.
    """
    first = min(model.first_sliding_layer, model.num_layers) if model.sliding_window else model.num_layers
    layers = sum(
        first * layer_flops(model, length) + (model.num_layers - first) * layer_flops(model, length, sliding=True)
        for length in lengths
    )
    return layers + head_flops(model, head, outputs)
