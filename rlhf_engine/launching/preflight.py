"""Everything that can be refused before a process group exists, in one line. Imports neither torch nor megatron."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import JOBS, SAMPLING, Base, ConfigError, MeshConfig, ModelConfig, RunConfig, check, resolve_mesh
from ..data.conversation import check_turns
from ..data.dataset import cache_of
from ..data.files import read_rows
from ..data.formats import Row, offered
from ..data.messages import asked_of, read_messages
from ..data.sources import HH_MINI, LOOKED_AT, NUM_EVAL_ROWS, Source, held_out_sets, look, mixture, parse_spec, serves
from ..data.tokenizer import Tokenizer
from ..data.trained import tokenizer_notes
from ..environments.load import check_environment
from ..observing.to_wandb import has_wandb
from ..rewards.functions import check_rows, load
from ..rewards.programs import try_out
from ..surviving.parts import Parts, folder_digest, rows_digest
from ..surviving.places import Lock, try_folder
from .earlier import check_finished, check_output_dir
from .environment import check_graphs, cores
from .folders import (
    check_reward,
    check_teacher,
    check_vocabulary,
    folder_notes,
    read_base,
    read_teacher,
    read_tokenizer,
    read_user_tokenizer,
)
from .layers import check_layers
from .sizes import settle

_NO_DIFFERENCE = {"path", "kv_tokens", "cuda_graphs", "vocab_size"}  # to the rows of a job


@dataclass(frozen=True)
class Plan:
    """A run that may start, or whose cost may be foretold."""

    config: RunConfig
    mesh: MeshConfig
    bases: dict[str, Base]  # "policy", "reward", and "teacher" and "user" where there are some
    device: str
    tokenizer: Tokenizer | None  # None: one is trained on the data
    sources: list[Source]  # of the training phases; empty for a job
    beside: dict[str, list[Source]]  # "ptx": mixed into the policy's update; "eval": what it is asked while it trains
    made_with: dict[str, Any]  # what a job's rows depend on; of the main rank alone
    notes: list[str]  # that a user should read before the run starts, a line each
    settled: dict[str, int]  # sizes that were left open, as `settle` filled them in
    user_tokenizer: Tokenizer | None = None  # of the model that environments ask

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        assert self.mesh.dp is not None
        return self.mesh.tp * self.mesh.pp * self.mesh.dp

    @property
    def models(self) -> dict[str, ModelConfig]:
        """Of the bases; one that brings no vocabulary has the tokenizer's size of it."""
        size = self.tokenizer.vocab_size if self.tokenizer is not None else self.config.tokenizer.vocab_size
        return {
            name: replace(base.model, vocab_size=base.model.vocab_size or size) for name, base in self.bases.items()
        }


def num_gpus() -> int:
    """CUDA devices that this process may use, without asking CUDA: those that are there, and of CUDA_VISIBLE_DEVICES
    what comes before the first that is not."""
    here = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return here
    found: list[str] = []
    for name in map(str.strip, visible.split(",")):
        is_there = int(name) < here if name.isdecimal() else here and name.startswith(("GPU-", "MIG-"))
        if not is_there or name in found:
            break
        found.append(name)
    return len(found)


def plan(config: RunConfig, world_size: int | None = None) -> Plan:
    """Checks a run as a whole.

    Args:
        world_size: ranks that a launcher started; None where we start them ourselves.

    Raises:
        ConfigError: what is wrong and what would be right.
    """
    device = _device(config)
    if world_size is None or config.starts_nothing:
        world_size = _world_size(config, device)
    mesh = resolve_mesh(config.mesh, world_size)
    if device == "cpu" and config.dtype in ("bfloat16", "fp8"):
        raise ConfigError(f"dtype={config.dtype} needs a GPU: megatron's optimizers keep float32 weights on a CPU")
    jobs = set(config.phases) & JOBS
    # other ranks do as the main one does, and need not look once more
    is_main = os.environ.get("RANK", "0") == "0" and not config.starts_nothing
    if jobs and len(config.phases) > 1:
        raise ConfigError(f"phases={config.phases}: {sorted(jobs)[0]} runs alone")
    policy = Base(None, config.model)
    if config.policy.path:
        policy = read_base(config.policy.path, "policy", config.policy.ignore_keys)
    if (coefficient := config.policy.router_aux_loss_coef) is not None:
        policy = replace(policy, model=replace(policy.model, router_aux_loss_coef=coefficient))
    reward = policy
    if config.reward.path:
        reward = read_base(config.reward.path, "reward", config.reward.ignore_keys)
    bases = {"policy": policy, "reward": reward}
    if teacher := read_teacher(config):
        bases["teacher"] = teacher
    user = read_base(config.user.path, "user", config.user.ignore_keys) if config.user.path else None
    for base in (*bases.values(), *([user] if user else [])):
        base.model.layers = config.model.layers
    context = min(base.model.max_position_embeddings for base in bases.values())
    settled = settle(config, mesh, policy.model, context, device)
    if not config.plan.search:  # which looks at other meshes, and checks each
        check(config, mesh, *(base.model for base in bases.values()), user=user.model if user else None)
    check_layers(config, device, is_main)
    tokenizer = read_tokenizer(config, policy)
    if reward is not policy:
        check_vocabulary(tokenizer, reward, "reward")
    if teacher:
        check_teacher(config, tokenizer, policy, teacher)
    user_tokenizer = None
    if user:
        user_tokenizer, bases["user"] = read_user_tokenizer(config, tokenizer, user), user
    sources: list[Source] = []
    beside: dict[str, list[Source]] = {}
    made_with: dict[str, Any] = {}
    if jobs:
        check_job_rows(config, tokenizer)
        if is_main:
            made_with = job_settings(config, device)
            Parts(Path(config.output or ""), made_with, config.rerun).check()
    else:
        sources, beside = _sources(config)
        check_output_dir(config)
        check_finished(config)
    check_reward(config, reward)
    notes = [*folder_notes(config, policy, reward, tokenizer), *unusual_rates(config)]
    if tokenizer is None and is_main:
        notes += tokenizer_notes(config, sources)
    notes += _notes_of_the_machine(config, device, is_main)
    if config.calls_functions:
        asked = [*(sources if config.sampling or "eval" not in beside else ()), *beside.get("eval", ())]
        check_functions(config, [row for source in asked for row in source.first_rows(LOOKED_AT)[0]], is_main)
    if config.env.fn is not None and is_main and config.phases != ["score"]:
        for answer in check_environment(config.env, list(_first_rows(config, sources))):
            if tokenizer is not None:
                check_turns(tokenizer, "tool" if answer.tools else "user", answer.tools)
    if is_main:
        place, key = (config.output, "output") if jobs else (config.output_dir, "output_dir")
        assert place is not None
        try_folder(Path(place).parent if jobs else Path(place), f"{key}={place}")
        if not jobs:
            try_folder(cache := cache_of(config), f"data.cache_dir={cache}")
    return Plan(config, mesh, bases, device, tokenizer, sources, beside, made_with, notes, settled, user_tokenizer)


def _device(config: RunConfig) -> str:
    """ "cpu" or "cuda", on which the run can be."""
    device = config.device if config.device != "auto" else ("cuda" if num_gpus() else "cpu")
    if config.starts_nothing:  # on devices that need not be here
        device = device if config.plan.device is None else "cpu" if config.plan.device == "cpu" else "cuda"
    elif device == "cuda" and not num_gpus():
        raise ConfigError("device=cuda, and there is no GPU: use device=cpu or device=auto")
    generates = bool(config.sampling) or "generate" in config.phases
    if device == "cuda" and generates and config.rollout.cuda_graphs and not config.starts_nothing:
        check_graphs(config.mesh.tp)
    if device == "cpu" and os.environ.get("RLHF_KERNELS") == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("RLHF_KERNELS=triton in the environment needs a GPU, or TRITON_INTERPRET=1")
    return device


def _world_size(config: RunConfig, device: str) -> int:
    """Ranks of a run that no launcher has started."""
    model_ranks = max(1, config.mesh.tp) * max(1, config.mesh.pp)
    if config.starts_nothing:
        return config.plan.world or model_ranks * (config.mesh.dp or max(1, 2 // model_ranks))
    if config.mesh.dp is not None:
        world_size = model_ranks * max(1, config.mesh.dp)
    else:
        # on a CPU two ranks with a thread each, the least that shows every kind of parallelism
        world_size = max(1, (num_gpus() if device == "cuda" else 2) // model_ranks) * model_ranks
    if device == "cuda" and world_size > num_gpus():
        raise ConfigError(f"mesh needs {world_size} GPUs and {num_gpus()} are here: use a cluster launcher")
    return world_size


def _sources(config: RunConfig) -> tuple[list[Source], dict[str, list[Source]]]:
    """Of the training phases, and what is read beside, as in `Plan`. Their first rows are read."""
    data = config.data
    sources = mixture(data.sources or HH_MINI, data.num_rows, data.num_eval_rows, config.seed)
    look(sources, config.phases)
    beside: dict[str, list[Source]] = {}
    for phase, section in config.sampling.items():
        if names := section.other_text:
            beside["ptx"] = mixture(names, data.num_rows, 0, config.seed, f"{phase}.ptx.sources")
    if config.eval.sources:
        beside["eval"] = held_out_sets(config.eval.sources, data.num_eval_rows or NUM_EVAL_ROWS, config.seed)
    for name, found in beside.items():
        look(found, [name])
    return sources, beside


def _notes_of_the_machine(config: RunConfig, device: str, is_main: bool) -> Iterator[str]:
    if device == "cuda" and is_main and cores() == 1:
        yield (
            "one core for each GPU, which its threads for autograd, NCCL and checkpoints share: more are faster"
            " (Slurm's --cpus-per-task)"
        )
    if config.log.wandb.project is not None and not has_wandb():
        yield (
            f"log.wandb.project={config.log.wandb.project}: wandb is not installed (pip install -e '.[wandb]'):"
            " the run goes on without it"
        )


def _first_rows(config: RunConfig, sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """What environments will be reset with, of a few rows."""
    if set(config.phases) & JOBS:
        rows = (row for source in config.data.sources for _, row in read_rows(parse_spec(source).name))
        for row in islice(rows, 1):
            yield {**asked_of(row), "seed": 0}
        return
    for source in sources:
        for row in source.first_rows(LOOKED_AT)[0]:
            if serves(row, "prompt"):
                yield {**row.fields, "messages": row.prompt, "seed": 0}


def lock(config: RunConfig) -> Lock:
    """Of the place where a run writes."""
    if set(config.phases) & JOBS:
        return Lock(Path(f"{config.output}.lock"), f"output={config.output}")
    return Lock(Path(config.output_dir) / "run.lock", f"output_dir={config.output_dir}")


def job_settings(config: RunConfig, device: str) -> dict[str, Any]:
    """What the rows of a job depend on: the data, the model and the settings, but not the mesh."""
    job, tokenizer = config.phases[0], config.tokenizer.path
    assert config.policy.path is not None
    found = {
        "phases": config.phases,
        "data.sources": rows_digest(row for s in config.data.sources for _, row in read_rows(parse_spec(s).name)),
        "policy.path": folder_digest(config.policy.path),
        "user.path": folder_digest(config.user.path) if config.user.path is not None else None,
        "tokenizer.path": folder_digest(tokenizer) if tokenizer is not None else None,
        "dtype": config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32",
    }
    sections = ["policy", "tokenizer", *(["rollout", "env", "user"] if job == "generate" else [])]
    for section in sections:
        values = asdict(getattr(config, section))
        found |= {f"{section}.{key}": value for key, value in values.items() if key not in _NO_DIFFERENCE}
    return found | ({"seed": config.seed} if job == "generate" else {})


def unusual_rates(config: RunConfig) -> list[str]:
    """What may start and is hardly meant: rates at which a pretrained model forgets what it has learned."""
    if config.policy.path is None:
        return []
    return [
        f"{key}.lr={rate.lr:g} is usual for a model from scratch, and {usual:g} for a pretrained one as this is"
        for key, rate in config.optimizers.items()
        for most, usual in [_highest_rates(*key.split("."))]
        if key.split(".")[0] in config.phases and rate.lr > most
    ]


def _highest_rates(phase: str, optimizer: str) -> tuple[float, float]:
    """Of a pretrained model: the highest that is not unusual, and a usual one."""
    if phase in SAMPLING:
        return (1e-4, 5e-6) if optimizer == "critic_optimizer" else (3e-5, 1e-6)
    return (2e-5, 1e-6) if phase in ("dpo", "kto") else (1e-4, 1e-5)


def check_job_rows(config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Refuses what a job cannot read, before anything starts."""
    for source in config.data.sources:
        spec = parse_spec(source)
        if (spec.system, spec.reward) != ("default", None):
            raise ConfigError(f"data.sources={source}: the {config.phases[0]} job reads rows without presets")
        for where, row in read_rows(spec.name):
            check_job_row(row, where, config.phases[0], tokenizer)


def check_job_row(row: Any, where: str, job: str, tokenizer: Tokenizer | None) -> None:
    """A row of a score or generate job.

    Raises:
        ConfigError: it has neither text nor messages, or messages that the chat template refuses.
    """
    key = {"score": "text", "generate": "prompt"}[job]
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row of the {job} job is a JSON object, not {type(row).__name__}")
    if key in row:
        if not isinstance(row[key], str):
            raise ConfigError(f"{where}: {key!r} must be text")
        return
    if "messages" not in row:
        raise ConfigError(f"{where}: a row of the {job} job has {key!r} or 'messages', this one {sorted(row)!s:.99}")
    messages = read_messages(row["messages"], where, "messages")
    tools = offered(row, messages, where)
    assert tokenizer is not None  # of the policy, which a job has
    try:
        tokenizer.template.parts(messages, prompt=job == "generate", marks=False, tools=tools)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_functions(config: RunConfig, rows: Sequence[Row], is_main: bool) -> None:
    """Reward functions can be called, with what rows of prompts have, and programs run where the main rank is.

    Raises:
        ConfigError: names the function, and what is missing.
    """
    parts = load(config)
    check_rows(parts, ((row.where, row.fields) for row in rows if serves(row, "prompt")))
    if is_main and any(part.name == "code" for part in parts):
        try_out(config.reward.code)
