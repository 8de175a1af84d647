"""Whether a run's layers can be computed where it will be: transformer-engine's (`model.layers=te`), and in 8 bits."""

from __future__ import annotations

import subprocess
import sys

from ..config import ConfigError, RunConfig
from ..config.devices import GPUS


def check_layers(config: RunConfig, device: str, is_main: bool) -> None:
    """Refuses layers that cannot be computed on the devices of a run.

    Args:
        is_main: this is the rank that looks at the devices and at what is installed, which are here.

    Raises:
        ConfigError: says why, and what would be right.
    """
    name = config.plan.device
    if config.dtype == "fp8" and name in GPUS and not GPUS[name].fp8:
        raise ConfigError(f"dtype=fp8: plan.device={name} has no products in 8 bits: use dtype=bfloat16")
    if config.model.layers != "te":
        return
    if device == "cpu":
        raise ConfigError("model.layers=te needs a GPU: use model.layers=own")
    if not is_main:
        return
    if reason := _failure("import transformer_engine.pytorch"):
        raise ConfigError(
            f"model.layers=te needs transformer-engine, which cannot be imported here ({reason}): install it"
            " (docs/gpu.md), or use model.layers=own"
        )
    if config.dtype == "fp8" and (reason := _failure(_HAS_FP8)):
        raise ConfigError(f"dtype=fp8 cannot be computed here ({reason}): use dtype=bfloat16")


_HAS_FP8 = """
from transformer_engine.pytorch.fp8 import check_fp8_block_scaling_support
is_there, reason = check_fp8_block_scaling_support()
is_there or exit(reason)
"""


def _failure(code: str) -> str | None:
    """What another process says as it fails to run this: it imports more than this one may."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
