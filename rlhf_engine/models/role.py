"""RoleModel: one model of an algorithm on the mesh (policy, critic, reference, reward), and where its weights are.

Roles infer and train through megatron's pipeline schedules, several of them in one stream (`stream.py`). A stage brings
the function that turns the last pipeline stage's output into what it wants.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ..config import ModelConfig, OptimizerConfig, Recompute
from ..mesh import ParallelMesh
from .build import Head, build_model
from .optim import build_optimizer, wrap_ddp
from .stream import Batch, InferFn, Work, infer


def head_weight(gpt: GPTModel) -> Tensor:
    """`(V / tp, H)`, the LM head's, on the last pipeline stage."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


class RoleModel:
    """A model split over the mesh.

    Args:
        name: of the role; prefixes its metrics and its entries in a checkpoint.
        head: "lm" (output: hidden states `(B, T, H)`, see `build_model`) or "scalar" (`(B, T, 1)`).
        optimizer: None for a frozen role.
        total_steps: optimizer steps of the whole phase, for the learning-rate schedule.
        recompute: activations that a trained role's backward computes again.
        offload: keep the weights of a frozen role on the CPU between its stages.
        micro_batch_tokens: tokens of one forward, padding included, that rows are packed to; None: rows as they come.
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
        offload: bool = False,
        recompute: Recompute = "none",
        micro_batch_tokens: int | None = None,
    ):
        self.name, self.model, self.mesh, self.head, self.dtype = name, model, mesh, head, dtype
        self.gpt = build_model(model, mesh, head, dtype, recompute=recompute)
        self.is_trained = optimizer is not None
        self.is_offloaded = offload
        self.micro_batch_tokens = micro_batch_tokens
        self._users = 0
        self.module = self.gpt
        self._optimizer_config, self._total_steps = optimizer, total_steps
        if not self.is_trained:
            self.gpt.requires_grad_(False)
            self.gpt.eval()  # megatron's experts ask for sequence parallelism only where gradients are at stake

    def start(self) -> None:
        """Called once the weights are in place: wraps a trained role for DDP and builds its optimizer."""
        if self._optimizer_config is None:
            if self.is_offloaded:
                self.gpt.to("cpu")
            return
        self.module = wrap_ddp(self.gpt, self._optimizer_config)
        # DDP, its hooks on gradients and the optimizer's views of weights refer to each other in a circle through C++
        # that no garbage collector sees: left alone, a finished phase would keep its memory
        weakref.finalize(self, vars(self.module).clear)
        self.optimizer, self.scheduler = build_optimizer(self.module, self._optimizer_config, self._total_steps)

    # -- residency ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the weights are on the device; an offloaded role leaves it with the outermost one."""
        if self.is_offloaded and not self._users:
            self.gpt.to(self.mesh.device)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self.is_offloaded and not self._users:
                self.gpt.to("cpu")

    # -- what it does ------------------------------------------------------------------------------------

    def infer(self, batch: Batch, fn: InferFn, micro_batch_size: int) -> Tensor:
        """`stream.infer` of this role alone."""
        return infer([Work(self, batch, fn, micro_batch_size)])[0]
