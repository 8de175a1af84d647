"""Gives megatron-core a CPU where it assumes CUDA.

Megatron's layers, schedules, DDP and optimizers are plain torch but for their habit of naming the device
"cuda". `use_cpu()` rebinds the name `torch` inside megatron's own modules to a stand-in that forwards all of
torch and answers for the device differently. Everybody else's torch stays as it is, but for the making of gloo's
groups (`one_listener`).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, distributed_c10d

# Modules that megatron imports lazily, or that nothing else has imported by the time of the call.
_MODULES = (
    "distributed", "optimizer", "optimizer.distrib_optimizer", "pipeline_parallel.schedules", "tensor_parallel",
    "models.gpt", "transformer.moe.moe_layer", "transformer.cuda_graphs", "dist_checkpointing",
    "optimizer_param_scheduler", "pipeline_parallel.p2p_communication", "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.async_utils", "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
)  # fmt: skip


class _Stream:
    """A CUDA stream or event where everything has happened already."""

    def __init__(self, *args, **kwargs): ...
    def _nothing(self, *args, **kwargs): ...

    wait_stream = wait_event = synchronize = record_event = record = wait = _nothing


def _cpu_cuda() -> types.SimpleNamespace:
    cuda: Any = torch.cuda
    nothing = lambda *args, **kwargs: None  # noqa: E731
    return types.SimpleNamespace(
        current_device=lambda: torch.device("cpu"),
        is_available=lambda: False,
        is_current_stream_capturing=lambda: False,
        device_count=lambda: 1,
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        stream=lambda *args: contextlib.nullcontext(),
        current_stream=_Stream, default_stream=_Stream, Stream=_Stream, Event=_Stream,
        synchronize=nothing, empty_cache=nothing, set_device=nothing, memory_allocated=lambda *args: 0,
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=contextlib.nullcontext),
        # named in isinstance checks and annotations only
        FloatTensor=cuda.FloatTensor, HalfTensor=cuda.HalfTensor, BFloat16Tensor=cuda.BFloat16Tensor,
        CUDAGraph=cuda.CUDAGraph, amp=cuda.amp,
    )  # fmt: skip


def _on_cpu(factory):
    """`factory` (torch.zeros and its like), taking device="cuda" for the CPU."""

    def make(*args, device=None, **kwargs):
        is_cuda = device is not None and torch.device(device).type == "cuda"
        return factory(*args, device="cpu" if is_cuda else device, **kwargs)

    return make


class _CpuTorch(types.ModuleType):
    cuda: types.SimpleNamespace

    def __getattr__(self, name: str):
        return getattr(torch, name)


_on_cpu_now = False
_listeners: list[Any] = []  # of gloo, one for each network interface that it uses


def parameter_device() -> torch.device | str:
    """Where megatron allocates parameters in this process."""
    return "cpu" if _on_cpu_now else torch.device("cuda", torch.cuda.current_device())


def use_cpu() -> None:
    """Makes megatron.core run on the CPU in this process. Calling it again does nothing."""
    global _on_cpu_now
    _on_cpu_now = True
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    stand_in = _CpuTorch("torch")
    stand_in.cuda = _cpu_cuda()
    for name in (
        "tensor",
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "zeros_like",
        "empty_like",
        "ones_like",
    ):
        setattr(stand_in, name, _on_cpu(getattr(torch, name)))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.tensor_parallel.random as random

    # These switch CUDA generators around dropout and around what is computed twice. No role has dropout.
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    random._get_all_rng_states = lambda: ()
    random._set_all_rng_states = lambda *states: None
    # The original asserts that every gradient is a CUDA tensor; the arithmetic is the same.
    optimizer.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm


def _clip_grad_by_total_norm(parameters, max_norm, total_norm, use_decoupled_grad=False) -> None:
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if grads and coefficient < 1.0:
        torch._foreach_mul_(grads, coefficient)


@contextlib.contextmanager
def one_listener() -> Iterator[None]:
    """Within it, all of gloo's groups listen by the thread that the first of this process has made for itself.

    Each would have one of its own, which wakes a hundred times a second, and megatron makes some twenty groups: 2.5% of
    a core for each rank, also while it waits (AMD EPYC).
    """

    class Listening(ProcessGroupGloo):
        def __init__(self, store, rank, size, timeout):
            if not _listeners:
                super().__init__(store, rank, size, timeout)
                _listeners.extend(self.options._devices)  # type: ignore[attr-defined]
                return
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices, options._threads, options._timeout = _listeners, 2 * len(_listeners), timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Listening  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[misc]


@contextlib.contextmanager
def cuda_calls_stay(device: torch.device) -> Iterator[None]:
    """Within it, `tensor.cuda()` leaves a tensor where it is, if `device` is a CPU.

    Megatron moves a tied embedding that way when it builds a pipeline, and stand-in names do not reach methods.
    """
    original = torch.Tensor.cuda
    if device.type == "cpu":
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


@contextlib.contextmanager
def cuda_type_names(params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within it, fp32 CPU parameters answer `.type()` as CUDA ones.

    Megatron's optimizers sort parameters into groups by that string when they are built, and at no later time.
    """
    renamed = [p for p in params if p.type() == "torch.FloatTensor"]
    for p in renamed:
        p.type = lambda *args: "torch.cuda.FloatTensor"  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for p in renamed:
            del p.type
