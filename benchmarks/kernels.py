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
import gc
import statistics
import sys
from functools import partial
from typing import Any

import torch
from candidates import Op, Run, device
from harness import RESULTS, append, argument_parser, machine, medians, peak, reset_peak, run, seconds, take_turns


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

    def turn(run: Run) -> list[float]:
        return [1e3 * seconds(partial(run, both), device()) for both in (False, True)]

    taken = take_turns({name: partial(turn, run) for name, run in runs.items()}, repeats, warm_up=0)
    return found | {name: medians(samples) for name, samples in taken.items()}


def extra_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype, candidate: str, backward: bool) -> int:
    """The most bytes that a candidate holds beyond what is held before it, in a process that does nothing else."""
    # small first: imports, thread pools, compilation
    Op(name, tuple(min(n, 64) for n in shape), dtype).cases[candidate]()(backward)
    run = Op(name, shape, dtype).cases[candidate]()
    gc.collect()
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(backward)
        return torch.cuda.max_memory_allocated() - before
    before = reset_peak()
    run(backward)
    return peak() - before


def memory(op: Op, candidate: str) -> list[float]:
    """MiB beyond what is held before, of forward and of both."""
    threads = torch.get_num_threads()
    alone = [run(extra_memory, op.name, op.shape, op.dtype, candidate, both, threads=threads) for both in (False, True)]
    return [extra / 2**20 for [extra] in alone]


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 512 MB, the median of nine."""
    source = torch.ones(128_000_000, device=device())
    target = torch.empty_like(source).fill_(0)
    return 1.024 / statistics.median(seconds(lambda: target.copy_(source), device()) for _ in range(9))


def ops(args: argparse.Namespace) -> list[Op]:
    if device() == "cuda":
        return [
            Op("token_log_probs", (args.rows or 8192, args.vocab or 131072), torch.bfloat16),
            Op("linear_log_probs", (args.rows or 8192, args.vocab or 131072, 4096), torch.bfloat16),
            *(Op("kl_advantages", shape, torch.float32) for shape in ((512, 1024), (8192, 4096))),
            Op("clipped_policy_loss", (8192, 4096), torch.float32),
            Op("rms_norm", (8192, 4096), torch.bfloat16),
            Op("swiglu", (8192, 11008), torch.bfloat16),
            Op("rotate", (8192, 32, 128), torch.bfloat16),
        ]
    rows, vocab = args.rows or 2048, args.vocab or 32000
    return [
        Op("token_log_probs", (rows, vocab), torch.float32),
        *(Op("linear_log_probs", (rows, vocab, hidden), torch.float32) for hidden in args.hidden),
        Op("kl_advantages", (512, 1024), torch.float32),
        Op("clipped_policy_loss", (512, 1024), torch.float32),
        Op("rms_norm", (rows, 1024), torch.float32),
        Op("swiglu", (rows, 2816), torch.float32),
        Op("rotate", (rows, 16, 64), torch.float32),
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gpu", action="store_true", help="fail where there is none (one that is there is used)")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--ops", nargs="+", default=[], help="of these alone")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.gpu and device() != "cuda":
        sys.exit("--gpu: torch sees no CUDA device")
    bandwidth = copy_bandwidth()
    print(f"{machine()}, {torch.get_num_threads()} threads, copy {bandwidth:.1f} GB/s")
    common = {"copy_gb_s": bandwidth, "threads": torch.get_num_threads()}
    rows = []
    for op in (op for op in ops(args) if not args.ops or op.name in args.ops):
        for name, result in times(op, args.repeats).items():
            if isinstance(result, str):
                print(f"{op.name} {name}: not measured, {result}")
                continue
            extra = memory(op, name)
            floor = [moved / 1e6 for moved in op.floor]
            reached = [mb / ms / bandwidth for mb, ms in zip(floor, result, strict=True)]
            shape = "x".join(map(str, op.shape))
            print(
                f"{op.name:20} {shape:16} {name:20} forward {result[0]:9.2f} ms {extra[0]:8.1f} MiB, "
                f"both {result[1]:9.2f} ms {extra[1]:8.1f} MiB, {reached[1]:.2f} of copy", flush=True,
            )  # fmt: skip
            row = {"op": op.name, "candidate": name, "shape": shape, "dtype": str(op.dtype).removeprefix("torch.")}
            columns = {"forward_ms": result, "forward_extra_mib": extra, "floor_mb": floor, "of_copy": reached}
            for column, (forward, both) in columns.items():
                row |= {column: forward, "both_" + column.removeprefix("forward_"): both}
            rows.append(row | {"gradient_mib": op.gradient / 2**20} | common)
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
