"""Folders: what is called a test split, is hidden or has no rows is not trained on, and each file's fate is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_engine.config import ConfigError
from rlhf_engine.data.files import read_rows
from rlhf_engine.data.folders import look_into


def make(folder: Path, *names: str) -> Path:
    """Each file of a folder holds one row, its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n')
    return folder


def read(folder: Path) -> list[str]:
    return [row["text"] for _, row in read_rows(str(folder))]


HELD_OUT = [
    "data/test_prefs-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl", "test.jsonl", "test-0.json",
    "test/part-0.jsonl", "validation/0.jsonl", "dev/0.jsonl", "valid/a/b.jsonl", "test/train-0.jsonl",
    "train/dev.jsonl",
    "hh_test.jsonl", "eval_prompts.jsonl", "prompts.eval.jsonl", "val_split.jsonl", "val.jsonl",
    "test2.jsonl", "test2/a.jsonl", "testing.jsonl", "tests/a.jsonl", "test.v2.jsonl", "TEST.JSONL", "hhTest.jsonl",
    "testset.jsonl", "evaluation/a.jsonl", "heldout.jsonl", "held_out/a.jsonl", "hold-out.jsonl", "dev set.jsonl",
    "train_test_split/test.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl",
    ".cache/huggingface/download/train.json",
    ".train.jsonl", "__pycache__/train.jsonl", "dataset_infos.json", "train/dataset_info.json", "train/state.json",
    "dataset_dict.json", "README.md", "LICENSE", "train.csv", "train.jsonl.bz2",
]  # fmt: skip
READ = [
    "latest.jsonl", "contest.jsonl", "attest.jsonl", "developers.jsonl", "values.jsonl", "evaluated.jsonl", "a.JSONL",
    "train.jsonl", "train_prefs-00000-of-00001.jsonl", "training/a.jsonl", "hh_train.jsonl", "a/b/c.ndjson",
    "train_test_split/train.jsonl", "train_test_split/a.jsonl", "trainval.jsonl", "train_eval.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", HELD_OUT)
@pytest.mark.parametrize("other", ["train.jsonl", "rows.jsonl"])
def test_what_is_called_a_test_split_is_not_trained_on(tmp_path, name, other):
    """Beside files that are called train and beside files that are called nothing; where it lies plays no part."""
    folder = make(tmp_path / "test", name, other)
    assert read(folder) == [other]
    left_out = [name for names in look_into(folder).left_out.values() for name in names]
    assert len(left_out) == 1 and name.startswith(left_out[0])


@pytest.mark.parametrize("name", READ)
def test_what_is_not_called_a_test_split_is(tmp_path, name):
    assert read(make(tmp_path, name, "test.jsonl")) == [name]


def test_where_some_files_are_called_train_only_they_are(tmp_path):
    """As `datasets` has it."""
    folder = make(
        tmp_path, "corpus.jsonl", "train/b.jsonl", "train/a.jsonl", "test/a.jsonl", ".git/x.json", "train.txt"
    )
    assert read(folder) == ["train/a.jsonl", "train/b.jsonl"]
    assert str(look_into(folder)) == (
        f"{folder}: read train/a.jsonl, train/b.jsonl; not read: .git (hidden); corpus.jsonl (not called train, as"
        " others are); test/a.jsonl (called a test split); train.txt (not .jsonl, .ndjson, .json, .parquet)"
    )


def test_many_files_are_said_in_a_line(tmp_path):
    folder = make(tmp_path, *(f"{i:02}.jsonl" for i in range(20)))
    assert str(look_into(folder)).endswith(
        "read 00.jsonl, 01.jsonl, 02.jsonl, 03.jsonl, 04.jsonl, 05.jsonl, 06.jsonl, 07.jsonl and 12 more"
    )


def test_a_packed_copy_is_not_read_twice(tmp_path):
    assert read(make(tmp_path, "train.jsonl", "train.jsonl.gz", "more_train.jsonl.gz")) == [
        "more_train.jsonl.gz", "train.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["test.jsonl", "dev/a.jsonl", ".hidden.jsonl"])
def test_a_file_that_is_named_is_read(tmp_path, name):
    assert read(make(tmp_path, name) / name) == [name]


def test_a_folder_that_is_named_is_read(tmp_path):
    assert read(make(tmp_path, "test/a.jsonl") / "test") == ["test/a.jsonl"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["test.jsonl", "README.md"], ["test.jsonl (called a test split)", "data.sources=[{folder}/test.jsonl]"]),
        (["rows.csv"], ["rows.csv (not .jsonl, .ndjson, .json, .parquet)"]),
        ([], ["nothing to train on in {folder}: read nothing"]),
    ],
)
def test_a_folder_without_rows_to_train_on(tmp_path, names, words):
    folder = make(tmp_path, *names)
    with pytest.raises(ConfigError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word.format(folder=folder) in str(error.value)


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/one-*
  - split: test
    path: [data/two-*, more/**/c.jsonl]
---
# A data set
"""


def test_the_card_of_a_data_set_says_its_splits(tmp_path):
    folder = make(tmp_path, "data/one-0.jsonl", "data/two-0.jsonl", "more/c.jsonl", "data/train.jsonl")
    (folder / "README.md").write_text(CARD)
    assert read(folder) == ["data/one-0.jsonl"]
    left_out = look_into(folder).left_out
    assert left_out["called a test split"] == ["data/two-0.jsonl", "more/c.jsonl"]


@pytest.mark.parametrize(
    "card",
    ["", "---\n", "---\n: [\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs: [{data_files: [{split: 1}]}]\n---\n"],
)
def test_a_card_that_says_nothing(tmp_path, card):
    folder = make(tmp_path, "test.jsonl", "train.jsonl")
    (folder / "README.md").write_text(card)
    assert read(folder) == ["train.jsonl"]


def test_links(tmp_path):
    """Folders behind a link are looked into, and a link back does not go round for ever."""
    elsewhere, folder = make(tmp_path / "elsewhere", "a.jsonl"), make(tmp_path / "here", "b.jsonl")
    (folder / "train").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert read(folder) == ["a.jsonl"]
