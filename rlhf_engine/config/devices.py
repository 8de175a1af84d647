"""What devices can do. Figures of data sheets, dense and in one direction, and the shares of them that runs reach."""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from .reading import ConfigError

# Shares of the data sheet's figures that large operations reach.
MATMUL_SHARE, MEMORY_SHARE, LINK_SHARE = 0.7, 0.8, 0.75


@dataclass(frozen=True)
class Device:
    """A device and its surroundings, in what a run can use of them.

    Args:
        memory: bytes.
        flops: of matrix products, a second.
        bandwidth: of its memory, bytes a second.
        host: bytes a second between it and the memory beside it.
        link, network: bytes a second that a device sends within its node, and out of it.
        node: devices of a node.
        latency, collective: seconds that one operation, and one collective, costs whatever its size.
        base: bytes that a process holds before it has a model.
        fp8: times `flops` that products in 8 bits reach; 0 where there are none.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    node: int
    latency: float = 5e-6
    collective: float = 20e-6
    base: float = 0.0
    fp8: float = 0.0

    def slowed(self, factor: float) -> Device:
        """The device where everything but what it sends takes `factor` times as long."""
        flops, bandwidth = self.flops / factor, self.bandwidth / factor
        return replace(self, flops=flops, bandwidth=bandwidth, latency=self.latency * factor)

    @property
    def peak(self) -> float:
        """FLOP/s that utilisation is a share of."""
        return self.flops / MATMUL_SHARE if self.is_gpu else self.flops

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory of its own."""
        return self.name != "cpu"


def _gpu(
    name: str,
    memory: float,
    teraflops: float,
    bandwidth: float,
    link: float,
    network: float,
    host: float,
    fp8: float = 2.0,
) -> Device:
    """In GB, TFLOP/s, TB/s and GB/s, as data sheets have them."""
    return Device(
        name, memory * 1e9, teraflops * 1e12 * MATMUL_SHARE, bandwidth * 1e12 * MEMORY_SHARE,
        link * 1e9 * LINK_SHARE, network * 1e9 * LINK_SHARE, host * 1e9 * LINK_SHARE, 8, fp8=fp8,
    )  # fmt: skip


# SXM modules in nodes of eight, bfloat16. What they have beyond a round number of GB is left to CUDA, NCCL and holes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 2.04, 300, 25, 32, fp8=0.0),
        _gpu("h100", 80, 989, 3.35, 450, 50, 64),
        _gpu("h200", 141, 989, 4.8, 450, 50, 64),
        _gpu("b200", 180, 2250, 8.0, 900, 50, 64),
    )
}


def data_sheet_flops(name: str) -> float | None:
    """The data sheet's figure for a GPU that calls itself so ("NVIDIA H100 80GB HBM3"); None for one not known."""
    known = next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)
    return known.peak if known else None


def gpu_here() -> str | None:
    """The table's name of this machine's first GPU, without asking CUDA; None where there is no GPU.

    Raises:
        ConfigError: there is one that the table does not have.
    """
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        model = Path(path).read_text().lower()
        for name in GPUS:
            if name in model:
                return name
        raise ConfigError(f"plan.device is not set, and this machine's GPU is none of {', '.join(GPUS)}")
    return None
