"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled ahead of time for two of them.

The interpreter is chosen when Triton decorates a kernel, so it gets a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from rlhf_kernels import (  # noqa: E402
    advantage_triton,
    attention_triton,
    log_prob_triton,
    losses_triton,
    norm_triton,
    rotary_triton,
    swiglu_triton,
)

HERE = Path(__file__).resolve().parent
MAX_REGISTERS, MAX_SHARED = 65536, 48 * 1024  # of a multiprocessor; of a program without asking for more


@pytest.mark.skipif(triton.__version__ < "3.7", reason="older interpreters fail on numpy 2.4")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "RLHF_KERNELS": "triton"}
    not_triton = "not ranks and not float64 and not dtype1 and not scores_are"
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-k", not_triton]
    files = ("test_kernels.py", "test_kernels_layers.py", "test_ppo_arithmetic.py", "test_precision.py")
    command += [str(HERE / name) for name in files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 290, result.stdout[-500:]


# Tensors by name, float32 where nothing is said, and numbers; what else a kernel takes is an integer.
POINTERS = {
    "tokens": torch.int64, "rows": torch.int64, "banned": torch.int64, "inverse": torch.int32, "early": torch.uint8,
    "mask": torch.uint8, "table": torch.int64, "lengths": torch.int64, "places": torch.int64,
    **dict.fromkeys(
        ("logits", "out", "parts", "saved", "grad_log_prob", "grad_entropy", "log_probs", "ref_log_probs", "values",
         "given", "advantages", "returns", "rewards", "moments", "old_log_probs", "old_values", "grad", "sums", "q",
         "cache", "weights", "means", "decays", "x", "add", "weight", "factors", "cos", "sin", "qkv", "of_query",
         "of_key", "bias"),
        torch.float32,
    ),
}  # fmt: skip
NUMBERS = {"scale", "inverse_temperature", "kl_coef", "gamma", "low", "high", "dual", "clip_value", "eps"}
# need not divide by 16, as all other addresses and strides do
UNALIGNED = {"num_blocks", "num_parts", "columns"}
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}


def cases():
    """Name, kernel, types of its tensors beside POINTERS, and constants, as the launches of the package make them."""
    for dtype in (BF16, FP32):
        for num_banned in (0, 2):
            options = {"HAS_ROWS": True, "NUM_BANNED": num_banned}
            name, types = f"{NAMES[dtype]}-{num_banned}", {"logits": dtype, "out": dtype}
            config = log_prob_triton.stats_config(dtype.itemsize) | options
            yield f"stats-{name}", log_prob_triton.stats_kernel, {"logits": dtype}, config
            config = log_prob_triton.gradient_config(dtype.itemsize) | options | {"HAS_ENTROPY": True}
            yield f"gradient-{name}", log_prob_triton.gradient_kernel, types, config
            if dtype is FP32:  # of logits that stand for narrower products
                yield f"gradient-{name}-to-bf16", log_prob_triton.gradient_kernel, types | {"out": BF16}, config
    for finish in (False, True):
        config = log_prob_triton.LAUNCH["combine"] | {"FINISH": finish}
        yield f"combine-{finish}", log_prob_triton.combine_kernel, {}, config
    for of_tokens in (False, True):
        config = advantage_triton.LAUNCH["rows"] | {"LIMIT": 20.0, "OF_TOKENS": of_tokens}
        yield f"advantage-{of_tokens}", advantage_triton.rows_kernel, {}, config
    yield "moments", advantage_triton.moments_kernel, {"rows": FP32}, advantage_triton.LAUNCH["moments"]
    for kind, kl in (("ppo", "none"), ("ppo", "k3"), ("gspo", "k2"), ("cispo", "k1"), ("reinforce", "k3+")):
        config = losses_triton.LAUNCH["policy"] | {"KIND": kind, "KL": kl, "LIMIT": 20.0, "WHITEN": True}
        yield f"policy-{kind}-{kl}", losses_triton.policy_kernel, {}, config | {"WEIGHTED": kl != "none"}
    yield "means", losses_triton.means_kernel, {}, losses_triton.LAUNCH["means"]
    yield "value", losses_triton.value_kernel, {}, losses_triton.LAUNCH["value"]
    for dtype, *shape in ((BF16, 4, 64), (BF16, 8, 128), (FP32, 4, 64), (FP32, 8, 128)):
        types = dict.fromkeys(("q", "cache", "out"), dtype)
        for window, splits in ((0, 1), (4096, 1), (0, 8), (4096, 8)):
            config = attention_triton.launch(*shape, dtype.itemsize) | {"WINDOW": window, "WIDE": False, "SIZE": 32}
            name = f"attention-{NAMES[dtype]}-{shape[1]}-{window}-{splits}"
            types |= {"out": dtype if splits == 1 else FP32}
            yield name, attention_triton.attention_kernel, types.copy(), config | {"SPLITS": splits}
        config = attention_triton.merge_launch(shape[1]) | {"SPLITS": 8}
        yield f"merge-{NAMES[dtype]}-{shape[1]}", attention_triton.merge_kernel, {"out": dtype}, config
    for dtype in (BF16, FP32):
        yield from layer_cases(NAMES[dtype], dtype)
    yield "norm-sum", norm_triton.sum_kernel, {"out": BF16}, norm_triton.LAUNCH["sum"]


def layer_cases(name: str, dtype: torch.dtype):
    """Of hidden states of 7B and 70B and of their heads, as many of a group as they have at TP 1 and 8."""
    types = dict.fromkeys(
        ("x", "add", "weight", "out", "grad", "cos", "sin", "qkv", "of_query", "of_key", "bias"), dtype
    )
    for width in (128, 4096, 8192):
        config = norm_triton.launch(width)
        for add, saves in ((False, True), (True, False)):
            options = {"ADD": add, "SAVES": saves}
            yield f"norm-{name}-{width}-{add}", norm_triton.norm_kernel, types, config | options
        yield f"norm-gradient-{name}-{width}", norm_triton.norm_gradient_kernel, types, config
    yield f"swiglu-{name}", swiglu_triton.swiglu_kernel, types, swiglu_triton.LAUNCH["forward"]
    yield f"swiglu-gradient-{name}", swiglu_triton.swiglu_gradient_kernel, types, swiglu_triton.LAUNCH["backward"]
    for heads, dim in ((8, 128), (1, 64)):
        for forward in (True, False):
            config = rotary_triton.launch(heads, dim) | {"FORWARD": forward}
            yield f"rotate-{name}-{heads}-{forward}", rotary_triton.rotate_kernel, types, config
        for norm, cache in ((True, True), (False, True), (False, False)):
            options = {"BIAS": norm, "ROTARY": True, "NORM": norm, "CACHE": cache, "QUERIES": heads}
            config = rotary_triton.launch(heads + 2, dim) | options
            yield f"heads-{name}-{heads}-{norm}-{cache}", rotary_triton.heads_kernel, types | {"cache": dtype}, config


def integers(kernel, config: dict) -> list[str]:
    return [name for name in kernel.arg_names if name not in {*POINTERS, *NUMBERS, *config}]


class Device:
    """Stands for Triton's driver: a GPU that kernels are compiled for, by its capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch):
    """`compiled(capability, kernel, types, config, values)`: what a launch with these integers would run, for which
    Triton itself decides which of them become constants, and what is said of the others."""
    from triton.runtime.driver import driver

    def get(capability: int, kernel, types: dict, config: dict, values: dict[str, int]):
        monkeypatch.setattr(driver, "_active", Device(capability))
        tensors, numbers = POINTERS | types, dict.fromkeys(NUMBERS, 0.5)
        arguments = [{**tensors, **numbers, **values}[name] for name in kernel.arg_names if name not in config]
        return kernel.warmup(*arguments, grid=(1,), **config)

    return get


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and of local memory, where spilled registers go."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run([tool, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out)}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "kernel", "types", "config"), cases(), ids=[case[0] for case in cases()])
def test_compiled_ahead_of_time(compiled, name, kernel, types, config, capability, tmp_path):
    """Nothing spills, at least two programs fit a multiprocessor, and long rows move in the widest loads and stores."""
    values = {argument: 17 if argument in UNALIGNED else 32 for argument in integers(kernel, config)}
    result = compiled(capability, kernel, types, config, values)
    used = resources(result.asm["cubin"], tmp_path)
    print(f"\n{name} sm_{capability}: {used} shared {result.metadata.shared}")
    assert used["STACK"] == used["LOCAL"] == 0, used
    # a long row's gradients keep enough loads under way by themselves
    programs = 1 if kernel is norm_triton.norm_gradient_kernel else 2
    assert 0 < used["REG"] * 32 * config["num_warps"] <= MAX_REGISTERS // programs
    assert result.metadata.shared <= MAX_SHARED
    if kernel is log_prob_triton.stats_kernel:
        assert len(re.findall(r"ld\.global\.v4", result.asm["ptx"])) >= 4
    if kernel is log_prob_triton.gradient_kernel:
        narrow = POINTERS | types
        for access, num_bytes in (("ld", narrow["logits"].itemsize), ("st", narrow["out"].itemsize)):
            least = 4 * num_bytes // narrow["logits"].itemsize
            assert len(re.findall(rf"{access}\.global\.v4", result.asm["ptx"])) >= least


KERNELS = {case[1]: case for case in cases()}  # one of each


@pytest.mark.parametrize(("name", "kernel", "types", "config"), KERNELS.values(), ids=[k.__name__ for k in KERNELS])
def test_compiled_for_any_integers(compiled, name, kernel, types, config):
    """One row, one token, one part, which Triton makes a constant of; and none of them a multiple of 16."""
    odd = dict.fromkeys(integers(kernel, config), 17)
    for values in (odd, *(odd | {argument: 1} for argument in odd), dict.fromkeys(odd, 1)):
        assert compiled(90, kernel, types, config, values).asm["cubin"], values
