"""Stages that share a pipeline give what they give one after the other, to the bit."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
import worlds
from conftest import SMALL, launch
from test_hf_architectures import SIZES, make

from rlhf_engine.algorithms.ppo import PPO, stage_table
from rlhf_engine.config import RunConfig, ScheduleConfig
from rlhf_engine.models.stream import _Stream
from rlhf_engine.models.work import Work
from rlhf_engine.observing.timeline import read_trace
from rlhf_engine.observing.trace import Span, Stream, Trace, append_events, cut_events
from rlhf_engine.schedule import Schedule
from rlhf_engine.trainer import close_trace

TOGETHER = ["time/log_probs+ref_log_probs+score+values", "time/train_critic+train_policy"]


@pytest.fixture(scope="module")
def settings(small_run, tmp_path_factory) -> list[str]:
    """PPO whose critic and reward model have another depth and width than the policy, and one token more a row."""
    sizes = SIZES | dict(head_dim=10, hidden_size=24, num_hidden_layers=5, max_position_embeddings=256, num_labels=1)
    reward = make(tmp_path_factory.mktemp("reward"), "LlamaForSequenceClassification", sizes | dict(vocab_size=700))
    tokenizer = small_run / "tokenizer" / "tokenizer.model"
    return [
        *SMALL, "model.num_layers=4", f"tokenizer.path={tokenizer}", f"reward.path={reward}", "phases=[ppo]",
        f"output_dir={small_run}/nowhere", "ppo.epochs=2", "ppo.num_minibatches=2",
    ]  # fmt: skip


LAYOUTS = [(1, 2, 1), (2, 2, 1), (2, 2, 1, True), (1, 4, 1), (1, 2, 1, False, 1, 2), (2, 2, 1, True, 1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_streams_change_nothing(worlds, settings, layout):
    world = worlds(layout[0] * layout[1])
    together = world.run(cases.first_iteration, settings, layout, "ppo")
    off = ["schedule.infer_stream=false", "schedule.train_stream=false"]
    apart = world.run(cases.first_iteration, [*settings, *off], layout, "ppo")
    for mine, theirs in zip(together, apart, strict=True):
        assert set(TOGETHER) <= set(mine.pop("times")) and not set(TOGETHER) & set(theirs.pop("times"))
        assert mine == theirs
    assert together[0]["figures"]["policy/grad_norm"] > 0 and together[0]["figures"]["critic/grad_norm"] > 0


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ((1, 1, 2), []),
        ((1, 2, 2), []),
        # one micro-batch of each role, filled up to as many as there are stages
        ((1, 2, 2, False, 1, 2), ["schedule.train_stream=false", "schedule.micro_batch_tokens=99999"]),
    ],
    ids=["replicas", "pipelines", "chunks"],
)
def test_overlap_changes_nothing(worlds, settings, layout, options, distributed):
    """Gradients reduced during the last backward of each role, though another's may follow it in one stream, and
    weights gathered during the next forward."""
    world = worlds(layout[1] * layout[2])
    both = ("ppo.optimizer", "ppo.critic_optimizer")
    settings = [*settings, *options, *(f"{key}.distributed={str(distributed).lower()}" for key in both)]
    plain = world.run(cases.first_iteration, settings, layout, "ppo")
    overlapped = world.run(cases.first_iteration, [*settings, *(f"{key}.overlap=true" for key in both)], layout, "ppo")
    assert overlapped == plain


@pytest.mark.parametrize("layout", [(2, 2, 1, True), (1, 2, 2, False, 1, 2)], ids=str)
def test_groups_end_in_one_order(worlds, layout):
    """On every rank: NCCL's destroy waits for the other members."""
    closed = worlds(4).run(cases.groups_closed, layout)
    for mine, theirs in itertools.combinations(closed, 2):
        common = {*mine} & {*theirs}
        assert [group for group in mine if group in common] == [group for group in theirs if group in common]
    assert all(sum(size > 1 for _, size in mine) > 3 for mine in closed)


@pytest.mark.parametrize("layout", [(1, 2, 1, False, 1, 2), (1, 1, 2, False, 2)], ids=str)
def test_groups_wait_as_long_as_the_mesh(worlds, layout):
    """All of them, or NCCL would end a rank before the watchdog has said what it waits for. None is made for tensors on
    the CPU besides, where nobody asks."""
    assert set(worlds(2).run(cases.groups_made, layout)[0]) == {(3600.0, None)}


def test_one_thread_listens_for_all_groups(worlds):
    assert worlds(4).run(cases.listeners, (2, 2, 1)) == [1] * 4


@pytest.mark.parametrize(("layout", "crossings"), [((1, 2, 1), 1), ((1, 2, 1, False, 1, 2), 3)], ids=str)
def test_neighbours_exchange_nothing_but_activations_and_gradients(worlds, settings, layout, crossings):
    """Of 16 micro-batches, whose widths differ, at each place where a rank's chunks meet the other's; and no host waits
    for the device."""
    alone = [*settings, "schedule.micro_batch_tokens=1", "phases=[sft]"]
    for found in worlds(2).run(cases.messages, alone, layout, "sft"):
        assert found == (["torch.float32"] * (16 * crossings * 2), 0)


def test_no_activation_is_kept_for_the_next_stage():
    """What a stage received lives as long as its micro-batch."""
    held: list = []
    chunk = SimpleNamespace(set_input_tensor=held.append)
    role = SimpleNamespace(name="policy", balance=None, chunks=[chunk], modules=[lambda *inputs: held[-1][0] + 1])
    stream = _Stream(None, 0, Trace())
    stream.set_input_tensor([received := torch.ones(2)])
    output, _ = stream.step(Work(role, {}, None, 1), {"tokens": torch.ones(1, 2)}, True, forward_only=True)
    assert torch.equal(output, received + 1) and held[-1] is None


ROLES = ("policy", "reference", "reward", "critic")


def names(config: ScheduleConfig, pp: int = 2, offloaded=(), table=None) -> list[list[str]]:
    schedule = Schedule(table or stage_table(RunConfig()), PPO.provided, ROLES)
    return [[stage.name for stage in group] for group in schedule.groups(config, pp, offloaded)]


def test_what_runs_together():
    inferred, trained = ["log_probs", "ref_log_probs", "score", "values"], ["train_critic", "train_policy"]
    found, half = names(ScheduleConfig()), names(ScheduleConfig(infer_stream=False))
    assert inferred in found and trained in found
    assert inferred not in half and trained in half
    assert all(len(group) == 1 for group in names(ScheduleConfig(), pp=1))
    # a role that is kept off the device is not brought there with others
    found = names(ScheduleConfig(), offloaded=("reference",))
    assert found[1:5] == [["log_probs"], ["ref_log_probs"], ["score", "values"], ["advantage"]]


def test_a_stage_does_not_run_with_one_that_it_reads_from():
    table = [
        replace(stage, reads=("tokens", "scores")) if stage.name == "values" else stage
        for stage in stage_table(RunConfig())
    ]
    found = names(ScheduleConfig(), table=table)
    assert ["log_probs", "ref_log_probs", "score"] in found and ["values"] in found


def test_a_trace_and_its_picture(tmp_path):
    """Every rank's stages, micro-batches and waits, in a file that Perfetto reads and in the report."""
    settings = [*SMALL, "phases=[sft]", "mesh.pp=2", "mesh.dp=1", "trace=true", f"output_dir={tmp_path}"]
    settings.append("schedule.micro_batch_tokens=1")  # each row alone
    (tmp_path / "sft").mkdir()  # what a run that was killed has left, in the middle of a line
    (tmp_path / "sft" / "trace.json").write_text(
        '[\n{"pid": 7, "cat": "stage", "args": {"iteration": 0}},\n{"pid": 7, "c'
    )
    launch(*settings, "sft.eval_every=0")
    text = (tmp_path / "sft" / "trace.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert {(event["pid"], event["cat"]) for event in events} == {
        (rank, cat) for rank in (0, 1) for cat in ("stage", "forward", "backward", "wait")
    }
    forwards = [event for event in events if event["cat"] == "forward" and event["args"]["iteration"] == 2]
    assert len(forwards) == 2 * 16  # ranks x rows
    rows = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["idle/train_policy"] < 1 for row in rows)
    assert "What each rank did when" in (tmp_path / "sft" / "report.html").read_text()


def test_a_trace_that_goes_on_has_each_iteration_once(tmp_path):
    path, spans = tmp_path / "trace.json", [Span("s", "stage", 1.0, 2.0)]
    for iteration in (0, 1, 2):
        append_events(path, [(spans, [2.0])] * 2, iteration)
    with path.open("a") as file:
        file.write('{"name": "s", "cat": "sta')
    cut_events(path, 2)
    append_events(path, [(spans, [2.0])] * 2, 2)
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert [(e["args"]["iteration"], e["pid"]) for e in events] == [(i, rank) for i in range(3) for rank in range(2)]
    last = read_trace(path)
    assert last is not None and (last.iteration, last.ranks, len(last.boxes)) == (2, 2, 2)


def traced(folder: Path) -> None:
    """In a rank, whose clock is thousands of seconds from the other's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: time.monotonic() + 5000 * worlds.mesh(1, 1, 2).rank)
        config, state = SimpleNamespace(trace=True), SimpleNamespace(iteration=1)
        ctx = SimpleNamespace(config=config, state=state, mesh=worlds.mesh(1, 1, 2), trace=Trace())
        with ctx.trace.stage("s"):
            ctx.mesh.barrier()
        close_trace(ctx, folder, {}, None)


def test_ranks_of_several_machines_have_one_time(worlds, tmp_path):
    """That of the first one's clock, whatever the others' say."""
    before = time.time()
    worlds(2).run(traced, tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert [event["pid"] for event in events] == [0, 1]
    assert all(abs(event["ts"] / 1e6 - before) < 1000 for event in events)


def test_idle_shares():
    """Two ranks, one second of work each in a pipeline of two seconds."""
    trace = Trace()
    trace.streams = [Stream("s", 2.0, 1.0)]
    mesh = SimpleNamespace(all_gather_object=lambda mine: [mine, [Stream("s", 1.5, 0.5)]])
    assert trace.idle_shares(mesh) == {"idle/s": 0.5}


def test_what_is_not_forward_is_backward():
    trace = Trace()
    with trace.stage("s"), trace.stream(has_backward=True):
        with trace.span("policy", "forward"):
            time.sleep(0.01)
        time.sleep(0.02)
        with trace.span("neighbours", "wait"):
            time.sleep(0.01)
    trace.finish()
    seconds = {kind: sum(s.stop - s.start for s in trace.spans if s.kind == kind) for kind in ("backward", "wait")}
    (stream,) = trace.streams
    assert 0.02 <= seconds["backward"] < stream.seconds - 0.02 and stream.waited == seconds["wait"] >= 0.01


def test_a_gpus_time_is_the_devices(monkeypatch):
    """The host queues three seconds of forward, four of backward and a message that comes a second later, and is done
    with each at once."""
    clock = 100.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    trace = Trace(torch.device("cuda"))
    with trace.stage("s"), trace.stream(has_backward=True):
        with trace.span("policy", "forward"):
            clock += 3
        with trace.span("neighbours", "wait"):
            clock += 1
        clock += 4
    trace.finish()
    assert trace.streams == [Stream("s", pytest.approx(8), pytest.approx(1))]
    seconds = {span.kind: span.stop - span.start for span in trace.spans}
    assert seconds == pytest.approx({"stage": 8, "forward": 3, "wait": 1, "backward": 4})
    assert trace.idle_shares(SimpleNamespace(all_gather_object=lambda mine: [mine])) == {"idle/s": pytest.approx(1 / 8)}
    starts = {span.kind: span.start for span in trace.spans}
    assert starts["wait"] - starts["forward"] == pytest.approx(3) and starts["backward"] < time.perf_counter()
