import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from rlhf_engine.observing.report import CHARTS, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
OPTIONAL_END = {"tr", "td", "th", "tbody"}
NAN_COORDINATE = re.compile(r'[",ML]-?(nan|inf)\b')


class Page(HTMLParser):
    """Checks nesting while it collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID | OPTIONAL_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        # As browsers do: the newline that opens a <pre> is not part of it.
        self.words.append(data.removeprefix("\n") if self.open[-1:] == ["pre"] else data)


def ppo_rows(count=30):
    draw = random.Random(7)
    rows = []
    for i in range(1, count + 1):
        rise = 1 - math.exp(-i / 10)
        row = {
            "iteration": i,
            "score/mean": -0.4 + 2.6 * rise + draw.gauss(0, 0.1),
            "gold/mean": -0.2 + 1.7 * rise + draw.gauss(0, 0.12),
            "kl/mean": 9 * rise + draw.gauss(0, 0.2),
            "policy/loss": draw.gauss(-0.01, 0.004),
            "policy/entropy": 2.4 - 1.1 * rise,
            "policy/clip_fraction": abs(draw.gauss(0.08, 0.02)),
            "policy/grad_norm": math.exp(draw.gauss(0, 1.5)),
            "critic/grad_norm": math.exp(draw.gauss(1, 1.5)),
            "policy/learning_rate": 1e-6 * min(1, i / 5),
            "critic/loss": 0.9 * math.exp(-i / 8) + 0.05,
            "critic/explained_variance": rise,
            "rollout/response_length": 64 + 40 * rise + draw.gauss(0, 3),
            "rollout/log_prob_gap": 10 ** draw.uniform(-5, -1),
            "throughput/generated_tokens_per_second": 12_300 + draw.gauss(0, 400),
            "memory/peak_gib": 41.5,
            "time/rollout": 14 + 5 * rise + draw.random(),
            "time/rollout/decode": 11.0,
            "time/log_probs": 3 + draw.random() / 2,
            "time/values": 2.1,
            "time/train_policy": 9 + draw.random(),
            "time/train_critic": 6 + draw.random(),
            "time/total": 36.0,
        }
        if i % 10 == 0:
            row["eval/score"] = 2 * rise
            row["time/checkpoint"] = 8.0
        rows.append(row)
    rows[6]["kl/mean"] = math.nan
    rows[11]["policy/entropy"] = None
    rows[12]["policy/loss"] = math.inf
    del rows[3]["gold/mean"]
    return rows


HOSTILE = "</pre><script>alert(1)</script><img src=http://x.test/y onerror=alert(1)>\x00\ud800 & \"'\n  two"
SUMMARY = {
    "model": "llama-tiny",
    "score_gain": 1.98765,
    "responses": 7680,
    "tokens": 123_456_789,
    "kl": 2.5e-5,
}
SAMPLES = [
    {
        "prompt": "\n\nHuman: How do I bake bread?\n\nAssistant:",
        "before": " Bread is bread.\n\tIt is what it is.",
        "after": " Mix flour, yeast, salt, water.\n  1. Knead for a while.\n  2. Let it rise.\n  3. Bake.",
        "score_before": -0.412,
        "score_after": 1.93,
        "gold_before": -1.0,
        "gold_after": 2.25,
    },
    {"prompt": "Human: Plain", "after": "Only one answer."},
    {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "score_after": math.nan},
]


def write(folder, rows, *, title="PPO", summary=SUMMARY, samples=SAMPLES):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report(folder, title=title, summary=summary, samples=samples)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "report.html"]
    return path.read_text(encoding="utf-8")


def test_one_svg_per_chart(tmp_path):
    rows = ppo_rows()
    text = write(tmp_path, rows)
    page = Page(text)
    keys = {key for row in rows for key in row}
    named = sum(any(key in keys for key in chart) for *_, chart in CHARTS)
    # eval/score, the stages, and in the fold: explained variance, memory, time/total, time/rollout/decode.
    assert page.tags.count("svg") == named + 1 + 1 + 4
    main, fold = text.split("<details>")
    assert main.count("<svg") == named + 2
    assert all(f'aria-label="{key}"' in fold for key in ("memory/peak_gib", "time/total", "time/rollout/decode"))
    words = "".join(page.words)
    assert "score/mean" in words and "gold/mean" in words and "log scale" in words
    assert words.count("1 not finite") == 2
    for figure in ("1.988", "7,680", "123.5M", "2.5e-5", "30 iterations · model llama-tiny"):
        assert figure in words
    assert "kl/mean nan" in text and not NAN_COORDINATE.search(text)


def test_page_loads_nothing_and_escapes_everything(tmp_path):
    row = {"iteration": 1, HOSTILE: 1.0, "time/" + HOSTILE: 2.0}
    text = write(tmp_path, [row, row], title=HOSTILE, summary={HOSTILE: 3, "text": HOSTILE})
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & set(page.tags)
    assert not any(name in {"src", "href", "srcset"} or name.startswith("on") for name, _ in page.attributes)
    assert "@import" not in text and "url(" not in text
    assert "\x00" not in text
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "?")
    assert page.words.count(shown) >= 3  # whitespace and all


def test_what_is_hovered_over_is_said_line_by_line(tmp_path):
    rows = [{"iteration": i, "score/mean": i / 4, "gold/mean": 2.0, "time/rollout": 3.0 * i} for i in (1, 2)]
    words = Page(write(tmp_path, rows)).words
    assert {"iteration 2\nscore/mean 0.5\ngold/mean 2", "iteration 2\nrollout 6 s"} <= set(words)


def event(name, kind, start, length, rank=0):
    place = {"pid": rank, "tid": int(kind != "stage"), "ts": start, "dur": length}
    return {"name": name, "cat": kind, **place, "args": {"iteration": 4}}


def test_what_each_rank_did_is_drawn_from_the_trace(tmp_path):
    old = event("rollout", "stage", 0, 10) | {"args": {"iteration": 3}}
    work = [event("policy", "forward", 20, 5e5), event("forward", "wait", 5e5, 1e5, rank=1)]
    events = [old, event("train_policy", "stage", 20, 1e6), *work, event(HOSTILE, "stage", 1e6, 20, rank=1)]
    (tmp_path / "trace.json").write_text("[\n" + "".join(json.dumps(e) + ",\n" for e in events))
    text = write_report(tmp_path, title="SFT", summary={}, samples=[]).read_text()
    page = Page(text)
    hints = {"train_policy (stage), 1000.0 ms", "policy (forward), 500.0 ms", "forward (wait), 100.0 ms"}
    assert hints | {"Iteration 4, 1.00 s", "rank 1"} <= set(page.words) and "rank 2" not in page.words
    drawn = [value for name, value in page.attributes if name == "width" and value != "device-width"]
    assert drawn == ["1072.0", "536.0", "107.2", "0.3"]  # of 1072 for the second; what is too short is still seen
    assert "script" not in page.tags and not NAN_COORDINATE.search(text)


def test_dialogues(tmp_path):
    words = Page(write(tmp_path, [])).words
    assert " Bread is bread.\n\tIt is what it is." in words
    assert "\n\nHuman: How do I bake bread?\n\nAssistant:" in words
    assert words.count("before") == 2 and words.count("after") == 2 and words.count("answer") == 1
    assert " (+2.34)" in words and " (+3.25)" in words


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"iteration": 1, "kl/mean": 0.5, "time/rollout": 1.0}],
        [{"iteration": 1, "kl/mean": math.nan, "time/rollout": math.nan}],
        [{"iteration": i, "kl/mean": 0.0, "critic/loss": 3.0, "time/rollout": 0.0} for i in range(5)],
        [
            {"kl/mean": 1e-300},
            {"kl/mean": 1e99},
            {"kl/mean": -1e99},
            {"kl/mean": 10**400},
            {"critic/loss": 5e-324},
        ],
        [{"critic/loss": 1e-320}, {"critic/loss": 1.0}, {"critic/loss": 1.0 + 1e-15, "iteration": 1e90}],
        [{"iteration": i, "kl/mean": math.sin(i / 500), "time/rollout": 1.0} for i in range(20_000)],
        [{"iteration": i, **{f"time/stage_{j}": j + 1.0 for j in range(12)}} for i in range(1, 8)],
    ],
    ids=["empty", "one", "nan", "constant", "huge", "tiny", "long", "stages"],
)
def test_odd_logs(tmp_path, rows):
    text = write(tmp_path, rows, samples=[])
    Page(text)
    assert len(text) < 100_000
    assert not NAN_COORDINATE.search(text)


def test_missing_log_broken_lines_and_resumed_run(tmp_path):
    path = write_report(tmp_path, title="SFT", summary={}, samples=[])
    assert "No metrics" in path.read_text()
    lines = [
        '{"iteration": 1, "eval/loss": 4}',
        '{"iteration": 2, "eval/loss": 5}',
        '{"iteration": 2, "eval/lo',
    ]
    lines += ["", "[1]", '{"iteration": 2, "eval/loss": 3.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = write_report(tmp_path, title="SFT", summary={}, samples=[]).read_text()
    assert "2 iterations" in text and ">3.25<" in text and "eval/loss 5" not in text
