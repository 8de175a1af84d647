"""RoleModel: one model of an algorithm on the mesh (policy, critic, reference, reward), and where its weights are.

Roles infer and train through megatron's pipeline schedules, several of them in one stream (`stream.py`). A stage brings
the function that turns the last pipeline stage's output into what it wants.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import ModuleList

from ..config import FP8_UNIT, ModelConfig, OptimizerConfig, Recompute
from ..hf.config import Head
from ..mesh import ParallelMesh
from .balance import Balance
from .build import build_model
from .optim import build_optimizer, gradient_tensors, optimizer_tensors, wrap_ddp
from .residency import Parcel, Presence


def head_weight(gpt: GPTModel) -> Tensor:
    """`(V / tp, H)`, the LM head's, of a model's last chunk."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


class RoleModel:
    """A model split over the mesh.

    Attributes:
        chunks: this rank's parts of it in the order of their depth: one, or `mesh.virtual_pp` that lie apart.
        modules: the same as they are trained, in megatron's DDP.
        balance: of its experts, where it has some and is trained.

    Args:
        name: of the role; prefixes its metrics and its entries in a checkpoint.
        head: "lm" (output: hidden states `(B, T, H)`, see `build_model`) or "scalar" (`(B, T, 1)`).
        optimizer: None for a frozen role.
        total_steps: optimizer steps of the whole phase, for the learning-rate schedule.
        recompute: activations that a trained role's backward computes again.
        offload: where the role goes while no stage needs it, in files if the device is a CPU; None: it stays, and only
            its gradients, which nobody needs between updates, come and go.
        micro_batch_tokens: tokens of one forward, padding included, that rows are packed to; None: those of the work's
            `micro_batch_size` longest rows.
        fp8: its layers, which are transformer-engine's, compute their products in 8 bits.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        mesh: ParallelMesh,
        head: Head,
        dtype: torch.dtype,
        optimizer: OptimizerConfig | None = None,
        total_steps: int = 1,
        offload: Path | None = None,
        recompute: Recompute = "none",
        micro_batch_tokens: int | None = None,
        fp8: bool = False,
    ):
        self.name, self.model, self.mesh, self.head, self.dtype = name, model, mesh, head, dtype
        chunks = [
            build_model(model, mesh, head, dtype, i, recompute=recompute, fp8=fp8) for i in range(mesh.virtual_pp)
        ]
        self.chunks: Any = ModuleList(chunks)  # of GPTModels
        self.is_trained = optimizer is not None
        self.presence = Presence.TRAINING
        self._offload = offload
        self._parcels: dict[Presence, Parcel] = {}
        self.micro_batch_tokens = micro_batch_tokens
        self.width_unit = mesh.tp * (FP8_UNIT if fp8 else 1)  # what divides the width of its micro-batches
        self.modules: list[Any] = list(self.chunks)
        self._optimizer_config, self._total_steps = optimizer, total_steps
        self.balance: Balance | None = None
        if self.is_trained and model.num_experts is not None:
            self._watch_routers(model.num_experts)
        if not self.is_trained:
            self.chunks.requires_grad_(False)
            self.chunks.eval()  # megatron's experts ask for sequence parallelism only where gradients are at stake

    def _watch_routers(self, num_experts: int) -> None:
        """As in transformers, models with a scalar head have no load-balancing loss."""
        coefficient = self.model.router_aux_loss_coef if self.head == "lm" else 0.0
        shape = self.model.num_layers, num_experts, self.model.experts_per_token
        self.balance = Balance(*shape, coefficient, self.mesh.device)
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                layer.mlp.router.balance = self.balance

    @contextlib.contextmanager
    def unbalanced(self) -> Iterator[None]:
        """Within it steps leave the load-balancing loss out."""
        balance, self.balance = self.balance, None
        try:
            yield
        finally:
            self.balance = balance

    def start(self) -> None:
        """Called once the weights are in place: wraps a trained role for DDP and builds its optimizer."""
        if self._optimizer_config is not None:
            self._start_training(self._optimizer_config)
        self._pack()
        self.move(Presence.AWAY)

    def _start_training(self, config: OptimizerConfig) -> None:
        self.modules = [wrap_ddp(chunk, config) for chunk in self.chunks]
        # DDP, its hooks on gradients and the optimizer's views of weights refer to each other in a circle through C++
        # that no garbage collector sees: left alone, a finished phase would keep its memory
        for module in self.modules:
            weakref.finalize(self, vars(module).clear)
        self.optimizer, self.scheduler = build_optimizer(self.modules, config, self._total_steps)

    def gather(self) -> None:
        """Waits for weights of the last update that other replicas hold (`overlap` gathers them when a forward comes to
        them): generation, checkpoints and exports do not go through the modules. Every replica takes part."""
        for module in self.modules:
            if self.is_trained and module.ddp_config.overlap_param_gather:
                module.start_param_sync(force_sync=True)

    # -- residency ---------------------------------------------------------------------------------------

    @property
    def is_offloaded(self) -> bool:
        """Whether the role comes and goes."""
        return self._offload is not None

    def _pack(self) -> None:
        device = self.mesh.device

        def weights() -> Iterable[Tensor]:
            return itertools.chain(self.chunks.parameters(), self.chunks.buffers())

        if self._offload is not None:
            folder = self._offload / f"rank_{self.mesh.rank}"
            self._parcels[Presence.WEIGHTS] = Parcel(weights, device, folder / f"{self.name}_weights")
            if self.is_trained:
                self._parcels[Presence.STATE] = Parcel(
                    lambda: optimizer_tensors(self.optimizer, weights()), device, folder / f"{self.name}_optimizer"
                )
        if self.is_trained:
            self._parcels[Presence.TRAINING] = Parcel(lambda: gradient_tensors(self.modules), device, None)

    def move(self, presence: Presence) -> None:
        """Brings on the device, or off it, what is missing or too much; of a role that stays, its gradients alone."""
        if not self.is_offloaded:
            presence = max(presence, Presence.STATE)
        for part, parcel in self._parcels.items():
            if self.presence < part <= presence:
                parcel.arrive()
            elif presence < part <= self.presence:
                parcel.leave()
        if self._parcels:
            self.presence = presence

    @contextlib.contextmanager
    def on_device(self, presence: Presence = Presence.WEIGHTS, changes: bool = False) -> Iterator[None]:
        """Within it so much of the role is on the device at least; afterwards what was there before.

        Args:
            changes: weights or optimizer are changed within, as under `Presence.TRAINING` they always are. What nobody
                changes is copied off the device once.
        """
        before = self.presence
        self.move(max(before, presence))
        for parcel in self._parcels.values():
            parcel.wait()
            parcel.is_copied &= not (changes or presence is Presence.TRAINING)
        try:
            yield
        finally:
            self.move(before)
