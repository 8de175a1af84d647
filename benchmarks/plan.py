"""Plans beside what they foretell: seconds of the stages of a PPO iteration, and the most bytes that a rank holds.

    python benchmarks/plan.py [--sizes 6m 28m 58m] [--layouts 1x1x1 1x1x2 2x1x1 1x2x1 2x2x1]

Each run is made of the engine's own stages on ranks of one thread, tp x pp x dp of them, with random weights. Memory
is the resident memory's high-water mark (Linux) from the moment when the roles are built. Seconds are planned twice: by
what a matrix product and a copy take on this machine, and with the factors that `plan.calibrate=true` finds with two
layers on one rank. Appends to benchmarks/results/plan.csv.
"""

from __future__ import annotations

import math
import tempfile

from harness import append, argument_parser, peak, reset_peak, run

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


def measure(size: str, layout: tuple[int, int, int], folder: str) -> tuple:
    """On a rank: its pipeline stage, the most bytes it held, seconds of the stages, and what they are planned by."""
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.plan import calibrate

    plan = planned(size, layout, folder)
    mesh = ParallelMesh(plan.mesh, "cpu")
    start = calibrate.Schedule.__init__

    def with_roles_built(*args) -> None:
        reset_peak()  # making weights needs more
        start(*args)

    calibrate.Schedule.__init__ = with_roles_built
    seconds, experience, models = calibrate.run_stages(plan, mesh, "ppo")
    return mesh.pp_rank, peak(), seconds, calibrate.as_measured(plan.config, experience), models


def calibrated(size: str, layout: tuple[int, int, int], folder: str) -> tuple:
    """The factors of the stages, and this machine as a device."""
    from rlhf_engine.plan.calibrate import stage_factors
    from rlhf_engine.plan.measure import cpu

    plan = planned(size, layout, folder)
    device = cpu(plan.world_size)
    return stage_factors(plan, device), device


def compare(size: str, layout: tuple[int, int, int]) -> list[list]:
    """Rows of the table: what, planned, planned and calibrated, measured."""
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.plan.forecast import Forecaster

    with tempfile.TemporaryDirectory() as folder:
        [(factors, device)] = run(calibrated, size, layout, folder)
        found = run(measure, size, layout, folder, size=math.prod(layout))
    *_, seconds, config, models = found[0]
    mesh = MeshConfig(*layout)
    plain = Forecaster("ppo", config, mesh, models, device).run()
    fitted = Forecaster("ppo", config, mesh, models, device, factors).run()
    rows = []
    for p in range(mesh.pp):
        foretold = max(stage.memory[p].total for stage in plain.stages)
        measured = max(held for pp_rank, held, *_ in found if pp_rank == p)
        rows.append([f"GB of pipeline stage {p}", foretold / 1e9, foretold / 1e9, measured / 1e9])
    for stage, other in zip(plain.stages, fitted.stages, strict=True):
        if stage.kind != "local":
            rows.append([f"s of {stage.name}", stage.seconds, other.seconds, seconds[stage.name]])
    total = sum(seconds[stage.name] for stage in plain.stages)
    rows.append(["s of an iteration", plain.seconds, fitted.seconds, total])
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--layouts", nargs="+", default=["1x1x1", "1x1x2", "2x1x1", "1x2x1", "2x2x1"])
    args = parser.parse_args()
    print(f"{'size':5} {'tp x pp x dp':12} {'what':48} {'planned':>8} {'calibrated':>10} {'measured':>8} {'off':>5}")
    for size in args.sizes:
        for layout in args.layouts:
            rows = compare(size, tuple(map(int, layout.split("x"))))
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
