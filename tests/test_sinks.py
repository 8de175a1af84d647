"""Where figures go beside metrics.jsonl. What is written to Weights & Biases is read back from its files."""

from __future__ import annotations

import importlib
import json
import re
import struct
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import chaos
import pytest
from conftest import ROOT, SMALL, launch
from tensorboard.summary.writer import event_file_writer

from rlhf_engine.config import LogConfig, WandBConfig
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.preflight import plan
from rlhf_engine.observing import sinks
from rlhf_engine.observing.sinks import Sinks, TensorBoard


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Pieces of records, in the form of LevelDB's logs: a header of 7 bytes in front of the file, blocks of 32 KiB, and
    in front of each piece a checksum, its length and its kind (whole, first, middle, last)."""
    at = 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        yield kind, data[at + 7 : at + 7 + length]
        at += 7 + length


def records(folder: Path) -> list:
    """Everything that offline runs in the folder hold."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        whole = b""
        for kind, piece in chunks(path.read_bytes()):
            whole += piece
            if kind in (1, 4):
                found.append(Record.FromString(whole))
                whole = b""
    return found


def history(folder: Path) -> list[dict]:
    """Figures by name, of each step."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def test_tensorboard_shows_a_run_that_moves_between_clocks_in_order(tmp_path, monkeypatch):
    """On to a machine whose clock is behind, and to another one: each iteration once, the later figure of it."""
    clock = SimpleNamespace(time=lambda: 1.7e9)
    monkeypatch.setattr(event_file_writer, "time", clock)
    for start, (resumed_at, now) in enumerate([(0, 1.7e9), (3, 1.6e9), (4, 1.5e9)]):
        clock.time = lambda now=now: now
        sink = TensorBoard(tmp_path, resumed_at)
        for iteration in range(resumed_at, resumed_at + 3):
            sink.write(iteration, {"x": float(start)})
        sink.close()
    shown = [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert chaos.scalars(tmp_path) == {"x": shown}


def test_weights_and_biases(tmp_path, monkeypatch):
    """A run of two iterations that goes on for a third: the figures of metrics.jsonl under the same names, the whole
    configuration, the held-out dialogues, all in one run."""
    pytest.importorskip("wandb")
    asked = ["log.wandb.project=test", "log.wandb.mode=offline", "log.wandb.tags=[a,b]", f"output_dir={tmp_path}/x"]
    for iterations in (2, 3):
        launch(
            *SMALL, "phases=[sft]", *asked, f"sft.iterations={iterations}", "sft.eval_every=0", "log.tensorboard=false"
        )
    folder = tmp_path / "x" / "sft"
    rows = history(folder)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(written) == 3 and not list(folder.glob("events.*"))
    for wanted in written:
        assert wanted in rows
    summary = json.loads((folder / "summary.json").read_text())
    del summary["iterations"]
    assert {"iteration": 3, **summary} in rows
    assert [row["dialogues/nrows"] for row in rows if "dialogues/nrows" in row] == [8, 8]
    started = [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.run_group, run.display_name, *run.tags) for run in started} == {
        ((folder / "wandb_id").read_text(), "test", "x", "x/sft", "a", "b")
    }
    config = {item.key: json.loads(item.value_json) for item in started[-1].config.update}
    assert config["sft"]["iterations"] == 3 and config["log"]["wandb"]["project"] == "test"


def make(folder: Path, **settings) -> Sinks:
    return Sinks(LogConfig(tensorboard=False, wandb=WandBConfig(project="p", **settings)), folder, {}, 0, False)


def use(found: Sinks, tmp_path: Path) -> None:
    found.write(0, {"loss": 1.0, "bad": float("nan")})
    found.show([{"prompt": "a", "after": None}])
    found.close()


def test_no_login(tmp_path, monkeypatch, capfd):
    """It is written all the same, for `wandb sync`."""
    pytest.importorskip("wandb")
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # where nobody listens
    use(make(tmp_path, mode="online"), tmp_path)
    assert {"iteration": 0, "loss": 1.0} in history(tmp_path)
    assert "`wandb sync`" in capfd.readouterr().err


class Refuses(BaseHTTPRequestHandler):
    """A server that wants nothing."""

    def do_POST(self):
        self.send_error(400)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def test_a_server_that_refuses(tmp_path, monkeypatch, capfd):
    """The package has begun the run by then, and does not begin it twice by itself."""
    pytest.importorskip("wandb")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {"HOME": str(tmp_path), "WANDB_API_KEY": "a" * 40}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        use(make(tmp_path, mode="online"), tmp_path)
        server.shutdown()
    assert {"iteration": 0, "loss": 1.0} in history(tmp_path)
    assert capfd.readouterr().err.count("`wandb sync`") == 1


def test_a_phase_that_begins_again_is_another_run(tmp_path, monkeypatch):
    """As with `rerun=true`: its curves are not drawn over those of before."""
    (tmp_path / "to_wandb.py").write_text("input()")
    monkeypatch.setattr(sinks, "__file__", str(tmp_path / "sinks.py"))
    numbers = []
    for goes_on in (False, True, True, False):
        sinks.WandB(tmp_path, {}, goes_on).close()
        numbers.append((tmp_path / "wandb_id").read_text())
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


@pytest.mark.parametrize("is_folder", [False, True], ids=["nothing", "a folder that it left"])
def test_no_package(tmp_path, monkeypatch, capsys, is_folder):
    """It is said before the run starts, once, and no phase says it again."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not Path(p, "wandb").is_dir())])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    if is_folder:
        (tmp_path / "wandb").mkdir()
    asked = compose([*SMALL, "log.wandb.project=p", f"output_dir={tmp_path}/run"])
    said = [note for note in plan(asked, 1).notes if "wandb" in note]
    assert said == [
        "log.wandb.project=p: wandb is not installed (pip install -e '.[wandb]'): the run goes on without it"
    ]
    use(make(tmp_path), tmp_path)
    assert capsys.readouterr().out == "" and not (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit(input() and 1)", "its process has ended"),
        ("import time; time.sleep(600)", "not done after 0.1 s"),
    ],
    ids=["ends", "hangs"],
)
def test_a_package_that(tmp_path, monkeypatch, capsys, program, words):
    """No figure is waited for, and what goes wrong is said once."""
    pytest.importorskip("wandb")
    (tmp_path / "to_wandb.py").write_text(program)
    monkeypatch.setattr(sinks, "__file__", str(tmp_path / "sinks.py"))
    monkeypatch.setattr(sinks, "_SECONDS_TO_FINISH", 0.1)
    found = make(tmp_path)
    if "exit" in program:
        found._sinks["wandb"].process.wait()
    for i in range(3):
        found.write(i, {f"figure/{j}": 0.5 for j in range(10_000)})  # far more than a pipe holds
    found.close()
    said = capsys.readouterr().out
    assert said.startswith("wandb: ") and words in said and said.count("the run goes on without it") == 1


def test_a_sink_that_fails_is_left(tmp_path, capsys):
    found = Sinks(LogConfig(), tmp_path, {}, 0, False)
    found._sinks["tensorboard"].writer.close()
    found._sinks["tensorboard"].writer = None
    for i in range(2):
        found.write(i, {"loss": 1.0})
    found.close()
    assert capsys.readouterr().out.count("tensorboard: ") == 1


# where each extra of pyproject.toml is used
USED_BY = {
    "hf": "rlhf_engine", "data": "rlhf_engine", "ray": "launch", "wandb": "rlhf_engine", "bench": "benchmarks",
    "dev": "tests", "math": "rlhf_engine", "retrieve": "rlhf_engine",
}  # fmt: skip
# of other names, or used otherwise: on the command lines of `make`, or by a package beside it that does not ask for it
NAMES = {
    "math-verify": "math_verify",
    "liger-kernel": "liger_kernel",
    "pytest-xdist": "pytest -n",
    "pytest-timeout": "--timeout",
    "ruff": "/ruff",
    "mypy": "/mypy",
    "pandas": "trl",
}


def test_every_extra_is_used():
    """A declared extra that nothing uses is a false promise. te's package is taken by megatron, which looks for it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == {*USED_BY, "te"}
    makefile = (ROOT / "Makefile").read_text()
    for extra, folder in USED_BY.items():
        code = "\n".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
        for requirement in extras[extra]:
            package = re.split(r"[\[=<>~ ]", requirement)[0]
            name = NAMES.get(package, package)
            uses = [f"import {name}", f"from {name}", f'"{name}"']
            assert any(use in code for use in uses) or name in makefile, f"{package} of the extra {extra}"
