"""Which implementation runs: the one place that decides."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

VARIABLE = "RLHF_KERNELS"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs in Triton: on CUDA where Triton is installed, else in plain torch.

    `RLHF_KERNELS=reference` or `triton` forces one; Triton takes CPU tensors under TRITON_INTERPRET=1. The Triton
    kernels compute in float32, so float64 always runs in plain torch.

    Raises:
        ValueError: the variable has another value.
        RuntimeError: Triton is forced where it cannot run.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "reference", "triton"):
        raise ValueError(f"{VARIABLE}={choice!r} is unknown: reference, triton, or unset")
    if choice == "triton":
        if not _HAS_TRITON:
            raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed")
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise RuntimeError(f"{VARIABLE}=triton needs CUDA tensors or TRITON_INTERPRET=1, not tensors on {x.device}")
    return choice != "reference" and _HAS_TRITON and (x.is_cuda or choice == "triton") and x.element_size() < 8
