"""The model, where it begins, and what meshes it can be cut for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .mesh import MeshConfig
from .reading import ConfigError


@dataclass
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training. `dynamic` stretches only what lies
    beyond `max_position_embeddings`, where no run goes."""

    rope_type: Literal["linear", "dynamic", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # these three belong to llama3
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class ModelConfig:
    """A decoder; the defaults are Llama's. Used for random weights; a checkpoint at `policy.path` brings its own, but
    for `layers`."""

    architecture: str = "llama"  # whose HF names and keys the weights have: a module of rlhf_engine/hf
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 352  # of each expert where there are experts
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    vocab_size: int | None = None  # null: the tokenizer's
    max_position_embeddings: int = 512
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a token sees, itself included; null: all before it
    first_sliding_layer: int = 0  # layers below see everything
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-5  # of either norm
    qk_norm: bool = False  # queries and keys normalised per head
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    proj_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    num_experts: int | None = None  # null: one dense MLP a layer
    experts_per_token: int = 2
    normalize_experts: bool = True  # the weights of a token's experts add up to 1
    router_aux_loss_coef: float = 0.0  # of the loss that keeps experts equally busy, where a model of text is trained
    tie_word_embeddings: bool = True
    score_token: int | None = None  # a reward model that reads its score at this token, put behind each dialogue
    score_pad: int | None = None  # a reward model that reads its score at the last token that is not this one
    init_std: float = 0.02
    layers: Literal["own", "te"] = "own"  # te: transformer-engine's; in which a model is computed, not which one it is

    @property
    def head_size(self) -> int:
        """Numbers of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Base:
    """Where a role's weights begin: a folder, or random ones of a model (`path` None)."""

    path: str | None
    model: ModelConfig


@dataclass
class PolicyConfig:
    # HF folder, or what tools/convert_hf made of one, that the first phase starts from; null: random weights of `model`
    path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)  # of its config.json, read as if they were not there
    # in place of the model's; null: a checkpoint's where its config.json has output_router_logits, as in transformers
    router_aux_loss_coef: float | None = None


def check_model(mesh: MeshConfig, model: ModelConfig) -> None:
    """Refuses a mesh that the model cannot be cut for. Key-value heads are never replicated.

    Raises:
        ConfigError: names the sizes, and those of the mesh that would fit.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(model, name)
        if size % mesh.tp:
            fits = [t for t in range(1, 65) if not any(
                getattr(model, n) % t for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
            )]  # fmt: skip
            raise ConfigError(f"mesh.tp={mesh.tp} does not divide the model's {name}={size}: tp may be {fits}")
    if model.num_layers < mesh.pp:
        raise ConfigError(f"mesh.pp={mesh.pp} exceeds the model's num_layers={model.num_layers}")
    if mesh.virtual_pp > 1 and mesh.pp == 1:
        raise ConfigError(
            f"mesh.virtual_pp={mesh.virtual_pp} has no pipeline to divide: use mesh.pp=2, or virtual_pp=1"
        )
    if model.num_layers < mesh.pp * mesh.virtual_pp:
        raise ConfigError(
            f"mesh.virtual_pp={mesh.virtual_pp} x mesh.pp={mesh.pp} exceeds the model's num_layers={model.num_layers}:"
            f" use mesh.virtual_pp={model.num_layers // mesh.pp}"
        )
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide"
            f" num_attention_heads={model.num_attention_heads}"
        )
    if (model.num_experts or mesh.ep) % mesh.ep or (mesh.ep > 1 and model.num_experts is None):
        raise ConfigError(f"mesh.ep={mesh.ep} does not divide the model's num_experts={model.num_experts or 0}")
    fewest = 2 if model.normalize_experts else 1  # the weight of one expert alone would always be 1
    if model.num_experts is not None and not fewest <= model.experts_per_token <= model.num_experts:
        raise ConfigError(
            f"model.experts_per_token={model.experts_per_token} does not lie between {fewest} and"
            f" num_experts={model.num_experts}"
        )
    if model.router_aux_loss_coef and model.num_experts is None:
        raise ConfigError(
            f"router_aux_loss_coef={model.router_aux_loss_coef} shares tokens out among experts, and a model of"
            f" num_experts=null has none: leave it out"
        )
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of num_attention_heads="
            f"{model.num_attention_heads}: change it or set model.head_dim"
        )


FP8_UNIT = 16  # that divides the sides of a product in 8 bits, and so the tokens of a micro-batch


def check_fp8(mesh: MeshConfig, model: ModelConfig) -> None:
    """Refuses what has no products in 8 bits.

    Raises:
        ConfigError: names the size that they do not come in, or what cannot have them.
    """
    if model.num_experts is not None:
        raise ConfigError("dtype=fp8 is not for mixtures of experts, which stay in bfloat16: use dtype=bfloat16")
    context = model.max_position_embeddings
    if model.positions == "learned" and context % (FP8_UNIT * mesh.tp):
        raise ConfigError(
            f"dtype=fp8 fills rows up to multiples of {FP8_UNIT * mesh.tp} tokens, and the model has no positions"
            f" beyond {context}: use dtype=bfloat16"
        )
    heads, groups = model.num_attention_heads // mesh.tp, model.num_key_value_heads // mesh.tp
    sides = {
        "hidden_size": model.hidden_size,
        "intermediate_size / mesh.tp": model.intermediate_size // mesh.tp,
        "num_attention_heads x head_dim / mesh.tp": heads * model.head_size,
        "(num_attention_heads + 2 num_key_value_heads) x head_dim / mesh.tp": (heads + 2 * groups) * model.head_size,
    }
    for name, size in sides.items():
        if size % FP8_UNIT:
            raise ConfigError(
                f"dtype=fp8 needs sizes that {FP8_UNIT} divides, and the model's {name} is {size}: use dtype=bfloat16"
                + (", or another mesh.tp" if mesh.tp > 1 else "")
            )
