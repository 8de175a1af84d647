"""The harness that the benchmarks share."""

from __future__ import annotations

import csv
import os
import signal
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import warm
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def harness():
    """The module, its ranks started warm."""
    warm.start_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # where a rank imports it from as well
        import harness

        patch.setattr(harness, "CONTEXT", warm.CONTEXT)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield harness


def join() -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # a harness that waits fails the tests


def before(pipe) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("planted")
    join()  # waits for the other


def within(pipe) -> None:
    join()
    # rank 1 has a type that gloo does not add up; the other waits for it
    dist.all_reduce(torch.zeros(1, dtype=torch.uint16 if os.environ["RANK"] == "1" else torch.float32))


def killed(pipe) -> None:
    join()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (before, "ValueError: planted"),
        (within, "Invalid scalar type"),
        (killed, "exit code -9"),
    ],
)
def test_a_rank_that_fails_ends_the_benchmark_with_its_error(harness, function, says):
    with pytest.raises(SystemExit) as ended, harness.World(function, size=2) as world:
        world.results()
    assert str(ended.value).startswith("rank 1 of 2: ") and says in str(ended.value)  # on stderr, and exit code 1
    assert not any(process.is_alive() for process in world.processes)


def deaf(pipe) -> None:
    signal.pause()


def test_a_world_that_fails_ends_the_wait_for_another(harness):
    with pytest.raises(SystemExit, match="planted"), harness.World(deaf) as other, harness.World(before, size=2):
        other.ask()


def double(pipe, times: int) -> int:
    if os.environ["RANK"] == "0":
        for _ in range(times):
            pipe.send(2 * pipe.recv())
    return int(os.environ["RANK"]) + 10


def test_a_rank_is_asked_and_all_give_results(harness):
    """The second rank is done long before."""
    with harness.World(double, 2, size=2) as world:
        assert [world.ask(3), world.ask("ab")] == [6, "abab"]
        assert world.results() == [10, 11]


def test_sides_take_turns_and_the_first_does_not_count(harness):
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or (len(calls), 0.5) for name in "ab"}
    found = harness.take_turns(sides, rounds=3)
    assert calls == list("abababab")
    assert found == {"a": [(3, 0.5), (5, 0.5), (7, 0.5)], "b": [(4, 0.5), (6, 0.5), (8, 0.5)]}
    assert harness.medians(found["b"]) == [6, 0.5]


def test_a_new_column_stands_behind_the_others(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.append("some", [{"seconds": 1.23456}])
    harness.append("some", [{"seconds": 2.0, "ranks": 2}], ["torch", "no-such-package"])
    with (tmp_path / "some.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    columns = ["seconds", "date", "load", "machine", "torch", "ranks", "no-such-package"]
    assert list(first) == list(second) == columns
    assert [first["seconds"], first["ranks"], second["ranks"]] == ["1.235", "", "2"]
    assert second["torch"] == torch.__version__ and second["no-such-package"] == ""


def test_settings_beside_trl_exist(harness):
    import fidelity

    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import RunConfig

    for case in fidelity.CASES.values():
        config = RunConfig(phases=[case.phase])
        setattr(config, case.phase, replace(getattr(config, case.phase), **case.ours))
        trains = [stage for stage in ALGORITHMS[case.phase](config).stages if stage.kind == "train"]
        assert len(trains) == 1  # a step of each epoch


def test_pipelines_of_sleep_run(harness):
    """Which stand in for roles, and must have what the schedules ask of one."""
    import schedule

    found = harness.run(schedule.measure, 2, 1, 2, 0.005, size=2)[0]
    assert sorted(found) == [(kind, how) for kind in ("infer", "train") for how in ("apart", "stream")]
    assert all(0 < idle < 1 and seconds > 0 for idle, seconds in found.values())


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_all_processes_are_started_by_the_harness(path):
    ways = {"import multiprocessing", "torch.multiprocessing", "import subprocess"}
    assert path.stem == "harness" or not {way for way in ways if way in path.read_text()}
