"""What is built on a finished phase, and when it is run again. In one process."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

from rlhf_engine import trainer
from rlhf_engine.algorithms import ALGORITHMS
from rlhf_engine.algorithms.algorithm import RoleSpec
from rlhf_engine.config import CheckpointConfig, ConfigError
from rlhf_engine.context import TrainState
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.launching.build import build_context, build_role, iterations_of_finished, phase_checkpoints
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.phase import begin_again
from rlhf_engine.launching.preflight import plan
from rlhf_engine.models.checkpoint import Checkpoints
from rlhf_engine.signals import STOPPED, RunError
from rlhf_engine.trainer import train


@pytest.fixture
def context(tmp_path):
    """`context(*overrides)`: of a run in the test's folder, where SFT has finished three iterations."""
    (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sft" / "summary.json").write_text('{"iterations": 3}')
    with one_rank() as mesh:

        def get(*overrides: str):
            settings = [*SMALL, "device=cpu", "phases=[sft]", f"output_dir={tmp_path}", *overrides]
            return build_context(plan(compose(settings), 1), mesh)

        yield get


def test_checkpoints_that_are_gone(context, tmp_path):
    """What is built on them does not begin with the base's weights, and SFT not once more without a word."""
    ctx = context("sft.iterations=4")
    line = f"no checkpoint in {tmp_path}/sft/checkpoints: put it back"
    with pytest.raises(ConfigError, match=line):
        build_role(ctx, "policy", RoleSpec("lm", (("sft", "policy"),)))
    with pytest.raises(ConfigError, match=line):
        train(ctx, ALGORITHMS["sft"](ctx.config))
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


def test_a_reward_model_is_centred_once(context, tmp_path):
    """As it goes on that was killed behind its last save and before its summary."""
    ctx = context("phases=[reward]", "reward.iterations=1")
    algorithm = ALGORITHMS["reward"](ctx.config)
    ctx.roles = {
        name: build_role(ctx, name, RoleSpec(spec.head, (), spec.optimizer)) for name, spec in algorithm.roles().items()
    }
    head = ctx.roles["reward"].chunks[-1].output_layer
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).view_as(head.weight))
        head.bias.fill_(3.0)
    figures = dict(algorithm.evaluate(ctx, final=True).figures)
    bias = float(head.bias)
    assert abs(figures["eval/offset"]) > 0.1 and bias == pytest.approx(3 - figures["eval/offset"])
    ctx.state = TrainState.from_dict(ctx.state.to_dict())
    assert algorithm.evaluate(ctx, final=True).figures == figures and float(head.bias) == bias
    algorithm.batch(ctx)  # of a phase that goes on: what it ends with is centred again
    again = algorithm.evaluate(ctx, final=True).figures
    assert again["eval/offset"] == pytest.approx(0, abs=1e-5) and float(head.bias) == pytest.approx(bias, abs=1e-5)


class Stopped(BaseException):
    pass


def test_a_rerun_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Three finished phases: stopped in the second, killed behind the third's beginning, and then done; each once."""
    for phase in ("sft", "reward", "ppo"):
        (tmp_path / phase / "checkpoints" / "iteration_3").mkdir(parents=True)
        (tmp_path / phase / "summary.json").write_text('{"iterations": 3}')
    begun, stops = [], iter([None, False, None, Stopped(), None])

    def train(ctx, algorithm):
        """The beginning of a phase as it is, and then its end, a stop or a kill."""
        begin_again(ctx, phase_checkpoints(ctx, algorithm.name))
        if iterations_of_finished(ctx, algorithm.name) >= 3:
            return True
        begun.append(algorithm.name)
        assert not list((tmp_path / algorithm.name / "checkpoints").glob("iteration_3"))
        stop = next(stops)
        if isinstance(stop, BaseException):
            raise stop
        if stop is None:
            (tmp_path / algorithm.name / "summary.json").write_text('{"iterations": 3}')
        return stop is None

    monkeypatch.setattr(trainer, "train", train)
    settings = [*SMALL, "device=cpu", "phases=[sft,reward,ppo]", "rerun=true", f"output_dir={tmp_path}"]
    checked = plan(compose(settings), 1)
    with one_rank() as mesh:
        ctx = SimpleNamespace(config=checked.config, mesh=mesh)
        monkeypatch.setattr(trainer, "build_context", lambda *args: ctx)
        monkeypatch.setattr(trainer, "ParallelMesh", lambda *args: mesh)
        monkeypatch.setattr(trainer, "show_run", lambda *args: None)
        monkeypatch.setattr(trainer, "Watchdog", lambda *args: SimpleNamespace(stage=nullcontext, close=lambda: None))
        checked.config.schedule.residency = "keep"
        assert trainer.run_phases(checked) == STOPPED
        with pytest.raises(Stopped):
            trainer.run_phases(checked)
        assert trainer.run_phases(checked) == 0
        assert begun == ["sft", "reward", "reward", "ppo", "ppo"]
        assert not list(tmp_path.glob("*/rerun"))


def test_linked_checkpoints_are_run_again(tmp_path):
    """The folder is elsewhere, and one of them elsewhere again."""
    folder, disk = tmp_path / "sft" / "checkpoints", tmp_path / "disk"
    (disk / "iteration_2").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (disk / "iteration_3").symlink_to(tmp_path / "other")
    (disk / "iteration_best").mkdir()
    (disk / "latest").write_text("iteration_3")
    folder.parent.mkdir()
    folder.symlink_to(disk)
    with one_rank() as mesh:
        checkpoints = Checkpoints(folder, mesh, CheckpointConfig())
        checkpoints.clear()
        assert checkpoints.newest() is None and [path.name for path in disk.iterdir()] == ["iteration_best"]


def test_what_cannot_be_removed_ends_a_rerun(context, tmp_path):
    (tmp_path / "sft" / "checkpoints" / "iteration_3").write_text("no folder")
    ctx = context("rerun=true")
    with pytest.raises(RunError, match=r"rerun=true: .*iteration_3 cannot be removed"):
        train(ctx, ALGORITHMS["sft"](ctx.config))
    assert (tmp_path / "sft" / "summary.json").is_file()
