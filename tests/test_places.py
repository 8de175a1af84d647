"""A place where a run writes: tried before the work, and held by one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from worlds import launcher

from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.launching.preflight import lock
from rlhf_engine.observing.provenance import say_finished, write_config
from rlhf_engine.surviving import places
from rlhf_engine.surviving.places import Holder, Lock, try_folder

renew = Lock._renew
ELSEWHERE = {"machine": "another boot", "host": "node-7", "pid": 12, "started": "99"}


@pytest.fixture
def locks(tmp_path, monkeypatch):
    """`locks()`: a run's lock of one place, whose heart does not beat."""
    monkeypatch.setattr(Lock, "_renew", lambda self: None)
    return lambda: Lock(tmp_path / "run.lock", "output_dir=runs/a")


def held(lock: Lock, **other) -> Holder:
    """Has another process hold the place."""
    holder = replace(Holder.this(), token="other", **other)
    lock.path.write_text(json.dumps(asdict(holder)))
    return holder


def age(lock: Lock, seconds: float) -> None:
    found = lock.path.stat().st_mtime
    os.utime(lock.path, (found - seconds, found - seconds))


def test_one_run_at_a_time(locks):
    """The other one is named; one that has ended leaves nothing."""
    first = locks().acquire()
    for attempt in (locks().look, locks().acquire):
        with pytest.raises(ConfigError, match=rf"output_dir=runs/a .*\(process {os.getpid()} on .*, since 20\d\d-"):
            attempt()
    first.release()
    assert not list(first.path.parent.iterdir())
    second = locks().acquire()
    first.release()  # again, which is not its own any more
    assert second._is_mine()


def test_a_run_that_died_here_holds_nothing(locks):
    """Its process is gone, or its number belongs to another one, or nobody has yet taken note of its end."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    for pid, started in ((ended.pid, places._started(ended.pid) or "1"), (2**22 + 1, "5"), (os.getpid(), "5")):
        held(locks(), pid=pid, started=started)
        locks().look()
        locks().acquire().release()
    ended.wait()


def test_a_run_that_died_elsewhere_is_known_by_its_silence(locks, monkeypatch):
    monkeypatch.setattr(places.time, "sleep", lambda seconds: pytest.fail("nothing is to be waited for"))
    held(locks(), **ELSEWHERE)
    age(locks(), 61)
    locks().acquire().release()
    locks().path.write_text("")  # it died before it could say who it was
    age(locks(), 61)
    locks().acquire().release()


@pytest.mark.parametrize("lives", [True, False])
def test_a_run_elsewhere_is_waited_for(locks, monkeypatch, capsys, lives):
    """Until it gives a sign, or has been silent for too long."""
    held(locks(), **ELSEWHERE)
    age(locks(), 20)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        age(locks(), seconds)
        if lives and len(slept) == 2:
            os.utime(locks().path)

    monkeypatch.setattr(places.time, "sleep", sleep)
    if lives:
        with pytest.raises(ConfigError, match="process 12 on node-7"):
            locks().acquire()
    else:
        locks().acquire().release()
    assert "output_dir=runs/a is held by process 12 on node-7" in capsys.readouterr().out and len(slept) >= 2


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"RLHF_ENGINE_LAUNCH": "a"}, {"RLHF_ENGINE_LAUNCH": "a", "RLHF_ENGINE_ATTEMPT": "1"}),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
        (
            {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "2"},
        ),
    ],
    ids=["our launchers", "requeued", "torchrun"],
)
def test_a_run_that_its_launcher_started_again_goes_on_at_once(locks, monkeypatch, before, now):
    monkeypatch.setattr(places.time, "sleep", lambda seconds: pytest.fail("nothing is to be waited for"))

    def attempts(variables: dict[str, str]) -> dict[str, int]:
        for name in ("RLHF_ENGINE_LAUNCH", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return places._attempts()

    held(locks(), **ELSEWHERE, attempts=attempts(before))
    attempts(now)
    locks().acquire().release()
    # two steps of one job are two runs
    held(locks(), **ELSEWHERE, attempts=attempts(now))
    assert not locks()._read().is_gone(Holder.this())


def test_of_two_that_take_over_one_does(locks, monkeypatch):
    """One looks, and the other has taken over before it acts: what is there then is not a dead run's."""
    dead = held(locks(), **ELSEWHERE)
    late, quick = locks(), locks()
    quick._remove(dead)
    assert quick._create()
    late._remove(dead)
    assert quick._is_mine() and not late._create()
    assert [path.name for path in quick.path.parent.iterdir()] == ["run.lock"]


def test_a_run_that_was_taken_for_dead_ends(locks, monkeypatch, capfd):
    monkeypatch.setattr(places, "_SECONDS_BETWEEN_BEATS", 0)
    monkeypatch.setattr(places.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    stopped = locks().acquire()
    held(stopped, **ELSEWHERE)
    with pytest.raises(SystemExit, match="69"):
        renew(stopped)
    assert capfd.readouterr().err.startswith("error: output_dir=runs/a was taken over by another run (process 12 on")


def test_jobs_and_phases_have_a_place_each():
    assert str(lock(RunConfig(output_dir="a")).path) == "a/run.lock"
    assert str(lock(RunConfig(phases=["score"], output="b/o.jsonl")).path) == "b/o.jsonl.lock"


def test_a_second_run_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "start_ranks", lambda *args: pytest.fail("a rank was started"))
    held(lock(RunConfig(output_dir=str(tmp_path))))
    assert launcher.main(["+exp=hh_rlhf", "device=cpu", "data.num_rows=400", f"output_dir={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"output_dir={tmp_path} is in use by another run" in err


# -- whether it can be written to --------------------------------------------------------------------------------


def test_trying_a_folder_leaves_nothing(tmp_path):
    try_folder(tmp_path / "a" / "b", "output_dir=a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "bad\0name", "x" * 300, "dangling/below"])
def test_a_folder_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^output_dir=there: nothing can be written in ") as error:
        try_folder(tmp_path / "new" / ".." / place, "output_dir=there")
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "dangling"} and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_disk_that_is_full(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.Path, call, full)
    with pytest.raises(ConfigError, match=r"^output_dir=there: nothing can be written in .*: No space left on device$"):
        try_folder(tmp_path / "a" if call == "mkdir" else tmp_path, "output_dir=there")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


# -- what a place was made with ----------------------------------------------------------------------------------


def test_what_changed_on_a_resume_is_said_and_kept(tmp_path, capsys):
    folder = tmp_path / "sft"
    folder.mkdir()
    config = RunConfig()
    for seed, said in ((1, []), (1, []), (2, ["sft: seed=2 from here on, 1 before"])):
        config.seed = seed
        write_config(folder, config, True)
        assert capsys.readouterr().out.splitlines() == said
    config.sft.optimizer.lr, config.data.sources = 1e-4, ["b.jsonl"]
    write_config(folder, config, True)
    assert capsys.readouterr().out.splitlines() == [
        'sft: data.sources=["b.jsonl"] from here on, [] before',
        "sft: sft.optimizer.lr=0.0001 from here on, 0.001 before",
    ]
    config.seed = 3
    write_config(folder, config, False)  # from the beginning: nothing is gone on with
    assert not capsys.readouterr().out
    seeds = {p.name: [line for line in p.read_text().splitlines() if line.startswith("seed")] for p in folder.iterdir()}
    assert seeds == {
        "config.1.yaml": ["seed: 1"], "config.2.yaml": ["seed: 2"], "config.3.yaml": ["seed: 2"],
        "config.yaml": ["seed: 3"],
    }  # fmt: skip
    config.sft.optimizer.lr, config.reward.optimizer.lr, config.mesh.dp = 1.0, 1.0, 4
    say_finished(folder, config)
    assert capsys.readouterr().out.splitlines() == [
        f"sft: finished before, in {folder} (rerun=true runs it again)",
        "sft: was made with sft.optimizer.lr=0.0001, not 1.0",
    ]
