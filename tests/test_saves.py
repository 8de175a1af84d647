"""What a save and a load cost: bytes of each rank, roles on the device at once, copies off it; and what they keep."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import cases
import pytest
import torch
import worlds as launching
from conftest import ROOT, SMALL
from test_plan import MODELS, mesh

from rlhf_engine.config import CheckpointConfig, ModelConfig, OptimizerConfig
from rlhf_engine.models import residency
from rlhf_engine.models.partition import rank_parameters
from rlhf_engine.models.residency import Parcel, Presence, host_memory
from rlhf_engine.models.shards import rectangles
from rlhf_engine.plan.memory import Numbers, saved
from rlhf_engine.signals import RunError

# -- on the ranks --------------------------------------------------------------------------------------------


def trained(model: dict, layout: tuple, seed: int, **optimizer):
    """A policy of random weights, whose moments follow from the weights beside them."""
    from rlhf_engine.launching.build import load_base
    from rlhf_engine.models.role import RoleModel

    settings = OptimizerConfig(**optimizer)
    role = RoleModel("policy", ModelConfig(**model), launching.mesh(*layout), "lm", torch.float32, settings)
    load_base(role, None, seed)
    role.start()
    with torch.no_grad():
        for parameter, state in moments(role):
            state["exp_avg"].copy_(3 * parameter + 1)
            state["exp_avg_sq"].copy_(parameter.square())
    return role


def moments(role):
    from rlhf_engine.models.optim import torch_optimizers

    for adam in torch_optimizers(role.optimizer):
        yield from adam.state.items()


def save(model: dict, layout: tuple, folder: str, **optimizer) -> tuple[int, int]:
    """Saves and gives the bytes of float32 numbers that this rank has sent to others and written."""
    from rlhf_engine.models.checkpoint import Checkpoints

    role, sent = trained(model, layout, 0, **optimizer), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "gather"):
            original = getattr(torch.distributed, name)

            def counted(*args, original=original, **kwargs):
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                sent.extend(x.nbytes for x in tensors if x.dtype is torch.float32)
                return original(*args, **kwargs)

            patch.setattr(torch.distributed, name, counted)
        checkpoints = Checkpoints(Path(folder), role.mesh, CheckpointConfig())
        checkpoints.save(1, {"policy": role}, {})
    assert checkpoints.finish()
    index = pickle.loads((Path(folder) / "iteration_1" / ".metadata").read_bytes())
    written = 0
    for item, where in index.storage_data.items():
        if where.relative_path.startswith(f"__{role.mesh.rank}_") and item.offset is not None:
            chunks = index.state_dict_metadata[item.fqn].chunks
            written += next(4 * math.prod(chunk.sizes) for chunk in chunks if chunk.offsets == item.offset)
    return sum(sent), written


def load(model: dict, layout: tuple, folder: str, **optimizer) -> None:
    """Weights and moments are those that were saved, in every place, and none is made anew."""
    from rlhf_engine.models import checkpoint

    found, wanted = trained(model, layout, 1, **optimizer), trained(model, layout, 0, **optimizer)
    before = [parameter.data_ptr() for parameter in found.chunks.parameters()]
    checkpoint.load(Path(folder) / "iteration_1", {"policy": found})
    for mine, theirs in zip(found.chunks.parameters(), wanted.chunks.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert before == [parameter.data_ptr() for parameter in found.chunks.parameters()]
    for parameter, state in moments(found):
        assert torch.equal(state["exp_avg"], 3 * parameter + 1)
        assert torch.equal(state["exp_avg_sq"], parameter.square())


def presences(overrides: list[str], folder: str) -> dict[str, list[tuple[Presence, ...]]]:
    """What of PPO's policy and critic is on the device as they are saved and loaded, at each of their moves."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.models.checkpoint import Checkpoints
    from rlhf_engine.models.checkpoint import load as load_checkpoint
    from rlhf_engine.models.role import RoleModel

    ctx = cases.context([*overrides, "schedule.residency=offload"], (1, 1, 1))
    specs = ALGORITHMS["ppo"](ctx.config).roles()
    roles = {name: build_role(ctx, name, spec) for name, spec in specs.items() if spec.optimizer}
    found: dict[str, list] = {"save": [], "load": []}
    with pytest.MonkeyPatch.context() as patch:
        move = RoleModel.move

        def noted(role, presence):
            move(role, presence)
            found[at].append(tuple(each.presence for each in roles.values()))

        patch.setattr(RoleModel, "move", noted)
        at = "save"
        checkpoints = Checkpoints(Path(folder), ctx.mesh, CheckpointConfig())
        checkpoints.save(1, roles, {})
        assert checkpoints.finish()
        at = "load"
        load_checkpoint(Path(folder) / "iteration_1", roles)
    return found


def copies(overrides: list[str]) -> dict[str, int]:
    """How often each role's parcels are copied off in one iteration, from their building on."""
    count: collections.Counter[str] = collections.Counter()
    write = Path.write_bytes
    with pytest.MonkeyPatch.context() as patch:

        def counted(path, data):
            if path.name.endswith(".0"):
                count[path.stem] += 1
            return write(path, data)

        patch.setattr(Path, "write_bytes", counted)
        cases.first_iteration([*overrides, "schedule.residency=offload"], (1, 1, 1), "ppo")
    return dict(count)


def left_by(overrides: list[str], stage: str, problem: str) -> dict[str, Presence]:
    """What is on the device once a stage was left by an exception."""
    from dataclasses import replace

    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.launching.build import begin
    from rlhf_engine.schedule import Schedule
    from rlhf_engine.signals import Stop
    from rlhf_engine.surviving.guard import NotFinite

    ctx = cases.context([*overrides, "schedule.residency=offload", "schedule.prefetch=true"], (1, 1, 1))
    algorithm = ALGORITHMS["ppo"](ctx.config)
    specs = algorithm.roles()
    begin(ctx, algorithm.name, specs)
    error = {"Stop": Stop, "NotFinite": NotFinite}[problem]

    def leaves(*args):
        raise error

    stages = [replace(s, body=leaves) if s.name == stage else s for s in algorithm.stages]
    with contextlib.suppress(error):
        Schedule(stages, algorithm.provided, specs).run(ctx, algorithm.batch(ctx))
    return {name: role.presence for name, role in ctx.roles.items()}


# -- the shares of replicas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5), (5, 1), (2, 1, 3), (2, 2, 2, 3)], ids=str)
def test_rectangles_are_the_stretch_in_its_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2):
        found = list(rectangles(shape, start, stop))
        parts = [
            numbers[tuple(slice(o, o + s) for o, s in zip(*offsets_sizes, strict=True))] for offsets_sizes in found
        ]
        assert [n for part in parts for n in part.flatten().tolist()] == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1 and all(part.numel() for part in parts)


@pytest.mark.parametrize("name", ["llama", "untied", "gpt2", "mixtral"])
def test_any_mesh_reads_each_number_where_it_belongs(worlds, tmp_path, name):
    layouts = [(1, 1, 2), (2, 1, 1, True), (1, 2, 1)] + ([(1, 1, 2, False, 2)] if name == "mixtral" else [])
    for layout in layouts:
        worlds(2).run(save, MODELS[name], layout, str(tmp_path / str(layout)))
    for layout, source in itertools.product(layouts, layouts):
        worlds(2).run(load, MODELS[name], layout, str(tmp_path / str(source)))


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 2)], ids=str)
def test_a_replica_writes_what_it_keeps_and_sends_nothing(worlds, tmp_path, layout):
    """And the plan knows how much that is."""
    found = worlds(math.prod(layout)).run(save, MODELS["llama"], layout, str(tmp_path))
    assert [sent for sent, _ in found] == [0] * len(found)
    tp, pp, dp = layout
    model, numbers = ModelConfig(**MODELS["llama"]), Numbers(4, "cpu")
    held = [rank_parameters(model, "lm", mesh(layout), stage) for stage in range(pp)]
    # ranks count up through tp, dp and pp
    for rank, (_, written) in enumerate(found):
        planned = saved(held[rank // (tp * dp)], OptimizerConfig(), mesh(layout), numbers)
        if rank // (tp * dp) == 0 and rank % tp == 0:  # others have copies of norms and of a tied embedding
            # the distributed optimizer cuts its buffer, not each parameter: shares differ by its padding
            assert written == pytest.approx(planned, rel=0.15)
    # every number once: weights, those of the optimizer, and two moments
    assert sum(written for _, written in found) == 16 * rank_parameters(model, "lm", mesh((1, 1, 1)), 0).total


def test_replicas_with_whole_optimizers_write_once(worlds, tmp_path):
    found = worlds(2).run(whole_optimizer, MODELS["llama"], str(tmp_path))
    held = rank_parameters(ModelConfig(**MODELS["llama"]), "lm", mesh((1, 1, 2)), 0)
    planned = saved(held, OptimizerConfig(distributed=False), mesh((1, 1, 2)), Numbers(4, "cpu"))
    assert found == [(0, planned), (0, 0)]


def whole_optimizer(model: dict, folder: str) -> tuple[int, int]:
    found = save(model, (1, 1, 2), folder, distributed=False)
    load(model, (1, 1, 2), folder, distributed=False)
    return found


# -- roles that come and go ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(small_run, tmp_path_factory) -> list[str]:
    """PPO behind a finished reward phase."""
    folder = tmp_path_factory.mktemp("saves") / "run"
    folder.symlink_to(small_run)
    return [*SMALL, "phases=[ppo]", f"output_dir={folder}"]


def test_a_role_at_a_time_is_saved_and_loaded_without_gradients(worlds, overrides, tmp_path):
    away, state = Presence.AWAY, Presence.STATE
    one_by_one = [(state, away), (away, away), (away, state), (away, away)]
    assert worlds(1).run(presences, overrides, str(tmp_path))[0] == {"save": one_by_one, "load": one_by_one}


def test_what_nobody_changed_is_copied_off_once(worlds, overrides):
    """The policy's weights are in place for the next iteration as this one ends."""
    wanted = {"policy_weights": 1, "policy_optimizer": 2, "critic_weights": 3, "critic_optimizer": 2}
    assert worlds(1).run(copies, overrides)[0] == wanted | {"reference_weights": 1, "reward_weights": 2}


@pytest.mark.parametrize(
    ("stage", "problem", "policy"),
    [("train_critic", "Stop", Presence.WEIGHTS), ("values", "NotFinite", Presence.AWAY)],
)
def test_a_stage_that_was_left_leaves_no_more_than_an_iteration(worlds, overrides, stage, problem, policy):
    """The roles of the next stage, which come early, go too."""
    wanted = dict.fromkeys(("policy", "reference", "critic", "reward"), Presence.AWAY)
    assert worlds(1).run(left_by, overrides, stage, problem)[0] == wanted | {"policy": policy}


def test_an_optimizer_that_makes_its_state_in_its_first_step(tmp_path):
    """Saved before that, loaded and stepped: apex's, or transformer-engine's, in a process that finds one."""
    paths = [str(ROOT / "tests" / "fused"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_PORT": str(launching.launcher.free_port()), "PYTHONPATH": os.pathsep.join(paths)}
    code = f"import test_saves; test_saves.before_the_first_step({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=launching.TIMEOUT_SECONDS)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "FusedAdam 0.0 1 True\n"


def before_the_first_step(folder: str) -> None:
    """Says which optimizer it was, its largest moment before a step, and the step and whether there are some after."""
    from rlhf_engine.models.checkpoint import Checkpoints
    from rlhf_engine.models.checkpoint import load as load_checkpoint
    from rlhf_engine.models.stream import train_step
    from rlhf_engine.models.work import Work
    from rlhf_engine.observing.metrics import Metrics
    from rlhf_engine.observing.trace import Trace

    role = cases.build_role(MODELS["llama"], "lm", (1, 1, 1), optimizer=True)
    checkpoints = Checkpoints(Path(folder), role.mesh, CheckpointConfig())
    checkpoints.save(1, {"policy": role}, {})
    assert checkpoints.finish()
    load_checkpoint(Path(folder) / "iteration_1", {"policy": role})
    fused = role.optimizer.optimizer
    before = max(float(state["exp_avg"].abs().max()) for state in fused.state.values())
    batch = {"tokens": torch.arange(16).view(2, 8), "lengths": torch.tensor([8, 8])}

    def loss(output, batch):
        return output.square().sum(), torch.tensor(output.numel()), {}

    assert train_step([Work(role, batch, loss, 2)], Metrics(), Trace()) == {"policy": None}
    after = [bool(state["exp_avg"].any()) for state in fused.state.values()]
    print(type(fused).__name__, before, fused.param_groups[0]["step"], any(after))


def looked_at(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Of what phases the checkpoints are read to be sure of them as PPO's four roles are made, and which times are
    limited."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.surviving import manifest

    ctx, looked, watched = cases.context(overrides, (1, 1, 1)), [], []
    with pytest.MonkeyPatch.context() as patch:

        def damage(folder, *part, original=manifest.damage):
            looked.append(folder.parent.parent.name)
            return original(folder, *part)

        def watch(name: str):
            watched.append(name)
            return contextlib.nullcontext()

        patch.setattr(manifest, "damage", damage)
        ctx.watch = watch
        for name, spec in ALGORITHMS["ppo"](ctx.config).roles().items():
            build_role(ctx, name, spec)
    return looked, watched


def test_a_finished_checkpoint_is_looked_at_once(worlds, overrides):
    looked, watched = worlds(1).run(looked_at, overrides)[0]
    assert sorted(looked) == ["reward", "sft"]
    assert watched == [f"the check of {phase}'s checkpoint" for phase in looked]


def test_a_file_that_was_cut_is_not_a_role(tmp_path):
    weights = torch.arange(50.0)
    parcel = Parcel(lambda: [weights], torch.device("cpu"), tmp_path / "weights")
    parcel.leave()
    with open(tmp_path / "weights.0", "r+b") as file:
        file.truncate(196)
    with pytest.raises(RunError, match=r"weights.0 has 196 bytes of 200"):
        parcel.arrive()


# -- copies on a GPU, on one that is not there ----------------------------------------------------------------


class Cuda:
    """Streams and events by name, what is said to them in order, and memory of which so much is free."""

    def __init__(self, free: int):
        self.free, self.said, self.registered = free, [], {}
        self.streams = itertools.count()

    def stream(self, name: str):
        def method(kind):
            return lambda *args: self.said.append(" ".join([name, kind, *(arg.name for arg in args)]))

        stream = types.SimpleNamespace(name=name, wait_stream=method("waits for"), wait_event=method("waits for"))
        stream.synchronize = method("is waited for")
        stream.record_event = lambda: types.SimpleNamespace(name=f"event of {name}")
        return stream

    def register(self, pointer: int, size: int, flags: int) -> int:
        self.registered[pointer] = size
        return 0


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda(free=1000)
    names = iter(("off", "back"))
    runtime = types.SimpleNamespace(cudaHostRegister=cuda.register, cudaHostUnregister=cuda.registered.pop)
    for name, value in {
        "Stream": lambda device: cuda.stream(next(names)),
        "current_stream": lambda device: cuda.stream("computation"),
        "stream": lambda stream: contextlib.nullcontext(),
        "cudart": lambda: runtime,
        "check_error": lambda code: None,
        "memory_stats": lambda device: {"reserved_bytes.all.current": 500, "active_bytes.all.current": 400},
        "mem_get_info": lambda device: (cuda.free, 10_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    residency._streams.cache_clear()
    yield cuda
    residency._streams.cache_clear()


def test_page_locked_memory_is_as_large_as_what_it_holds(cuda):
    memory = host_memory(1_000_001, torch.device("cuda", 0))
    assert cuda.registered == {memory.data_ptr(): 1_000_001}
    part = memory[:10]
    del memory
    assert cuda.registered  # while anything looks at it
    del part
    assert not cuda.registered


def test_a_parcel_of_a_gpu(cuda, tmp_path):
    """Copied off again only when changed, in streams whose order is said, and waited for where room is short."""
    weights = torch.arange(50.0)
    parcel = Parcel(lambda: [weights[:20], weights[20:]], torch.device("cuda", 0), tmp_path)
    parcel.leave()
    assert weights.untyped_storage().nbytes() == 0 and sum(cuda.registered.values()) == 200
    parcel.arrive()
    parcel.wait()
    arrival = ["back waits for computation", "back waits for event of off", "computation waits for event of back"]
    assert cuda.said == ["off waits for computation", *arrival] and weights.tolist() == list(range(50))
    cuda.said.clear()
    parcel.leave()
    cuda.free = 50  # beside 100 that the allocator holds unused
    parcel.arrive()
    parcel.wait()
    assert cuda.said == ["off is waited for", *arrival]
    weights += 1
    parcel.is_copied = False
    cuda.said.clear()
    parcel.leave()
    parcel.arrive()
    assert cuda.said[0] == "off waits for computation" and weights[-1] == 50
