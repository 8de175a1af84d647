"""A plan's seconds made this machine's: the same stages run with a few layers on one rank, over what is planned.

What a plan leaves out (the interpreter's time, how well a library's products do at these shapes) is in the quotient.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..algorithms import ALGORITHMS
from ..config import Base, ConfigError, MeshConfig, ModelConfig, RunConfig
from ..config.devices import Device
from ..experience import Experience
from ..launching.build import begin, build_context
from ..launching.preflight import Plan
from ..mesh import ParallelMesh
from ..schedule import Schedule
from .forecast import Forecaster, StageForecast, training_phases
from .search import changed

_LAYERS, _NEW_TOKENS = 2, 32


def run_stages(
    plan: Plan, mesh: ParallelMesh, phase: str, iterations: int = 2
) -> tuple[dict[str, float], Experience, Mapping[str, ModelConfig]]:
    """Seconds of each group of stages (of the fastest iteration but the first), the last batch, and the models."""
    ctx = build_context(plan, mesh)
    algorithm = ALGORITHMS[phase](ctx.config)
    specs = algorithm.roles()
    begin(ctx, algorithm.name, specs)
    schedule = Schedule(algorithm.stages, algorithm.provided, specs)
    seconds: dict[str, list[float]] = {}
    for _ in range(1 + iterations):
        experience = schedule.run(ctx, algorithm.batch(ctx))
        for name, value in ctx.metrics.reduce(mesh)[0].items():
            if name.startswith("time/"):
                seconds.setdefault(name.removeprefix("time/"), []).append(value)
        ctx.state.iteration += 1
    models = {name: base.model for name, base in ctx.bases.items()}
    return {name: min(values[1:]) for name, values in seconds.items()}, experience, models


def as_measured(config: RunConfig, experience: Experience) -> RunConfig:
    """The configuration with the lengths of rows that came up."""
    assert experience.lengths is not None
    if experience.response_mask is None:
        length = int(experience.lengths.float().mean())
        return changed(config, {"plan.prompt_tokens": length - 1, "plan.response_tokens": 1})
    said = experience.response_mask.any(1)
    prompts = experience.response_mask.int().argmax(1)[said]  # behind which an environment's answers stand too
    mean = float((experience.lengths[said] - prompts).float().mean())
    lengths = {"plan.prompt_tokens": round(float(prompts.float().mean())), "plan.response_tokens": round(mean)}
    return changed(config, lengths | {"data.max_prompt_len": int(prompts.max())})


def stage_factors(plan: Plan, device: Device) -> dict[str, float]:
    """Measured over planned seconds, by kind of stage, of the last training phase.

    Raises:
        ConfigError: the device is another than this machine's.
    """
    if plan.device != "cpu" and plan.config.plan.device is not None:
        raise ConfigError("plan.calibrate=true measures this machine's device: leave plan.device out")
    phase = training_phases(plan.config)[-1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    others = min(plan.world_size, device.node) - 1 if plan.device == "cpu" else 0
    with tempfile.TemporaryDirectory() as folder, _neighbours(others):
        small = _small(plan, folder)
        seconds, experience, models = run_stages(small, ParallelMesh(small.mesh, small.device), phase)
    found = Forecaster(phase, as_measured(small.config, experience), small.mesh, models, device).run()
    planned = {stage.name: stage for stage in found.stages}
    return {
        kind: sum(seconds[name] for name in names) / sum(planned[name].seconds for name in names)
        for kind, names in _by_kind(planned).items()
    }


@contextlib.contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """Within it so many other processes multiply and copy: ranks share a processor's memory and its power."""
    code = "import torch; torch.set_num_threads(1); a = torch.randn(1024, 1024)\nwhile True: a @ a; a.clone()"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _by_kind(planned: Mapping[str, StageForecast]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name, stage in planned.items():
        if stage.kind != "local":
            kinds.setdefault(stage.kind, []).append(name)
    return kinds


def _small(plan: Plan, folder: str) -> Plan:
    """The rows of one replica through a few layers: the same shapes, less of them."""
    config, mesh = plan.config, MeshConfig(1, 1, 1)
    assert plan.mesh.dp is not None
    replicas, sampling = plan.mesh.dp * plan.mesh.pp, dict[str, int]()
    for phase, part in config.sampling.items():
        unit = math.lcm(part.micro_batch_size, part.samples_per_prompt)
        prompts = -(-part.samples // (replicas * unit)) * unit // part.samples_per_prompt
        sampling |= {f"{phase}.prompts_per_iteration": prompts, f"{phase}.num_minibatches": 1, f"{phase}.epochs": 1}
    new = min(config.rollout.max_new_tokens, _NEW_TOKENS)
    config = changed(
        config,
        {
            **sampling,
            "sft.batch_size": config.sft.micro_batch_size, "reward.batch_size": config.reward.micro_batch_size,
            "rollout.max_new_tokens": new, "rollout.min_new_tokens": new, "rollout.tail": "finish",
            "data.cache_dir": config.data.cache_dir or folder,
        },
    )  # fmt: skip
    config.output_dir, config.mesh = folder, mesh
    bases = {
        name: Base(None, replace(base.model, num_layers=min(_LAYERS, base.model.num_layers)))
        for name, base in plan.bases.items()
    }
    return replace(plan, config=config, mesh=mesh, bases=bases)
