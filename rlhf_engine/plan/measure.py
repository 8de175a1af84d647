"""What this machine does: its matrix products, its memory, and what a process holds in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from ..config import RunConfig
from ..config.devices import GPUS, Device, data_sheet_flops, gpu_here
from ..launching.environment import num_threads


def cpu(ranks: int) -> Device:
    """This machine's processor as each of `ranks` ranks with a thread of its own has it; measured in about a second.

    Messages go through gloo on the loopback, whose figures are constants: 1 GB/s, as for the files
    that roles leave to, and 1 ms a collective.
    """
    threads = num_threads()  # as launch/run.py gives a rank
    torch.set_num_threads(threads)
    return Device(
        "cpu", psutil.virtual_memory().total / ranks, matmul_flops(), copy_bandwidth(), 1e9, 1e9, 1e9,
        max(1, (os.cpu_count() or 1) // threads), latency=10e-6, collective=1e-3, base=resident_bytes(),
    )  # fmt: skip


def device_of(config: RunConfig, world: int) -> Device:
    """The device that a run is planned for, with the memory that the user allows."""
    name = config.plan.device or ("cpu" if config.device == "cpu" else gpu_here() or "cpu")
    device = GPUS[name] if name in GPUS else cpu(world)
    return device if config.plan.memory is None else replace(device, memory=config.plan.memory * 1e9)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that utilisation is a share of: a GPU's by its data sheet, None for one that is not known; on a CPU those
    of a large matrix product, every rank measuring while the others do."""
    if device.type == "cuda":
        return data_sheet_flops(torch.cuda.get_device_name(device))
    return matmul_flops()


def matmul_flops(size: int = 768) -> float:
    """FLOP/s of a float32 matrix product on as many threads as torch has, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _best(lambda: a @ b)


def copy_bandwidth(num_bytes: int = 1 << 26) -> float:
    """Bytes a second that this machine's memory gives and takes."""
    source, target = torch.ones(num_bytes // 4), torch.empty(num_bytes // 4)
    return 2 * num_bytes / _best(lambda: target.copy_(source))


def resident_bytes() -> float:
    """Of this process, which has imported what a rank imports."""
    return psutil.Process().memory_info().rss


def _best(run: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
