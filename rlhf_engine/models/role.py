"""RoleModel: one model of an algorithm on the mesh (policy, critic, reference, reward). It infers and it trains.

Both go through megatron's pipeline schedules: `infer` forward only, `train_step` as 1F1B with megatron's DDP and
optimizer. A stage brings the function that turns the last pipeline stage's output into what it wants.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..config import ModelConfig, OptimizerConfig
from ..mesh import ParallelMesh
from ..metrics import Metrics
from .build import Head, build_model
from .optim import build_optimizer, wrap_ddp

Batch = Mapping[str, Tensor]  # field name to (rows, ...)
InferFn = Callable[[Tensor, Batch], Tensor]  # model output, micro-batch -> (rows, ...)
# model output, micro-batch -> sum of losses, count that the sum over the minibatch is divided by, statistics
LossFn = Callable[[Tensor, Batch], tuple[Tensor, Tensor, Mapping[str, Tensor]]]


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
        offload: keep the weights of a frozen role on the CPU between its stages.
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
    ):
        self.name, self.model, self.mesh, self.head, self.dtype = name, model, mesh, head, dtype
        self.gpt = build_model(model, mesh, head, dtype)
        self.is_trained = optimizer is not None
        self.is_offloaded = offload
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
        config = self.gpt.config
        self.module = wrap_ddp(self.gpt, self._optimizer_config)
        # DDP, its hooks on gradients and the optimizer's views of weights refer to each other in a circle through C++
        # that no garbage collector sees: left alone, a finished phase would keep its memory
        weakref.finalize(self, vars(self.module).clear)
        self.optimizer, self.scheduler = build_optimizer(self.module, self._optimizer_config, self._total_steps)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.module.no_sync

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

    # -- forward only ------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(self, batch: Batch, fn: InferFn, micro_batch_size: int) -> Tensor:
        """`fn` of the model's output for every row: `(B, ...)` on every rank's CPU.

        Rows are split over the replicas and into micro-batches; missing ones are filled up with copies of the
        last row, whose results are dropped.
        """
        num_rows = len(batch["tokens"])
        unit = self.mesh.dp * micro_batch_size
        index = torch.arange(-(-num_rows // unit) * unit).clamp_max(num_rows - 1)
        with self.on_device():
            outputs = self._run({k: v[index] for k, v in batch.items()}, fn, micro_batch_size, forward_only=True)
        local = torch.cat(outputs) if self.mesh.is_last_stage else None
        return self.mesh.gather(local)[:num_rows]

    # -- training ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, fn: LossFn, micro_batch_size: int, metrics: Metrics) -> None:
        """One optimizer step on the rows of `batch` (a multiple of dp x micro_batch_size).

        The loss is the sum of `fn`'s losses over the whole batch divided by the sum of its counts, whatever the
        split into replicas and micro-batches. Statistics (sums over the same count) become `role/name` metrics.
        """
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batch, fn, micro_batch_size, forward_only=False)
        for loss, count, statistics in results:
            metrics.add(f"{self.name}/loss", loss, count)
            for key, value in statistics.items():
                metrics.add(f"{self.name}/{key}", value, count)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        metrics.record(f"{self.name}/grad_norm", grad_norm)
        metrics.record(f"{self.name}/learning_rate", learning_rate)

    # -- both --------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, fn, micro_batch_size: int, forward_only: bool) -> list:
        local = {name: self.mesh.take(rows).to(self.mesh.device) for name, rows in batch.items()}
        num_rows, length = local["tokens"].shape
        num_micro_batches = num_rows // micro_batch_size
        micro_batches = (
            {name: rows[i : i + micro_batch_size] for name, rows in local.items()}
            for i in range(0, num_rows, micro_batch_size)
        )
        return get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, fn, forward_only),
            data_iterator=micro_batches,
            model=[self.module],
            num_microbatches=num_micro_batches,
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _forward_step(fn, forward_only: bool, micro_batches: Iterator[Batch], module):
    """Megatron's forward step: the model's output and what the last stage makes of it."""
    batch = next(micro_batches)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    # right padding and a causal model: no real token sees padding, so there is no mask
    output = module(tokens, positions, None)

    def finish(output: Tensor, non_loss_data: bool = False):
        if forward_only:
            return fn(output, batch)
        loss, count, statistics = fn(output, batch)
        # With `calculate_per_token_loss` the schedule neither divides by the number of micro-batches nor does
        # DDP average over replicas; gradients are divided by the total of `count` when they are finalised.
        return loss, count.to(torch.int), (loss.detach(), count, statistics)

    return output, finish
