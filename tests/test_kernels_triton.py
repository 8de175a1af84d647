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

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rlhf_kernels import advantage_triton, attention_triton, log_prob_triton, losses_triton  # noqa: E402

HERE = Path(__file__).resolve().parent
MAX_REGISTERS, MAX_SHARED = 65536, 48 * 1024  # of a multiprocessor; of a program without asking for more


@pytest.mark.skipif(triton.__version__ < "3.7", reason="older interpreters fail on numpy 2.4")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "RLHF_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-k", "not ranks"]
    command += [str(HERE / "test_kernels.py"), str(HERE / "test_ppo_arithmetic.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 300, result.stdout[-500:]


# The types of arguments by name; what is named in UNALIGNED need not divide by 16, all other addresses and strides do.
TYPES = {
    "tokens": "*i64", "rows": "*i64", "banned": "*i64", "inverse": "*i32", "early": "*u8", "mask": "*u8",
    "num_rows": "i32", "row_stride": "i32", "out_stride": "i32", "num_columns": "i32", "split_columns": "i32",
    "width": "i32", "num_blocks": "i32", "num_parts": "i32", "num_tokens": "i32", "num_scores": "i32",
    "starts": "*i64", "strides": "*i64", "lengths": "*i64", "scale": "fp32", "inverse_temperature": "fp32",
    "kl_coef": "fp32", "gamma": "fp32", "decay": "fp32", "clip_ratio": "fp32", "clip_value": "fp32", "eps": "fp32",
}  # fmt: skip
UNALIGNED = {"num_blocks", "num_parts", "num_scores"}


def cases():
    """Name, kernel, logits' type and its constants, as the launches of the package make them."""
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for num_banned in (0, 2):
            stats = log_prob_triton.stats_config(itemsize) | {"HAS_ROWS": True, "NUM_BANNED": num_banned}
            yield f"stats-{dtype}-{num_banned}", log_prob_triton.stats_kernel, dtype, stats
            gradient = log_prob_triton.gradient_config(itemsize) | {"HAS_ROWS": True, "NUM_BANNED": num_banned}
            yield (
                f"gradient-{dtype}-{num_banned}",
                log_prob_triton.gradient_kernel,
                dtype,
                gradient | {"HAS_ENTROPY": True},
            )
    for finish in (False, True):
        config = log_prob_triton.LAUNCH["combine"] | {"FINISH": finish}
        yield f"combine-{finish}", log_prob_triton.combine_kernel, "fp32", config
    for packed in (False, True):
        config = advantage_triton.LAUNCH["rows"] | {"LIMIT": 20.0, "PACKED": packed}
        yield f"advantage-{packed}", advantage_triton.rows_kernel, "fp32", config
    yield "moments", advantage_triton.moments_kernel, "fp32", advantage_triton.LAUNCH["moments"]
    config = losses_triton.LAUNCH["policy"] | {"LIMIT": 20.0, "WHITEN": True}
    yield "policy", losses_triton.policy_kernel, "fp32", config
    yield "value", losses_triton.value_kernel, "fp32", losses_triton.LAUNCH["value"]
    for dtype, itemsize, *shape in (("bf16", 2, 4, 64), ("bf16", 2, 8, 128), ("fp32", 4, 4, 64), ("fp32", 4, 8, 128)):
        for window in (0, 4096):
            config = attention_triton.launch(*shape, itemsize) | {"WINDOW": window, "WIDE": False}
            yield f"attention-{dtype}-{shape[1]}-{window}", attention_triton.attention_kernel, dtype, config


def compile_case(kernel, dtype: str, config: dict, capability: int):
    constants = {name: value for name, value in config.items() if name != "num_warps"}
    is_logits = kernel in (log_prob_triton.stats_kernel, log_prob_triton.gradient_kernel)
    result = "out" if kernel is log_prob_triton.gradient_kernel else None
    names = kernel.arg_names
    signature = {name: TYPES.get(name, "*fp32") for name in names}
    if is_logits:
        signature |= {"logits": f"*{dtype}"} | ({result: f"*{dtype}"} if result else {})
    if kernel is attention_triton.attention_kernel:
        signature |= dict.fromkeys(("q", "cache", "out"), f"*{dtype}")
    if kernel is advantage_triton.moments_kernel:
        signature["rows"] = "*fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    divides = [n for n in names if signature[n].startswith("*") or (signature[n] == "i32" and n not in UNALIGNED)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divides},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": config["num_warps"]})


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and of local memory, where spilled registers go."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run([tool, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out)}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "kernel", "dtype", "config"), cases(), ids=[case[0] for case in cases()])
def test_compiled_ahead_of_time(name, kernel, dtype, config, capability, tmp_path):
    """Nothing spills, at least two programs fit a multiprocessor, and long rows move in the widest loads and stores."""
    compiled = compile_case(kernel, dtype, config, capability)
    used = resources(compiled.asm["cubin"], tmp_path)
    print(f"\n{name} sm_{capability}: {used} shared {compiled.metadata.shared}")
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert 0 < used["REG"] * 32 * config["num_warps"] <= MAX_REGISTERS // 2
    assert compiled.metadata.shared <= MAX_SHARED
    if kernel is log_prob_triton.stats_kernel:
        assert len(re.findall(r"ld\.global\.v4", compiled.asm["ptx"])) >= 4
    if kernel is log_prob_triton.gradient_kernel:
        for access in ("ld", "st"):
            assert len(re.findall(rf"{access}\.global\.v4", compiled.asm["ptx"])) >= 4
