"""Plans beside what they foretell: seconds of the stages of a PPO iteration, and the most bytes that a rank holds.

    python benchmarks/plan.py [--sizes 6m 28m 58m] [--layouts 1x1x1 1x1x2 2x1x1 1x2x1 2x2x1]

Each run is made of the engine's own stages on ranks of one thread, tp x pp x dp of them, with random weights. Memory
is the resident memory's high-water mark (Linux) from the moment when the roles are built. Seconds are planned twice: by
what a matrix product and a copy take on this machine, and with the factors that `plan.calibrate=true` finds with two
layers on one rank. Appends to benchmarks/results/plan.csv.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from record import append

from rlhf_engine.launching.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # hidden size, layers, MLP, vocabulary
    "6m": (256, 6, 704, 2048),
    "28m": (512, 8, 1408, 4096),
    "58m": (768, 8, 2048, 4096),
}
OVERRIDES = [
    "+exp=hh_rlhf", "phases=[ppo]", "reward.path=null", "device=cpu", "ppo.prompts_per_iteration=16", "ppo.epochs=1",
    "ppo.num_minibatches=1", "ppo.micro_batch_size=4", "rollout.max_new_tokens=32", "rollout.min_new_tokens=32",
    "data.num_rows=400", "data.num_eval_rows=8", "schedule.recompute=none",
    "checkpoint.async_save=false",  # nothing is saved: no memory is kept for it
]  # fmt: skip


def planned(size: str, layout: tuple[int, int, int], folder: str):
    """The checked run of a size on a mesh. There is no reward phase behind it, which nothing here asks for."""
    from rlhf_engine.launching import preflight
    from rlhf_engine.launching.compose import compose

    hidden, layers, inner, vocabulary = SIZES[size]
    sizes = [f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.intermediate_size={inner}"]
    sizes += ["model.num_attention_heads=8", "model.num_key_value_heads=4", f"model.vocab_size={vocabulary}"]
    mesh = [f"mesh.{name}={value}" for name, value in zip(("tp", "pp", "dp"), layout, strict=True)]
    preflight.check_reward = lambda config: None
    return preflight.plan(compose([*OVERRIDES, *sizes, *mesh, f"output_dir={folder}"]))


def rank_main(rank: int, size: str, layout: tuple[int, int, int], folder: str, port: int, queue) -> None:
    world = layout[0] * layout[1] * layout[2]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.plan import calibrate

    plan = planned(size, layout, folder)
    mesh = ParallelMesh(plan.mesh, "cpu")
    start = calibrate.Schedule.__init__

    def with_roles_built(*args) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark anew: making weights needs more
        start(*args)

    calibrate.Schedule.__init__ = with_roles_built
    seconds, experience, models = calibrate.run_stages(plan, mesh, "ppo")
    peak = 1024 * float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    config = calibrate.as_measured(plan.config, experience)
    queue.put((rank, mesh.pp_rank, peak, seconds if rank == 0 else None, config, models))
    mesh.barrier()


def factors_main(size: str, layout: tuple[int, int, int], folder: str, queue) -> None:
    from rlhf_engine.plan.calibrate import stage_factors
    from rlhf_engine.plan.measure import cpu

    plan = planned(size, layout, folder)
    device = cpu(plan.world_size)
    queue.put((stage_factors(plan, device), device))


def measure(size: str, layout: tuple[int, int, int]) -> list[list]:
    """Rows of the table: what, planned, planned and calibrated, measured."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.plan.forecast import Forecaster

    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        calibration = context.Process(target=factors_main, args=(size, layout, folder, queue))
        calibration.start()
        factors, device = queue.get()
        calibration.join()
        port, world = free_port(), layout[0] * layout[1] * layout[2]
        args = (size, layout, folder, port, queue)
        ranks = mp.start_processes(rank_main, args, world, join=False, start_method="spawn")
        found = sorted((queue.get() for _ in range(world)), key=lambda entry: entry[0])
        while not ranks.join():
            pass
    *_, seconds, config, models = found[0]
    mesh = MeshConfig(*layout)
    plain = Forecaster("ppo", config, mesh, models, device).run()
    calibrated = Forecaster("ppo", config, mesh, models, device, factors).run()
    rows = []
    for p in range(mesh.pp):
        peak = max(stage.memory[p].total for stage in plain.stages)
        measured = max(entry[2] for entry in found if entry[1] == p)
        rows.append([f"GB of pipeline stage {p}", peak / 1e9, peak / 1e9, measured / 1e9])
    for stage, other in zip(plain.stages, calibrated.stages, strict=True):
        if stage.kind != "local":
            rows.append([f"s of {stage.name}", stage.seconds, other.seconds, seconds[stage.name]])
    total = sum(seconds[stage.name] for stage in plain.stages)
    rows.append(["s of an iteration", plain.seconds, calibrated.seconds, total])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--layouts", nargs="+", default=["1x1x1", "1x1x2", "2x1x1", "1x2x1", "2x2x1"])
    args = parser.parse_args()
    print(f"{'size':5} {'tp x pp x dp':12} {'what':48} {'planned':>8} {'calibrated':>10} {'measured':>8} {'off':>5}")
    for size in args.sizes:
        for layout in args.layouts:
            rows = measure(size, tuple(map(int, layout.split("x"))))
            for what, plain, calibrated, measured in rows:
                off = f"{calibrated / measured - 1:+.0%}"
                print(
                    f"{size:5} {layout:12} {what:48} {plain:8.3g} {calibrated:10.3g} {measured:8.3g} {off:>5}",
                    flush=True,
                )
            names = ("what", "planned", "calibrated", "measured")
            here = {"size": size, "tp x pp x dp": layout}
            append("plan", [here | dict(zip(names, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
