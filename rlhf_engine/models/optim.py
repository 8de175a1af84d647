"""Megatron's optimizer and learning-rate schedule for one role."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import layers as linear_layers
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor

from rlhf_kernels import wide_addmm_

from ..config import OptimizerConfig
from ..cpu import cuda_type_names


def _norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool, *args) -> tuple[Tensor, None]:
    """The norm `(1,)` of all tensors together, as apex's kernel gives it."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).view(1), None


def _scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Multiplies gradients, which come as source and as target, in place."""
    torch._foreach_mul_(lists[1], scale)


# without apex and transformer-engine megatron waits for the device once for each parameter
if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
    clip_grads.l2_norm_impl = _norm
if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
    clip_grads.multi_tensor_scale_impl = _scale


class _Accumulation:
    """Apex's extension of this name, by torch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, total: Tensor) -> None:
        """Adds the gradient of a linear layer's weight, of inputs `(T, H)` and gradients `(T, F)`, to `(F, H)`."""
        wide_addmm_(total, grad.t(), x)


if not linear_layers._grad_accum_fusion_available:
    linear_layers.fused_weight_gradient_mlp_cuda = _Accumulation


def accumulate_in_products(chunk: GPTModel) -> None:
    """The gradients of linear layers' weights are added to those of the minibatch within their products, and not
    rounded to the weights' type before."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True


def wrap_ddp(chunk: GPTModel, config: OptimizerConfig) -> DistributedDataParallel:
    """Megatron's DDP: gradients in float32 buffers, reduced once per optimizer step."""
    on_gpu = next(chunk.parameters()).is_cuda
    if on_gpu:
        accumulate_in_products(chunk)
    overlap = on_gpu if config.overlap is None else config.overlap
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and config.distributed,
    )
    return DistributedDataParallel(chunk.config, ddp_config, chunk)


def build_optimizer(
    modules: Sequence[DistributedDataParallel], config: OptimizerConfig, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam over the role's parameters and the schedule of its learning rate over `total_steps` updates.

    Args:
        modules: the role's chunks in DDP.
    """
    params = [param for ddp in modules for param in ddp.parameters()]
    dtype = params[0].dtype
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
    )
    on_cpu = not params[0].is_cuda
    with cuda_type_names(params) if on_cpu else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(settings, list(modules), use_gloo_process_groups=False)
    for part in optimizer_parts(optimizer):
        # Adam makes its state in the first step, and megatron can neither save nor load what is not there
        part.init_state_fn(part.optimizer, part.config)
    for adam in torch_optimizers(optimizer):
        for entry in adam.state.values():
            entry["step"] = torch.tensor(0.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (config.warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # a resumed run follows its own configuration: its horizon may be longer, its rate another
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def load_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    """Megatron's load_state_dict, with two corrections for torch's Adam and its step counter: one that is 0 is missing;
    and all parameters are left with one counter between them, which Adam would then advance once for each."""
    rates = [(group.get("max_lr"), group.get("min_lr")) for group in optimizer.param_groups]
    adams = torch_optimizers(optimizer)
    for inner in _of_adams(state) if adams else ():
        inner["state"].setdefault("common_step", torch.tensor(0.0))
    optimizer.load_state_dict(state)
    for group, (max_lr, min_lr) in zip(optimizer.param_groups, rates, strict=True):
        group["max_lr"], group["min_lr"] = max_lr, min_lr  # the configuration's, as for the schedule
    for adam in adams:
        for entry in adam.state.values():
            entry["step"] = entry["step"].clone()


def _of_adams(state: dict) -> Iterator[dict]:
    """The state dicts of torch's optimizers within megatron's."""
    if {"state", "param_groups"} <= state.keys():
        yield state
    else:
        for part in state.values():
            yield from _of_adams(part) if isinstance(part, dict) else ()


def gradient_tensors(modules: Iterable[DistributedDataParallel]) -> list[Tensor]:
    """Megatron's flat buffers, of which every gradient is a view; a step begins by zeroing them."""
    return [buffer.grad_data for ddp in modules for buffer in ddp.buffers + ddp.expert_parallel_buffers]


def optimizer_tensors(optimizer: MegatronOptimizer, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Moments and the weights that the optimizer keeps for itself: not those that are views of the model's."""
    of_model = {weight.untyped_storage()._cdata for weight in weights}
    for part in optimizer_parts(optimizer):
        held = [p for group in part.optimizer.param_groups for p in group["params"]]
        held += [
            value for entry in part.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
        ]
        for tensor in held:
            # a step counter is a number on the CPU
            if tensor.dim() and tensor.untyped_storage()._cdata not in of_model:
                yield tensor


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron's; none where apex or transformer-engine bring theirs."""
    inner = (part.optimizer for part in optimizer_parts(optimizer))
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that megatron's is a chain of, without those that have no parameters on this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if part.optimizer is not None]
