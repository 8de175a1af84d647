"""What a rehearsal has in place of the machine: rows as long as allowed, weights without numbers, a disk that is not
filled, a request to stop; and where the engine's memory is marked with what it is for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import state_dict_utils
from torch import Tensor
from torch.distributed.checkpoint import default_planner

from .. import mesh, trainer
from ..algorithms import responding, samples, turns
from ..algorithms.talk import Conversation, Talk
from ..config import RunConfig
from ..data.dataset import Dataset, Example
from ..environments import pool
from ..hf import files
from ..hf.rows import Window
from ..launching import build
from ..launching.phase import Phase
from ..launching.preflight import Plan
from ..models import checkpoint, residency, role, stream
from ..models.optim import gradient_tensors, optimizer_tensors
from ..rollout import cache, engine, fold, generate, steps
from ..rollout.responses import Responses
from ..surviving import watchdog
from . import groups
from .device import CUDA, FakeGPU, put
from .part import Part

_STEPS = 8  # of a number of rows: those before a graph is captured, its capture, and some that replay it


def stand_in(gpu: FakeGPU, part: Part, plan: Plan) -> None:
    """Changes the engine in this process."""
    _mark_memory(gpu)
    _name_stages(gpu)
    _count_steps(gpu)
    _weights(gpu)
    if plan.config.rehearse.rows == "longest":
        _longest_rows(plan.config)
    ends = set(plan.tokenizer.end_ids) if plan.tokenizer is not None else {1, 2}
    gpu.integer = next(i for i in range(len(ends) + 1) if i not in ends)
    if part.micro_batches is not None:
        _few_micro_batches(part.micro_batches)
        _few_steps()
    if plan.config.env.fn is not None:
        _environments(plan)
    if part.stops_in is not None:
        _stop(part)
    if len(part.present) < part.world_size:
        _own_share()
    if not part.writes:
        _without_disk()


def _mark_memory(gpu: FakeGPU) -> None:
    start, new, build, exchange = role.RoleModel.start, cache.KVCache.__init__, fold.build_model, fold._exchange

    def started(self: role.RoleModel) -> None:
        for name, parameter in self.chunks.named_parameters():
            if parameter.device.type != "cuda":
                raise gpu.refusal(f"{name} of {self.name} is left on the host")
        start(self)
        weights = [*self.chunks.parameters(), *self.chunks.buffers()]
        gpu.mark(weights, "weights")
        if self.is_trained:
            gpu.mark(gradient_tensors(self.modules), "gradients")
            gpu.mark(optimizer_tensors(self.optimizer, weights), "optimizer")

    def build_marked(*args, **kwargs):
        gpt = build(*args, **kwargs)
        gpu.mark(gpt.parameters(), "weights")
        return gpt

    def exchange_alike(mine, *args) -> None:
        groups.Group.wire.assumed = [list(mine)]  # a stage that is not rehearsed has layers of its own, as many
        exchange(mine, *args)

    def new_cache(self, *args, **kwargs) -> None:
        new(self, *args, **kwargs)
        gpu.mark([self.store], "kv_cache")

    def as_bytes(storage: torch.UntypedStorage) -> Tensor:
        with gpu.shapes:
            return torch.empty(storage.nbytes(), dtype=torch.uint8, device=CUDA)

    put(role.RoleModel, start=started)
    put(residency, _bytes=as_bytes)
    put(fold, build_model=build_marked, _exchange=exchange_alike)
    put(cache.KVCache, __init__=new_cache)


def _name_stages(gpu: FakeGPU) -> None:
    watch, train = watchdog.Watchdog.stage, trainer.train

    def train_phase(ctx, algorithm) -> bool:
        gpu.phase = algorithm.name
        return train(ctx, algorithm)

    @contextlib.contextmanager
    def stage(self, name: str):
        with watch(self, name), gpu.at(name):
            yield

    put(mesh, meeting_place=lambda timeout: {})
    put(trainer, train=train_phase)
    put(watchdog.Watchdog, stage=stage)
    put(watchdog.Watchdog, _exchange=lambda self: None)


def _count_steps(gpu: FakeGPU) -> None:
    """What the host does for a decode step, the loading of its rows included."""
    load, step = steps.Steps.load, engine.Engine._step
    before: tuple[int, ...] = ()

    def figures() -> tuple[int, ...]:
        stage = gpu.stage
        launches = stage.kernels - stage.replayed + stage.replays
        return launches, sum(stage.waits.values()), stage.replays, stage.captures

    def loaded(self, *args) -> None:
        nonlocal before
        before = figures()
        load(self, *args)

    def stepped(self) -> bool:
        nonlocal before
        have_left, after, stage = step(self), figures(), gpu.stage
        launches, waits, replays, captures = (now - then for now, then in zip(after, before, strict=True))
        before = after
        if captures:
            stage.step = {}  # steps without a graph are no measure of the others
        elif replays or not stage.replays:
            for name, count in (("launches", launches), ("waits", waits)):
                stage.step[name] = max(count, stage.step.get(name, 0))
        return have_left

    put(steps.Steps, load=loaded)
    put(engine.Engine, _step=stepped)


class _Untouched:
    """Weights that are not read: host memory of their sizes."""

    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    def __contains__(self, name: str) -> bool:
        return True

    def read(self, window: Window) -> Tensor:
        shape = list(window.shape)
        shape[window.dim] = window.stop - window.start
        return self.gpu.on_host(shape, torch.bfloat16)


def _weights(gpu: FakeGPU) -> None:
    load = build.load_weights

    def load_untouched(chunks, model, head, mesh, source) -> None:
        load(chunks, model, head, mesh, _Untouched(gpu))

    put(build, load_weights=load_untouched, HFFolder=lambda path: None)


@dataclass
class _Stretched(Sequence[Example]):
    """Rows that are made long when they are asked for."""

    rows: Sequence[Example]
    stretch: Callable[[Example], Example]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):  # type: ignore[override]
        found = self.rows[i]
        return [*map(self.stretch, found)] if isinstance(i, slice) else self.stretch(found)


def _longest_rows(config: RunConfig) -> None:
    built = build.datasets_of
    data = config.data
    config.eval.prompts = min(8, config.eval.prompts or 8)

    def stretched(tokens: list[int], length: int) -> list[int]:
        """From its beginning on once more, with the last token where it was."""
        return [tokens[i % max(1, len(tokens) - 1)] for i in range(length - 1)] + tokens[-1:]

    def stretch(example: Example) -> Example:
        whole, prompt = data.max_seq_len, min(data.max_prompt_len, data.max_seq_len - 1)
        before = stretched(example.before, prompt) if example.before else []
        answer = whole - len(before)
        return replace(
            example,
            prompt=stretched(example.prompt, prompt) if example.prompt else [],
            before=before,
            before_spoken=[False] * len(before),
            chosen=stretched(example.chosen, answer) if example.chosen else example.chosen,
            rejected=stretched(example.rejected, answer) if example.rejected else example.rejected,
            reward_prompt=stretched(example.reward_prompt, prompt) if example.reward_prompt else [],
            reward_before=stretched(example.reward_before, prompt) if example.reward_before else [],
        )

    def build_longest(*args, **settings) -> dict[str, Dataset]:
        found = built(*args, **settings)
        for dataset in found.values():
            for each in dataset.parts:
                each.train = _Stretched(each.train, stretch)
                each.held_out = [stretch(example) for example in each.held_out[:8]]
            dataset.held_out[:] = [example for each in dataset.parts for example in each.held_out]
        return found

    put(build, datasets_of=build_longest)


def _few_micro_batches(count: int) -> None:
    """Rows are all as long as may be, so that micro-batches are alike, and the results of some stand for all."""
    infer, train_step = stream.infer, stream.train_step

    def cut(work: stream.Work) -> stream.Work:
        if len(work.batch["tokens"]) % (work.role.mesh.dp * work.together):
            return work  # replicas do not divide what `infer` fills up
        rows = sum(rows.numel() for rows, _ in work.parts[:count])
        return replace(work, batch={name: field[:rows] for name, field in work.batch.items()})

    def infer_some(works, *args):
        found = infer([cut(work) for work in works], *args)
        rows = (torch.arange(len(work.batch["tokens"])) for work in works)
        return [part[index % len(part)] for part, index in zip(found, rows, strict=True)]

    for module in (stream, samples):
        put(module, infer=infer_some)
    put(stream, train_step=lambda works, *args: train_step([cut(work) for work in works], *args))


def _few_steps() -> None:
    """Of the decode steps of so many rows the first few; the others give what the last of them gave."""

    run = steps.Steps.__call__

    def once_more(self) -> Tensor:
        # by rows, how many calls there were and their result; it goes with the engine
        entry = vars(self).setdefault("steps_like_this", {}).setdefault(len(self.rows), [0, None])
        entry[0] += 1
        if entry[0] <= _STEPS:
            entry[1] = run(self)
        return entry[1]

    put(steps.Steps, __call__=once_more)


def _own_share() -> None:
    """A replica takes the responses to its own prompts for those of replicas that are not rehearsed."""
    rollout = generate.rollout

    def rollout_own(role, prompts, keys, config, end_ids, *, limits=None, begun=None, **options) -> Responses:
        replicas = role.mesh.num_replicas
        need = [len(prompt) for prompt in prompts]
        own = generate.split(prompts, need, replicas)[role.mesh.replica] or list(range(len(prompts)))[:1]
        found = rollout(
            role, [prompts[i] for i in own], keys[own], config, end_ids,
            limits=limits and [limits[i] for i in own], begun=begun and [begun[i] for i in own], **options,
            shares=[range(len(own))] * replicas,
        )  # fmt: skip
        place = {i: k for k, i in enumerate(own)}
        return found.take(torch.tensor([place.get(i, i % len(found)) for i in range(len(prompts))]))

    def talk_own(ctx, policy, rows, keys, config, shares=None, report=None) -> turns.Talked:
        count, replicas, replica = len(rows), ctx.mesh.num_replicas, ctx.mesh.replica
        own = range(count * replica // replicas, count * (replica + 1) // replicas) or range(1)
        found = talk(ctx, policy, [rows[i] for i in own], keys[own], config, [range(len(own))] * replicas, report)
        places = [i % len(own) for i in range(count)]
        return turns.Talked(
            [found.prompts[i] for i in places],
            found.responses.take(torch.tensor(places)),
            [found.trajectories[i] for i in places],
            found.progress,
        )

    put(samples, rollout=rollout_own)
    put(responding, rollout=rollout_own)
    talk = turns.talk
    put(turns, talk=talk_own)


def _environments(plan: Plan) -> None:
    """Answers at once, that make of each trajectory as many turns and as many tokens as it may have; the model that
    environments may ask goes on behind half of such a one."""
    config, most, found = plan.config, plan.config.most_new_tokens, list[pool.Answer]()
    env, dialogue = config.env, list[dict[str, str]]()
    sampled = min(most, env.max_turns * config.rollout.max_new_tokens)
    words = " ".join("a" * max(1, (most - sampled) // max(1, env.max_turns - 1)))
    if config.user.path is not None:
        room = plan.bases["user"].model.max_position_embeddings - config.user.max_new_tokens
        length = min(config.data.max_prompt_len + most, room) // 2
        dialogue = [{"role": "user", "content": " ".join("a" * max(1, length))}]
    ask, start = Talk.ask, Conversation.start

    def start_longest(self, messages, tools, tokenizer) -> list[int]:
        tokens = start(self, messages, tools, tokenizer)
        more = tokens[-1:] * (config.data.max_prompt_len - len(tokens) if config.rehearse.rows == "longest" else 0)
        self.tokens, self.mask = [*self.tokens, *more], [*self.mask, *[0] * len(more)]
        return tokens + more

    def begin(self, number: int, row) -> None:
        found.append(pool.Answer(number, row["messages"]))

    def tell(self, number: int, text: str) -> None:
        found.append(pool.Answer(number, [{"role": "user", "content": words}]))

    def act(self, number: int, action) -> None:
        if not dialogue:
            return tell(self, number, "")
        found.append(pool.Answer(number, asks=dialogue))

    def answers(self, timeout) -> list[pool.Answer]:
        told, found[:] = found[:], []
        return told

    put(Conversation, start=start_longest)
    # a turn as long as it may be is none that was cut
    put(Talk, ask=lambda self, sample, tokens, is_cut, room: ask(self, sample, tokens, False, room))
    put(pool.Environments, __init__=lambda self, config: None, begin=begin, act=act, answers=answers)
    put(pool.Environments, tell=tell, end=lambda self, number: None, close=lambda self: None)


def _stop(part: Part) -> None:
    """The main rank is asked to stop in the first iteration of a phase, as a scheduler would."""
    iterate = trainer.iterate

    def iterate_and_ask(phase: Phase) -> bool:
        if part.rank == 0 and phase.algorithm.name == part.stops_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(phase)

    put(trainer, iterate=iterate_and_ask)


def _without_disk() -> None:
    """Saves and exports as far as the disk: planned, gathered, copied, and not written.

    Of ranks that are not rehearsed their twins' shards are known, which are others: so nothing is checked of all shards
    together.
    """

    def not_written(self, buckets: list) -> None:
        self._results, self._written = [], {}

    def named(self, writing, reports) -> str:
        return f"iteration_{writing.iteration}"

    put(checkpoint._Writing, _write=not_written)
    put(checkpoint.Checkpoints, _complete=named, chosen=lambda self: None)  # the next phase begins as the first
    put(state_dict_utils, validate_sharding_integrity=lambda *args, **kwargs: None)
    put(default_planner, _validate_global_plan=lambda *args: [])
    put(files.TensorFile, add=lambda self, tensor: tensor.cpu())
    put(files, stored_tensors=lambda path: {})
