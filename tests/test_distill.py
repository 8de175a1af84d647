"""On-policy distillation: a teacher of another size, in both of its forms."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
import worlds as launching
from conftest import SMALL, launch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_hf_architectures import make, reference
from test_layout_invariance import assert_same
from test_runs import figures
from test_stops import train

from rlhf_engine.algorithms import distill
from rlhf_engine.config import MeshConfig, ModelConfig, RunConfig
from rlhf_engine.context import TrainState
from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.experience import packed
from rlhf_engine.observing.metrics import Metrics
from rlhf_engine.plan.memory import Numbers, second_head

TEACHER = dict(
    hidden_size=48, intermediate_size=56, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
SIZES = [
    "phases=[distill]", "distill.iterations=2", "distill.prompts_per_iteration=16", "distill.micro_batch_size=4",
    "distill.num_minibatches=1", "distill.eval_prompts=8", "distill.save_every=2",
]  # fmt: skip
SCORED = ["reward.fns=[length]", "distill.reward_coef=0.5", "distill.samples_per_prompt=4"]
SCORED += ["distill.prompts_per_iteration=4"]
FORMS = {
    "token": [],
    "token, scored": SCORED,
    "full": ["distill.kl=full"],
    "full, scored": ["distill.kl=full", *SCORED, "distill.entropy_coef=0.01", "distill.loss_mean=sequences"],
}
LAYOUTS: list[tuple] = [(1, 1, 1), (2, 1, 1), (2, 1, 1, True), (1, 2, 1), (1, 1, 2), (1, 2, 1, False, 1, 2)]
LAYOUTS += [(2, 2, 1, True), (1, 4, 1)]


@pytest.fixture(scope="module")
def teacher(small_run, tmp_path_factory) -> Path:
    """Wider and deeper than the policy, with its tokenizer."""
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    folder = tmp_path_factory.mktemp("teacher")
    make(folder, "LlamaForCausalLM", TEACHER | dict(vocab_size=Tokenizer(str(tokenizer)).vocab_size))
    shutil.copy(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def settings(small_run, teacher, tmp_path_factory) -> list[str]:
    """Of a student with random weights."""
    student = ["model.num_layers=4", f"tokenizer.path={small_run / 'tokenizer' / 'tokenizer.model'}"]
    return [*SMALL, *SIZES, *student, f"teacher.path={teacher}", f"output_dir={tmp_path_factory.mktemp('run')}"]


# -- right values ------------------------------------------------------------------------------------------------


def advantages(x: SimpleNamespace, *, is_scored: bool = False, **options) -> list[list[float]]:
    config = RunConfig()
    for name, value in options.items():
        setattr(config.distill, name, value)
    config.distill.reward_coef = 0.5 if is_scored else 0.0
    ctx = SimpleNamespace(config=config, settings=config.distill, state=TrainState(), metrics=Metrics())
    found = distill.advantage(ctx, None, x)["advantages"]
    assert ctx.metrics._whole["kl/mean"] == pytest.approx((1 - 1.5 - 20 + 2) / 2)  # of a response, by their sums
    return found.tolist()


@pytest.fixture
def x() -> SimpleNamespace:
    """Two responses to a prompt, of three tokens and of two; what stands elsewhere is not to be read."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    mine = torch.tensor([[9.0, -1, -2, -30], [9.0, -0.5, -1, 9]])
    theirs = torch.tensor([[7.0, -2, -0.5, -1], [7.0, -0.5, -3, 7]])
    fields = dict(scores=torch.tensor([3.0, 1.0]), finished=torch.ones(2).bool(), sample_ids=torch.arange(2))
    return SimpleNamespace(log_probs=mine, ref_log_probs=theirs, response_mask=mask, **fields)


def test_advantages_by_hand(x):
    """The teacher's log-prob less the policy's, within +-20 nats, and 0 outside the response."""
    assert advantages(x, kl_coef=2.0) == [[0, -2, 3, 40], [0, 0, -4, 0]]
    assert advantages(x, kl="full") == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_advantages_with_scores_by_hand(x):
    """Half of that of a score against the other response's, which is +-2 with rloo, at every token."""
    options = dict(is_scored=True, advantage="rloo", samples_per_prompt=2)
    assert advantages(x, **options) == [[0, 0, 2.5, 21], [0, -1, -3, 0]]
    assert advantages(x, kl="full", **options) == [[0, 1, 1, 1], [0, -1, -1, 0]]


def test_columns_of_a_ragged_mask_go_to_the_front():
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    x = torch.arange(30.0).view(3, 2, 5)
    assert packed(x, mask).tolist() == [
        [[2, 7], [3, 8], [4, 9]], [[11, 16], [14, 19], [0, 0]], [[0, 0], [0, 0], [0, 0]]
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["token", "full"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1, True)], ids=str)
def test_the_first_step_against_transformers(worlds, small_run, teacher, tmp_path, form, layout):
    """KL of the sampled tokens, and over the whole vocabulary, of materialised logits in float64."""
    policy, temperature = small_run / "sft" / "hf", 0.8
    options = [*SMALL, *SIZES, f"policy.path={policy}", f"teacher.path={teacher}", f"output_dir={tmp_path}"]
    options += [f"distill.kl={form}", "distill.kl_coef=0.7", f"rollout.temperature={temperature}"]
    options += ["rollout.min_new_tokens=0"]
    found = worlds(layout[0]).run(cases.first_iteration, options, layout, "distill")[0]
    lengths, sampled, whole = [], [], []
    models = [reference(path).double() for path in (policy, teacher)]
    prompts = worlds(1).run(prompt_lengths, options)[0]
    for row, start in zip(found["tokens"], prompts, strict=True):
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0, start - 1 : -1] / temperature for model in models]
        log_p, log_q = (each.log_softmax(-1) for each in logits)
        index = torch.tensor(row[start:]).unsqueeze(1)
        sampled += (log_p - log_q).gather(1, index).squeeze(1).tolist()
        whole += (log_p.exp() * (log_p - log_q)).sum(1).tolist()
        lengths.append(len(index))
    of = found["figures"]
    mean = sum(sampled) / len(sampled)
    assert min(whole) > 1e-3 and of["kl/mean"] == pytest.approx(sum(sampled) / len(lengths), rel=1e-5)
    assert of["policy/loss"] == pytest.approx(0.7 * (mean if form == "token" else sum(whole) / len(whole)), rel=1e-5)
    assert abs(of["policy/ratio_first"] - 1) <= 1e-6 and of["rollout/log_prob_gap"] <= 1e-5
    assert ("policy/kl" in of) == (form == "full") and "score/mean" not in of


def prompt_lengths(options: list[str]) -> list[int]:
    from rlhf_engine.algorithms.rollouts import draw

    ctx = cases.context(options, (1, 1, 1))
    ctx.phase = "distill"
    return [len(prompt) for prompt in draw(ctx).prompts]


# -- on any mesh, stopped anywhere -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(worlds, settings):
    """`alone(form)`: the first iteration on one rank."""
    known: dict[str, dict] = {}

    def get(form: str) -> dict:
        if form not in known:
            options = [*settings, *FORMS[form]]
            known[form] = worlds(1).run(cases.first_iteration, options, (1, 1, 1), "distill", True)[0]
        return known[form]

    return get


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mesh_and_micro_batches_change_nothing(worlds, settings, alone, form, layout):
    """Rows dealt otherwise than on one rank, and roles that leave between their stages."""
    wanted = alone(form)
    options = [*settings, *FORMS[form], "distill.micro_batch_size=2", "schedule.residency=offload"]
    if layout[1] > 1:
        options[-1] = "schedule.micro_batch_tokens=150"
    for rank, found in enumerate(worlds(layout[0] * layout[1] * layout[2]).run(
        cases.first_iteration, options, layout, "distill", True
    )):  # fmt: skip
        assert found["tokens"] == wanted["tokens"]
        assert_same(found["figures"], wanted["figures"], f"{form} on {layout}, rank {rank}")
    assert wanted["figures"]["policy/grad_norm"] > 1e-3 and abs(wanted["figures"]["policy/ratio"] - 1) > 1e-3


@pytest.mark.parametrize(("form", "points"), [("token", 7), ("full, scored", 8)])
def test_stopped_again_and_again(worlds, settings, tmp_path, form, points):
    """At each point where it can be: six stages and an update, with scores seven."""
    straight, folder, stops = tmp_path / "straight", tmp_path / "run", 0
    options = [*settings[len(SMALL) :], *FORMS[form], "export_hf=false"]
    assert worlds(2).run(train, straight, (1, 1, 2), None, 1, [*options, f"output_dir={straight}"], "distill")
    options.append(f"output_dir={folder}")
    while not worlds(2).run(train, folder, (1, 1, 2), 1, 1, [*options, "distill.iterations=1"], "distill")[0]:
        stops += 1
    assert stops == points
    assert figures(folder / "distill") == figures(straight / "distill")[:1]


@pytest.mark.parametrize("form", ["token", "full, scored"])
def test_what_verify_says(worlds, settings, tmp_path, form):
    options = [*settings, *FORMS[form], f"output_dir={tmp_path}"]
    assert worlds(2).run(cases.verify, options) == [0, 0]
    lines = {line["name"]: line["outcome"] for line in json.loads((tmp_path / "verify.json").read_text())["checks"]}
    wanted = ["teacher's log-probs", "advantages", "policy loss"]
    assert all(lines[f"distill: {name} against plain"] == "pass" for name in wanted)
    assert ("distill: teacher's states against its log-probs" in lines) == form.startswith("full")


@pytest.mark.parametrize(
    ("fault", "form", "check"),
    [
        ("teacher_a_token_late", "full", "teacher's states against its log-probs"),
        ("forward_kl", "full", "policy loss against plain"),
        ("teacher_unheard", "token", "advantages against plain"),
    ],
)
def test_a_fault_is_caught_by_name(worlds, settings, tmp_path, fault, form, check):
    options = [*settings, *FORMS[form], f"output_dir={tmp_path}", "schedule.residency=offload"]
    assert worlds(1).run(cases.verify, options, fault) == [1]
    lines = json.loads((tmp_path / "verify.json").read_text())["checks"]
    assert f"distill: {check}" in [line["name"] for line in lines if line["outcome"] == "FAIL"]


def test_a_run_and_what_it_leaves(settings, tmp_path):
    """Its report has both policies, its rollouts the KL to the teacher, and the export is the student's."""
    options = ["distill.kl=full", "distill.write_rollouts=true", f"output_dir={tmp_path}", "mesh.dp=1"]
    launch(*settings, *options)
    folder = tmp_path / "distill"
    assert json.loads((folder / "hf" / "config.json").read_text())["hidden_size"] == 32
    summary = json.loads((folder / "summary.json").read_text())
    assert {"eval/kl", "eval/gold_before", "eval/gold_after", "eval/win_rate"} <= summary.keys()
    rows = [json.loads(line) for line in (folder / "rollouts" / "0.jsonl").read_text().splitlines()]
    kl = sum(sum(row["kl"]) for row in rows) / len(rows)
    assert figures(folder)[0]["kl/mean"] == pytest.approx(kl, rel=1e-4) and rows[0]["score"] is None


# -- before anything starts --------------------------------------------------------------------------------------


@pytest.fixture
def said(settings, capsys, monkeypatch):
    """What a command line says, where no rank may start, and its exit status."""
    monkeypatch.setattr(launching.launcher, "start_ranks", lambda *args: pytest.fail("a rank was started"))

    def get(*overrides: str) -> tuple[int, str, str]:
        return launching.launcher.main([*settings, "device=cpu", *overrides]), *capsys.readouterr()

    return get


@pytest.mark.parametrize(
    ("change", "overrides", "words"),
    [
        ({}, ["teacher.path=null"], ["distill has nobody to learn from", "teacher.path=DIR"]),
        ({}, ["teacher.path=nowhere"], ["nowhere", "config.json"]),
        ({}, ["tokenizer.path=null"], ["teacher.path needs the tokenizer", "tokenizer.path"]),
        ({"vocab_size": 500}, [], ["vocabulary of teacher.path", "500"]),
        ({"vocab_size": 9999}, ["distill.kl=full"], ["9999 token ids", "distill.kl=token"]),
        ({"max_position_embeddings": 64}, [], ["data.max_seq_len=192", "64"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, [], ["teacher.path", "is a reward model"]),
        ({}, ["mesh.pp=5", "model.num_layers=6"], []),
        ({}, ["mesh.pp=6", "model.num_layers=6"], ["mesh.pp=6", "num_layers=5"]),
        ({}, ["distill.redraws=1", "distill.samples_per_prompt=2"], ["distill.redraws=1", "distill.reward_coef=0"]),
        ({}, ["distill.advantage=remax"], ["distill.advantage=remax", "distill.reward_coef=0"]),
        ({}, ["distill.reward_coef=1"], ["distill.samples_per_prompt=1"]),
        ({}, ["distill.reward_coef=1", "distill.advantage=none"], ["distill needs a reward model"]),
        ({}, ["distill.kl=all"], ["distill.kl=all", "token, full"]),
    ],
    ids=str,
)
def test_refusals(said, teacher, tmp_path, change, overrides, words):
    """Or, where nothing is wrong, a plan."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).symlink_to(teacher / name)
    config = json.loads((teacher / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    status, out, err = said(f"teacher.path={folder}", "plan=true", *overrides)
    assert status == (2 if words else 0) and (not words or not out), out + err
    assert err.count("\n") == bool(words) and all(word in err for word in words), err


def test_another_tokenizer_is_refused(said, teacher, tmp_path):
    """Though it has as many ids, and only two have changed places."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    last, other = model.pieces[-1].piece, model.pieces[-2].piece
    model.pieces[-1].piece, model.pieces[-2].piece = other, last
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    status, out, err = said(f"teacher.path={folder}")
    assert status == 2 and not out and err.count("\n") == 1
    assert "has another tokenizer than the policy" in err and all(repr(name) in err for name in (last, other)), err


def test_a_plan_knows_the_teacher(said):
    """And what the second head needs where both are read."""
    held = {}
    for form in ("token", "full"):
        _, out, _ = said("plan=true", f"distill.kl={form}", *SCORED)
        assert "ref_log_probs" in out and not re.search(r"^ *(reward|critic|reference) ", out, re.M)
        assert re.search(r"^ *teacher ", out, re.M)
        held[form] = re.search(r"^ *train_policy .*", out, re.M)[0]
    assert held["token"] != held["full"]
    model, mesh = ModelConfig(vocab_size=690, hidden_size=48), MeshConfig(2, 1, 1)
    logits, states, head = 2 * 100 * 384 * 4, 2 * 100 * 48 * 4, 384 * 48 * 4  # of 768 columns half
    assert second_head(model, 100, mesh, Numbers(4, "cpu"), copies=True) == 2 * logits + states + head
    _, out, _ = said("schedule=explain", "mesh.pp=2")
    assert "log_probs + ref_log_probs" in out
