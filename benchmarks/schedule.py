"""Idle time of pipelines: roles one after the other against all of them in one stream.

    python benchmarks/schedule.py [--stages 2 4] [--chunks 1 2] [--micro-batches 4] [--milliseconds 50]

Megatron's schedules, the exchange between ranks (gloo) and the measurement are the engine's own. A stage's work is a
sleep, twice as long backward as forward, so that stages are equal and more of them than cores do not slow each other
down. Beside what is measured stands (P - 1) / (V M + P - 1) for P stages of V chunks and M micro-batches, and at the
end a simulation of the same schedules for more stages. Appends to benchmarks/results/schedule.csv.
"""

from __future__ import annotations

import functools
import itertools
import time

import torch
from harness import append, argument_parser, medians, run, take_turns

from rlhf_engine.models.pipeline import simulate

ROUNDS = 3
INFERRED = ("policy", "reference", "reward", "critic")
TRAINED = ("critic", "policy")
ROLES = {"infer": len(INFERRED), "train": len(TRAINED)}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


class Sleeper:
    """A role whose every stage takes `seconds` for a forward, an equal part of it in each of its chunks."""

    is_trained = False
    micro_batch_tokens = balance = None
    width_unit = 1
    bucket_groups = expert_parallel_bucket_groups = ()  # of gradients

    def __init__(self, name: str, mesh, seconds: float):
        from rlhf_engine.config import ModelConfig
        from rlhf_engine.models.build import transformer_config

        self.name, self.mesh, self.seconds = name, mesh, seconds / mesh.virtual_pp
        self.chunks = self.modules = [self] * mesh.virtual_pp
        self.model = ModelConfig(num_layers=mesh.pp * mesh.virtual_pp, hidden_size=8)
        self.config = transformer_config(self.model, mesh, torch.float32)
        self.input = None

    def set_input_tensor(self, tensors) -> None:
        self.input = tensors and tensors[0]

    def __call__(self, tokens, positions, mask):
        rows, length = tokens.shape
        x = self.input if self.input is not None else torch.zeros(length, rows, 8, requires_grad=True)
        return _Sleep.apply(x, self.seconds)


def measure(stages: int, chunks: int, micro_batches: int, seconds: float) -> dict[tuple[str, str], list[float]]:
    """On a rank: median idle share and length in seconds of each kind and way."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.models.stream import _run
    from rlhf_engine.models.work import Work
    from rlhf_engine.observing.trace import Trace

    mesh = ParallelMesh(MeshConfig(1, stages, 1, virtual_pp=chunks), "cpu")
    batch = {"tokens": torch.zeros(micro_batches, 4, dtype=torch.int64)}

    def loss(output, batch):
        return output.sum(), torch.tensor(1), {}

    def rows(output, batch):
        return output.sum((0, 2))

    def iteration(kind: str, groups: list[list[Work]]) -> tuple[float, float]:
        trace = Trace()
        mesh.barrier()
        started = time.perf_counter()
        with torch.set_grad_enabled(kind == "train"):
            for group in groups:
                with trace.stage(kind):
                    _run(group, trace, forward_only=kind == "infer")
                mesh.barrier()
        length = time.perf_counter() - started
        trace.finish()
        return trace.idle_shares(mesh)[f"idle/{kind}"], length

    sides = {}
    for kind, names, fn in (("infer", INFERRED, rows), ("train", TRAINED, loss)):
        works = [Work(Sleeper(name, mesh, seconds), batch, fn, 1) for name in names]
        for how, groups in (("apart", [[work] for work in works]), ("stream", [works])):
            sides[kind, how] = functools.partial(iteration, kind, groups)
    return {side: medians(samples) for side, samples in take_turns(sides, ROUNDS).items()}


def formula(stages: int, chunks: int, micro_batches: int) -> float:
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def simulated(stages: int, chunks: int, micro_batches: int, has_backward: bool) -> float:
    """Idle share by the simulator that plans are made with, a forward taking 1 and a backward 2."""
    ones = [[1.0] * stages] * micro_batches
    return simulate(ones, [[2.0] * stages] * micro_batches if has_backward else None, chunks=chunks)[1]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--milliseconds", type=float, default=50.0)
    args = parser.parse_args()
    rows = []
    print("stages  chunks  what   idle apart (formula)   idle in one stream (formula)   times as fast")
    for stages, chunks in itertools.product(args.stages, args.chunks):
        found = run(measure, stages, chunks, args.micro_batches, args.milliseconds / 1e3, size=stages)[0]
        for kind, roles in ROLES.items():
            (apart, slow), (stream, fast) = found[kind, "apart"], found[kind, "stream"]
            wanted = [formula(stages, chunks, n * args.micro_batches) for n in (1, roles)]
            print(
                f"{stages:6}  {chunks:6}  {kind}  {apart:10.1%} ({wanted[0]:.1%}) {stream:18.1%} ({wanted[1]:.1%})"
                f" {slow / fast:20.2f}",
                flush=True,
            )
            idle = {"apart": apart, "apart_formula": wanted[0], "stream": stream, "stream_formula": wanted[1]}
            about = {"stages": stages, "kind": kind, "micro_batches": args.micro_batches}
            rows.append(about | {"forward_ms": args.milliseconds} | idle | {"chunks": chunks})
    print("simulated, the same number of micro-batches a role:")
    for stages, chunks in itertools.product((2, 4, 8, 16), args.chunks):
        for kind, roles in ROLES.items():
            ways = [simulated(stages, chunks, n * args.micro_batches, kind == "train") for n in (1, roles)]
            times = (1 - ways[1]) / (1 - ways[0])
            print(f"{stages:6}  {chunks:6}  {kind}  {ways[0]:10.1%} {ways[1]:27.1%} {times:29.2f}")
    append("schedule", rows)


if __name__ == "__main__":
    main()
