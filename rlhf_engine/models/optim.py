"""Megatron's optimizer and learning-rate schedule for one role."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ..config import OptimizerConfig
from ..cpu import cuda_type_names


def wrap_ddp(gpt: GPTModel, config: OptimizerConfig) -> DistributedDataParallel:
    """Megatron's DDP: gradients in one float32 buffer, reduced once per optimizer step."""
    on_cuda = torch.cuda.is_available() and next(gpt.parameters()).is_cuda
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=on_cuda,
        overlap_param_gather=on_cuda and config.distributed,
    )
    return DistributedDataParallel(gpt.config, ddp_config, gpt)


def build_optimizer(
    ddp: DistributedDataParallel, config: OptimizerConfig, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam over the role's parameters and the schedule of its learning rate over `total_steps` updates."""
    dtype = next(ddp.parameters()).dtype
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
        overlap_param_gather=ddp.ddp_config.overlap_param_gather,
    )
    on_cpu = not next(ddp.parameters()).is_cuda
    with cuda_type_names(ddp.parameters()) if on_cpu else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=not on_cpu)
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
    )
    return optimizer, scheduler
