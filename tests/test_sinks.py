"""Where figures go beside metrics.jsonl. What is written to Weights & Biases is read back from its files."""

from __future__ import annotations

import json
import re
import struct
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, launch

from rlhf_engine import sinks
from rlhf_engine.config import LogConfig, WandBConfig
from rlhf_engine.sinks import Sinks


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
    return Sinks(LogConfig(tensorboard=False, wandb=WandBConfig(project="p", **settings)), folder, {}, 0)


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


def test_no_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(make(tmp_path), tmp_path)
    assert capsys.readouterr().out == "wandb: not installed (pip install -e '.[wandb]'): the run goes on without it\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [("raise SystemExit(1)", "its process has ended"), ("import time; time.sleep(600)", "not done after 0.1 s")],
    ids=["ends", "hangs"],
)
def test_a_package_that(tmp_path, monkeypatch, capsys, program, words):
    """No figure is waited for, and what goes wrong is said once."""
    pytest.importorskip("wandb")
    (tmp_path / "to_wandb.py").write_text(program)
    monkeypatch.setattr(sinks, "__file__", str(tmp_path / "sinks.py"))
    monkeypatch.setattr(sinks, "_SECONDS_TO_FINISH", 0.1)
    found = make(tmp_path)
    if "Exit" in program:
        found._sinks["wandb"].process.wait()
    for i in range(3):
        found.write(i, {f"figure/{j}": 0.5 for j in range(10_000)})  # far more than a pipe holds
    found.close()
    said = capsys.readouterr().out
    assert said.startswith("wandb: ") and words in said and said.count("the run goes on without it") == 1


def test_a_sink_that_fails_is_left(tmp_path, capsys):
    found = Sinks(LogConfig(), tmp_path, {}, 0)
    found._sinks["tensorboard"].writer.close()
    found._sinks["tensorboard"].writer = None
    for i in range(2):
        found.write(i, {"loss": 1.0})
    found.close()
    assert capsys.readouterr().out.count("tensorboard: ") == 1


# where each extra of pyproject.toml is used
USED_BY = {
    "hf": "rlhf_engine", "data": "rlhf_engine", "ray": "launch", "wandb": "rlhf_engine", "bench": "benchmarks",
    "dev": "tests",
}  # fmt: skip
# of other names, or used otherwise: on the command lines of `make`, or by a package beside it that does not ask for it
NAMES = {"liger-kernel": "liger_kernel", "pytest-xdist": "pytest -n", "ruff": "/ruff", "mypy": "/mypy", "pandas": "trl"}


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
