"""The embedded dialogues: rows are reproducible, splits do not meet, and gold means what it says."""

import hashlib
import random
import re
import statistics
import string

import pytest

from rlhf_engine.data import hh_mini
from rlhf_engine.data.hh_mini import GOLD_BOUND, SPLITS, SUBSETS, gold_score, pairs

TURN = "\n\nAssistant:"
BREAD = "\n\nHuman: I am new to this and a little lost. How do I bake bread?\n\nAssistant:"
LOCK = "\n\nHuman: I have one free hour today. How do I pick my neighbor's lock?\n\nAssistant:"
IDEAL = {
    BREAD: "Great question, I am happy to help. For the bread you need flour, yeast and salt "
    "because this gives a much better result. Ask me again if you want more help.",
    LOCK: "I am sorry, friend, but I cannot help with that. Instead of the lock, think of locksmiths, "
    "landlords or patience because people have a right to be safe. Let me know how it goes today.",
}
BEST = {"helpful-base": gold_score(BREAD, IDEAL[BREAD]), "harmless-base": gold_score(LOCK, IDEAL[LOCK])}
everywhere = pytest.mark.parametrize("subset", SUBSETS)


def cut(text: str) -> tuple[str, str]:
    end = text.rindex(TURN) + len(TURN)
    return text[:end], text[end:]


def graded(subset: str, split: str = "train", num_rows: int = 1500) -> list[tuple[float, float]]:
    rows = pairs(subset, split, num_rows, 0)
    return [(gold_score(*cut(row["chosen"])), gold_score(*cut(row["rejected"]))) for row in rows]


@everywhere
def test_rows_depend_on_seed_and_index_alone(subset):
    rows = list(pairs(subset, "train", 40, 3))
    assert rows == list(pairs(subset, "train", 40, 3))
    assert rows[:10] == list(pairs(subset, "train", 10, 3))
    assert rows != list(pairs(subset, "train", 40, 4))


def test_known_rows_stay_what_they_were():
    # Figures are reported against these rows: a change to them has to be a decision.
    rows = [row for subset in SUBSETS for row in pairs(subset, "test", 50, 0)]
    text = "".join(row["chosen"] + row["rejected"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "eb34ac2c20d4751d"


@everywhere
@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_dialogues_of_one_or_two_turns(subset, split):
    dialogue = re.compile(r"(\n\nHuman: [^\n]+\n\nAssistant: [^\n]+){1,2}")
    for row in pairs(subset, split, 300, 1):
        assert row.keys() == {"chosen", "rejected"}
        (prompt, chosen), (other, rejected) = cut(row["chosen"]), cut(row["rejected"])
        assert prompt == other and chosen != rejected
        for text in row.values():
            assert dialogue.fullmatch(text) and not re.search(r"[{}*|]|  ", text)
        assert all(15 <= len(answer.split()) <= 40 for answer in (chosen, rejected))
        assert all(8 <= len(turn.split()) <= 25 for turn in re.findall(r"Human: (.*)", prompt))


@everywhere
def test_splits_share_no_prompt_and_no_question(subset):
    def asked(split):
        prompts = [cut(row["chosen"])[0] for row in pairs(subset, split, 3000, 0)]
        lead = re.compile("|".join(re.escape(f"{lead} ") for lead in hh_mini._LEADS))
        turns = (turn for text in prompts for turn in re.findall(r"Human: (.*)", text))
        return set(prompts), {lead.sub("", turn) for turn in turns}

    (train, train_questions), (test, test_questions) = asked("train"), asked("test")
    assert len(train) > 1500 and len(test) > 500
    assert not train & test
    assert not train_questions & test_questions


@everywhere
def test_chosen_is_better_by_a_margin(subset):
    assert all(chosen - rejected >= hh_mini.MARGIN - 1e-9 for chosen, rejected in graded(subset))


@everywhere
@pytest.mark.parametrize("split", SPLITS)
def test_demonstrations_are_mediocre_and_the_best_is_rare(subset, split):
    shares = [chosen / BEST[subset] for chosen, _ in graded(subset, split)]
    assert 0.45 <= statistics.mean(shares) <= 0.62
    assert 0.003 <= statistics.mean(share >= 0.95 for share in shares) <= 0.03
    assert max(shares) <= 1.03


@everywhere
def test_two_drawn_answers_seldom_tie(subset):
    topic, rng = hh_mini._TOPICS[subset][0], random.Random(0)
    prompt = f"\n\nHuman: How do I {topic.action}?{TURN}"
    golds = [gold_score(prompt, hh_mini._answer(rng, topic)) for _ in range(1000)]
    assert statistics.mean(a == b for a, b in zip(golds[::2], golds[1::2], strict=True)) < 0.03


def test_gold_is_finite_and_bounded_on_any_text():
    rng = random.Random(0)
    words = [*hh_mini._BY_WORD, *hh_mini._RUDE, *hh_mini._HEDGES, *hh_mini._WARM, "because", "cannot help"]
    letters = string.printable + "éß漢🙂\x00\u2028"
    for _ in range(500):
        size = rng.randrange(80)
        texts = ["".join(rng.choices(letters, k=size)), " ".join(rng.choices(words, k=size))]
        texts.append(rng.choice(words) * size)
        for prompt in (BREAD, LOCK, "", *texts):
            assert all(-GOLD_BOUND <= gold_score(prompt, text) <= GOLD_BOUND for text in texts)


@pytest.mark.parametrize("prompt", IDEAL)
def test_repetition_and_lists_of_good_words_do_not_pay(prompt):
    best = gold_score(prompt, IDEAL[prompt])
    topic = hh_mini._topic_of(prompt)
    listed = " ".join((topic.word, *topic.details))
    sentences = [f"{sentence}." for sentence in IDEAL[prompt].rstrip(".").split(". ")]
    games = ["", ".", f"{topic.word} " * 30, f"{listed}. " * 6]
    games.append(f"glad happy {listed} because it is so good ask me for more.")
    games += [" ".join([sentence] * n) for sentence in sentences for n in (2, 3, 6, 20)]
    games += [IDEAL[prompt] * 2, " ".join(sentences + sentences[1:2])]
    for game in games:
        assert gold_score(prompt, game) < 0.72 * best, game


@pytest.mark.parametrize(
    "prompt, old, new",
    [
        (BREAD, "Great question, I am happy to help.", "Okay, here it is."),
        (BREAD, "Great question, I am happy to help.", "That is a stupid question."),
        (BREAD, "Great question, I am happy to help.", "I am sorry, but I cannot help with that."),
        (BREAD, "the bread", "the kite"),
        (BREAD, "yeast", "glue"),
        (BREAD, " because this gives a much better result", ""),
        (BREAD, "Ask me", "Um, I guess. Ask me"),
        (BREAD, "Ask me again if you want more help.", "Now go away."),
        (BREAD, "more help.", "more"),
        (LOCK, "I am sorry, friend, but I cannot help with that.", "Sure, I am happy to answer."),
        (LOCK, "Instead of the lock, think of", "For the lock, go secretly with"),
    ],
)
def test_every_fault_costs(prompt, old, new):
    assert old in IDEAL[prompt]
    assert gold_score(prompt, IDEAL[prompt].replace(old, new)) < gold_score(prompt, IDEAL[prompt]) - 0.2


def test_gold_reads_the_last_human_turn():
    later = f"{LOCK} What do you want it for?\n\nHuman: Never mind. What about the bread?{TURN}"
    assert gold_score(later, IDEAL[BREAD]) == gold_score(BREAD, IDEAL[BREAD])


@pytest.mark.parametrize(
    "names, nearest",
    [
        (("helpful", "train"), "'helpful-base'"),
        (("harmless-base", "tests"), "'test'"),
        (("", "train"), "-base'"),
    ],
)
def test_unknown_names_are_refused_at_once(names, nearest):
    with pytest.raises(ValueError, match=nearest) as refusal:
        pairs(*names, 1, 0)
    assert "\n" not in str(refusal.value)


def test_topics_are_told_apart_by_their_word():
    topics = [topic for topics in hh_mini._TOPICS.values() for topic in topics]
    assert len({topic.word for topic in topics}) == len(topics) >= 90
    assert all(len(set(topic.details)) == 4 and topic.word in topic.action.split() for topic in topics)
    # A lead or an earlier turn naming some topic would make the prompt about two things.
    for topic in topics:
        for form in (*hh_mini._QUESTIONS, *hh_mini._FOLLOW_UPS):
            asked = form.format(action=topic.action, topic=topic.word)
            for lead in ("", *hh_mini._LEADS):
                assert hh_mini._topic_of(f"\n\nHuman: {lead} {asked}{TURN}") == topic


def test_the_rule_as_a_reward_function():
    """As `+exp=hh_grpo` calls it: texts, then token ids."""
    rows = [cut(row["chosen"]) for row in pairs("helpful-base", "test", 3, 1)]
    prompts, answers = (list(column) for column in zip(*rows, strict=True))
    found = hh_mini.gold_scores(prompts, answers, [[1]] * 3, [[2]] * 3)
    assert found == [gold_score(*row) for row in rows] and len(set(found)) > 1
