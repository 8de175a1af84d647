"""What a save costs the loop: written by a thread while training goes on, against waiting for it.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--ranks 2] [--saves 5]

Weights and Adam's moments of one policy, split over TP. Behind each save the ranks train for a
while, so that the thread has to share the cores with them. The loop's cost is what the engine's `time/save` counts: the
time in `save` and in the `finish` that moves `latest`. Appends to benchmarks/results/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import append, argument_parser, medians, run, seconds, take_turns


def measure(args: argparse.Namespace, folder: str) -> tuple[int, dict[bool, list[float]], float]:
    """On a rank: bytes of a checkpoint; medians of what a save costs and of a step's seconds while it is written, by
    whether it is asynchronous; and a step's seconds without one."""
    from rlhf_engine.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.models.checkpoint import Checkpoints
    from rlhf_engine.models.role import RoleModel
    from rlhf_engine.models.stream import train_step
    from rlhf_engine.models.work import Work
    from rlhf_engine.observing.metrics import Metrics
    from rlhf_engine.observing.trace import Trace

    mesh = ParallelMesh(MeshConfig(tp=args.ranks, dp=1), args.device)
    model = ModelConfig(
        hidden_size=args.hidden, num_layers=args.layers, intermediate_size=4 * args.hidden, vocab_size=8192,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    role = RoleModel("policy", model, mesh, "lm", torch.float32, OptimizerConfig())
    with torch.no_grad():
        for parameter in role.chunks.parameters():
            parameter.normal_(std=0.02)
    role.start()
    tokens = torch.arange(4 * 64).view(4, 64)
    batch = {"tokens": tokens, "lengths": torch.full((4,), 64)}

    def loss(output, batch):
        return output.square().sum(), torch.tensor(output.numel()), {}

    def train() -> float:
        """Steps for so long at least; seconds a step."""
        started, steps = time.perf_counter(), 0
        while not mesh.any_rank(torch.tensor([time.perf_counter() - started > args.seconds], device=mesh.device))[0]:
            train_step([Work(role, batch, loss, 4)], Metrics(), Trace())
            steps += 1
        return (time.perf_counter() - started) / steps

    def side(is_async: bool) -> Callable[[], tuple[float, float]]:
        checkpoints = Checkpoints(Path(folder) / str(is_async), mesh, CheckpointConfig(async_save=is_async))
        iterations = itertools.count(1)

        def finish() -> None:
            assert checkpoints.finish()

        def save() -> tuple[float, float]:
            mesh.barrier()
            cost = seconds(lambda: checkpoints.save(next(iterations), {"policy": role}, {}))
            step = train()
            while any(mesh.all_gather_object(checkpoints.is_writing)):
                time.sleep(0.05)
            return cost + seconds(finish), step

        return save

    alone = train()
    samples = take_turns({is_async: side(is_async) for is_async in (False, True)}, args.saves)
    size = sum(p.stat().st_size for p in next((Path(folder) / "True").glob("iteration_*")).iterdir())
    return size, {is_async: medians(rows) for is_async, rows in samples.items()}, alone


def report(args: argparse.Namespace, size: int, costs: dict[bool, list[float]], alone: float) -> None:
    (waited, _), (beside, step) = costs[False], costs[True]
    row = {
        "device": args.device,
        "ranks": args.ranks,
        "checkpoint_mb": round(size / 1e6),
        "synchronous_seconds": round(waited, 3),
        "asynchronous_seconds": round(beside, 3),
        "share": round(beside / waited, 3),
        "step_seconds_alone": round(alone, 4),
        "step_seconds_while_writing": round(step, 4),
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    append("checkpoint", [row])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of training behind each save")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        report(args, *run(measure, args, folder, size=args.ranks)[0])


if __name__ == "__main__":
    main()
