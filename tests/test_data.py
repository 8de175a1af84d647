"""Dialogues, tokens, masks and the order of rows."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_engine.config import ConfigError, DataConfig
from rlhf_engine.data.chat import text_of
from rlhf_engine.data.dataset import Dataset
from rlhf_engine.data.sources import parse_hh, parse_weight, read_sources
from rlhf_engine.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sources = read_sources(DataConfig(num_rows=200, num_eval_rows=10), 1)
    train_tokenizer([r.chosen for s in sources for r in s.train] + ["\n\nHuman: \n\nAssistant:"] * 20, path, 500)
    return Tokenizer(str(path))


def test_hh_text_to_messages():
    text = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nHuman: Four\n\nAssistant:"
    assert parse_hh(text, "f:1", "chosen") == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\nFour"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(("source", "parsed"), [("a.jsonl", ("a.jsonl", 1.0)), ("a::b::0.5", ("a::b", 0.5))])
def test_weights(source, parsed):
    assert parse_weight(source) == parsed


@pytest.mark.parametrize("source", ["a::0", "a::-1", "a::inf", "a::nan", "a::"])
def test_bad_weights(source):
    with pytest.raises(ConfigError, match="weight"):
        parse_weight(source)


def test_a_prompt_is_the_beginning_of_its_dialogue(tokenizer):
    """What the policy is prompted with in PPO is what SFT saw in front of an answer."""
    messages = parse_hh("\n\nHuman: Tell me\n\nAssistant: Sure.\n\nHuman: And?\n\nAssistant: More.", "", "")
    whole, spoken = tokenizer.render(messages)
    prompt = tokenizer.render_prompt(messages[:-1])
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*tokenizer.encode(" More.", continues=True), tokenizer.end_id]
    said = [token for token, mine in zip(whole, spoken, strict=True) if mine]
    assert tokenizer.decode(said) == " Sure. More." and said.count(tokenizer.end_id) == 2
    assert tokenizer.decode(prompt) == text_of(messages[:-1])


@pytest.mark.parametrize("text", ["<s></s><unk>", "\x00 a\udc80 b", "מִלָּה 漢字 🙂", "  two  spaces\n\n\n", "</s>" * 5])
def test_hostile_text_is_text(tokenizer, text):
    """Control tokens written by a user stay letters, and what has bytes comes back as it was."""
    ids = tokenizer.encode("a" + text, continues=True)
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == ("a" + text).encode("utf-8", "replace").decode()


def dataset(tokenizer, **changes) -> Dataset:
    config = DataConfig(num_rows=90, num_eval_rows=10, **changes)
    return Dataset(read_sources(config, 1), tokenizer, config, seed=5)


def test_shares_are_exact(tokenizer):
    mixed = dataset(tokenizer, sources=["helpful-base::1.0", "harmless-base::0.5"], max_seq_len=512)
    helpful = {id(row) for row in mixed._parts[0]}
    for start in range(0, 300, 3):
        assert sum(id(mixed[i]) in helpful for i in range(start, start + 3)) == 2


def test_every_row_is_seen_before_one_is_seen_again(tokenizer):
    one = dataset(tokenizer, sources=["helpful-base"], max_seq_len=512)
    n = len(one)
    for epoch in range(3):
        assert Counter(id(one[epoch * n + i]) for i in range(n)).most_common(1)[0][1] == 1
    assert [id(one[i]) for i in range(n)] != [id(one[n + i]) for i in range(n)]


def test_the_order_is_a_function_of_the_position(tokenizer):
    first, second = dataset(tokenizer), dataset(tokenizer)
    assert first.batch(70, 20) == [second[i] for i in range(70, 90)]


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer):
    short = dataset(tokenizer, max_seq_len=100)
    assert 0 < short.num_dropped < 100 and len(short) + len(short.held_out) + short.num_dropped == 100
    assert all(len(short[i].prompt + short[i].chosen) <= 100 for i in range(50))
    with pytest.raises(ConfigError, match=r"no row of helpful-base fits data\.max_seq_len=5"):
        dataset(tokenizer, max_seq_len=5)
