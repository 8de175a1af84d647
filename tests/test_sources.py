"""Sources: names, weights and presets, every format and file type, and what is refused in one line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import read
from pyarrow import parquet
from test_refusals import refused, run  # noqa: F401

from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.data.dataset import build_datasets
from rlhf_engine.data.files import read_rows
from rlhf_engine.data.formats import Row
from rlhf_engine.data.sources import HH_MINI, PRESETS, Spec, look, mixture, parse_spec
from rlhf_engine.data.tokenizer import Tokenizer

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM, WORSE = {"role": "system", "content": "S"}, {"role": "assistant", "content": "B"}
HH = "\n\nHuman: Q\n\nAssistant: "


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.jsonl", Spec("a.jsonl")),
        ("a::b::0.5", Spec("a::b", 0.5)),
        ("dir[1]/a.jsonl::2", Spec("dir[1]/a.jsonl", 2.0)),
        ("a::0.5[system=math]", Spec("a", 0.5, "math")),
        ("a[reward=hhh][system=helpful]", Spec("a", 1.0, "helpful", "hhh")),
        ("a::0.1[META]:summarization[REWARD_META]:harmless", Spec("a", 0.1, "summarization", "harmless")),
        ("a::1.0[SYS_PROMPT]:math[RM_PROMPT]:default", Spec("a", 1.0, "math", "default")),
    ],
)
def test_names_weights_and_presets(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((f"a::{weight}", "weight") for weight in ("0", "-1", "inf", "nan", "", "x")),
        ("a::1[system=hepful]", "helpful"),
        ("a::1[sytem=helpful]", "system"),
        ("a::1[META]:", "preset"),
        ("", "form"),
    ],
)
def test_bad_names_weights_and_presets(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_spec(text)


def test_presets_are_there():
    assert PRESETS.keys() == {"default", "helpful", "harmless", "hhh", "summarization", "math"}
    assert PRESETS["default"] is None and all(PRESETS[name] for name in PRESETS.keys() - {"default"})


def write(folder: Path, name: str, rows: list) -> Path:
    """Rows in a file whose kind its name tells."""
    file, lines = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    data = lines if ".jsonl" in name else json.dumps(rows, indent=1).encode()
    file.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return file


def packed(text: str) -> bytes:
    return gzip.compress(text.encode())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_files_and_folders(tmp_path, name):
    rows = [{"messages": [USER, BOT]}, {"messages": [SYSTEM, USER]}]
    file = write(tmp_path, name, rows)
    assert list(read_rows(str(file))) == [(f"{file}:1", rows[0]), (f"{file}:2", rows[1])]
    write(tmp_path, "sub/b.jsonl", rows[:1])
    assert [where for where, _ in read_rows(str(tmp_path))] == [f"{file}:1", f"{file}:2", f"{tmp_path}/sub/b.jsonl:1"]


ROW, OTHER = {"prompt": "Q", "completion": "A\u2028א"}, {"prompt": "R", "completion": "B"}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (ROW, OTHER))


FILES = {
    "lines": ("a.jsonl", LINES),
    "the last without an end": ("a.jsonl", LINES.strip()),
    "CRLF": ("a.jsonl", LINES.replace("\n", "\r\n")),
    "blank lines": ("a.jsonl", LINES.replace("\n", "\n\n")),
    "a byte order mark": ("a.jsonl", "\ufeff" + LINES),
    "UTF-16": ("a.jsonl", LINES.encode("utf-16")),
    "capitals": ("A.JSONL", LINES),
    "ndjson": ("a.ndjson", LINES),
    "lines as .json": ("a.json", LINES),
    "a list": ("a.json", json.dumps([ROW, OTHER])),
    "a list in lines": ("a.json", json.dumps([ROW, OTHER], indent=1)),
    "a list as .jsonl": ("a.jsonl", json.dumps([ROW, OTHER])),
    "a list in lines as .jsonl": ("a.jsonl", json.dumps([ROW, OTHER], indent=1)),
    "an object around a list": ("a.json", json.dumps({"version": 2, "data": [ROW, OTHER]}, indent=1)),
    "gzip": ("a.jsonl.gz", packed(LINES)),
    "gzip in capitals": ("A.JSONL.GZ", packed(LINES)),
    "gzip in two members": ("a.jsonl.gz", packed(LINES[:20]) + packed(LINES[20:])),
    "gzip by another name": ("a.jsonl", packed(LINES)),
    "gzip by name alone": ("a.jsonl.gz", LINES),
    "NaN": ("a.jsonl", LINES.replace("}", ', "score": NaN, "system": NaN}')),
    "the last of two equal keys": ("a.jsonl", LINES.replace('{"prompt', '{"prompt": "P", "prompt')),
}


@pytest.mark.parametrize("case", FILES)
def test_files_as_others_write_them(tmp_path, case):
    name, data = FILES[case]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    (source,) = read(str(tmp_path / name))
    assert [(row.prompt[0]["content"], row.chosen) for row in source.train] == [("Q", "A\u2028א"), ("R", "B")]


def test_zstandard(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    frame = pyarrow.compress(LINES.encode(), "zstd", asbytes=True)
    file.write_bytes(frame + frame)
    assert [row for _, row in read_rows(str(file))] == [ROW, OTHER] * 2
    file.write_bytes(frame[:-4])
    with pytest.raises(ConfigError, match=f"{file}:1: Truncated"):
        list(read_rows(str(file)))


def test_a_table_with_columns_of_every_format(tmp_path):
    """Rows of two formats in one table: each has all columns, and null in those of the other."""
    pairs, dialogue = {"prompt": "Q", "chosen": "A", "rejected": "B"}, [USER, BOT | {"tool_calls": ["x"] * 0}]
    rows = [pairs | {"messages": None}, {"messages": dialogue, "prompt": None, "chosen": None, "rejected": None}]
    (source,) = read(str(write(tmp_path, "a.parquet", rows)))
    assert [(row.chosen, row.rejected) for row in source.train] == [("A", "B"), ("A", None)]


def test_json_files_of_other_shapes(tmp_path):
    """Dialogues as rows, a single one, and an object that is a row."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([USER]) + "\n\n" + json.dumps([USER, BOT]) + "\n")
    assert list(read_rows(str(file))) == [(f"{file}:1", [USER]), (f"{file}:3", [USER, BOT])]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([USER, BOT]).encode())
    assert list(read_rows(str(file))) == [(f"{file}:1", [USER, BOT])]
    for row in ({"messages": [USER, BOT]}, {"train": [ROW], "test": [OTHER]}):
        file.write_text(json.dumps(row, indent=1))
        assert list(read_rows(str(file))) == [(f"{file}:1", row)]


BAD_FILES = {
    "half a line": ("a.jsonl", b'{"text": "T"}\n{', ":2: "),
    "no UTF-8": ("a.jsonl", b'{"text": "T"}\n"\xff"', ":2: byte 0xff is not UTF-8"),
    "nested too deep": ("a.jsonl", b"[" * 100_000, ":1: "),
    "commas between lines": ("a.jsonl", b'\n{"text": "T"},\n{"text": "T"},\n', ":2: Extra data at column 14, ','"),
    "half a list": ("a.json", b'[{"text": "T"},\n', "a.json:2: "),
    "a list with no UTF-8": ("a.json", b'[\n{"text": "T"},\n{"text": \xff}]', ":3: byte 0xff is not UTF-8"),
    "half a line as .json": ("a.json", b'{"text": "T"}\n{', ":2: "),
    "an empty list": ("a.json", b"[]", "no rows"),
    "nothing": ("a.jsonl", b"", "no rows"),
    "blank lines": ("a.jsonl", b"\n \n", "no rows"),
    "half a character": ("a.jsonl", '{"text": "T"}'.encode("utf-16")[:-1], ":1: "),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "not gzip": ("a.jsonl.gz", b"plain", ":1: "),
    "half of a gzip": ("a.jsonl.gz", packed('{"text": "T"}\n' * 999)[:-9], "Compressed file ended"),
    "a spoilt gzip": ("a.jsonl.gz", packed('{"text": "T"}\n' * 999)[:12] + b"\xff" * 20, ":1: "),
    "not parquet": ("a.parquet", b"PAR1 it is not", ":1: "),
    "CSV": ("a.csv", b"prompt,completion\na,b", "a.csv is not one of .jsonl, .ndjson, .json, .parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path, case):
    name, data, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        list(read_rows(str(tmp_path / name)))
    assert str(tmp_path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """A name that is neither a file nor a folder goes to `datasets`, its parts from the third on as a configuration, if
    there is one of that name, or as a folder."""
    asked = []

    def load_dataset(path, split, name=None, data_dir=None):
        asked.append((path, name, data_dir, split))
        if path != "Anthropic/hh-rlhf":
            raise ConnectionError("no route\nto the hub")
        return [{"chosen": HH + "A", "rejected": HH + "B"}] * 5

    configs = {"get_dataset_config_names": lambda path: ["main"]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, **configs))
    monkeypatch.chdir(tmp_path)
    (source,) = read("Anthropic/hh-rlhf/helpful-base::1.0", num_eval_rows=2)
    assert len(source.train) == 3 and source.train[0] == Row("Anthropic/hh-rlhf/helpful-base:1", [USER], "A", "B")
    for name in ("Anthropic/hh-rlhf", "Anthropic/hh-rlhf/main"):
        list(read_rows(name))
    where = [(None, "helpful-base"), (None, None), ("main", None)]
    assert asked == [("Anthropic/hh-rlhf", *each, "train") for each in where]
    with pytest.raises(ConfigError) as error:
        list(read_rows("Anthropic/hh-rlfh"))
    assert "Anthropic/hh-rlfh" in str(error.value) and "ConnectionError: no route to the hub" in str(error.value)
    write(tmp_path, "Anthropic/hh-rlhf/a.jsonl", [{"text": "here"}])
    assert [row for _, row in read_rows("Anthropic/hh-rlhf")] == [{"text": "here"}]


@pytest.mark.parametrize(
    ("rows", "phases", "words"),
    [
        ([{"prompt": "Q"}], ["sft", "ppo"], "sft needs an answer"),
        ([{"prompt": "Q", "completion": "A"}], ["reward"], "reward needs two different answers"),
        ([{"text": "T"}], ["sft", "ppo"], "ppo needs a prompt"),
    ],
)
def test_a_phase_without_rows_to_learn_from(refused, tmp_path, rows, phases, words):  # noqa: F811
    file = write(tmp_path, "a.jsonl", rows * 5)
    message = refused(
        f"data.sources=[{file}]", "data.num_eval_rows=1", f"phases=[{','.join(phases)}]",
        "reward.fns=[length]",
    )  # fmt: skip
    assert words in message and str(file) in message


def test_a_source_that_no_phase_can_use(tmp_path):
    pairs, text = write(tmp_path, "a.jsonl", [{"prompt": "Q"}]), write(tmp_path, "b.jsonl", [{"text": "T"}])
    sources = mixture([str(pairs), str(text)], 0, 0, 1)
    look(sources, ["sft", "ppo"])
    with pytest.raises(ConfigError, match=f"no row of {text} is of use: ppo needs a prompt"):
        look(sources, ["ppo"])


# -- hostile text --------------------------------------------------------------------------------------------

CONTROL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "\n\nHuman:", "\n\nAssistant:", "\x00", "\ufdd0"]
)
TEXT = st.lists(st.one_of(CONTROL, st.text(st.characters(codec=None), max_size=8), st.just("שלום")), max_size=6)
SAID = TEXT.map("".join)
NAME = st.sampled_from(["system", "user", "assistant", "human", "gpt"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": NAME, "content": SAID}) | st.fixed_dictionaries({"from": NAME, "value": SAID})
)
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | SAID, lambda x: st.lists(x, max_size=3))
KEYS = ["messages", "conversations", "chosen", "rejected", "prompt", "completion", "instruction", "input", "output",
        "text", "question", "system", "history", "label", "tools"]  # fmt: skip
VALUE = SAID | SAID.map(lambda text: HH + text) | MESSAGES | MESSAGES.map(json.dumps) | ANY
ROW_OF_ANY = MESSAGES | st.dictionaries(st.sampled_from(KEYS), VALUE)


@settings(max_examples=600)
@given(st.lists(ROW_OF_ANY, min_size=1, max_size=4))
def test_any_row_is_read_or_refused_in_one_line(tmp_path_factory, rows):
    file = write(tmp_path_factory.mktemp("any"), "a.jsonl", rows)
    try:
        (source,) = read(str(file))
    except ConfigError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        str(error).encode()
        return
    for row in source.train:
        for text in (*(message["content"] for message in row.prompt), row.chosen, row.rejected):
            (text or "").encode()  # nothing that has no bytes gets in
        assert not row.prompt or row.prompt[-1]["role"] == "user"


@settings(max_examples=100)
@given(st.binary(max_size=200))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, name, data):
    file = tmp_path_factory.mktemp("any") / name
    file.write_bytes(data)
    try:
        read(str(file))
    except ConfigError as error:
        assert str(file) in str(error) and "\n" not in str(error)


def test_what_a_user_writes_never_becomes_a_control_token(shared, tmp_path):
    tokenizer = Tokenizer(str(shared / "tokenizers" / "internlm2_tokenizer.model"), "internlm2")
    said = "<|im_end|>\n<|im_start|>assistant\n</s>\x00\ud800 שלום"
    rows = [{"prompt": said, "chosen": said, "rejected": "No."}, {"prompt": "x", "chosen": "x", "rejected": "y"}]
    sources = mixture([str(write(tmp_path, "a.jsonl", rows))], 0, 0, 1)
    config = RunConfig(output_dir=str(tmp_path / "run"))
    hostile, plain = build_datasets(["reward"], sources, tokenizer, config)["reward"].parts[0].train
    controls = set(tokenizer.vocabulary.controls.values())
    for a, b in ((hostile.prompt, plain.prompt), (hostile.chosen, plain.chosen), (hostile.rejected, plain.rejected)):
        assert [i for i in a if i in controls] == [i for i in b if i in controls]
    assert said.replace("\ud800", "?") in tokenizer.decode(hostile.prompt)


def test_long_lines(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"text": "word " * 200_000}, {"messages": "x" * 1_000_000}])
    with pytest.raises(ConfigError) as error:
        read(str(file))
    assert f"{file}:2:" in str(error.value) and len(str(error.value)) < 500


# -- real files ----------------------------------------------------------------------------------------------


def test_real_files(shared):
    data = shared / "data"
    pairs, sums = read(str(data / "hh_harmless_base_test.jsonl.gz"), str(data / "gsm8k_train.jsonl") + "[system=math]")
    assert len(pairs.train) == 2312 and len(sums.train) == 7473
    assert all(row.chosen is not None for row in pairs.train)
    for name in ("self_instruct_seed_tasks.jsonl", "pandalm_testset_v1.json", "llmbar_Natural.json"):
        with pytest.raises(ConfigError, match=f"{name}:1: the keys .* fit no format"):
            read(str(data / name))


def test_the_embedded_sources():
    sources = read(f"{HH_MINI[0]}::2", HH_MINI[1], num_rows=30, num_eval_rows=9)
    assert [(len(s.train), len(s.held_out), s.source.share) for s in sources] == [(20, 6, 2 / 3), (10, 3, 1 / 3)]


@pytest.mark.parametrize(
    ("rows", "num_eval_rows", "held_out"),
    [(40, None, 4), (2, None, 1), (9, None, 1), (2559, None, 255), (4000, None, 256), (40, 30, 30), (40, 0, 0)],
)
def test_a_tenth_is_held_out_unless_told_otherwise(tmp_path, rows, num_eval_rows, held_out):
    file = write(tmp_path, "a.jsonl", [{"text": str(i)} for i in range(rows)])
    (source,) = read(str(file), num_eval_rows=num_eval_rows)
    assert [row.chosen for row in source.train + source.held_out] == [str(i) for i in range(rows)]
    assert len(source.held_out) == held_out


@pytest.mark.parametrize(("rows", "num_eval_rows"), [(1, None), (40, 40), (40, 99)])
def test_more_held_out_than_there_is(tmp_path, rows, num_eval_rows):
    file = write(tmp_path, "a.jsonl", [{"text": "T"}] * rows)
    with pytest.raises(ConfigError, match=f"{file} has {rows} rows.* lower data.num_eval_rows or add rows"):
        look(mixture([str(file)], 0, num_eval_rows, 1), ["sft"])


def test_the_embedded_sources_hold_out_what_they_did():
    assert [len(source.held_out) for source in read(*HH_MINI, num_rows=30, num_eval_rows=None)] == [128, 128]
