"""Rows prepared once: in pieces, by several processes, again where they are damaged or their source has changed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT
from mixed import read

from rlhf_engine.config import ConfigError, DataConfig, RolloutConfig, RunConfig, TokenizerConfig
from rlhf_engine.data import prepare, prepared
from rlhf_engine.data.dataset import Dataset, build_datasets
from rlhf_engine.data.prepared import Prepared, Rows
from rlhf_engine.data.render import example
from rlhf_engine.data.sources import KINDS, mixture
from rlhf_engine.data.tokenizer import Tokenizer, train_tokenizer
from rlhf_engine.data.trained import tokenizer_notes, trained_tokenizer
from rlhf_engine.surviving import durable

SAID = [f"Is {i} odd? " + "So it is said. " * (i % 7) for i in range(40)]
DIALOGUES = [
    {"prompt": [{"role": "user", "content": said}], "chosen": "Yes.", "rejected": f"No, {i}.", "answer": str(i)}
    for i, said in enumerate(SAID)
]
ROWS = [*DIALOGUES[:20], {"text": "Once upon a time. " * 30}, *DIALOGUES[20:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*SAID, "\n\nHuman: \n\nAssistant: Yes. No, Once upon a time."] * 4, path, 340)
    return Tokenizer(str(path))


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def in_fives(monkeypatch) -> None:
    """Files of five rows."""
    for module in (prepare, prepared):
        monkeypatch.setattr(module, "ROWS_PER_FILE", 5)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Numbers of the rows of each file that is made in this process."""
    numbers, usual = [], prepare.Recipe.made
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(prepare.Recipe, "made", lambda recipe, rows: numbers.append(len(rows)) or usual(recipe, rows))
    return numbers


def datasets(tokenizer: Tokenizer, file: Path, phases=("sft", "reward", "ppo"), **data) -> dict[str, Dataset]:
    cache = str(file.parent / "prepared")
    config = RunConfig(data=DataConfig(cache_dir=cache, **data), rollout=RolloutConfig(max_new_tokens=8))
    return build_datasets(phases, mixture([str(file)], 0, data.get("num_eval_rows"), 1), tokenizer, config)


def cached(file: Path) -> list[Path]:
    return sorted((file.parent / "prepared").glob("*/*.arrow"))


def test_what_is_drawn_is_what_the_rows_say(tokenizer, file, in_fives, made):
    """Each row as it is rendered alone, its own fields beside it, and text in pieces."""
    (split,) = read(str(file))
    found = datasets(tokenizer, file, max_seq_len=200)
    expected = [example(row, (None, None), frozenset(KINDS), tokenizer) for row in split.train]
    text = expected.pop(20).chosen
    train, held_out = found["sft"].parts[0].train, found["sft"].held_out
    assert isinstance(train, Rows) and made == [5] * 8 + [1]
    whole = [e for e in (*train, *held_out) if e.messages]
    assert whole == expected and [e.fields for e in whole] == [{"answer": str(i)} for i in range(40)]
    pieces = [e.chosen for e in train if not e.messages]
    assert [i for piece in pieces for i in piece] == text and {len(piece) for piece in pieces[:-1]} == {200}
    assert [e.rejected for e in found["reward"].parts[0].train[:3]] == [e.rejected for e in expected[:3]]


def test_a_second_start_makes_nothing_whatever_the_lengths_and_the_mixture(tokenizer, file, made):
    first = datasets(tokenizer, file)
    assert len(made) == 1
    again, shorter = datasets(tokenizer, file), datasets(tokenizer, file, max_seq_len=80, num_eval_rows=9)
    assert len(made) == 1
    assert again["sft"].batch(0, 99) == first["sft"].batch(0, 99)
    assert again["sft"].digest() == first["sft"].digest() != shorter["sft"].digest()
    assert shorter["sft"].parts[0].num_rows == (32, 9) and shorter["ppo"].parts[0].left_out


def test_other_tokens_are_other_files(tokenizer, file, made, tmp_path):
    for phases in (["sft"], ["ppo"], ["reward", "ppo"], ["sft"]):
        datasets(tokenizer, file, phases)
    assert len(made) == 3
    train_tokenizer(SAID * 9, tmp_path / "other.model", 300)
    datasets(Tokenizer(str(tmp_path / "other.model")), file, ["sft"])
    assert len(made) == 4


def test_several_processes_make_what_one_makes(tokenizer, file, in_fives, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    datasets(tokenizer, file)
    alone = [path.read_bytes() for path in cached(file)]
    for path in (file.parent / "prepared").glob("*/*"):
        path.unlink()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    datasets(tokenizer, file)
    assert [path.read_bytes() for path in cached(file)] == alone and len(alone) == 9


@pytest.mark.parametrize("cores", [1, 2])
def test_a_bad_row_ends_it_with_its_place_and_what_is_before_is_kept(tokenizer, file, in_fives, monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:22], '{"prompt": 3}', *lines[23:]]))
    with pytest.raises(ConfigError, match=r"rows\.jsonl:23: 'prompt' must be text, not int"):
        datasets(tokenizer, file)
    assert len(cached(file)) == 4


def test_what_was_interrupted_goes_on_where_it_was(tokenizer, file, in_fives, made, monkeypatch):
    usual, written = durable.write, []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        usual(path, content)

    monkeypatch.setattr(durable, "write", write)
    with pytest.raises(OSError, match="No space left"):
        datasets(tokenizer, file)
    monkeypatch.setattr(durable, "write", usual)
    before = [path.stat().st_mtime_ns for path in cached(file)]
    made.clear()
    found = datasets(tokenizer, file)
    assert made == [5] * 5 + [1] and [path.stat().st_mtime_ns for path in cached(file)][:3] == before
    assert len(found["reward"]) == 36


def test_a_source_that_has_changed_is_prepared_again(tokenizer, file, made, capsys):
    datasets(tokenizer, file)
    os.utime(file, ns=(1, 1))
    file.write_text(file.read_text().replace("odd", "even"))
    found = datasets(tokenizer, file)
    assert len(made) == 2 and "Is 0 even?" in found["sft"].parts[0].train[0].prompt_text
    assert f"{file} has changed since it was prepared in" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "index"])
def test_what_is_damaged_is_named_and_made_again(tokenizer, file, in_fives, made, capsys, harm):
    whole = datasets(tokenizer, file)["sft"].batch(0, 50)
    victim = cached(file)[1]
    content = bytearray(victim.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif harm == "cut":
        victim.write_bytes(content[:-9])
    elif harm == "gone":
        victim.unlink()
    else:
        victim = victim.with_name(prepared.INDEX)
        victim.write_text("{")
    made.clear()
    assert datasets(tokenizer, file)["sft"].batch(0, 50) == whole
    assert f"{victim} is not what was written there: prepared again" in capsys.readouterr().out
    assert made == ([] if harm == "index" else [5])


def test_memory_holds_numbers_and_no_rows(tokenizer, file, made):
    for phase, size in {"sft": 1 + 4 + 4, "reward": 1 + 4}.items():  # bytes a row; of whole rows all begin at token 0
        train = datasets(tokenizer, file)[phase].parts[0].train
        held = [value for part in (train, train.prepared) for value in vars(part).values()]
        assert sum(value.strides[0] for value in held if isinstance(value, np.ndarray)) == size


def settings_of(folder: Path, file: Path) -> list[str]:
    return [f"data.sources=[{file}]", f"output_dir={folder / 'run'}", "+exp=hh_rlhf", "phases=[sft]", "device=cpu"]


PREPARE = [sys.executable, str(ROOT / "launch" / "prepare.py")]


def test_eight_processes_that_start_at_once_prepare_once(file):
    """Each a start of its own on an empty folder; the tokenizer is trained once as well."""
    command = [*PREPARE, *settings_of(file.parent, file)]
    outputs = [file.parent / f"out{i}" for i in range(8)]
    started = [warm.Command(command, output, output) for output in outputs]
    assert [process.wait(300) for process in started] == [0] * 8, outputs[0].read_text()
    ends = [output.read_text() for output in outputs]
    tables = {end[end.index("source") :] for end in ends}
    assert len(tables) == 1 and "39 (100.0%)" in tables.pop()
    assert len(cached(file)) == 1 and not list(file.parent.glob("prepared/*/lock*"))


def test_kill_9_in_the_middle(file, tmp_path):
    """Another start goes on at once, with the files that are there, and no worker is left."""
    rows = "".join(json.dumps({"text": f"{i} " + "so it is said " * 4}) + "\n" for i in range(12_000))
    file.write_text(rows)
    command = [*PREPARE, *settings_of(tmp_path, file)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not cached(file) and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in cached(file)}
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "12000 rows" in second.stdout and len(cached(file)) == 3
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    (folder,) = {path.parent for path in cached(file)}
    assert len(Prepared(folder)) == 12_000


def test_a_tokenizer_is_of_the_rows_there_are_until_a_phase_has_learned_its_ids(file, tmp_path, capsys):
    sources = mixture([str(file)], 0, 0, 1)
    run = RunConfig(output_dir=str(tmp_path / "run"), tokenizer=TokenizerConfig(vocab_size=300))
    first = trained_tokenizer(run, sources).digest()
    assert trained_tokenizer(run, sources).digest() == first and not capsys.readouterr().out
    file.write_text("".join(json.dumps({"text": f"Twice under {i} moons. " * 9}) + "\n" for i in range(40)))
    second = trained_tokenizer(run, sources).digest()
    folder = tmp_path / "run" / "tokenizer"
    assert second != first
    assert capsys.readouterr().out == (
        f"{folder}: trained again, as it was trained with another data.sources: {file}\n"
    )
    (tmp_path / "run" / "sft").mkdir()
    assert tokenizer_notes(run, sources) == []
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run.tokenizer.vocab_size = 310
    assert trained_tokenizer(run, sources).digest() == second
    assert tokenizer_notes(run, sources) == [
        f"{folder}: kept, as phases here have learned its ids, though it was trained with another"
        f" tokenizer.vocab_size, data.sources: {file}"
    ]
    (tmp_path / "run" / "sft").rmdir()
    (folder / "trained_on.json").unlink()
    run.tokenizer.vocab_size = 300
    assert trained_tokenizer(run, sources).digest() == first
    assert capsys.readouterr().out == f"{folder}: trained again, as what it was trained on is not known\n"
