"""That what is said to be written is on the disk, in the order of calls; and what is left where it cannot be."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import cases
import pytest
from conftest import SMALL

from rlhf_engine.config import ConfigError
from rlhf_engine.hf.files import whole_folder
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.earlier import check_output_dir
from rlhf_engine.launching.preflight import plan
from rlhf_engine.observing import provenance
from rlhf_engine.signals import RunError
from rlhf_engine.surviving import durable


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[str]:
    return cases.disk_calls(monkeypatch, tmp_path)


def test_a_file(tmp_path, calls):
    durable.make_folder(tmp_path / "a" / "b")
    durable.write(path := tmp_path / "a" / "b" / "x", "é")
    assert calls == ["fsync .", "fsync a", "fsync a/b/x.tmp", "replace a/b/x.tmp a/b/x", "fsync a/b"]
    assert path.read_bytes() == b"\xc3\xa9"


def test_an_export_is_on_the_disk_before_the_one_before_it_is_removed(tmp_path, calls):
    for content in "first", "second":
        calls.clear()
        with whole_folder(tmp_path / "hf") as folder:
            (folder / "model.safetensors").write_text(content)
            (folder / "additional").mkdir()
            (folder / "additional" / "x.jinja").write_text("")
    synced, calls = calls[:4], calls[4:]
    names = ["", "/model.safetensors", "/additional", "/additional/x.jinja"]
    assert sorted(synced) == sorted(f"fsync hf.incomplete{name}" for name in names)
    assert synced[-1] == "fsync hf.incomplete"
    assert calls == ["replace hf hf.replaced", "replace hf.incomplete hf", "fsync .", "rmtree hf.replaced"]


def fail(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_where_there_is_no_room_the_old_file_stays(tmp_path, monkeypatch):
    durable.write(path := tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError) as caught:
        durable.write(path, "new")
    assert str(caught.value).startswith(f"{path} cannot be written (No space left on device): make room")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_text() == "old"
    with pytest.raises(RunError), whole_folder(tmp_path / "hf") as folder, durable.needed(tmp_path / "hf"):
        (folder / "model.safetensors").write_text("")
        durable.sync(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    def not_of_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", not_of_folders)
    durable.write(tmp_path / "x", "content")
    assert (tmp_path / "x").read_text() == "content"


def test_what_is_spared_is_told_of_once(tmp_path, capsys):
    for _ in range(2):
        with durable.spared(tmp_path / "x"):
            durable.write(tmp_path / "nowhere" / "x", "")
    line = f"{tmp_path}/x cannot be written (No such file or directory): the run goes on without it\n"
    assert capsys.readouterr().out == line


# -- records of a run ------------------------------------------------------------------------------------------


def record(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sft").mkdir(exist_ok=True)
    (tmp_path / "sft" / name).write_text(text)


@pytest.mark.parametrize("rerun", ["false", "true"])
@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("config.yaml", "", "it is empty"),
        ("config.yaml", "seed: 1\npolicy:\n  pa", "it was cut short"),
        ("config.yaml", "seed: [1,\n", "while parsing a flow node"),
        ("summary.json", "", "Expecting value"),
        ("summary.json", '{"iterations": 3, "eval/lo', "Unterminated string"),
        ("summary.json", "3", "it was cut short"),
    ],
)
def test_a_record_that_is_not_whole_is_refused_in_one_line(tmp_path, name, text, why, rerun):
    """Before there is a process group."""
    record(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        plan(compose([*SMALL, "phases=[sft]", f"rerun={rerun}", f"output_dir={tmp_path}"]))
    line = f"{tmp_path}/sft/{name} cannot be read ({why}"
    assert str(caught.value).startswith(line) and "remove it, and the phase goes on" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_cut_anywhere(tmp_path):
    """Is refused in one line, or is as good as the whole one."""
    config = compose([*SMALL, "phases=[sft]", f"output_dir={tmp_path}"])
    durable.make_folder(tmp_path / "sft")
    provenance.write_config(tmp_path / "sft", config, False)
    text, outcomes = (tmp_path / "sft" / "config.yaml").read_text(), set()
    behind_a_name = [found.end() for found in re.finditer(r"^\w+:\n", text, re.M)]
    for n in (*behind_a_name, *range(0, len(text), 211)):
        record(tmp_path, "config.yaml", text[:n])
        try:
            check_output_dir(config)
            provenance.say_finished(tmp_path / "sft", config)
            outcomes.add("taken")
        except ConfigError as error:
            assert "cannot be read" in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


def test_a_configuration_is_replaced_and_the_one_before_it_kept(tmp_path, calls, monkeypatch):
    first, second = (compose([*SMALL, f"seed={seed}"]) for seed in (1, 2))
    durable.make_folder(tmp_path / "sft")
    for config in (first, second):
        calls.clear()
        provenance.write_config(tmp_path / "sft", config, False)
        if config is first:
            kept = (tmp_path / "sft" / "config.yaml").read_text()
    names = "config.1.yaml", "config.yaml"
    assert calls == [
        line for name in names for line in (f"fsync sft/{name}.tmp", f"replace sft/{name}.tmp sft/{name}", "fsync sft")
    ]
    assert (tmp_path / "sft" / "config.1.yaml").read_text() == kept
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError):
        provenance.write_config(tmp_path / "sft", first, False)
    assert durable.read(tmp_path / "sft" / "config.yaml")["seed"] == 2
