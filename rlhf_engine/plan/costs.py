"""Seconds of the parts of a stage on one rank: matrix products by their FLOPs, all else by the bytes that it moves.

A forward is its products at the device's rate, its activations written once and read twice at the bandwidth of the
memory, and what each operation costs whatever its size, one after the other: nothing here overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MeshConfig, ModelConfig, OptimizerConfig, Recompute
from ..config.devices import Device
from ..models.flops import BACKWARD, forward_flops, head_flops, layer_flops, matmul_parameters
from ..models.partition import layer_parameters, num_parameters, rank_parameters, stage_layers
from .memory import Numbers, kv_bytes_per_token, layer_activations, logits, optimized

# of a layer's forward in training, and in generation; those of a GPU as counted (docs/rehearse.md)
_OPERATIONS, _DECODE_OPERATIONS = {"cpu": 40, "cuda": 12}, {"cpu": 16, "cuda": 9}
_TOUCHES = 3  # an activation is written once and read twice
_SAMPLER = 4  # collectives of a decode step beside those of layers: the embedding's, and three of the sampler


@dataclass(frozen=True)
class Costs:
    """One role on one mesh.

    Args:
        mesh: resolved.
    """

    model: ModelConfig
    head: str
    mesh: MeshConfig
    device: Device
    numbers: Numbers
    recompute: Recompute = "none"

    @property
    def dp(self) -> int:
        assert self.mesh.dp is not None
        return self.mesh.dp

    # -- bytes that a rank sends, and how long that takes --------------------------------------------------

    def _link(self, ranks: int) -> float:
        """Of a group whose first and last rank are so many apart."""
        return self.device.link if ranks <= self.device.node else self.device.network

    def tp_bytes(self, tokens: int) -> float:
        """Of the two all-reduces of each layer of a forward, or of as much in halves under sequence parallelism."""
        tp = self.mesh.tp
        return 2 * 2 * (tp - 1) / tp * tokens * self.model.hidden_size * self.numbers.itemsize

    def _tp_seconds(self, tokens: int) -> float:
        """Of one layer's forward."""
        if self.mesh.tp == 1:
            return 0.0
        return self.tp_bytes(tokens) / self._link(self.mesh.tp) + 2 * self.device.collective

    def ep_bytes(self, tokens: int) -> float:
        """Of one layer's forward: each token to its experts on other ranks, and what they make of it back; each tensor
        parallel rank sends all tokens to those with its shard."""
        ep, model = self.mesh.ep, self.model
        sent = tokens * model.experts_per_token * (ep - 1) / ep
        return 2 * sent * model.hidden_size * self.numbers.itemsize

    def _sent_seconds(self, tokens: int) -> float:
        """Of one layer's forward in training, with or without gradients."""
        if self.mesh.ep == 1:
            return self._tp_seconds(tokens)
        to_experts = self.ep_bytes(tokens) / self._link(self.mesh.tp * self.mesh.ep) + 2 * self.device.collective
        return self._tp_seconds(tokens) + to_experts

    def pp_bytes(self, tokens: int) -> float:
        """Hidden states of a micro-batch, from one stage to the next."""
        split = self.mesh.tp if self.mesh.sequence_parallel else 1
        return tokens * self.model.hidden_size / split * self.numbers.itemsize if self.mesh.pp > 1 else 0.0

    def transfer(self, tokens: int) -> float:
        ranks = self.mesh.tp * self.dp * self.mesh.pp
        return self.pp_bytes(tokens) / self._link(ranks) + self.device.collective

    def dp_bytes(self, stage: int, optimizer: OptimizerConfig) -> float:
        """Of one optimizer step: gradients in float32, and with a distributed optimizer the new weights."""
        held, share = rank_parameters(self.model, self.head, self.mesh, stage).total, (self.dp - 1) / self.dp
        return held * share * (4 + self.numbers.itemsize if optimizer.distributed else 8)

    # -- seconds -------------------------------------------------------------------------------------------

    def _layer(self, rows: int, length: int) -> float:
        """One layer's forward over a micro-batch."""
        kept = layer_activations(self.model, rows, length, self.mesh, self.numbers)
        flops = rows * layer_flops(self.model, length, sliding=True) / self.mesh.tp
        if self.numbers.fp8:
            products = 2 * rows * length * matmul_parameters(self.model) / self.mesh.tp
            flops -= products * (1 - 1 / self.device.fp8)
        operations = _OPERATIONS[self.numbers.device] * self.device.latency
        return flops / self.device.flops + _TOUCHES * kept / self.device.bandwidth + operations

    def _head(self, outputs: int) -> float:
        """The head's forward, its slices of logits written once and read twice."""
        if self.head != "lm":
            return _OPERATIONS[self.numbers.device] * self.device.latency
        return (
            head_flops(self.model, "lm", outputs) / self.mesh.tp / self.device.flops
            + _TOUCHES * logits(self.model, outputs, self.mesh) / self.device.bandwidth
            + _OPERATIONS[self.numbers.device] * self.device.latency
        )

    def forward(self, stage: int, rows: int, length: int, outputs: int) -> float:
        """A micro-batch through one pipeline stage."""
        layers = stage_layers(self.model.num_layers, self.mesh.pp)[stage]
        seconds = layers * (self._layer(rows, length) + self._sent_seconds(rows * length))
        return seconds + (self._head(outputs) if stage == self.mesh.pp - 1 else 0.0)

    def backward(self, stage: int, rows: int, length: int, outputs: int) -> float:
        """The same backwards, with what is computed again, and gradients added to those of the minibatch."""
        layers = stage_layers(self.model.num_layers, self.mesh.pp)[stage]
        held = rank_parameters(self.model, self.head, self.mesh, stage).total
        seconds = layers * (BACKWARD * self._layer(rows, length) + self._sent_seconds(rows * length))
        if self.recompute == "full":
            seconds += layers * (self._layer(rows, length) + self._sent_seconds(rows * length))
        if stage == self.mesh.pp - 1:
            seconds += BACKWARD * self._head(outputs)
        added = 8 + (0 if self.numbers.device == "cuda" else 2 * self.numbers.itemsize)  # on a GPU within the products
        return seconds + held * added / self.device.bandwidth

    def step(self, stage: int, optimizer: OptimizerConfig) -> float:
        """An optimizer step: gradients reduced, their norm, Adam, new weights gathered."""
        held = rank_parameters(self.model, self.head, self.mesh, stage)
        # zeroed gradients; then norm, clipping, and Adam's reading and writing of what it holds and of temporaries
        moved = 4 * held.total + 52 * optimized(held, optimizer, self.mesh)
        sent = self.dp_bytes(stage, optimizer) / self._link(self.mesh.tp * self.dp) if self.dp > 1 else 0.0
        return moved / self.device.bandwidth + sent

    def generate(self, rows: int, slots: int, prompts: int, prompt: int, response: int) -> float:
        """A replica's work in a rollout.

        Args:
            rows: its sequences, in whole responses, of which `slots` are decoded at once.
            prompts: different ones among theirs.
        """
        model, mesh, device = self.model, self.mesh, self.device
        steps = response * rows / slots
        weights = num_parameters(model, "lm") / mesh.tp  # about: norms are not split
        active = (model.num_layers * matmul_parameters(model) + model.hidden_size * (model.vocab_size or 0)) / mesh.tp
        seen = slots * (prompt + response / 2) * kv_bytes_per_token(model, mesh.tp, self.numbers.itemsize)
        step = (
            max(weights * self.numbers.itemsize / device.bandwidth, 2 * slots * active / device.flops)
            + seen / device.bandwidth
            + 6 * logits(model, slots, mesh) / device.bandwidth  # the sampler's passes
            + model.num_layers * _DECODE_OPERATIONS[self.numbers.device] * device.latency
        )
        return prompts * self.prefill(prompt) + steps * step

    def prefill(self, length: int) -> float:
        """A sequence's forward into the cache."""
        kept = layer_activations(self.model, 1, length, self.mesh, self.numbers)
        return (
            forward_flops(self.model, "lm", [length], 1) / self.mesh.tp / self.device.flops
            + self.model.num_layers * 2 * kept / self.device.bandwidth
        )

    def exchange(self, rows: int, slots: int, prompts: int, prompt: int, response: int) -> float:
        """What a replica's rollout waits for besides: its collectives, and the layers of other stages before it."""
        fold = self.fold_bytes() / self._link(self.mesh.tp * self.dp * self.mesh.pp)
        if self.mesh.tp == 1:
            return fold
        step = self.model.num_layers * self._tp_seconds(slots) + _SAMPLER * self.device.collective
        steps = response * rows / slots
        return fold + prompts * self.model.num_layers * self._tp_seconds(prompt) + steps * step

    def fold_bytes(self) -> float:
        """Under PP the layers of other stages, then under EP the experts of other ranks, received before a rollout."""
        model, mesh = self.model, self.mesh
        others = model.num_layers * layer_parameters(model, mesh.tp, mesh.ep).experts * (mesh.ep - 1)
        mine = num_parameters(model, "lm") / mesh.tp - others
        return (mine * (mesh.pp - 1) / mesh.pp + others) * self.numbers.itemsize
