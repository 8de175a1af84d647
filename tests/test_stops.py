"""A phase that is stopped between any two of its stages and updates goes on as if it had not been, on any mesh."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import cases
import pytest
from conftest import SMALL
from test_runs import assert_close, figures

from rlhf_engine.context import RunningMoments, TrainState
from rlhf_engine.experience import Experience
from rlhf_engine.surviving.guard import Skipped

OPTIONS = {
    "ppo": ["ppo.kl_controller=adaptive", "ppo.score_scale=true"],
    "grpo": ["grpo.score_center=true", "grpo.redraws=1", "reward.fns=[rewards:some_alike]"],
}


def train(
    folder: Path, layout: tuple, stop_at: int | None = None, iterations: int = 2, options: Sequence[str] = (),
    phase: str = "ppo",
) -> bool:  # fmt: skip
    """In a rank: a phase from where it is, stopped at the so-manieth point where it can be. Whether it ended."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.signals import Stop
    from rlhf_engine.trainer import train

    settings = [*SMALL, f"phases=[{phase}]", "export_hf=false", *OPTIONS.get(phase, [])]
    settings += [f"{phase}.iterations={iterations}", f"output_dir={folder}", *options]
    ctx, passed = cases.context(settings, layout), 0

    def stop_if_asked() -> None:
        nonlocal passed
        passed += 1
        if passed == stop_at:
            raise Stop

    ctx.stop_if_asked = stop_if_asked  # type: ignore[method-assign]
    return train(ctx, ALGORITHMS[phase](ctx.config))


@pytest.fixture(scope="module")
def whole(small_run, worlds, tmp_path_factory) -> Path:
    """Both phases, never stopped, on two replicas."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(small_run, folder)
    for phase in OPTIONS:
        assert worlds(2).run(train, folder, (1, 1, 2), None, 2, (), phase) == [True, True]
    return folder


@pytest.mark.parametrize(
    ("phase", "points", "stop_at", "iterations"), [("ppo", 17, 1, 1), ("ppo", 17, 7, 2), ("grpo", 12, 1, 1)]
)
def test_stopped_again_and_again(small_run, worlds, whole, tmp_path, phase, points, stop_at, iterations):
    """At each point where it can be, of PPO's nine stages and eight updates, or ten and two; and at every seventh of
    two iterations."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    stops = 0
    while not worlds(2).run(train, folder, (1, 1, 2), stop_at, iterations, (), phase)[0]:
        stops += 1
    assert stops == points * iterations // stop_at
    assert figures(folder / phase) == figures(whole / phase)[:iterations]


@pytest.mark.parametrize(
    ("phase", "options", "points"),
    # a pass of the reference, then a stage and an update; a stage more, or two; without a reference none
    [("dpo", [], 3), ("dpo", ["dpo.reference=each_step"], 3), ("dpo", ["dpo.loss=simpo"], 2), ("kto", [], 4)],
    ids=str,
)
def test_offline_phases_stopped_again_and_again(small_run, worlds, tmp_path, phase, options, points):
    """At each point where they can be, the pass over all rows before the first iteration among them."""
    straight, folder, stops = tmp_path / "straight", tmp_path / "run", 0
    for each in (straight, folder):
        shutil.copytree(small_run, each)
    assert worlds(2).run(train, straight, (1, 1, 2), None, 1, options, phase) == [True, True]
    while not worlds(2).run(train, folder, (1, 1, 2), 1, 1, options, phase)[0]:
        stops += 1
    assert stops == points and figures(folder / phase) == figures(straight / phase)


def test_stopped_and_gone_on_with_on_other_meshes(small_run, worlds, whole, tmp_path):
    """Each time in the middle of the updates, which two of a pipeline's roles make together. The last mesh needs rows
    of an even length."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    for layout, stop_at in (((2, 2, 1), 5), ((1, 1, 2), 16), ((1, 2, 1), 2), ((2, 1, 1, True), None)):
        size = layout[0] * layout[1] * layout[2]
        assert worlds(size).run(train, folder, layout, stop_at) == [stop_at is None] * size
    assert_close(figures(folder / "ppo"), figures(whole / "ppo"), 1e-4)


def test_a_phase_that_gets_more_iterations_is_not_finished(worlds, whole, tmp_path):
    """Until they are made: what follows would be built on its middle."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    summary = folder / "ppo" / "summary.json"
    assert worlds(2).run(train, folder, (1, 1, 2), None, 2) == [True, True] and summary.is_file()
    assert worlds(2).run(train, folder, (1, 1, 2), 16, 3) == [False, False] and not summary.exists()
    assert (folder / "ppo" / "checkpoints" / "latest").read_text() == "iteration_2.1"
    assert worlds(2).run(train, folder, (1, 1, 2), None, 3) == [True, True]
    assert json.loads(summary.read_text())["iterations"] == 3


def test_an_iteration_that_is_cut_otherwise_is_refused(small_run, worlds, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    worlds(2).run(train, folder, (1, 1, 2), 16)
    with pytest.raises(AssertionError, match=r"ConfigError: ppo\.epochs=3, and ppo was stopped within iteration 1"):
        worlds(2).run(train, folder, (1, 1, 2), None, 2, ["ppo.epochs=3"])


def test_a_state_comes_back_whole():
    state = TrainState(3, 7, 0.1, None, RunningMoments(1.0, 2.0, 3.0), Skipped({"policy": 3}, {"policy": 1}))
    state.carried, state.tail = Experience(prompts=[[5]]), 12
    state.experience = Experience(prompts=[[1], [2, 3]], stages=["rollout"], steps={"train_critic": 2})
    assert TrainState.from_dict(state.to_dict()) == state
