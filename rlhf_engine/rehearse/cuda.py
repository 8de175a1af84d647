"""What `torch.cuda` and Triton answer while a rank is rehearsed."""

from __future__ import annotations

import contextlib
import time
import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..config.devices import Device
from .device import CUDA, FakeGPU, put

_NAMES = {
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10),
    "h200": ("NVIDIA H200", (9, 0), 132, 227 << 10),
    "b200": ("NVIDIA B200", (10, 0), 148, 227 << 10),
}
_FAST_HEADS = 256  # channels of a head that the flash kernel takes


class _Event:
    """An event, which has happened as soon as it is recorded."""

    gpu: FakeGPU

    def __init__(self, *args, **kwargs):
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)

    def query(self) -> bool:
        return True

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None:
        self.gpu.wait("synchronize")


class _Stream:
    """A stream, on which everything has happened already."""

    def __init__(self, *args, **kwargs):
        self.device, self.cuda_stream = CUDA, 0

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...


class _Pool:
    """Memory that graphs share."""


def install(gpu: FakeGPU, device: Device) -> None:
    """Makes this process one that sees `gpu` alone."""
    _Event.gpu = gpu
    name, capability, processors, _ = _NAMES[device.name]
    state = torch.Generator().get_state()

    def synchronize(*args) -> None:
        gpu.wait("synchronize")

    def empty_cache() -> None:
        gpu.reserved = gpu.total

    def properties(*args):
        return types.SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], multi_processor_count=processors,
            total_memory=int(device.memory),
        )  # fmt: skip

    locked: dict[int, int] = {}  # page-locked host memory by its address

    def register(address: int, size: int, flags: int) -> int:
        locked[address] = size
        gpu.hold_on_host(size)
        return 0

    def unregister(address: int) -> int:
        gpu.hold_on_host(-locked.pop(address))
        return 0

    runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    answers = dict(
        current_device=lambda: 0, device_count=lambda: 1, set_device=lambda chosen: None, is_available=lambda: True,
        is_initialized=lambda: True, _lazy_init=lambda: None, synchronize=synchronize, empty_cache=empty_cache,
        Stream=_Stream, Event=_Event, current_stream=_Stream, default_stream=_Stream,
        stream=lambda *args: contextlib.nullcontext(), device=lambda *args: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: state, set_rng_state=lambda *args, **kwargs: None,
        manual_seed=lambda *args: None, manual_seed_all=lambda *args: None, is_bf16_supported=lambda *a, **k: True,
        mem_get_info=lambda *args: (int(gpu.memory - gpu.reserved), int(gpu.memory)),
        memory_allocated=lambda *args: gpu.total, memory_reserved=lambda *args: gpu.reserved,
        max_memory_allocated=lambda *args: gpu.reserved, reset_peak_memory_stats=lambda *args: None,
        is_current_stream_capturing=lambda: False, get_device_name=lambda *args: name,
        get_device_capability=lambda *args: capability, get_device_properties=properties,
        default_generators=(torch.Generator(),), cudart=lambda: runtime, check_error=lambda code: None,
        memory_stats=lambda *args: {"reserved_bytes.all.current": gpu.reserved, "active_bytes.all.current": gpu.total},
    )  # fmt: skip
    put(torch.cuda, **answers)
    put(
        torch.cuda.random,
        **{key: answers[key] for key in ("current_device", "get_rng_state", "set_rng_state", "_lazy_init")},
    )
    _install_graphs(gpu)
    _install_storages(gpu)
    _install_tensors(gpu)
    _install_attention()
    _install_norm(gpu)
    with contextlib.suppress(ImportError):
        _install_triton(gpu, device)


def _install_graphs(gpu: FakeGPU) -> None:
    pools: dict[int, int] = {}  # bytes that graphs of a pool work in

    class CUDAGraph:
        kernels = 0

        def __init__(self, *args, **kwargs):
            self.place: Any = _Pool()

        def replay(self) -> None:
            gpu.stage.replays += 1
            gpu.stage.kernels += self.kernels
            gpu.stage.replayed += self.kernels

        def pool(self):
            return self.place

    class graph(contextlib.AbstractContextManager):
        def __init__(self, graph: CUDAGraph, pool=None, **kwargs):
            self.graph = graph
            self.graph.place = pool if pool is not None else self.graph.place

        def __enter__(self):
            self.kernels, self.before = gpu.stage.kernels, gpu.total
            self.waits = sum(gpu.stage.waits.values())
            gpu.captured = gpu.total
            return self

        def __exit__(self, *error) -> None:
            self.graph.kernels = gpu.stage.kernels - self.kernels
            gpu.stage.captures += 1
            if error[0] is None and sum(gpu.stage.waits.values()) > self.waits:
                raise gpu.refusal("the host waits within the capture")
            # what a graph works in is its own as long as its pool lives
            worked, key = gpu.captured - self.before, id(self.graph.place)
            more = max(0, worked - pools.get(key, 0))
            if more:
                if key not in pools:
                    weakref.finalize(self.graph.place, lambda: gpu.keep("graphs", -pools.pop(key, 0)))
                pools[key] = pools.get(key, 0) + more
                gpu.keep("graphs", more)

    put(torch.cuda, CUDAGraph=CUDAGraph, graph=graph)


def _install_storages(gpu: FakeGPU) -> None:
    resize = torch.UntypedStorage.resize_

    def resize_(self, size: int):
        found = resize(self, size)
        gpu.resized(self, size)
        return found

    put(torch.UntypedStorage, resize_=resize_)
    put(torch.Tensor, record_stream=lambda self, stream: None)


def _install_tensors(gpu: FakeGPU) -> None:
    """`torch.tensor` of device scalars, which reads them; host tensors are as good as page-locked."""
    make = torch.tensor

    def plain(x):
        if isinstance(x, list | tuple):
            return [plain(y) for y in x]
        return x.item() if isinstance(x, FakeTensor) else x

    def tensor(data, *args, pin_memory=False, **kwargs) -> Tensor:
        return make(plain(data) if isinstance(data, list | tuple) else data, *args, **kwargs)

    put(torch, tensor=tensor)
    put(FakeTensor, tolist=lambda self: self.cpu().tolist())  # torch reads them one by one

    def assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
        """A host parameter moves to the device; a tensor with numbers cannot become one without by assignment."""
        if not isinstance(value, FakeTensor):
            torch.Tensor.data.__set__(parameter, value)  # type: ignore[attr-defined]
            return
        moved = torch.nn.Parameter(value, parameter.requires_grad)
        parameter.__class__, moved.__class__ = moved.__class__, parameter.__class__
        parameter.__dict__.update(moved.__dict__)
        torch._C._swap_tensor_impl(parameter, moved)  # type: ignore[attr-defined]

    put(torch.nn.Parameter, data=property(torch.Tensor.data.__get__, assign))  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)


def _install_attention() -> None:
    """The kernel that a GPU would take, and so what it keeps for backward; a CPU build takes the plain formula."""
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ):  # fmt: skip
        options: Any = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        if not isinstance(query, FakeTensor) or query.device.type != "cuda":
            return plain(query, key, value, enable_gqa=enable_gqa, **options)
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if is_half and attn_mask is None and query.shape[-1] <= _FAST_HEADS:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if not enable_gqa:
            bias = attn_mask
            if bias is not None and bias.dtype is torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
            if bias is not None:
                bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
            )[0]
        return plain(query, key, value, enable_gqa=enable_gqa, **options)

    put(F, scaled_dot_product_attention=attention)


def _install_norm(gpu: FakeGPU) -> None:
    """The fused norm, which keeps a float for each row; a CPU build has it as many operations, which keep much more."""
    plain = F.rms_norm

    class FusedNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            gpu.stage.kernels += 1
            ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1, device=x.device))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, *grads):
            gpu.stage.kernels += 2
            x, weight, _ = ctx.saved_tensors
            return torch.empty_like(x), torch.empty_like(weight)

    def rms_norm(x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not isinstance(x, FakeTensor) or x.device.type != "cuda" or weight is None or x.dtype != weight.dtype:
            return plain(x, shape, weight, eps)
        return FusedNorm.apply(x, weight)

    put(F, rms_norm=rms_norm)


def _install_triton(gpu: FakeGPU, device: Device) -> None:
    """Kernels are compiled for the device, and not launched."""
    import triton.runtime.jit as jit
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    _, (major, minor), _, shared = _NAMES[device.name]
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
            get_current_device=lambda: 0, set_current_device=lambda index: None, get_current_stream=lambda index: 0,
        )
    )  # fmt: skip
    run = jit.JITFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if away := [x for x in given if x.device.type != "cuda"]:
            raise gpu.refusal(f"{name} of a tensor {tuple(away[0].shape)} on {away[0].device.type}")
        size = (*grid, 1, 1)[:3] if not callable(grid) else (*grid(kwargs), 1, 1)[:3]
        if not (0 < size[0] < 2**31 and 0 < size[1] < 2**16 and 0 < size[2] < 2**16):
            raise gpu.refusal(f"{name} on a grid of {size}, which CUDA does not have")

        def mock(x):
            return jit.MockTensor(x.dtype) if isinstance(x, Tensor) else x

        try:
            kernel = run(self, *map(mock, args), grid=size, warmup=True, **{key: mock(x) for key, x in kwargs.items()})
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            why = f"{type(error).__name__}: {reason}"
            raise gpu.refusal(f"{name} does not compile for {device.name}: {why}") from None
        if kernel.metadata.shared > shared:
            taken = kernel.metadata.shared
            raise gpu.refusal(f"{name} takes {taken} bytes of shared memory, and {device.name} has {shared}")
        gpu.stage.launches[name] += 1
        gpu.stage.kernels += 1

    put(jit.JITFunction, run=launch)
