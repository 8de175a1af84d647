"""What a save costs the loop: written by a thread while training goes on, against waiting for it.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--ranks 2] [--saves 5]

Weights and Adam's moments of one policy, split over TP. Behind each save the ranks train for a
while, so that the thread has to share the cores with them. The loop's cost is what the engine's `time/save` counts: the
time in `save` and in the `finish` that moves `latest`. Appends to benchmarks/results/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from record import append

from rlhf_engine.launching.ranks import free_port


def measure(rank: int, args: argparse.Namespace, port: int, folder: str) -> None:
    """One rank: saves that are waited for, then saves that are not."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
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

    def train(seconds: float) -> tuple[float, int]:
        """Steps for so long at least; seconds a step."""
        started, steps = time.perf_counter(), 0
        while not mesh.any_rank(torch.tensor([time.perf_counter() - started > seconds], device=mesh.device))[0]:
            train_step([Work(role, batch, loss, 4)], Metrics(), Trace())
            steps += 1
        return (time.perf_counter() - started) / steps, steps

    alone, _ = train(args.seconds)
    rows = {}
    for is_async in (False, True):
        checkpoints = Checkpoints(Path(folder) / str(is_async), mesh, CheckpointConfig(async_save=is_async))
        costs, beside = [], []
        for iteration in range(1, args.saves + 2):
            mesh.barrier()
            started = time.perf_counter()
            checkpoints.save(iteration, {"policy": role}, {})
            cost = time.perf_counter() - started
            beside.append(train(args.seconds)[0])
            while any(mesh.all_gather_object(checkpoints.is_writing)):
                time.sleep(0.05)
            started = time.perf_counter()
            assert checkpoints.finish()
            costs.append(cost + time.perf_counter() - started)
        rows[is_async] = statistics.median(costs[1:]), statistics.median(beside[1:])
    if mesh.is_main:
        size = sum(p.stat().st_size for p in next((Path(folder) / "True").glob("iteration_*")).iterdir())
        report(args, size, rows, alone)
    torch.distributed.destroy_process_group()


def report(args: argparse.Namespace, size: int, rows: dict, alone: float) -> None:
    (waited, _), (beside, step) = rows[False], rows[True]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of training behind each save")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        mp.spawn(measure, (args, str(free_port()), folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
