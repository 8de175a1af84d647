"""Bytes on one rank: what a role's weights and optimizer hold, what a micro-batch leaves for backward, the KV cache.

The formulas follow what torch saves in our layers (`models/layers.py`) and megatron's MLP; `tests/test_plan.py` holds
them to what is saved. The attention scores and the logits are never held (`docs/architecture.md`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from rlhf_kernels.linear_log_prob import CHUNK_BYTES, KEEP_BYTES

from ..config import MeshConfig, ModelConfig, OptimizerConfig, Recompute, RolloutConfig
from ..models.partition import Parameters, layer_parameters, padded_vocab_size, stage_layers
from ..rollout.cache import BLOCK, num_blocks
from ..rollout.engine import PREFILL_TOKENS


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    process: float = 0.0  # what it holds before it has a model

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


# Times what tensors that come and go need. glibc's heap keeps what was freed between blocks that are still in use,
# about as much again; torch's allocator on a GPU hands it out anew.
_HOLES = {"cpu": 2.0, "cuda": 1.0}


@dataclass(frozen=True)
class Numbers:
    """How a run stores its numbers.

    Args:
        itemsize: bytes of a weight and of an activation.
        device: "cpu" or "cuda".
        fp8: layers compute their products in 8 bits, of weights in `itemsize` bytes.
    """

    itemsize: int
    device: str
    fp8: bool = False

    @property
    def holes(self) -> float:
        """Times what tensors that come and go need."""
        return _HOLES[self.device]

    @property
    def optimizer_itemsize(self) -> int:
        """Two moments in float32, and the float32 weights that bfloat16 ones are rounded from."""
        return 8 if self.itemsize == 4 else 12


def resident(held: Parameters, optimizer: OptimizerConfig | None, mesh: MeshConfig, numbers: Numbers) -> Memory:
    """A role's weights and, where it trains, its gradients (float32) and optimizer, the latter split over replicas."""
    weights = held.total * numbers.itemsize
    if optimizer is None:
        return Memory(weights)
    return Memory(weights, 4 * held.total, numbers.optimizer_itemsize * optimized(held, optimizer, mesh))


def optimized(held: Parameters, optimizer: OptimizerConfig, mesh: MeshConfig) -> float:
    """Parameters whose optimizer state a rank holds. Experts have fewer replicas."""
    assert mesh.dp is not None
    if not optimizer.distributed:
        return held.total
    return held.dense / mesh.dp + held.experts / (mesh.dp // mesh.ep)


def saved(held: Parameters, optimizer: OptimizerConfig, mesh: MeshConfig, numbers: Numbers) -> float:
    """What a save copies to host memory on the rank that writes most: weights, and the optimizer with its own float32
    weights. A replica writes what it keeps of a distributed optimizer, and as much of the weights."""
    each = 12 if optimizer.distributed else numbers.optimizer_itemsize
    return (numbers.itemsize + each) * optimized(held, optimizer, mesh)


# -- activations ---------------------------------------------------------------------------------------------


def layer_activations(
    model: ModelConfig, rows: int, length: int, mesh: MeshConfig, numbers: Numbers, recompute: Recompute = "none"
) -> float:
    """What one layer keeps of one micro-batch for backward."""
    tp, tokens, item = mesh.tp, rows * length, numbers.itemsize
    hidden = model.hidden_size / (tp if mesh.sequence_parallel else 1)
    if recompute == "full":
        return tokens * hidden * item
    size, heads, groups = model.head_size, model.num_attention_heads / tp, model.num_key_value_heads / tp
    queries, keys, inner = heads * size, groups * size, model.intermediate_size / tp
    # torch's norm on a CPU keeps the normalised values too; the linear layer behind it keeps the norm's output
    norm_copies = 2 if numbers.device == "cpu" and model.norm == "rms" else 1
    norm_floats = 2 if model.norm == "layer" else 1  # mean and deviation, or the latter alone
    items = 2 * (norm_copies + 1) * hidden
    floats = 2.0 * norm_floats * hidden / model.hidden_size
    items += 2 * queries + 2 * keys  # queries, keys and values as they were projected, and the output
    if model.positions == "rotary":
        items += queries + keys  # as they were turned
    if model.qk_norm:
        # queries of several groups do not lie side by side, and are copied to be normalised
        items += (norm_copies - (groups == 1)) * queries + (norm_copies - 1) * keys
        floats += norm_floats * (heads + groups)
    if recompute == "none":
        floats += heads  # log-sum-exp of each query
    mlp = feed_forward(model, numbers) * inner
    if model.num_experts is not None:
        mlp = model.experts_per_token * (model.hidden_size + mlp)  # the tokens of each expert side by side
    if numbers.fp8:
        # products keep their inputs in 8 bits, but for attention's output, which attention keeps as it is
        items, mlp = items - 2 * hidden * (1 - 1 / item), mlp - inner * (1 - 1 / item)
    kept = tokens * ((items + mlp) * item + floats * 4)
    if numbers.fp8:
        kept += 2 * layer_parameters(model, tp, mesh.ep).dense  # weights in 8 bits, scaled along both of their sides
    if model.sliding_window is not None and model.sliding_window < length and recompute == "none":
        kept += length * length * item  # the mask
    return kept


def feed_forward(model: ModelConfig, numbers: Numbers) -> int:
    """Numbers of a token that a feed-forward layer makes for each of its inner size: the input of the activation, which
    with a gate is twice as wide; what the second projection reads; and between them, unless one kernel goes from the
    first to the second, the activation and, of megatron's own gates, the other half."""
    if not model.gated_mlp:
        return 2
    if model.activation != "silu" or model.num_experts is not None:
        return 5
    return 3 if numbers.device == "cuda" else 4


def stage_activations(
    model: ModelConfig, head: str, rows: int, length: int, mesh: MeshConfig, numbers: Numbers, stage: int,
    recompute: Recompute = "none",
) -> float:  # fmt: skip
    """What a pipeline stage keeps of one micro-batch: its layers', and the final norm's and the head's inputs."""
    layers = stage_layers(model.num_layers, mesh.pp)[stage]
    kept = layers * layer_activations(model, rows, length, mesh, numbers, recompute)
    hidden = model.hidden_size / (mesh.tp if mesh.sequence_parallel else 1)
    if stage == mesh.pp - 1:
        kept += (3 if numbers.device == "cpu" else 2) * rows * length * hidden * numbers.itemsize
    if stage != mesh.pp - 1 or stage != 0:
        kept += mesh.virtual_pp * rows * length * hidden * numbers.itemsize  # sent to or received from a neighbour
    return kept


def logits(model: ModelConfig, outputs: int, mesh: MeshConfig) -> float:
    """Bytes that all logits of so many positions would take on a rank, in float32."""
    assert model.vocab_size is not None
    return outputs * padded_vocab_size(model.vocab_size, mesh.tp) / mesh.tp * 4


def workspace(
    model: ModelConfig, head: str, rows: int, length: int, outputs: int, mesh: MeshConfig, numbers: Numbers,
    stage: int, train: bool, recompute: Recompute = "none",
) -> float:  # fmt: skip
    """What comes and goes within a micro-batch, at most: in a layer, or in the head with its slice of the logits.

    Args:
        outputs: positions of the micro-batch at which the head is evaluated.
    """
    tokens, item = rows * length, numbers.itemsize
    wide = feed_forward(model, numbers) if model.gated_mlp else 3
    inner = wide * model.intermediate_size / mesh.tp
    if model.num_experts is not None:
        inner = model.experts_per_token * (model.hidden_size + inner)
    layer = tokens * (3 * model.hidden_size + inner) * item
    if train:
        if recompute == "full":
            layer += layer_activations(model, rows, length, mesh, numbers)
        layer += layer_parameters(model, mesh.tp, mesh.ep).largest * item  # a gradient not yet added to the others
    if stage != mesh.pp - 1 or head != "lm":
        return layer
    whole = logits(model, outputs, mesh)
    ends = min(CHUNK_BYTES[numbers.device], whole) + outputs * model.hidden_size * item
    if train:
        assert model.vocab_size is not None
        table = padded_vocab_size(model.vocab_size, mesh.tp) / mesh.tp * model.hidden_size * item
        ends += min(KEEP_BYTES[numbers.device], whole) + outputs * model.hidden_size * 4 + table
        if item < 4:
            ends += min(CHUNK_BYTES[numbers.device], whole) * item / 4  # their gradient in the weight's type
    return max(layer, ends)


def second_head(model: ModelConfig, outputs: int, mesh: MeshConfig, numbers: Numbers, copies: bool) -> float:
    """What a loss adds to that which reads the head of another model: its outputs, as they came and as they are
    selected, slices of both models' logits and those that are kept, and a copy of the head where the role has left."""
    assert model.vocab_size is not None
    whole, states = 2 * logits(model, outputs, mesh), 2 * outputs * model.hidden_size * numbers.itemsize
    head = padded_vocab_size(model.vocab_size, mesh.tp) / mesh.tp * model.hidden_size * numbers.itemsize
    slices = min(CHUNK_BYTES[numbers.device], whole) + min(KEEP_BYTES[numbers.device], whole)
    return states + slices + head * copies


def at_a_step(held: Parameters, optimizer: OptimizerConfig, mesh: MeshConfig, numbers: Numbers) -> float:
    """What comes and goes in an optimizer step, at most: torch's Adam on a GPU takes the roots of all second moments at
    once, and gloo copies the buffer that it reduces or gathers."""
    return 4 * (held.total if numbers.device == "cpu" else optimized(held, optimizer, mesh))


# -- generation ----------------------------------------------------------------------------------------------


def kv_bytes_per_token(model: ModelConfig, tp: int, itemsize: int) -> int:
    """Bytes of the KV cache for one position, on one rank."""
    return model.num_layers * 2 * model.num_key_value_heads // tp * model.head_size * itemsize


def kv_positions(config: RolloutConfig, rows: int, longest: int, most: float) -> int:
    """Positions of the cache that a replica allocates, as `rollout/engine.py` does.

    Args:
        rows: sequences of the replica.
        longest: tokens that a sequence may come to have.
        most: positions that the memory left for it holds.
    """
    kv_tokens = config.kv_tokens or max(longest, int(most))
    return BLOCK * (1 + min(num_blocks(kv_tokens), min(config.slots, rows) * num_blocks(longest)))


def decoded_at_once(positions: int, rows: int, prompts: int, prompt: int, response: int) -> int:
    """Sequences of the usual length that a cache holds: the blocks of their own, half of the last one empty, and those
    of the prompts, which the samples of each share."""
    shared = prompt // BLOCK * BLOCK * (1 - prompts / rows)
    return max(1, int(positions / (prompt + response + BLOCK / 2 - shared)))


def generation_workspace(
    model: ModelConfig, slots: int, prompts: int, prompt: int, mesh: MeshConfig, numbers: Numbers
) -> float:
    """What comes and goes in a rollout, at most: a forward of prompts, or the sampler's view of a step's logits."""
    tokens = min(PREFILL_TOKENS[numbers.device], prompts * prompt)
    wide = min(4, feed_forward(model, numbers))
    prefill = tokens * (3 * model.hidden_size + wide * model.intermediate_size / mesh.tp) * numbers.itemsize
    return max(prefill, logits(model, slots, mesh))
