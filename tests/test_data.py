"""Dialogues, tokens, masks and the order of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mixed import read, source_of

from rlhf_engine.config import ConfigError, DataConfig, RolloutConfig, RunConfig
from rlhf_engine.data.chat import text_of
from rlhf_engine.data.dataset import Dataset, Part, build_datasets
from rlhf_engine.data.formats import Row
from rlhf_engine.data.messages import parse_hh
from rlhf_engine.data.sources import HH_MINI, PRESETS, Source, Spec, mixture
from rlhf_engine.data.tokenizer import Tokenizer, train_tokenizer
from rlhf_engine.launching.header import remarks

HELPFUL, HARMLESS = HH_MINI


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sources = read(*HH_MINI, num_rows=200, num_eval_rows=10)
    train_tokenizer([r.chosen for s in sources for r in s.train] + ["\n\nHuman: \n\nAssistant:"] * 20, path, 500)
    return Tokenizer(str(path))


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def datasets(tokenizer, cache):
    def get(*sources: str, phases=("sft", "reward", "ppo"), **changes) -> dict[str, Dataset]:
        config = RunConfig(data=DataConfig(**{"max_seq_len": 512, "cache_dir": cache, **changes}), seed=5)
        return build_datasets(phases, mixture(sources or HH_MINI, 90, 10, 1), tokenizer, config)

    return get


def named(shares: dict[str, float], rows: int = 100, **settings) -> Dataset:
    """A mixture whose examples are their source's name and a number."""
    total = sum(shares.values())
    parts = [
        Part(Source(Spec(name), weight / total, 0), weight / total, [(name, i) for i in range(rows)], [], Counter())
        for name, weight in shares.items()
    ]
    return Dataset(parts, 3, **settings)


@pytest.mark.parametrize(
    "weights",
    [{"helpful": 1.0, "harmless": 0.5}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 5.0, "b": 0.3, "c": 1.1, "d": 0.02}],
    ids=len,
)
def test_each_batch_has_the_shares_and_the_run_has_them_exactly(weights):
    mixed, size = named(weights), 64
    whole, total = Counter(), sum(weights.values())
    for start in range(0, size * 1000, size):
        found = Counter(name for name, _ in mixed.batch(start, size))
        whole += found
        if len(weights) == 2:
            assert (found["helpful"], found["harmless"]) in ((43, 21), (42, 22))
        for name, weight in weights.items():
            assert abs(found[name] - weight / total * size) < 2  # less than a row, and what the last batch owed
            assert abs(whole[name] - weight / total * (start + size)) < 1


def test_in_data_keeps_the_shares_over_the_data_alone():
    weights = {"helpful": 1.0, "harmless": 0.5}
    mixed = named(weights, strategy="in_data")
    blocks = [Counter(name for name, _ in mixed.batch(start, 200)) for start in range(0, 6000, 200)]
    assert all(abs(block["helpful"] - 133.3) < 1 for block in blocks)
    batches = [Counter(name for name, _ in mixed.batch(start, 20))["helpful"] for start in range(0, 6000, 20)]
    assert min(batches) < 11 and max(batches) > 15
    again = named(weights, strategy="in_data")
    assert again.batch(777, 300) == [mixed[i] for i in range(777, 1077)]


def test_every_row_is_seen_before_one_is_seen_again(datasets):
    one = datasets(HELPFUL)["sft"]
    n = len(one)
    for epoch in range(3):
        rows = [one[epoch * n + i] for i in range(n)]
        assert sorted(map(str, rows)) == sorted(map(str, one.parts[0].train))
    assert one.batch(0, n) != one.batch(n, n)


def test_the_order_is_a_function_of_the_position(datasets):
    first, second = datasets()["ppo"], datasets()["ppo"]
    assert first.batch(70, 20) == [second[i] for i in range(70, 90)]


def test_rows_that_do_not_fit_are_left_out_and_counted(datasets):
    everything = datasets()["sft"]
    prompts = sorted(len(everything[i].prompt) for i in range(len(everything)))
    limits = {"min_prompt_len": prompts[10], "max_prompt_len": prompts[-10], "max_seq_len": prompts[-10] + 60}
    for phase, dataset in datasets(**limits).items():
        reasons = sum((part.left_out for part in dataset.parts), Counter())
        assert len(dataset) + reasons.total() == 90 and len(dataset.held_out) < 10
        assert reasons["prompt too long"] and reasons["prompt too short"]
        assert reasons["too long"]  # in PPO with a response of 64 tokens, the longest
        assert all(limits["min_prompt_len"] <= len(e.prompt) <= limits["max_prompt_len"] for e in dataset.batch(0, 80))
        if phase == "reward":
            assert all(len(e.prompt + e.rejected) <= limits["max_seq_len"] for e in dataset.batch(0, 80))
    with pytest.raises(ConfigError, match=r"no row of hh_mini/helpful-base fits data\.max_seq_len=5"):
        datasets(max_seq_len=5)


USER = [{"role": "user", "content": "Which way?"}]
BLANK = Row("f:5", [{"role": "user", "content": " "}], "", "Right!")
PAIR, ANSWER = Row("f:1", USER, "Left.", "Right!"), Row("f:2", USER, "Left.")
PROMPT, TEXT = Row("f:3", USER), Row("f:4", [], "Once upon a time. " * 20)


def test_each_phase_takes_what_it_can_use(tokenizer, tmp_path):
    sources = [
        source_of(tmp_path / "pairs.jsonl", [PAIR] * 4 + [ANSWER, BLANK, PAIR], 0.5),
        source_of(tmp_path / "prompts.jsonl", [PROMPT] * 5, 0.25),
        source_of(tmp_path / "text.jsonl", [TEXT] * 3, 0.25),
    ]
    data = DataConfig(max_seq_len=50, cache_dir=str(tmp_path))
    config = RunConfig(data=data, rollout=RolloutConfig(max_new_tokens=8))
    found = build_datasets(["sft", "reward", "ppo", "ptx"], sources, tokenizer, config)
    shares = {phase: {Path(p.source.spec.name).stem: p.share for p in data.parts} for phase, data in found.items()}
    assert shares["sft"] == shares["ptx"] == {"pairs": pytest.approx(2 / 3), "text": pytest.approx(1 / 3)}
    assert shares["reward"] == {"pairs": 1.0}
    assert shares["ppo"] == {"pairs": pytest.approx(2 / 3), "prompts": pytest.approx(1 / 3)}
    assert found["reward"].parts[0].left_out == {"without two different answers to one prompt": 2} and [
        len(found[name].parts[0].train) for name in ("sft", "reward", "ppo")
    ] == [5, 4, 5]
    pieces = [example.chosen for example in found["ptx"].parts[1].train]
    assert max(map(len, pieces)) == 50
    assert [i for piece in pieces for i in piece] == tokenizer.encode(TEXT.chosen) * 2


def test_good_and_bad_answers_one_by_one(tokenizer, tmp_path):
    """Both sides of a pair, and answers that are labelled; a bad one is nothing to the other phases but a prompt."""
    rows = [PAIR, Row("f:6", USER, None, "Right!"), ANSWER, PROMPT, BLANK]
    config = RunConfig(data=DataConfig(cache_dir=str(tmp_path)), rollout=RolloutConfig(max_new_tokens=8))
    found = build_datasets(
        ["sft", "ppo", "kto"], [source_of(tmp_path / "labels.jsonl", [*rows, PAIR])], tokenizer, config
    )

    def text(side: list[int] | None) -> str | None:
        return None if side is None else tokenizer.decode(side).strip()

    train, held_out = found["kto"].parts[0].train, found["kto"].held_out
    assert [(text(example.chosen), text(example.rejected)) for example in (*train, *held_out)] == [
        ("Left.", None), (None, "Right!"), (None, "Right!"), ("Left.", None), ("Left.", None), (None, "Right!"),
    ]  # fmt: skip
    assert len(train) == 4 and len({example.prompt_text for example in train}) == 1
    assert found["kto"].parts[0].left_out == {"without a prompt and an answer": 2}
    assert [len(found[phase].parts[0].train) for phase in ("sft", "ppo")] == [2, 4]
    assert len({dataset.digest() for dataset in found.values()}) == 3


def test_a_source_with_nothing_for_a_phase_is_said(tokenizer, cache, tmp_path):
    """And so is what was read of a folder."""
    (tmp_path / "test.jsonl").touch()
    prompts = source_of(tmp_path / "train.jsonl", [PROMPT] * 5)
    config = RunConfig(data=DataConfig(sources=["pairs", str(tmp_path)], cache_dir=cache))
    sources = [Source(Spec(HELPFUL), 1.0, 1, generated=(5, 1)), replace(prompts, spec=Spec(str(tmp_path)))]
    found = build_datasets(["sft", "reward", "ppo"], sources, tokenizer, config)
    plan = SimpleNamespace(config=config, sources=sources, beside={})
    assert list(remarks(plan, found)) == [
        f"{tmp_path}: read train.jsonl; not read: test.jsonl (called a test split)",
        f"{tmp_path}: no row has an answer or text: sft draws from the other sources alone",
        f"{tmp_path}: no row has two different answers to one prompt: reward draws from the other sources alone",
    ]


def test_presets_stand_in_front(tokenizer, tmp_path):
    """The policy's in front of its dialogue, and in front of the reward model's where that has none of its own."""

    def example(**presets):
        prompt = [{"role": "system", "content": "Be brief."}, *USER]
        source = source_of(tmp_path / "a.jsonl", [Row("f:1", prompt, "Left.", "Right!")] * 2, **presets)
        config = RunConfig(data=DataConfig(cache_dir=str(tmp_path)))
        return build_datasets(["reward"], [source], tokenizer, config)["reward"][0]

    plain, system = example(), example(system="math")
    own, only = example(system="math", reward="harmless"), example(reward="harmless")
    back = example(system="math", reward="default")
    assert tokenizer.decode(plain.prompt) == "Be brief.\n\nHuman: Which way?\n\nAssistant:"
    assert tokenizer.decode(system.prompt) == PRESETS["math"] + "\n\nHuman: Which way?\n\nAssistant:"
    assert system.reward_prompt == system.prompt == own.prompt == back.prompt
    assert own.reward_prompt == only.reward_prompt and tokenizer.decode(own.reward_prompt).startswith(
        PRESETS["harmless"]
    )
    assert only.prompt == plain.prompt == back.reward_prompt
    assert {tuple(e.chosen) for e in (plain, system, own, only, back)} == {tuple(plain.chosen)}
