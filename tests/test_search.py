"""Settings that a plan finds fastest: never slower than what one would have chosen without it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rlhf_engine.config import ConfigError, ModelConfig, RunConfig, resolve_mesh
from rlhf_engine.config.devices import GPUS, Device
from rlhf_engine.launching.compose import compose
from rlhf_engine.models.residency import Presence
from rlhf_engine.plan.forecast import Forecaster
from rlhf_engine.plan.moves import moved
from rlhf_engine.plan.search import Changes, Choice, changed, evaluate, meshes, residency, search

LARGE = ["+exp=ppo_large", "model=llama_7b", "plan.device=h100"]
PLACEMENTS: list[Changes] = [{"schedule.residency": "keep"}, {"schedule.residency": "offload"}]


@pytest.fixture(scope="module")
def large() -> RunConfig:
    return compose([*LARGE, "phases=[ppo]"])


def drawn(large: RunConfig, seed: int) -> tuple[RunConfig, int, dict[str, ModelConfig], Device]:
    """A run at random: its configuration, world, models and device."""
    draw = random.Random(seed)
    heads = draw.choice((8, 16, 32))
    policy = ModelConfig(
        num_layers=draw.randint(4, 32), hidden_size=128 * heads, num_attention_heads=heads,
        num_key_value_heads=draw.choice((heads, 8)), intermediate_size=draw.choice((2, 3, 4)) * 128 * heads,
        vocab_size=draw.choice((32000, 128256)), max_position_embeddings=8192, tie_word_embeddings=draw.random() < 0.3,
    )  # fmt: skip
    reward = replace(policy, num_layers=draw.randint(2, policy.num_layers))
    phase = draw.choice(("ppo", "ppo", "ppo", "grpo", "dpo"))
    settings: Changes = {
        "data.max_prompt_len": (prompt := draw.choice((128, 512, 1024))),
        "rollout.max_new_tokens": (new := draw.choice((128, 512, 1024))), "data.max_seq_len": prompt + new,
        "rollout.slots": draw.choice((64, 256)), "schedule.recompute": draw.choice(("none", "none", "full")),
        "schedule.prefetch": draw.random() < 0.2, "mesh.virtual_pp": draw.choice((1, 1, 2)),
    }  # fmt: skip
    for name in ("ppo", "grpo", "sft", "reward", "dpo"):
        settings[f"{name}.micro_batch_size"] = draw.choice((1, 2, 3, 8))
    settings["ppo.prompts_per_iteration"] = draw.choice((64, 256, 512))
    settings |= {"grpo.prompts_per_iteration": draw.choice((16, 64)), "grpo.num_minibatches": 2}
    settings |= {"dpo.batch_size": 64, "dpo.reference": draw.choice(("cached", "each_step"))}
    config = changed(large, settings)
    config.phases = draw.choice(([phase], [phase], ["sft", "reward", phase]))
    gpu = GPUS[draw.choice(("a100", "h100", "h200"))]
    device = replace(gpu, memory=gpu.memory * draw.choice((0.3, 0.6, 1.0)))
    return config, draw.choice((1, 2, 4, 8, 16)), {"policy": policy, "reward": reward}, device


def fixed(config: RunConfig, world: int, models: dict[str, ModelConfig], device: Device) -> Iterator[Choice]:
    """What fits of choices made without a plan: each mesh, and no role leaves or all do."""
    for mesh in meshes(config, world, models["policy"], device):
        for placement in PLACEMENTS:
            if choice := evaluate(config, world, mesh | placement, models, device):
                yield choice


@pytest.mark.parametrize("seed", range(30))
def test_no_fixed_choice_is_faster(large, seed):
    config, world, models, device = drawn(large, seed)
    found = search(config, world, models, device, most=1)
    others = list(fixed(config, world, models, device))
    assert found or not others
    for choice in others:
        assert found[0].seconds <= choice.seconds * (1 + 1e-9), (found[0].overrides, choice.overrides)
    for choice in found:  # and it is what its command line would plan
        again = evaluate(config, world, choice.changes, models, device)
        assert again is not None and again.peak <= device.memory
        assert (again.seconds, again.peak) == pytest.approx((choice.seconds, choice.peak), rel=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_no_fixed_residency_is_faster_than_auto(large, seed):
    """On a mesh that is given, with its micro-batches and recomputation."""
    config, world, models, device = drawn(large, 100 + seed)
    for mesh in itertools.islice(meshes(config, world, models["policy"], device), 3):
        others = [evaluate(config, world, mesh | placement, models, device) for placement in PLACEMENTS]
        there = changed(config, mesh | {"schedule.residency": "auto"})
        try:
            resolved = resolve_mesh(there.mesh, world)
        except ConfigError:
            continue
        found = residency(there, resolved, models, device)
        chosen = evaluate(there, world, found, models, device)
        assert chosen is not None or others == [None, None]
        for other in filter(None, others):
            assert chosen is not None and chosen.seconds <= other.seconds * (1 + 1e-9), (mesh, found)


@pytest.mark.parametrize("phases", [["ppo"], ["sft", "ppo"]], ids=str)
def test_it_finds_what_trying_everything_finds(large, monkeypatch, phases):
    """Of a role more or less, of shares of the cache, of micro-batches of each phase and of recomputation."""
    monkeypatch.setattr("rlhf_engine.plan.search._ROWS", (1, 4, 16))
    monkeypatch.setattr("rlhf_engine.plan.search._CACHE_SHARES", (0.5, 0.9))
    config = changed(large, {"ppo.prompts_per_iteration": 64, "rollout.slots": 64})
    config.phases = phases
    models = {name: replace(config.model, num_layers=12) for name in ("policy", "reward")}
    device = replace(GPUS["h100"], memory=40e9)
    mesh: Changes = {"mesh.tp": 1, "mesh.pp": 2, "mesh.dp": 1}
    roles = ("policy", "critic", "reference", "reward")
    everything = []
    for count, recompute, share in itertools.product(range(5), ("none", "full"), (0.5, 0.9)):
        for leaving in itertools.combinations(roles, count):
            where: Changes = {"schedule.residency": "offload" if leaving else "keep", "schedule.offload": list(leaving)}
            changes = mesh | where | {"schedule.recompute": recompute, "rollout.cache_share": share}
            other, parts = changed(config, changes), []
            for phase in phases:
                sizes = [changed(other, {f"{phase}.micro_batch_size": rows}) for rows in (1, 4, 16)]
                plans = [Forecaster(phase, each, other.mesh, models, device) for each in sizes]
                parts.append(min((plan.run().seconds for plan in plans if plan.fits), default=math.inf))
            everything.append(sum(parts))
    found = search(changed(config, mesh), 2, models, device)
    best = next(choice for choice in found if choice.changes["mesh.pp"] == 2)
    assert len(everything) == 64 and best.seconds == pytest.approx(min(everything), rel=1e-9)


def test_7b_on_eight_gpus(large):
    """Policy, critic, reference and reward, 512 samples of 1,024 + 1,024 tokens: fixed choices, and the search's."""
    models, device = {"policy": large.model, "reward": large.model}, GPUS["h100"]
    micro_batches: list[Changes] = [{"ppo.micro_batch_size": rows} for rows in (1, 2, 4, 8)]
    best = [
        min(
            choice.seconds
            for mesh, rows in itertools.product(meshes(large, 8, large.model, device), micro_batches)
            if (choice := evaluate(large, 8, mesh | placement | rows, models, device))
        )
        for placement in PLACEMENTS
    ]
    assert best == pytest.approx([78.16, 71.08], abs=0.005)
    found = search(large, 8, models, device)
    assert found[0].seconds == pytest.approx(66.44, abs=0.005)
    chosen = found[0].changes
    assert (chosen["mesh.tp"], chosen["mesh.pp"], chosen["mesh.dp"], chosen["ppo.micro_batch_size"]) == (2, 1, 4, 8)
    assert chosen["schedule.offload"] == ["policy", "critic", "reference", "reward"]
    assert chosen["rollout.cache_share"] == 0.9 and chosen["schedule.recompute"] == "none"
    # a mesh that is given gets the same where its roles go and how large the cache is
    mesh: Changes = {"mesh.tp": 2, "mesh.dp": 4, "mesh.sequence_parallel": True, "ppo.micro_batch_size": 8}
    there = changed(large, mesh | {"schedule.residency": "auto"})
    auto = residency(there, there.mesh, models, device)
    assert auto == {key: chosen[key] for key in ("schedule.residency", "schedule.offload", "rollout.cache_share")}


def test_what_a_role_moves():
    """PPO's, both ways: a rollout, four forwards, the updates of the critic and of the policy."""
    away, weights, training = Presence.AWAY, Presence.WEIGHTS, Presence.TRAINING
    policy = [weights, weights, away, away, away, away, training]
    critic = [away, away, away, away, weights, training, away]
    reward = [away, away, away, weights, away, away, away]
    sizes = {Presence.WEIGHTS: 10.0, Presence.STATE: 100.0}
    # off behind its forward, for the update has changed it; all back for the next, from which the weights stay
    assert moved(policy, sizes, False) == [0, 10, 0, 0, 0, 0, 10 + 100 + 100]
    # there for its forward and still there for its update, all off behind it
    assert moved(critic, sizes, False) == [0, 0, 0, 0, 10, 100 + 10 + 100, 0]
    assert moved(reward, sizes, False) == [0, 0, 0, 10, 0, 0, 0]
    assert moved(critic, sizes, True) == [0, 0, 0, 10, 100, 110, 0]
    assert moved([training], sizes, False) == [0]
