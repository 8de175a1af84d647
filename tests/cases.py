"""What rank processes do for the tests: functions that are sent to a `World`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import worlds

MEASURED = ("time/", "throughput/", "idle/", "mfu/")  # figures of the machine and the mesh, and not of the experiment


def compose(overrides: list[str]):
    """The RunConfig of a command line, as launch/run.py makes it."""
    from rlhf_engine.launching.compose import compose

    return compose(overrides)


def context(overrides: list[str], layout: tuple):
    """Context of a run on the mesh `layout` = (tp, pp, dp[, sequence_parallel[, ep[, virtual_pp]]])."""
    from rlhf_engine.launching.build import build_context
    from rlhf_engine.launching.preflight import plan

    tp, pp, dp, sequence_parallel, ep, virtual_pp = (*layout, *(False, 1, 1)[len(layout) - 3 :])
    overrides = [*overrides, f"mesh.tp={tp}", f"mesh.pp={pp}", f"mesh.dp={dp}", f"mesh.ep={ep}"]
    overrides += [f"mesh.sequence_parallel={str(sequence_parallel).lower()}", f"mesh.virtual_pp={virtual_pp}"]
    checked = plan(compose(overrides), int(os.environ["WORLD_SIZE"]))
    return build_context(checked, worlds.mesh(tp, pp, dp, sequence_parallel, ep, virtual_pp))


def disk_calls(patch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What is synced, renamed and removed in `folder`, or the two above it, as long as `patch` holds: a line for each
    call as it is made."""
    calls: list[str] = []

    def name(path: int | str | os.PathLike) -> str:
        whole = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
        return re.sub(r"saving\.[0-9a-f]{16}", "saving", os.path.relpath(whole, folder))

    def note(function: str, original, *args, **kwargs):
        names = [name(arg) for arg in args]
        if not names[0].startswith("../../../") and (function != "rmtree" or args[0].is_dir()):
            calls.append(" ".join([function, *names]))
        return original(*args, **kwargs)

    for module, function in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
        patch.setattr(module, function, functools.partial(note, function, getattr(module, function)))
    return calls


def later(ctx, _, x) -> dict[str, torch.Tensor]:
    """Body of a stage: log-probs as if updates lay behind the policy, so that ratios and the KL matter."""
    noise = 0.3 * torch.randn(2, len(x.log_probs), 512, generator=torch.Generator().manual_seed(2))
    both = torch.stack([x.log_probs, x.ref_log_probs]) + noise[:, :, : x.log_probs.shape[1]]
    return {"log_probs": both[0] * x.response_mask, "ref_log_probs": both[1] * x.response_mask}


def first_iteration(
    overrides: list[str], layout: tuple, phase: str, is_later: bool = False, scale: float = 4.0
) -> dict:
    """The first iteration of a phase: its tokens, its figures, and a digest of this rank's weights after it.

    Args:
        is_later: see `later`.
        scale: of the last norm of a reference that is asked offline: where it is the policy, log-ratios are rounding.
    """
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import SAMPLING
    from rlhf_engine.launching.build import begin
    from rlhf_engine.schedule import Schedule, Stage

    ctx = context(overrides, layout)
    algorithm = ALGORITHMS[phase](ctx.config)
    specs = algorithm.roles()
    begin(ctx, algorithm.name, specs)
    for role in ctx.roles.values():
        if role.head == "scalar" and ctx.mesh.is_last_stage and ctx.bases["reward"].path is None:
            # from a head near 0 next to no gradient would reach the layers below
            with role.on_device(changes=True):
                weight = role.chunks[-1].output_layer.weight
                weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    if "reference" in ctx.roles and phase not in SAMPLING and ctx.mesh.is_last_stage:
        with ctx.roles["reference"].on_device(changes=True):
            ctx.roles["reference"].chunks[-1].decoder.final_layernorm.weight.data.mul_(scale)
    stages, both = list(algorithm.stages), ("log_probs", "ref_log_probs")
    if is_later:
        place = next(i for i, stage in enumerate(stages) if stage.name == "advantage")
        stages.insert(place, Stage("later", "local", later, None, (*both, "response_mask"), both))
    experience = Schedule(stages, algorithm.provided, specs).run(ctx, algorithm.batch(ctx))
    figures, _ = ctx.metrics.reduce(ctx.mesh)
    rows = [row[:n] for row, n in zip(experience.tokens.tolist(), experience.lengths.tolist(), strict=True)]
    digest = hashlib.sha256()
    for name in sorted(ctx.roles):
        with ctx.roles[name].on_device():
            for parameter in ctx.roles[name].chunks.parameters():
                digest.update(parameter.detach().clone().numpy().tobytes())
    times = [name for name in figures if name.startswith("time/")]
    away = {name: role.presence for name, role in ctx.roles.items() if role.is_offloaded}
    figures = {k: v for k, v in figures.items() if not k.startswith(MEASURED)}
    return {"tokens": rows, "figures": figures, "weights": digest.hexdigest(), "times": times, "away": away}


def grad_norm_of_text(overrides: list[str], layout: tuple) -> float:
    """Of the policy's mean loss per token on the first rows that PPO mixes in."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.algorithms.sft import cross_entropy, supervised, text_work
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.models.stream import train_step

    ctx = context(overrides, layout)
    policy = build_role(ctx, "policy", ALGORITHMS["ppo"](ctx.config).roles()["policy"])
    x = supervised(ctx.datasets["ptx"].batch(0, ctx.config.ppo.ptx.rows), ctx.mesh.tp)
    train_step([text_work(policy, x, cross_entropy(policy), 4)], ctx.metrics, ctx.trace)
    return ctx.metrics.reduce(ctx.mesh)[0]["policy/grad_norm"]


@contextlib.contextmanager
def rollouts_as_on_cuda():
    """Attention reads row by row, and a graph that only calls its step again stands for a CUDA graph."""
    from rlhf_engine.rollout import engine, graphs

    def called_again(step, pool):
        results = []  # of which there is one, at the same place each time

        def replay():
            found = step()
            results.append(found if not results else results[0].copy_(found))
            return results[0]

        return replay, pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "reads_by_row", lambda cache: True)
        patch.setattr(graphs, "capture", called_again)
        patch.setattr(graphs, "_EAGER_STEPS", 1)
        yield


def generate(
    overrides: list[str],
    layout: tuple,
    prompts: list[list[int]],
    ids: list[int],
    ends: tuple = (),
    limits: list[int] | None = None,
    poison: int | None = None,
    as_on_cuda: bool = False,
    begun: list[tuple] | None = None,
    delay: int | None = None,
):
    """Responses of the run's policy to prompts whose noise is keyed by `ids`, and the last report of their progress.

    Args:
        ends: tokens that end them too.
        limits: of their lengths.
        poison: a token whose embedding is not a number.
        as_on_cuda: see `rollouts_as_on_cuda`.
        begun: what there is of each, as this gives it.
        delay: they have turns, which `Echo` answers after so many calls at most.
    """
    from rlhf_engine.launching.build import base_policy
    from rlhf_engine.rollout.generate import rollout
    from rlhf_engine.rollout.progress import Response
    from rlhf_engine.rollout.sampling import sample_keys

    ctx = context(overrides, layout)
    role = base_policy(ctx)
    if poison is not None:
        table = role.chunks[0].embedding.word_embeddings.weight
        if (row := poison - ctx.mesh.tp_rank * len(table)) in range(len(table)):
            table.data[row] = torch.nan
    keys = sample_keys(ctx.config.seed, 0, torch.tensor(ids, dtype=torch.int64))
    reports: list = []
    with rollouts_as_on_cuda() if as_on_cuda else contextlib.nullcontext():
        responses = rollout(
            role,
            prompts,
            keys,
            ctx.config.rollout,
            (*ctx.tokenizer.end_ids, *ends),
            decode=ctx.tokenizer.decode,
            limits=limits,
            begun=begun and [Response(*part) for part in begun],
            report=reports.append,
            turns=None if delay is None else Echo(delay),
        )
    if delay is not None:
        return [(r.tokens, r.log_probs, r.finished, r.sampled) for r in responses], reports[-1]
    return [(r.tokens, r.log_probs, r.finished) for r in responses], reports[-1]


class Echo:
    """Answers turns by what was said in them, in any order."""

    def __init__(self, delay: int):
        self.random, self.delay, self.counts, self.asked = random.Random(delay), delay, Counter(), []

    def ask(self, sample: int, tokens: list[int], is_cut: bool, room: int) -> None:
        self.counts[sample] += 1
        found = echo(sample, self.counts[sample], tokens)
        calls = self.random.randint(0, self.delay)
        self.asked.append([calls, sample, None if found is None or len(found) >= room else found])

    def answers(self, wait: bool) -> list[tuple]:
        assert self.asked
        for each in self.asked:
            each[0] -= min(e[0] for e in self.asked) if wait else 1
        found = [(sample, tokens) for calls, sample, tokens in self.asked if calls <= 0]
        self.asked = [each for each in self.asked if each[0] > 0]
        self.random.shuffle(found)
        return found


def echo(sample: int, turn: int, tokens: list[int]) -> list[int] | None:
    """What a turn is answered; None: it was the last."""
    if turn > sample % 4:
        return None
    return [(sum(tokens) + 7 * i) % 500 + 3 for i in range(1 + (5 * sample + 11 * turn) % 40)]


def logits(overrides: list[str], layout: tuple, rows: list[list[int]]) -> torch.Tensor:
    """The whole vocabulary's logits `(B, T, V)` for right-padded rows."""
    from rlhf_engine.experience import pad_rows
    from rlhf_engine.launching.build import base_policy
    from rlhf_engine.models.stream import forward

    ctx = context(overrides, layout)
    policy, mesh = base_policy(ctx), ctx.mesh
    tokens, _ = pad_rows(rows, mesh.tp)
    return forward(policy, {"tokens": tokens}, functools.partial(whole_logits, policy), 2)


def whole_logits(role, hidden, batch) -> torch.Tensor:
    """The whole vocabulary's logits from hidden states, as an `InferFn`."""
    import torch.distributed as dist

    from rlhf_engine.models.role import head_weight

    assert not role.mesh.config.sequence_parallel
    output = torch.nn.functional.linear(hidden, head_weight(role.chunks[-1]))
    parts = [torch.empty_like(output) for _ in range(role.mesh.tp)]
    dist.all_gather(parts, output.contiguous(), group=role.mesh.tp_group)
    return torch.cat(parts, -1)[..., : role.model.vocab_size]


def sampled_frequencies(overrides: list[str], layout: tuple, scores: list[float], draws: int) -> list[int]:
    """How often each token is drawn from fixed logits, the vocabulary split over the mesh."""
    from rlhf_engine.rollout.sampling import Sampler, sample_keys

    config = compose(overrides).rollout
    mesh = worlds.mesh(*layout)
    shard = torch.tensor(scores).chunk(mesh.tp)[mesh.tp_rank]
    sampler = Sampler(config, len(scores), (len(scores) - 1,), mesh.tp_group)
    keys = sample_keys(3, 0, torch.arange(draws))
    tokens, _ = sampler(shard.repeat(draws, 1), keys, torch.zeros(draws, dtype=torch.int64))
    return torch.bincount(tokens, minlength=len(scores)).tolist()


def hf_role(folder: str, layout: tuple, head: str = "lm"):
    """A model of an HF folder on the mesh `layout`, as it is in the folder."""
    from rlhf_engine.hf.config import read_model_config
    from rlhf_engine.launching.build import load_base
    from rlhf_engine.models.role import RoleModel

    mesh, model = worlds.mesh(*layout), read_model_config(folder)
    role = RoleModel("policy", model, mesh, head, torch.float32)
    load_base(role, folder)
    return role


def hf_round_trip(folder: str, layout: tuple, rows: list[list[int]], out: str, head: str = "lm") -> torch.Tensor:
    """Outputs for the rows, `(B, T, V)` or `(B, T, 1)`; the model's weights are written to `out` in HF format, and to
    `out`_spread as if it were so large that every rank writes some."""
    from rlhf_engine.converting.export import export_role, head_config
    from rlhf_engine.hf import shares
    from rlhf_engine.hf.files import copy_assets
    from rlhf_engine.models.stream import forward

    role = hf_role(folder, layout, head)
    fn = functools.partial(whole_logits, role) if head == "lm" else lambda output, batch: output
    add = functools.partial(copy_assets, Path(folder))
    config = head_config(role.model, head, Path(folder))
    export_role(role, Path(out), config, add)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "_LEAST_BYTES", 1)
        export_role(role, Path(f"{out}_spread"), config, add)
    return forward(role, {"tokens": torch.tensor(rows)}, fn, 2)[:, : len(rows[0])]


def hf_greedy(
    folder: str, layout: tuple, prompts: list[list[int]], tokens: int, as_on_cuda: bool = False
) -> tuple[list[list[int]], float]:
    """Greedy responses of a model of an HF folder, and how far their log-probs are from the trainer's at most."""
    from rlhf_engine.algorithms.heads import choose, policy_log_probs
    from rlhf_engine.config import RolloutConfig
    from rlhf_engine.experience import pad_rows, spans
    from rlhf_engine.models.stream import forward
    from rlhf_engine.rollout.generate import rollout
    from rlhf_engine.rollout.sampling import sample_keys

    role = hf_role(folder, layout)
    config = RolloutConfig(greedy=True, max_new_tokens=tokens, min_new_tokens=0, slots=2)
    keys = sample_keys(1, 0, torch.arange(len(prompts)))
    with rollouts_as_on_cuda() if as_on_cuda else contextlib.nullcontext():
        responses = rollout(role, prompts, keys, config, end_ids=[])
    rows, lengths = pad_rows([p + r.tokens for p, r in zip(prompts, responses, strict=True)], role.mesh.tp)
    mask = spans(torch.tensor([len(p) for p in prompts]), lengths, rows.shape[1])

    def fn(output, batch):
        return policy_log_probs(role, output, choose(role, batch, "mask"))[0]

    found = forward(role, {"tokens": rows, "mask": mask}, fn, 2)
    log_probs = torch.tensor([log_prob for r in responses for log_prob in r.log_probs])
    return [r.tokens for r in responses], float((found[mask] - log_probs).abs().max())


def num_parameters(path: str) -> int:
    """Parameters of the model that a config.json describes."""
    from rlhf_engine.converting.layout import count_parameters
    from rlhf_engine.hf.config import parse, read_json

    return count_parameters(parse(read_json(Path(path)), path), "lm", worlds.mesh(1, 1, 1))


def te_names() -> list[str]:
    """Parameters under transformer-engine's names that the Qwen3 table has no row for, or that map to a wrong one."""
    from types import SimpleNamespace

    from rlhf_engine.config import ModelConfig
    from rlhf_engine.hf.weights import Table, parameters

    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attn.q_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.gate_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    # a second pipeline stage, whose first layer is the third of all
    gpt = SimpleNamespace(
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=3)]),
        named_parameters=lambda: [(f"decoder.layers.0.{name}", torch.zeros(1)) for name in names],
    )
    table, wrong = Table(ModelConfig(architecture="qwen3"), "lm"), []
    for (name, _), hf in zip(parameters([gpt]), names.values(), strict=True):
        row, numbers = table.row(name)
        if numbers != ["2"] or row.hf.split()[0] != f"model.layers.*.{hf}":
            wrong.append(name)
    return wrong


def verify(overrides: list[str], fault: str | None = None) -> int:
    """The exit code of what launch/verify.py runs on a rank, with one of the faults of faults.py in the engine."""
    import faults
    import pytest

    from rlhf_engine.launching.preflight import plan
    from rlhf_engine.verify.suite import run

    worlds.close_mesh()
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            getattr(faults, fault)(patch)
        return run(plan(compose(overrides), int(os.environ["WORLD_SIZE"])))


def groups_closed(layout: tuple) -> list[tuple[str, int]]:
    """Closes a mesh of that layout. Gives name and size of its groups in the order of their end."""
    from torch import distributed as dist

    worlds.mesh(*layout)
    closed = []

    def destroy(group) -> None:
        closed.append((group.group_name, group.size()))
        end(group)

    end, dist.destroy_process_group = dist.destroy_process_group, destroy
    try:
        worlds.close_mesh()
    finally:
        dist.destroy_process_group = end
    return closed


def groups_made(layout: tuple) -> list[tuple[float, str | None]]:
    """Makes a mesh of that layout. Gives seconds that collectives of its groups may take, and their backends."""
    from torch import distributed as dist

    found = []

    def new_group(ranks=None, timeout=None, backend=None, **others):
        found.append((timeout and timeout.total_seconds(), backend))
        return make(ranks, timeout, backend, **others)

    worlds.close_mesh()
    make = dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        worlds.mesh(*layout)
    return found


def listeners(layout: tuple) -> int:
    """Makes a mesh of that layout once more. Threads of this rank that listen for gloo."""
    worlds.close_mesh()
    worlds.mesh(*layout)
    return [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()].count("gloo_tcp_loop\n")


def messages(overrides: list[str], layout: tuple, phase: str) -> tuple[list[str], int]:
    """Of the pipelines of a first iteration: the types of what was sent or received, and how often the host waited for
    all of the device."""
    from megatron.core.pipeline_parallel import p2p_communication
    from torch import distributed as dist

    found, waits = [], []

    def message(op, tensor, *others):
        found.append(str(tensor.dtype))
        return make(op, tensor, *others)

    make = dist.P2POp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "P2POp", message)
        patch.setattr(p2p_communication.torch.cuda, "synchronize", lambda *args: waits.append(1))
        first_iteration(overrides, layout, phase)
    return found, len(waits)


def num_models() -> int:
    """Models that this process still holds."""
    import gc

    from megatron.core.models.gpt import GPTModel

    gc.collect()
    return sum(isinstance(found, GPTModel) for found in gc.get_objects())


def build_role(model: dict, head: str, layout: tuple, optimizer: bool = False, recompute: str = "none"):
    """A role of a ModelConfig's fields with random weights, ready to train where it has an optimizer."""
    from rlhf_engine.config import ModelConfig, OptimizerConfig
    from rlhf_engine.launching.build import load_base
    from rlhf_engine.models.role import RoleModel

    settings = OptimizerConfig() if optimizer else None
    role = RoleModel(
        "policy", ModelConfig(**model), worlds.mesh(*layout), head, torch.float32, settings, recompute=recompute
    )
    if optimizer:
        load_base(role, None)
        role.start()
    return role


def held(model: dict, head: str, layout: tuple) -> tuple[int, int, int]:
    """This rank's pipeline stage, its parameters, and those of experts among them."""
    role = build_role(model, head, layout)
    sizes = [(p.numel(), not getattr(p, "allreduce", True)) for p in role.chunks.parameters()]
    return role.mesh.pp_rank, sum(n for n, _ in sizes), sum(n for n, is_expert in sizes if is_expert)


def chunk_order(layout: tuple, micro_batches: int, group: int) -> tuple[int, int, list]:
    """This rank's pipeline stage, forwards before its first backward, and (micro-batch, chunk) in megatron's order."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    mesh = worlds.mesh(*layout)
    _, _, warmup, _ = get_pp_rank_microbatches(micro_batches, mesh.virtual_pp, group)
    return mesh.pp_rank, warmup, get_schedule_table(micro_batches, mesh.virtual_pp, group)


def training_bytes(model: dict, layout: tuple) -> tuple[int, int, int]:
    """Bytes of this rank's weights, gradient buffers and optimizer state."""
    from rlhf_engine.models.optim import gradient_tensors, torch_optimizers

    role = build_role(model, "lm", layout, optimizer=True)
    buffers = gradient_tensors(role.modules)
    states = [state for adam in torch_optimizers(role.optimizer) for state in adam.state.values()]
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    return sum(p.nbytes for p in role.chunks.parameters()), sum(b.nbytes for b in buffers), moments


def saved_bytes(model: dict, layout: tuple, rows: int, length: int, recompute: str) -> int:
    """Bytes that a forward keeps for backward, weights aside."""
    role = build_role(model, "lm", layout, optimizer=True, recompute=recompute)
    weights = {p.untyped_storage().data_ptr() for p in (*role.chunks.parameters(), *role.chunks.buffers())}
    found: dict = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its place would be taken by another
        return tensor

    tokens = torch.zeros(rows, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        role.modules[0](tokens, torch.arange(length).expand_as(tokens), None)
    return sum(size for size, _ in found.values())


def matmul_flops(model: dict, layout: tuple, rows: int, length: int) -> int:
    """FLOPs of a forward's linear layers, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    def grouped(x, weight, *_, **__) -> int:
        return 2 * x[0] * x[1] * weight[2]  # of (N, I) and (E, I, O)

    role, also = build_role(model, "lm", layout), {torch.ops.aten._grouped_mm: grouped}
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=also) as counter:
        role.modules[0](tokens, torch.arange(length).expand_as(tokens), None)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for operator, n in counts.items() if "attention" not in str(operator))


def cache_bytes(model: dict, layout: tuple, prompts: list[list[int]], response: int, config: dict) -> int:
    """Bytes of the KV cache that a replica allocates for these prompts and responses of so many tokens."""
    return engine_of(build_role(model, "lm", layout), prompts, response, config).cache.store.nbytes


def blocks_of_prompts(overrides: list[str], prompts: list[list[int]]) -> int:
    """Blocks of the cache that are taken when all prompts are in it."""
    from rlhf_engine.launching.build import base_policy

    engine = engine_of(base_policy(context(overrides, (1, 1, 1))), prompts, 2, {})
    with torch.no_grad():
        engine._admit()
    return engine.cache.num_blocks - engine.cache.num_free


def engine_of(role, prompts: list[list[int]], response: int, config: dict):
    """For responses of so many tokens."""
    from rlhf_engine.config import RolloutConfig
    from rlhf_engine.rollout.engine import Engine
    from rlhf_engine.rollout.sampling import Sampler, sample_keys

    settings = RolloutConfig(max_new_tokens=response, **config)
    sampler = Sampler(settings, role.model.vocab_size, (0,), role.mesh.tp_group)
    keys, count = sample_keys(1, 0, torch.arange(len(prompts))), len(prompts)
    most = settings.kv_tokens or 1 << 20
    return Engine(
        role.chunks[0], role.mesh, sampler, prompts, keys, [response] * count, range(count), settings.slots, most
    )
