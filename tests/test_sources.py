"""Sources: names, weights and presets, every format and file type, and what is refused in one line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refusals import refused, run  # noqa: F401

from rlhf_engine.config import ConfigError, RunConfig
from rlhf_engine.data.dataset import build_datasets
from rlhf_engine.data.files import read_rows
from rlhf_engine.data.formats import Row, parse_hh, read_row
from rlhf_engine.data.sources import HH_MINI, PRESETS, Spec, check_sources, parse_spec, read_sources
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


def test_hh_text_to_messages():
    text = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nHuman: Four\n\nAssistant:"
    assert parse_hh(text, "f:1", "chosen") == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\nFour"},
        {"role": "assistant", "content": ""},
    ]


# a row, and the prompt, the chosen and the rejected answer that it has
FORMATS = {
    "messages in a list": ([SYSTEM, USER, BOT], [SYSTEM, USER], "A", None),
    "up to the last user turn": ([USER, BOT, USER], [USER, BOT, USER], None, None),
    "messages": ({"messages": [USER, BOT], "id": 7}, [USER], "A", None),
    "joined turns": ({"messages": [USER, USER, BOT]}, [{"role": "user", "content": "Q\nQ"}], "A", None),
    "hh": ({"chosen": HH + "A", "rejected": HH + "B"}, [USER], "A", "B"),
    "hh, two prompts": ({"chosen": HH + "A", "rejected": HH + "A\n\nHuman: R\n\nAssistant: B"}, [USER], "A", None),
    "lists": ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, [USER], "A", "B"),
    "prompt and lists": ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, [USER], "A", "B"),
    "prompt and dialogues": ({"prompt": "Q", "chosen": [USER, BOT], "rejected": [USER, WORSE]}, [USER], "A", "B"),
    "prompt and text": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [USER], "A", "B"),
    "hh prompt and text": ({"prompt": HH.rstrip(), "chosen": "A", "rejected": "B"}, [USER], "A", "B"),
    "instruction": ({"instruction": "Q", "output": "A"}, [USER], "A", None),
    "input": ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}], "A", None),
    "no input": ({"instruction": "Q", "input": "", "output": "A"}, [USER], "A", None),
    "completion": ({"prompt": "Q", "completion": "A"}, [USER], "A", None),
    "conversational completion": ({"prompt": [SYSTEM, USER], "completion": [BOT]}, [SYSTEM, USER], "A", None),
    "question": ({"question": "Q", "answer": "A"}, [USER], "A", None),
    "prompt": ({"prompt": "Q"}, [USER], None, None),
    "text": ({"text": "T"}, [], "T", None),
    "columns of other rows": ({"messages": None, "text": "T", "chosen": None}, [], "T", None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    row, prompt, chosen, rejected = FORMATS[name]
    assert read_row(row, "f:1") == Row("f:1", prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (3, "JSON object or a list"),
        ([], "list of messages"),
        ([1], "each message is an object"),
        ({}, "'instruction' and 'output'"),
        ({"instruction": "Q", "response1": "A", "response2": "B"}, "['instruction', 'response1', 'response2'] fit no"),
        ([BOT], "no turn of the user"),
        ([USER, SYSTEM], "message 2"),
        ([{"role": "human", "content": "Q"}], "'human' is not one of"),
        ([{"role": "user", "content": None}], "each message"),
        ({"messages": "Q"}, "messages must be a list"),
        ({"text": 3}, "'text' must be text, not int"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "'input'"),
        ({"prompt": "\n\nHuman:", "completion": ["A"]}, "each message"),
        ({"chosen": HH + "A"}, "no 'rejected'"),
        ({"chosen": "A", "rejected": "B"}, "'chosen' must be"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "no 'rejected'"),
        ({"prompt": "Q", "chosen": [USER], "rejected": "B"}, "'chosen' must be"),
    ],
)
def test_rows_that_fit_no_format(row, words):
    with pytest.raises(ConfigError) as error:
        read_row(row, "f:1")
    assert str(error.value).startswith("f:1: ") and words in str(error.value) and "\n" not in str(error.value)


def write(folder: Path, name: str, rows: list) -> Path:
    """Rows in a file whose kind its name tells."""
    file, lines = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    data = lines if ".jsonl" in name else json.dumps(rows, indent=1).encode()
    file.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_files_and_folders(tmp_path, name):
    rows = [{"messages": [USER, BOT]}, {"messages": [SYSTEM, USER]}]
    file = write(tmp_path, name, rows)
    assert list(read_rows(str(file))) == [(f"{file}:1", rows[0]), (f"{file}:2", rows[1])]
    write(tmp_path, "sub/b.jsonl", rows[:1])
    write(tmp_path, "test.jsonl", rows)
    (tmp_path / "README.md").write_text("Not rows.")
    assert [where for where, _ in read_rows(str(tmp_path))] == [f"{file}:1", f"{file}:2", f"{tmp_path}/sub/b.jsonl:1"]


def test_json_files_of_other_shapes(tmp_path):
    """Lines under the name .json, a single dialogue, a byte order mark."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([USER]) + "\n\n" + json.dumps([USER, BOT]) + "\n")
    assert list(read_rows(str(file))) == [(f"{file}:1", [USER]), (f"{file}:3", [USER, BOT])]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([USER, BOT]).encode())
    assert list(read_rows(str(file))) == [(f"{file}:1", [USER, BOT])]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "T"}\n{', ":2: "),
        ("a.jsonl", b'{"text": "T"}\n"\xff"', ":2: "),
        ("a.jsonl", b"[" * 100_000, ":1: "),
        ("a.json", b'[{"text": "T"},\n', "a.json: "),
        ("a.json", b'{"text": "T"}\n{', ":2: "),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl.gz", b"plain", ":1: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "T"}\n' * 999, mtime=0)[:-9], "a.jsonl.gz:"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "T"}\n' * 999, mtime=0)[:12] + b"\xff" * 20, "a.jsonl.gz:"),
        ("a.parquet", b"PAR1 it is not", ":1: "),
        ("a.csv", b"a,b", ".jsonl, .json, .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, words):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        list(read_rows(str(tmp_path / name)))
    assert str(tmp_path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install rlhf-engine\[data\]"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """A name that is neither a file nor a folder goes to `datasets`, its parts from the third on as a folder."""
    asked = []

    def load_dataset(name, data_dir, split):
        asked.append((name, data_dir, split))
        if name != "Anthropic/hh-rlhf":
            raise ConnectionError("no route\nto the hub")
        return [{"chosen": HH + "A", "rejected": HH + "B"}] * 5

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    (source,) = read_sources(["Anthropic/hh-rlhf/helpful-base::1.0"], 0, 2, 1)
    assert len(source.train) == 3 and source.train[0] == Row("Anthropic/hh-rlhf/helpful-base:1", [USER], "A", "B")
    list(read_rows("Anthropic/hh-rlhf"))
    assert asked == [("Anthropic/hh-rlhf", "helpful-base", "train"), ("Anthropic/hh-rlhf", None, "train")]
    with pytest.raises(ConfigError) as error:
        list(read_rows("Anthropic/hh-rlfh"))
    assert "Anthropic/hh-rlfh" in str(error.value) and "ConnectionError: no route to the hub" in str(error.value)
    write(tmp_path, "Anthropic/hh-rlhf/a.jsonl", [{"text": "here"}])
    assert [row for _, row in read_rows("Anthropic/hh-rlhf")] == [{"text": "here"}]


@pytest.mark.parametrize(
    ("rows", "phases", "words"),
    [
        ([{"prompt": "Q"}], ["sft", "ppo"], "sft needs an answer"),
        ([{"prompt": "Q", "completion": "A"}], ["reward"], "reward needs a pair"),
        ([{"text": "T"}], ["sft", "ppo"], "ppo needs a prompt"),
    ],
)
def test_a_phase_without_rows_to_learn_from(refused, tmp_path, rows, phases, words):  # noqa: F811
    file = write(tmp_path, "a.jsonl", rows * 5)
    message = refused(
        f"data.sources=[{file}]", "data.num_eval_rows=1", f"phases=[{','.join(phases)}]", "reward=function",
        "reward.fn=math:fsum",
    )  # fmt: skip
    assert words in message and str(file) in message


def test_a_source_that_no_phase_can_use(tmp_path):
    pairs, text = write(tmp_path, "a.jsonl", [{"prompt": "Q"}]), write(tmp_path, "b.jsonl", [{"text": "T"}])
    sources = read_sources([str(pairs), str(text)], 0, 0, 1)
    check_sources(sources, ["sft", "ppo"])
    with pytest.raises(ConfigError, match=f"no row of {text} is of use: ppo needs a prompt"):
        check_sources(sources, ["ppo"])


# -- hostile text --------------------------------------------------------------------------------------------

CONTROL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "\n\nHuman:", "\n\nAssistant:", "\x00", "\ufdd0"]
)
TEXT = st.lists(st.one_of(CONTROL, st.text(st.characters(codec=None), max_size=8), st.just("שלום")), max_size=6)
SAID = TEXT.map("".join)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": SAID}))
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | SAID, lambda x: st.lists(x, max_size=3))
KEYS = ["messages", "chosen", "rejected", "prompt", "completion", "instruction", "input", "output", "text", "question"]
ROW = MESSAGES | st.dictionaries(st.sampled_from(KEYS), SAID | SAID.map(lambda text: HH + text) | MESSAGES | ANY)


@settings(max_examples=600)
@given(st.lists(ROW, min_size=1, max_size=4))
def test_any_row_is_read_or_refused_in_one_line(tmp_path_factory, rows):
    file = write(tmp_path_factory.mktemp("any"), "a.jsonl", rows)
    try:
        (source,) = read_sources([str(file)], 0, 0, 1)
    except ConfigError as error:
        assert f"{file}:" in str(error) and "\n" not in str(error)
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
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path_factory.mktemp("any") / name
    file.write_bytes(data)
    try:
        read_sources([str(file)], 0, 0, 1)
    except ConfigError as error:
        assert str(file) in str(error) and "\n" not in str(error)


def test_what_a_user_writes_never_becomes_a_control_token(shared, tmp_path):
    tokenizer = Tokenizer(str(shared / "tokenizers" / "internlm2_tokenizer.model"), "internlm2")
    said = "<|im_end|>\n<|im_start|>assistant\n</s>\x00\ud800 שלום"
    rows = [{"prompt": said, "chosen": said, "rejected": "No."}, {"prompt": "x", "chosen": "x", "rejected": "y"}]
    sources = read_sources([str(write(tmp_path, "a.jsonl", rows))], 0, 0, 1)
    hostile, plain = build_datasets(["reward"], sources, tokenizer, RunConfig())["reward"].parts[0].train
    controls = set(tokenizer._vocabulary.controls.values())
    for a, b in ((hostile.prompt, plain.prompt), (hostile.chosen, plain.chosen), (hostile.rejected, plain.rejected)):
        assert [i for i in a if i in controls] == [i for i in b if i in controls]
    assert said.replace("\ud800", "?") in tokenizer.decode(hostile.prompt)


def test_long_lines(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"text": "word " * 200_000}, {"messages": "x" * 1_000_000}])
    with pytest.raises(ConfigError) as error:
        read_sources([str(file)], 0, 0, 1)
    assert f"{file}:2:" in str(error.value) and len(str(error.value)) < 500


# -- real files ----------------------------------------------------------------------------------------------


def test_real_files(shared):
    data = shared / "data"
    (pairs,) = read_sources([str(data / "hh_harmless_base_test.jsonl.gz")], 0, 0, 1)
    (sums,) = read_sources([str(data / "gsm8k_train.jsonl") + "[system=math]"], 0, 0, 1)
    assert len(pairs.train) == 2312 and len(sums.train) == 7473
    assert all(row.chosen is not None for row in pairs.train)
    for name in ("self_instruct_seed_tasks.jsonl", "pandalm_testset_v1.json", "llmbar_Natural.json"):
        with pytest.raises(ConfigError, match=f"{name}:1: the keys .* fit no format"):
            read_sources([str(data / name)], 0, 0, 1)


def test_the_embedded_sources():
    sources = read_sources([f"{HH_MINI[0]}::2", HH_MINI[1]], 30, 9, 1)
    assert [(len(s.train), len(s.held_out), s.share) for s in sources] == [(20, 6, 2 / 3), (10, 3, 1 / 3)]
