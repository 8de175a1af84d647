"""Score and generate: rows are written as they are done, and a job that was ended goes on behind them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import worlds as rank_worlds
from worlds import launcher

from rlhf_engine import signals
from rlhf_engine.config import ConfigError
from rlhf_engine.launching.compose import compose
from rlhf_engine.surviving.parts import Parts, folder_digest

NUM_ROWS = 150
SETTINGS = {"seed": 1, "rollout.top_p": 1.0, "data.sources": "d1", "policy.path": "d2"}


# -- the files ---------------------------------------------------------------------------------------------------


def text(i: int) -> dict:
    return {"n": i, "text": "ä" * i}


def make(parts: Parts, first: int, sizes: list[int]) -> None:
    """The parts from `first` on, of rows that are made in reverse."""
    order = list(range(sum(sizes)))[::-1]
    for i in range(first, len(sizes)):
        parts.add(text(row) for row in order[sum(sizes[:i]) : sum(sizes[: i + 1])])
    parts.finish(order)


@pytest.fixture
def whole(tmp_path) -> Path:
    path = tmp_path / "whole.jsonl"
    parts = Parts(path, SETTINGS)
    assert parts.begin([2, 2, 1]) == 0
    make(parts, 0, [2, 2, 1])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [text(i) for i in range(5)]
    assert {p.name for p in tmp_path.iterdir()} == {"whole.jsonl", "whole.jsonl.settings.json"}
    return path


def test_killed_at_any_byte(tmp_path, whole):
    """Whole parts stay and the others are made again, to the same bytes; so behind a block that the disk has lost."""
    rows = [json.dumps(text(i), ensure_ascii=False).encode() + b"\n" for i in reversed(range(5))]
    written = b"".join(rows)
    ends = [0, len(rows[0] + rows[1]), len(b"".join(rows[:4])), len(written)]
    for cut in range(len(written) + 1):
        for junk in (b"", b"\0" * 9 + b"\n", b'"text"\n'):
            parts = Parts(tmp_path / "o.jsonl", SETTINGS)
            parts._settings_path.write_text(json.dumps(SETTINGS))
            parts.partial.write_bytes(written[:cut] + junk)
            parts.check()
            assert not parts.is_finished
            kept = parts.begin([2, 2, 1])
            assert kept == sum(end <= cut for end in ends) - 1
            assert parts.partial.read_bytes() == written[: ends[kept]]
            make(parts, kept, [2, 2, 1])
            assert parts.path.read_bytes() == whole.read_bytes() and parts.is_finished


def test_a_finished_output(whole):
    """Says so with the same settings, and is not made anew with others, until that is asked for."""
    same = Parts(whole, SETTINGS)
    same.check()
    assert same.is_finished
    other = SETTINGS | {"seed": 2, "rollout.top_p": 0.9, "data.sources": "d3"}
    with pytest.raises(ConfigError) as error:
        Parts(whole, other).check()
    assert str(error.value) == (
        f"output={whole}: the rows that are there were made with other rows in data.sources; rollout.top_p=1.0, not"
        " 0.9; seed=1, not 2: use another output, or rerun=true to begin again"
    )
    again = Parts(whole, SETTINGS, rerun=True)
    again.check()
    assert not again.is_finished and again.begin([2, 2, 1]) == 0
    assert whole.is_file()  # until there is another
    again.add([text(4), text(3)])
    assert Parts(whole, SETTINGS, rerun=True).begin([2, 2, 1]) == 1  # what was asked for once goes on
    assert Parts(whole, other, rerun=True).begin([2, 2, 1]) == 0


def test_a_partial_output_of_other_settings(tmp_path):
    parts = Parts(tmp_path / "o", SETTINGS)
    parts.begin([1])
    with pytest.raises(ConfigError, match=r"made with other files in policy\.path: use another output"):
        Parts(tmp_path / "o", SETTINGS | {"policy.path": "d4"}).check()
    Parts(tmp_path / "o", SETTINGS).check()


@pytest.mark.parametrize("case", ["a file of the user", "edited", "a folder", "a device"])
def test_what_this_job_has_not_made_is_not_written_over(tmp_path, whole, case):
    path = {"a folder": tmp_path, "a device": Path("/dev/null")}.get(case, tmp_path / "mine.jsonl")
    if case == "edited":
        shutil.copy(whole, path)
        shutil.copy(f"{whole}.settings.json", f"{path}.settings.json")
        path.write_text(path.read_text() + "more")
    elif not path.exists():
        path.write_text("kept")
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ConfigError, match=r"^output=.* (is not a file|write over it)$"):
        Parts(path, SETTINGS).check()
    assert not path.is_file() or path.read_bytes() == before
    (tmp_path / "empty").touch()  # as mktemp leaves it
    Parts(tmp_path / "empty", SETTINGS).check()


def test_other_weights_are_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(bytes(3 << 20))
    before = folder_digest(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # later, and elsewhere
    assert folder_digest(str(tmp_path / "b")) == before
    with (tmp_path / "b" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert folder_digest(str(tmp_path / "b")) != before


def test_what_a_signal_has_done_before_it_ends_a_rank(monkeypatch):
    done: list = []
    monkeypatch.setattr(signals, "_last_acts", [])
    monkeypatch.setattr(signals.os, "_exit", done.append)
    signals.before_leaving(lambda: done.append("lock"))
    signals.before_leaving(lambda: done.append("line"))
    signals._leave()
    assert done == ["line", "lock", signals.STOPPED]


# -- the jobs ----------------------------------------------------------------------------------------------------


def run(settings: list[str], dp: int) -> int:
    """In a rank: a job. How many rows it made."""
    from rlhf_engine.algorithms import jobs
    from rlhf_engine.launching.build import base_policy, build_context
    from rlhf_engine.launching.preflight import plan

    made = 0

    class Watched(Parts):
        def add(self, rows):
            nonlocal made
            made += len(rows)
            super().add(rows)

        def finish(self, order):
            shutil.copy(self.partial, f"{self.path}.made")
            super().finish(order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Parts", Watched)
        checked = plan(compose([*settings, f"mesh.dp={dp}"]), dp)
        ctx = build_context(checked, rank_worlds.mesh(1, 1, dp))
        jobs.run(ctx, checked.made_with, lambda: base_policy(ctx))
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path, draw = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(1)
    said = ["word " * draw.randrange(1, 30) for _ in range(NUM_ROWS)]
    path.write_text("".join(json.dumps({"text": t, "prompt": t}) + "\n" for t in said))
    return path


@pytest.mark.parametrize("job", ["score", "generate"])
def test_a_job_goes_on_to_the_same_bytes(small_run, worlds, rows, tmp_path, job):
    """Stopped at different places, on as many replicas or on others."""
    settings = [f"+exp={job}", f"policy.path={small_run}/sft/hf", f"data.sources=[{rows}]", "rollout.max_new_tokens=6"]
    whole = tmp_path / "whole.jsonl"
    assert worlds(2).run(run, [*settings, f"output={whole}"], 2) == [NUM_ROWS, 0]
    made = Path(f"{whole}.made").read_bytes()
    about = json.loads(Path(f"{whole}.settings.json").read_text())
    del about["size"]
    for i, (dp, share) in enumerate([(1, 0.0), (1, 0.6), (2, 0.7), (1, 1.0)]):
        output = tmp_path / f"{i}.jsonl"
        Path(f"{output}.settings.json").write_text(json.dumps(about))
        kept = made[: int(share * len(made))]
        Path(f"{output}.partial").write_bytes(kept)
        num_made = worlds(dp).run(run, [*settings, f"output={output}"], dp)[0]
        assert output.read_bytes() == whole.read_bytes()
        size = 64 if job == "score" else 19
        assert num_made == NUM_ROWS - (kept.count(b"\n") // size * size if share < 1 else NUM_ROWS)
        assert worlds(dp).run(run, [*settings, f"output={output}"], dp)[0] == 0  # finished before
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.tmp"))


def test_other_settings_are_refused_before_a_rank_is_started(small_run, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "start_ranks", lambda *args: 0)
    common = ["+exp=generate", f"policy.path={small_run}/sft/hf", f"data.sources=[{rows}]", f"output={tmp_path}/o"]
    assert launcher.main([*common, "device=cpu"]) == 0
    assert not list(tmp_path.iterdir())
    from rlhf_engine.launching.preflight import job_settings

    Path(f"{tmp_path}/o.partial").touch()
    Path(f"{tmp_path}/o.settings.json").write_text(json.dumps(job_settings(compose(common), "cpu")))
    assert launcher.main([*common, "device=cpu", "mesh.dp=1"]) == 0
    shutil.copytree(small_run / "sft" / "hf", tmp_path / "trained on")
    with (tmp_path / "trained on" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
    for setting, words in (
        ("seed=7", "seed=1, not 7"),
        ("rollout.temperature=0.5", "rollout.temperature=1.0, not 0.5"),
        (f"data.sources=[{rows},{rows}]", "other rows in data.sources"),
        (f"policy.path={tmp_path}/trained on", "other files in policy.path"),
    ):
        capsys.readouterr()
        assert launcher.main([*common, "device=cpu", setting]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("place", ["file/o", "folder"])
def test_an_output_that_cannot_be_is_refused(small_run, rows, tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(launcher, "start_ranks", lambda *args: pytest.fail("a rank was started"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    common = ["+exp=score", "device=cpu", f"policy.path={small_run}/sft/hf", f"data.sources=[{rows}]"]
    assert launcher.main([*common, f"output={tmp_path}/{place}"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"output={tmp_path}/{place}" in err
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


LATE = """
import os, signal, sys
from rlhf_engine import signals

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)

signals.take_note()
last = Last()
{act}
sys.exit(signals.STOPPED)
"""


@pytest.mark.parametrize(("act", "code"), [("", -signal.SIGTERM), ("signals.ignore()", signals.STOPPED)])
def test_a_signal_that_comes_while_python_ends(act, code):
    """A launcher may tell a rank once more to stop that has already stopped."""
    assert subprocess.run([sys.executable, "-c", LATE.format(act=act)]).returncode == code
