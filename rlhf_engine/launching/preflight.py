"""Everything that can be refused before a process group exists, in one line. Imports neither torch nor megatron."""

from __future__ import annotations

import glob
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import JOBS, Base, ConfigError, MeshConfig, ModelConfig, RunConfig, check, resolve_mesh
from ..data.files import read_rows
from ..data.messages import read_messages
from ..data.sources import HH_MINI, Source, check_sources, parse_spec, read_sources
from ..data.tokenizer import Tokenizer
from ..data.vocabulary import has_tokenizer, read_vocabulary
from ..hf.config import ARCHITECTURES, family, read_json, read_model_config
from ..hf.index import check_adapter, index, unread_files
from ..observing.to_wandb import has_wandb
from ..surviving import durable
from ..surviving.parts import Parts, folder_digest, rows_digest
from ..surviving.places import Lock, try_folder
from .environment import check_graphs, cores
from .sizes import settle

SUMMARY = "summary.json"  # of a finished phase
_NO_DIFFERENCE = {"path", "kv_tokens", "cuda_graphs", "vocab_size"}  # to the rows of a job


@dataclass(frozen=True)
class Plan:
    """A run that may start, or whose cost may be foretold."""

    config: RunConfig
    mesh: MeshConfig
    bases: dict[str, Base]  # "policy" and "reward"
    device: str
    tokenizer: Tokenizer | None  # None: one is trained on the data
    sources: list[Source]  # of the training phases; empty for a job
    ptx_sources: list[Source]  # that PPO mixes into the policy's update
    made_with: dict[str, Any]  # what a job's rows depend on; of the main rank alone
    notes: list[str]  # that a user should read before the run starts, a line each
    settled: dict[str, int]  # sizes that were left open, as `settle` filled them in

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
    device = config.device if config.device != "auto" else ("cuda" if num_gpus() else "cpu")
    if config.starts_nothing:  # on devices that need not be here
        device = device if config.plan.device is None else "cpu" if config.plan.device == "cpu" else "cuda"
        model_ranks = config.mesh.tp * config.mesh.pp
        world_size = config.plan.world or model_ranks * (config.mesh.dp or max(1, 2 // model_ranks))
    elif device == "cuda" and not num_gpus():
        raise ConfigError("device=cuda, and there is no GPU: use device=cpu or device=auto")
    generates = bool({"ppo", "generate"} & set(config.phases))
    if device == "cuda" and generates and config.rollout.cuda_graphs and not config.starts_nothing:
        check_graphs(config.mesh.tp)
    if device == "cpu" and os.environ.get("RLHF_KERNELS") == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("RLHF_KERNELS=triton in the environment needs a GPU, or TRITON_INTERPRET=1")
    if world_size is None:
        model_ranks = max(1, config.mesh.tp) * max(1, config.mesh.pp)
        if config.mesh.dp is not None:
            world_size = model_ranks * max(1, config.mesh.dp)
        else:
            # on a CPU two ranks with a thread each, the least that shows every kind of parallelism
            world_size = max(1, (num_gpus() if device == "cuda" else 2) // model_ranks) * model_ranks
        if device == "cuda" and world_size > num_gpus():
            raise ConfigError(f"mesh needs {world_size} GPUs and {num_gpus()} are here: use a cluster launcher")
    mesh = resolve_mesh(config.mesh, world_size)
    if device == "cpu" and config.dtype == "bfloat16":
        raise ConfigError("dtype=bfloat16 needs a GPU: megatron's optimizers keep float32 weights on a CPU")
    jobs = set(config.phases) & JOBS
    # other ranks do as the main one does, and need not look once more
    is_main = os.environ.get("RANK", "0") == "0" and not config.starts_nothing
    if jobs and len(config.phases) > 1:
        raise ConfigError(f"phases={config.phases}: {sorted(jobs)[0]} runs alone")
    policy = Base(None, config.model)
    if config.policy.path:
        policy = read_base(config.policy.path, "policy", config.policy.ignore_keys)
    reward = policy
    if config.reward.path:
        reward = read_base(config.reward.path, "reward", config.reward.ignore_keys)
    context = min(base.model.max_position_embeddings for base in (policy, reward))
    settled = settle(config, mesh, policy.model, context, device)
    if not config.plan.search:  # which looks at other meshes, and checks each
        check(config, mesh, policy.model, reward.model)
    tokenizer = read_tokenizer(config, policy)
    if reward is not policy:
        check_vocabulary(tokenizer, reward)
    sources: list[Source] = []
    ptx_sources: list[Source] = []
    made_with: dict[str, Any] = {}
    if jobs:
        for source in config.data.sources:
            spec = parse_spec(source)
            if (spec.system, spec.reward) != ("default", None):
                raise ConfigError(f"data.sources={source}: the {config.phases[0]} job reads rows without presets")
            for where, row in read_rows(spec.name):
                check_job_row(row, where, config.phases[0], tokenizer)
        if is_main:
            made_with = job_settings(config, device)
            Parts(Path(config.output or ""), made_with, config.rerun).check()
    else:
        data = config.data
        sources = read_sources(data.sources or HH_MINI, data.num_rows, data.num_eval_rows, config.seed)
        check_sources(sources, config.phases)
        if "ppo" in config.phases and config.ppo.ptx.sources:
            ptx_sources = read_sources(config.ppo.ptx.sources, data.num_rows, 0, config.seed, "ppo.ptx.sources")
            check_sources(ptx_sources, ["ptx"], "ppo.ptx.sources")
        check_output_dir(config)
        check_finished(config)
    check_reward(config, reward)
    notes = [*folder_notes(config, policy, reward, tokenizer), *unusual_rates(config)]
    if device == "cuda" and is_main and cores() == 1:
        notes.append(
            "one core for each GPU, which its threads for autograd, NCCL and checkpoints share: more are faster"
            " (Slurm's --cpus-per-task)"
        )
    if config.log.wandb.project is not None and not has_wandb():
        notes.append(
            f"log.wandb.project={config.log.wandb.project}: wandb is not installed (pip install -e '.[wandb]'):"
            " the run goes on without it"
        )
    if config.reward.kind == "function" and "ppo" in config.phases:
        load_function(config.reward.fn or "")
    bases = {"policy": policy, "reward": reward}
    if is_main:
        place, key = (config.output, "output") if jobs else (config.output_dir, "output_dir")
        assert place is not None
        try_folder(Path(place).parent if jobs else Path(place), f"{key}={place}")
    return Plan(config, mesh, bases, device, tokenizer, sources, ptx_sources, made_with, notes, settled)


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
        "tokenizer.path": folder_digest(tokenizer) if tokenizer is not None else None,
        "dtype": config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32",
    }
    sections = ["policy", "tokenizer", *(["rollout"] if job == "generate" else [])]
    for section in sections:
        values = asdict(getattr(config, section))
        found |= {f"{section}.{key}": value for key, value in values.items() if key not in _NO_DIFFERENCE}
    return found | ({"seed": config.seed} if job == "generate" else {})


def unusual_rates(config: RunConfig) -> list[str]:
    """What may start and is hardly meant: rates at which a pretrained model forgets what it has learned."""
    if config.policy.path is None:
        return []
    return [
        f"{key}.lr={lr:g} is usual for a model from scratch, and {usual:g} for a pretrained one as this is"
        for key, lr, most, usual in (
            ("sft.optimizer", config.sft.optimizer.lr, 1e-4, 1e-5),
            ("reward.optimizer", config.reward.optimizer.lr, 1e-4, 1e-5),
            ("ppo.optimizer", config.ppo.optimizer.lr, 3e-5, 1e-6),
            ("ppo.critic_optimizer", config.ppo.critic_optimizer.lr, 1e-4, 5e-6),
        )
        if key.split(".")[0] in config.phases and lr > most
    ]


def read_base(path: str, section: str = "policy", ignore_keys: Sequence[str] = ()) -> Base:
    """A folder that weights begin from, in HF format or converted.

    Args:
        section: of the configuration that names it.
        ignore_keys: see `hf.config.parse`.
    """
    check_adapter(path)
    model = read_model_config(path, ignore_keys, f"{section}.ignore_keys")
    if section == "policy" and has_score(path):
        raise ConfigError(f"policy.path={path} is a reward model: reward.path={path} scores with it, or trains it")
    if not is_converted(path):
        index(path)
    return Base(path, model)


def is_converted(path: str) -> bool:
    """Whether a folder is what tools/convert_hf makes."""
    return (Path(path) / ".metadata").is_file()


def has_score(path: str) -> bool:
    """Whether the folder's model is one that scores."""
    where = Path(path) / "config.json"
    return family(read_json(where), str(where))[1] == "scalar"


def folder_notes(config: RunConfig, policy: Base, reward: Base, tokenizer: Tokenizer | None) -> list[str]:
    """What the folders of weights hold that is not used, or is used in a way of its own."""
    notes = []
    for section, base in {"policy": policy, "reward": reward}.items():
        if base.path is None or is_converted(base.path) or (section == "reward" and base is policy):
            continue
        if unread := [path.name for path in unread_files(base.path)]:
            notes.append(f"{section}.path={base.path}: not read: {', '.join(unread)}")
        score = index(base.path).get(ARCHITECTURES[base.model.architecture].score)
        if section == "policy" and score is not None:
            notes.append(
                f"policy.path={base.path}: {score.name} in {score.path.name} is a score's head, not the policy's"
            )
        if section == "reward" and score is None and "reward" in config.phases:
            notes.append(f"reward.path={base.path} has no score's head: the reward phase starts with one of zeros")
    if tokenizer is not None and reward.model.score_pad in tokenizer.end_ids:
        notes.append(
            f"reward.path={reward.path}: pad_token_id={reward.model.score_pad} of its config.json ends rows: its score"
            " is read at the token before, as by transformers"
        )
    return notes


def check_reward(config: RunConfig, reward: Base) -> None:
    """What PPO builds on.

    Raises:
        ConfigError: there is no reward model, or it gives no scores.
    """
    trained = "reward" in config.phases or (Path(config.output_dir) / "reward" / SUMMARY).is_file()
    if "ppo" not in config.phases or config.reward.kind != "model" or trained:
        return
    if config.reward.path is None:
        raise ConfigError(
            f"PPO needs a reward model, and no reward phase is finished in {config.output_dir}:"
            " use phases=[reward,ppo], reward.path=DIR, or reward=function reward.fn=package.module:name"
        )
    head = ARCHITECTURES[reward.model.architecture].score
    path = config.reward.path
    if not (has_score(path) if is_converted(path) else head in index(path)):
        raise ConfigError(
            f"reward.path={config.reward.path} has no tensor {head}, so all its scores would be 0: phases=[reward,ppo]"
            " makes a reward model of it"
        )


def check_output_dir(config: RunConfig) -> None:
    """A run goes on only where it began as the same: another model or tokenizer cannot load what is there.

    Raises:
        ConfigError: names the key that differs from the config.yaml of an earlier phase, or a record that is not whole.
    """
    now = {name: asdict(getattr(config, name)) for name in ("model", "tokenizer", "policy")}
    with_reward = now | {"reward": {"path": config.reward.path}}  # of which the SFT phase knows nothing
    for phase in ("sft", "reward", "ppo"):
        path = Path(config.output_dir) / phase / "config.yaml"
        durable.read(path.with_name(SUMMARY))
        if (before := durable.read(path)) is None or config.rerun:
            continue
        for section, values in (now if phase == "sft" else with_reward).items():
            for key, value in values.items():
                if (old := (before.get(section) or {}).get(key, value)) != value:
                    raise ConfigError(
                        f"{section}.{key}={value}, and {path.parent} was made with {old}: use another output_dir"
                    )


def check_finished(config: RunConfig) -> None:
    """A phase builds on the end of those before it.

    Raises:
        ConfigError: one of them was stopped before its end, and is not to go on.
    """
    order = ("sft", "reward", "ppo")
    for i, phase in enumerate(order):
        folder, later = Path(config.output_dir) / phase, [name for name in config.phases if name in order[i + 1 :]]
        has_begun = (folder / "checkpoints" / "latest").is_file()
        if later and phase not in config.phases and has_begun and not (folder / SUMMARY).is_file():
            raise ConfigError(
                f"phases=[{','.join(config.phases)}]: {later[0]} builds on {folder}, which was stopped before its end:"
                f" use phases=[{','.join([phase, *config.phases])}], or another output_dir"
            )


def read_tokenizer(config: RunConfig, policy: Base) -> Tokenizer | None:
    """The configured tokenizer or the policy's own; None where one is to be trained on the data.

    Raises:
        ConfigError: it cannot be read, lacks what the template needs, or has more ids than the model.
    """
    path, template = config.tokenizer.path or config.policy.path, config.tokenizer.template
    if path is None and config.tokenizer.end_id is not None:
        raise ConfigError(
            f"tokenizer.end_id={config.tokenizer.end_id} needs a tokenizer that has it: set tokenizer.path"
        )
    if path is None and template not in (None, "hh"):
        raise ConfigError(
            f"tokenizer.template={template} needs control tokens, which a tokenizer trained on the data does not have:"
            " set tokenizer.path"
        )
    most = policy.model.vocab_size
    if path is None:
        if most is not None and (size := config.tokenizer.vocab_size) > most:
            raise ConfigError(f"the tokenizer (trained on the data) has {size} ids, and the model's vocabulary {most}")
        return None
    config.tokenizer.date = config.tokenizer.date or kept_date(config)
    tokenizer = Tokenizer(path, template, config.tokenizer.end_id, config.tokenizer.date)
    if most is not None:
        tokenizer.fit(most, "the model's vocabulary")
    return tokenizer


def kept_date(config: RunConfig) -> str | None:
    """The date that the templates of a run wrote when it began, which a resumed one goes on with."""
    for phase in ("sft", "reward", "ppo"):
        before = durable.read(Path(config.output_dir) / phase / "config.yaml")
        if not set(config.phases) & JOBS and before is not None:
            return (before.get("tokenizer") or {}).get("date")
    return None


def check_vocabulary(tokenizer: Tokenizer | None, reward: Base) -> None:
    """A reward model reads the token ids that the policy writes.

    Raises:
        ConfigError: it would take them for other words.
    """
    assert reward.path is not None and reward.model.vocab_size is not None
    if tokenizer is None:
        raise ConfigError("reward.path needs the tokenizer that it was trained with: set policy.path or tokenizer.path")
    tokenizer.fit(reward.model.vocab_size, f"the vocabulary of reward.path={reward.path}")
    if has_tokenizer(Path(reward.path)):
        own, text = read_vocabulary(Path(reward.path)), "Which words are these? 1, 2, 3: naïve\n\nAssistant: tokens."
        if [*own.begin, *own.encode(text)] != tokenizer.encode(text):
            raise ConfigError(f"reward.path={reward.path} has another tokenizer than the policy")


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
    assert tokenizer is not None  # of the policy, which a job has
    try:
        tokenizer.template.parts(messages, prompt=job == "generate", marks=False)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_function(name: str):
    """The function `package.module:name`.

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ConfigError(f"reward.fn={name}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ConfigError(f"reward.fn={name} is not a function")
    return function
