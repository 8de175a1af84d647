"""The kernels beside plain torch and public implementations: time, memory, and how near the machine's limit they are.

    python benchmarks/kernels.py [--gpu] [--rows 2048] [--vocab 32000] [--hidden 256 1024] [--repeats 5]

Candidates take turns in one process, and the median of the repeats counts. Memory is the highest of a fresh process
while it runs a candidate once, less what it held before: on a CPU the kernel's high-water mark of resident memory, on
a GPU torch's of allocated memory. The gradients returned are in it and, since all candidates must return them, in a
column of their own too. `floor_mb` are the bytes that any implementation must move, so `of_copy` compares the speed
with that of a copy of the same bytes. Appends to benchmarks/results/kernels.csv and redraws kernels.png beside it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, append, machine

import rlhf_kernels as kernels

Run = Callable[[bool], None]  # with backward or without


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=dtype)


def plain(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def call(fn: Callable, inputs: list[torch.Tensor], incoming: torch.Tensor) -> Run:
    """Runs `fn` of fresh leaves; its first result takes the incoming gradient."""

    def run(backward: bool) -> None:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        with torch.set_grad_enabled(backward):
            result = fn(*leaves)
        if backward:
            (result[0] if isinstance(result, tuple) else result).backward(incoming)

    return run


def log_prob_cases(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    """Each makes its own inputs: megatron writes over the logits."""
    tokens, incoming = torch.randint(0, vocab, (rows,), device=device()), random(rows)

    def make(fn: Callable) -> Callable[[], Run]:
        return lambda: call(fn, [random(rows, vocab, dtype=dtype)], incoming)

    def with_entropy() -> Run:
        logits = random(rows, vocab, dtype=dtype)

        def run(backward: bool) -> None:
            leaf = logits.detach().requires_grad_(backward)
            results = kernels.token_log_probs(leaf, tokens)
            if backward:
                torch.autograd.backward(results, (incoming, incoming))

        return run

    def megatron(fused: bool) -> Callable[[], Run]:
        def start() -> Run:
            group = tensor_parallel_mesh().tp_group
            from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
            from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

            def fn(x):
                x, y = x.unsqueeze(1), tokens.unsqueeze(1)
                loss = fused_vocab_parallel_cross_entropy(x, y, group) if fused else vocab_parallel_cross_entropy(x, y)
                return loss.squeeze(1)

            return make(fn)()

        return start

    def trl() -> Run:
        from trl.trainer.utils import selective_log_softmax

        return make(lambda x: selective_log_softmax(x, tokens))()

    def liger() -> Run:
        group = tensor_parallel_mesh().tp_group
        from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

        loss = LigerVocabParallelCrossEntropy(reduction="none", label_smoothing_formula="megatron")
        return make(lambda x: loss(x.unsqueeze(1), tokens.unsqueeze(1), group).squeeze(1))()

    ours = make(lambda x: kernels.token_log_probs(x, tokens))
    in_place = make(lambda x: kernels.token_log_probs(x, tokens, inplace_grad=True))
    found = {
        "plain": make(lambda x: plain(x, tokens)), "ours": ours, "ours-in-place": in_place,
        "ours-entropy-grad": with_entropy, "megatron": megatron(False), "megatron-fused": megatron(True), "trl": trl,
    }  # fmt: skip
    return found | ({"liger": liger} if device() == "cuda" else {})


def linear_cases(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    tokens, incoming = torch.randint(0, vocab, (rows,), device=device()), random(rows)

    def make(fn: Callable) -> Callable[[], Run]:
        return lambda: call(
            fn, [random(rows, hidden, dtype=dtype), random(vocab, hidden, dtype=dtype) * hidden**-0.5], incoming
        )

    def products() -> Run:
        """The three matrix products alone, and nothing in between."""
        x, weight = random(rows, hidden, dtype=dtype), random(vocab, hidden, dtype=dtype)
        logits = x @ weight.T

        def run(backward: bool) -> None:
            torch.mm(x, weight.T, out=logits)
            if backward:
                _ = logits @ weight, logits.T @ x

        return run

    return {
        "plain": make(lambda x, w: plain(F.linear(x, w), tokens)),
        "ours": make(lambda x, w: kernels.linear_log_probs(x, w, tokens)),
        "ours-keeps-nothing": make(lambda x, w: kernels.linear_log_probs(x, w, tokens, keep_bytes=0)),
        "products-alone": products,
    }


def advantage_cases(rows: int, num_tokens: int) -> dict[str, Callable[[], Run]]:
    log_probs, ref, values, scores = (*random(3, rows, num_tokens), random(rows))
    lengths = torch.randint(num_tokens // 2, num_tokens, (rows, 1), device=device())
    mask = torch.arange(num_tokens, device=device()) < lengths

    def plain_gae(backward: bool) -> None:
        """As most trainers have it: a loop over tokens, then whitening."""
        rewards = -0.1 * (log_probs - ref) * mask
        rewards[torch.arange(rows, device=device()), lengths.squeeze(1) - 1] += scores
        masked, last, out = values * mask, 0, []
        for t in range(num_tokens - 1, -1, -1):
            following = masked[:, t + 1] if t + 1 < num_tokens else 0.0
            last = rewards[:, t] + following - masked[:, t] + 0.95 * last
            out.append(last)
        advantages = torch.stack(out[::-1], 1)
        _ = advantages + masked
        mean = (advantages * mask).sum() / mask.sum()
        _ = ((advantages - mean).square() * mask).sum() / mask.sum()

    def ours(backward: bool) -> None:
        kernels.kl_advantages(log_probs, ref, values, scores, mask, kl_coef=0.1)

    return {"plain": lambda: plain_gae, "ours": lambda: ours}


def loss_cases(rows: int, num_tokens: int) -> dict[str, Callable[[], Run]]:
    new, old, advantages = random(3, rows, num_tokens)
    mask = torch.rand(rows, num_tokens, device=device()) < 0.7

    def plain_loss(x):
        ratio = (x - old).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantages
        loss = -(torch.minimum(ratio * advantages, clipped) * mask).sum()
        return loss, (clipped < ratio * advantages).sum(), ((ratio - 1 - (x - old)) * mask).sum()

    one = torch.ones((), device=device())
    return {
        "plain": lambda: call(plain_loss, [new], one),
        "ours": lambda: call(lambda x: kernels.clipped_policy_loss(x, old, advantages, mask), [new], one),
    }


@functools.cache
def tensor_parallel_mesh():
    """Megatron's groups, in a world of this process alone."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.launching.ranks import free_port
    from rlhf_engine.mesh import ParallelMesh

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    return ParallelMesh(MeshConfig(1, 1, 1), device())


# -- what is measured ----------------------------------------------------------------------------------------------


class Op:
    """A shape, its candidates, and the bytes in MB that forward, and both, must move at least."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        self.name, self.shape, self.dtype, size = name, shape, dtype, dtype.itemsize
        if name == "token_log_probs":
            rows, vocab = shape
            self.cases, self.gradient = log_prob_cases(rows, vocab, dtype), rows * vocab * size
            self.floor = (rows * vocab * size, 3 * rows * vocab * size)
        elif name == "linear_log_probs":
            rows, vocab, hidden = shape
            inputs = (rows + vocab) * hidden * size
            self.cases, self.gradient = linear_cases(rows, vocab, hidden, dtype), inputs
            self.floor = (inputs, 3 * inputs)
        elif name == "kl_advantages":
            self.cases, self.gradient, tokens = advantage_cases(*shape), 0, shape[0] * shape[1]
            self.floor = (21 * tokens, 21 * tokens)
        else:
            self.cases, tokens = loss_cases(*shape), shape[0] * shape[1]
            self.gradient, self.floor = 4 * tokens, (13 * tokens, 25 * tokens)

    @property
    def words(self) -> list[str]:
        return [self.name, str(self.dtype).removeprefix("torch."), *map(str, self.shape)]


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], None]) -> float:
    gc.collect()
    synchronize()
    if device() == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    synchronize()
    return start.elapsed_time(end) / 1e3


def times(op: Op, repeats: int) -> dict[str, Any]:
    """Median milliseconds of forward and of both, or why there are none."""
    found: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    for name, make in op.cases.items():
        try:
            runs[name] = make()
            runs[name](True)
            runs[name](False)
        except Exception as error:  # a candidate that is not installed or does not run here
            runs.pop(name, None)
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    taken: dict[tuple[str, bool], list[float]] = {(name, both): [] for name in runs for both in (False, True)}
    for _ in range(repeats):
        for (name, both), samples in taken.items():
            samples.append(seconds(lambda name=name, both=both: runs[name](both)))
    for name in runs:
        found[name] = tuple(1e3 * statistics.median(taken[name, both]) for both in (False, True))
    return found


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def extra_memory(run: Callable[[], None]) -> int:
    """Bytes that `run` holds at its highest beyond what is held before it."""
    gc.collect()
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure_alone(words: list[str], candidate: str, backward: bool) -> None:
    name, dtype, *shape = words
    # small first: imports, thread pools, compilation
    small = Op(name, tuple(min(int(x), 64) for x in shape), getattr(torch, dtype))
    small.cases[candidate]()(backward)
    op = Op(name, tuple(map(int, shape)), getattr(torch, dtype))
    run = op.cases[candidate]()
    print(json.dumps(extra_memory(lambda: run(backward))))


def memory(op: Op, candidate: str, backward: bool) -> float:
    """MiB, from a process that does nothing else."""
    command = [sys.executable, __file__, "--alone", candidate, str(int(backward)), *op.words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1]) / 2**20


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 512 MB, the median of nine."""
    source = torch.ones(128_000_000, device=device())
    target = torch.empty_like(source).fill_(0)
    return 1.024 / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(9))


def ops(args: argparse.Namespace) -> list[Op]:
    if device() == "cuda":
        return [
            Op("token_log_probs", (args.rows or 8192, args.vocab or 131072), torch.bfloat16),
            Op("linear_log_probs", (args.rows or 8192, args.vocab or 131072, 4096), torch.bfloat16),
            *(Op("kl_advantages", shape, torch.float32) for shape in ((512, 1024), (8192, 4096))),
            Op("clipped_policy_loss", (8192, 4096), torch.float32),
        ]
    rows, vocab = args.rows or 2048, args.vocab or 32000
    return [
        Op("token_log_probs", (rows, vocab), torch.float32),
        *(Op("linear_log_probs", (rows, vocab, hidden), torch.float32) for hidden in args.hidden),
        Op("kl_advantages", (512, 1024), torch.float32),
        Op("clipped_policy_loss", (512, 1024), torch.float32),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="fail where there is none (one that is there is used)")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--ops", nargs="+", default=[], help="of these alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return measure_alone(args.alone[2:], args.alone[0], args.alone[1] == "1")
    if args.gpu and device() != "cuda":
        sys.exit("--gpu: torch sees no CUDA device")
    bandwidth = copy_bandwidth()
    print(f"{machine()}, {torch.get_num_threads()} threads, copy {bandwidth:.1f} GB/s")
    common = {"copy_gb_s": f"{bandwidth:.1f}", "threads": torch.get_num_threads()}
    rows = []
    for op in (op for op in ops(args) if not args.ops or op.name in args.ops):
        for name, result in times(op, args.repeats).items():
            if isinstance(result, str):
                print(f"{op.name} {name}: not measured, {result}")
                continue
            extra = [memory(op, name, both) for both in (False, True)]
            reached = [n / 1e9 / (ms / 1e3) / bandwidth for n, ms in zip(op.floor, result, strict=True)]
            shape = "x".join(map(str, op.shape))
            print(
                f"{op.name:20} {shape:16} {name:20} forward {result[0]:9.2f} ms {extra[0]:8.1f} MiB, "
                f"both {result[1]:9.2f} ms {extra[1]:8.1f} MiB, {reached[1]:.2f} of copy", flush=True,
            )  # fmt: skip
            row = common | {"op": op.name, "candidate": name, "shape": shape, "dtype": op.words[1]}
            row |= dict(zip(("forward_ms", "both_ms"), (f"{ms:.3f}" for ms in result), strict=True))
            row |= dict(zip(("forward_extra_mib", "both_extra_mib"), (f"{mib:.1f}" for mib in extra), strict=True))
            row |= dict(zip(("floor_mb", "both_floor_mb"), (f"{n / 1e6:.1f}" for n in op.floor), strict=True))
            row |= dict(zip(("of_copy", "both_of_copy"), (f"{x:.3f}" for x in reached), strict=True))
            row["gradient_mib"] = f"{op.gradient / 2**20:.1f}"
            rows.append(row)
    found = append("kernels", rows, ["triton", "megatron-core", "liger-kernel", "trl"])
    here = [row for row in found if row["machine"] == machine()]
    plot(list({(row["op"], row["shape"], row["dtype"], row["candidate"]): row for row in here}.values()))


def plot(rows: list[dict]) -> None:
    """Time and memory of forward with backward."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']}\n{row['shape']} {row['dtype']}", []).append(row)
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(10, 1 + 1.5 * len(groups)), squeeze=False)
    for (title, members), pair in zip(groups.items(), axes, strict=True):
        for axis, field, unit in zip(pair, ("both_ms", "both_extra_mib"), ("ms", "MiB extra"), strict=True):
            values = [float(row[field]) for row in members]
            colors = ["#1b6ca8" if row["candidate"].startswith("ours") else "#b0b0b0" for row in members]
            axis.barh([row["candidate"] for row in members], values, color=colors)
            axis.invert_yaxis()
            axis.set_xlabel(unit, fontsize=8)
            axis.tick_params(labelsize=7)
        pair[0].set_title(title, fontsize=8, loc="left")
    figure.suptitle(f"forward and backward, {rows[0]['machine']}, {rows[0]['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "kernels.png", dpi=80)


if __name__ == "__main__":
    main()
