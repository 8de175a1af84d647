"""A disk that is full at any kind of write: a small one of memory, which only root can have."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from conftest import ROOT, SMALL
from rewards import fill
from tensorboard.summary.writer import event_file_writer

from rlhf_engine.algorithms import records
from rlhf_engine.algorithms.algorithm import Evaluation
from rlhf_engine.config import LogConfig
from rlhf_engine.hf.files import whole_folder, write_files
from rlhf_engine.launching import phase
from rlhf_engine.launching.compose import compose
from rlhf_engine.models.residency import Parcel
from rlhf_engine.observing.logbook import Logbook
from rlhf_engine.observing.sinks import Sinks
from rlhf_engine.observing.trace import Span, append_events
from rlhf_engine.signals import RunError, say_errors_once
from rlhf_engine.surviving import durable


@pytest.fixture(params=["size=16m"])
def disk(tmp_path, request) -> Iterator[Path]:
    """A folder that is a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def without(path: Path) -> str:
    return f"{path} cannot be written (No space left on device): the run goes on without it\n"


FIGURES = {f"policy/{i}": 1.0 for i in range(400)}  # more than what is left of a page


# -- what a run can do without ---------------------------------------------------------------------------------


def test_metrics_wait_for_room(disk, capsys):
    logbook = Logbook(compose([f"output_dir={disk}", "log.tensorboard=false"]), "sft", 9, 0, True, False)
    logbook.last_line = float("inf")  # no progress lines
    for iteration, change in enumerate([None, fill, None, empty, None]):
        if change is not None:
            change(disk)
        logbook.write({"iteration": iteration, **FIGURES})
        if change is fill:
            assert logbook.path.read_text().count("\n") == 1
    assert [json.loads(line)["iteration"] for line in logbook.path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == without(logbook.path)


def test_a_trace_has_whole_iterations(disk, capsys):
    path, spans = disk / "trace.json", [([Span("log_probs", "stage", 0.0, 1.0)] * 50, [0.0])] * 2
    for iteration, change in enumerate([None, fill, None, empty]):
        if change is not None:
            change(disk)
        append_events(path, spans, iteration)
    events = json.loads(path.read_text().rstrip(",\n") + "]")
    assert [event["args"]["iteration"] for event in events] == [0] * 100 + [3] * 100
    assert capsys.readouterr().out == without(path)


def test_rollouts_are_left_out(disk, capsys):
    ctx = SimpleNamespace(mesh=SimpleNamespace(is_main=True), config=compose([f"output_dir={disk}"]), phase="ppo")
    ctx.tokenizer = SimpleNamespace(decode=lambda ids: "word " * len(ids))
    row = torch.zeros(1, 4)
    x = SimpleNamespace(prompts=[[1, 2]], tokens=row.long(), lengths=torch.tensor([4]), scores=row[0], golds=None)
    x.log_probs = x.ref_log_probs = row
    for iteration, change in enumerate([None, fill, None, empty]):
        if change is not None:
            change(disk)
        ctx.state = SimpleNamespace(iteration=iteration)
        records.write(ctx, None, x)
        records.write_arrays(ctx, None, SimpleNamespace(tokens=x.tokens, row_fields=[]))
    names = sorted(path.name for path in (disk / "ppo" / "rollouts").iterdir())
    assert names == ["0.jsonl", "0.npz", "3.jsonl", "3.npz"]
    assert capsys.readouterr().out == without(disk / "ppo" / "rollouts")


@pytest.mark.parametrize("disk", ["size=1m,nr_inodes=5"], indirect=True)
def test_no_room_for_folders(disk, capsys):
    """Nor for names of files."""
    durable.make_folder(disk / "ppo")
    for n in range(3):
        (disk / f"{n}").touch()
    ctx = SimpleNamespace(config=compose([f"output_dir={disk}"]), phase="ppo", state=SimpleNamespace(iteration=0))
    records._keep(ctx, "jsonl", b"row")
    assert capsys.readouterr().out == without(disk / "ppo" / "rollouts")
    with pytest.raises(RunError, match=r"sft cannot be written .No space left on device."):
        Logbook(compose([f"output_dir={disk}"]), "sft", 9, 0, True, False)


def test_tensorboard_is_left(disk, capfd):
    """Told of once, and not by a traceback of its thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr("threading.excepthook", print)
        patch.setattr(event_file_writer, "time", SimpleNamespace(time=itertools.count(0, 1000).__next__))
        say_errors_once()  # the thread writes whatever it gets at once
        found = Sinks(LogConfig(), disk, {}, 0, False)
        fill(disk)
        for iteration in range(3):
            found.write(iteration, FIGURES)
        found.close()
        found.close()
    said = capfd.readouterr()
    assert "No space left on device: the run goes on without it\n" in said.out
    assert said.out.startswith("tensorboard: ") and said.out.count("\n") == 1 and said.err == ""


def finish(disk: Path, algorithm: str = "sft") -> None:
    """The end of a phase."""
    mesh = SimpleNamespace(is_main=True, tp=1, pp=1, dp=1)
    datasets = {"sft": SimpleNamespace(parts=[])}
    ctx = SimpleNamespace(mesh=mesh, config=compose([f"output_dir={disk}"]), datasets=datasets)
    ctx.state = SimpleNamespace(iteration=3)
    logbook = SimpleNamespace(finish=lambda figures, samples: None)
    (disk / "sft").mkdir(exist_ok=True)
    checkpoints = SimpleNamespace(best=None)
    opened = phase.Phase(ctx, SimpleNamespace(name="sft"), {}, None, checkpoints, logbook, disk / "sft")
    phase.finish(opened, Evaluation({"eval/loss": 1.0}))


def test_a_drawing_never_keeps_a_phase_unfinished(disk, capsys):
    (disk / "sft").mkdir()
    (disk / "sft" / "trace.json").write_text('[\n{"name": "a"},\n')  # of another program
    finish(disk)
    assert "sft/report.html cannot be written ('args'" in capsys.readouterr().out
    assert json.loads((disk / "sft" / "summary.json").read_text()) == {"iterations": 3, "eval/loss": 1.0}


# -- what it cannot do without: one line, and exit code 69 -----------------------------------------------------


def test_no_room_for_report_and_summary(disk, capsys):
    (disk / "sft").mkdir()
    fill(disk)
    with pytest.raises(RunError) as caught:
        finish(disk)
    assert caught.value.code == 69
    line = f"{disk}/sft/summary.json cannot be written (No space left on device): make room, or mend it, and start the"
    assert str(caught.value) == line + " same again"
    assert capsys.readouterr().out == without(disk / "sft" / "report.html")
    assert [path.name for path in (disk / "sft").iterdir()] == []
    empty(disk)
    finish(disk)
    assert sorted(path.name for path in (disk / "sft").iterdir()) == ["report.html", "summary.json"]


def export(disk: Path) -> None:
    with durable.needed(disk / "hf"), whole_folder(disk / "hf") as folder:
        write_files(
            folder, {"model.safetensors": {"weight": (weight := torch.ones(1 << 20))}}, iter([("weight", weight)])
        )


def offload(disk: Path) -> None:
    Parcel(lambda: [torch.ones(1 << 20)], torch.device("cpu"), disk / "offloaded" / "rank_0" / "policy_weights").leave()


@pytest.mark.parametrize("write", [export, offload])
def test_no_room_for_weights(disk, write: Callable):
    fill(disk)
    with open(disk / "filler", "r+b") as file:
        file.truncate(15 << 20)
    with pytest.raises(RunError, match=r"^\S* cannot be written .*No space left on device"):
        write(disk)
    assert not (disk / "hf").exists() and not (disk / "hf.incomplete").exists()


@pytest.mark.parametrize("disk", ["size=64m"], indirect=True)
def test_a_run(disk):
    """Which finds its disk full in its first iteration, then behind its last save, and then finds room."""
    settings = [*SMALL, "phases=[ppo]", "reward.fns=[rewards:fills]", "mesh.dp=1", "trace=true"]
    settings += ["ppo.write_rollouts=true", "ppo.save_every=1", f"output_dir={disk}/run"]
    env = os.environ | {"FULL": str(disk), "PYTHONPATH": str(ROOT / "tests")}

    def start(full_at: int, *more: str) -> tuple[int, str, str]:
        (disk / "filler").unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "launch" / "run.py"), *settings, *more]
        found = warm.run(command, env=env | {"FULL_AT": str(full_at)}, check=False)
        assert "Traceback" not in found.stderr, found.stderr
        return found.returncode, found.stdout, found.stderr

    folder = disk / "run" / "ppo"
    code, said, error = start(1)
    assert code == 69 and error.startswith("error: ppo: what follows needs the last checkpoint: make room")
    assert said.count(" not saved: ") == 2
    for name in ("rollouts", "trace.json"):
        assert said.count(without(folder / name)) == 1
    code, said, error = start(3)
    assert code == 69 and error.startswith(f"error: {folder}/hf cannot be written (")
    assert "cannot be written" not in said
    code, said, error = start(1, "export_hf=false")
    assert code == 69 and error.startswith(f"error: {folder}/summary.json cannot be written (No space left on device)")
    assert said.count("resuming at iteration 2 of 2") == 1 and said.count(without(folder / "report.html")) == 1
    code, said, error = start(-1)
    assert code == 0 and (folder / "summary.json").is_file() and (folder / "hf" / "model.safetensors").is_file()
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_prepared_rows_wait_for_room(disk, tmp_path):
    """What is whole stays, and the next start goes on."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} is said"}) + "\n" for i in range(5000)))
    settings = [f"data.sources=[{file}]", f"data.cache_dir={disk}", f"output_dir={tmp_path}", "phases=[sft]"]
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), *SMALL, *settings]
    fill(disk)
    full = warm.run([*command, "data.num_eval_rows=1"])
    assert full.returncode in (2, RunError.code) and full.stderr.count("\n") == 1 and "No space left" in full.stderr
    empty(disk)
    assert "5000 rows in" in warm.run(command, check=True).stdout
