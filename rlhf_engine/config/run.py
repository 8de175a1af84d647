"""A run as a whole."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .algorithms import (
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    TeacherConfig,
    check_batch,
    check_dpo,
    check_optimizer,
    check_turns,
)
from .data import DataConfig, TokenizerConfig
from .environments import EnvConfig, UserConfig, check_env
from .evaluating import EvalConfig, check_best, check_eval
from .mesh import MeshConfig
from .model import ModelConfig, PolicyConfig, check_fp8, check_model
from .observing import LogConfig
from .planning import PlanConfig, RehearseConfig
from .reading import ConfigError
from .rollout import RolloutConfig, check_rollout, check_sampled_from
from .schedule import ScheduleConfig, check_offload
from .surviving import CheckpointConfig, GuardConfig, TimeoutConfig

Phase = Literal["sft", "reward", "ppo", "grpo", "distill", "dpo", "kto", "score", "generate"]
JOBS = frozenset({"score", "generate"})  # phases that read a file and write a file
SAMPLING = frozenset({"ppo", "grpo", "distill"})  # phases that draw prompts and sample the answers
ASKING = SAMPLING | {"eval"}  # what reads a prompt of each row alone
PAIRED = frozenset({"reward", "dpo"})  # phases that draw two answers to each prompt
TAUGHT = frozenset({"distill"})  # phases that learn from a teacher
LABELLED = frozenset({"kto"})  # phases that draw answers one by one, good and bad
# the phases that train, each with those whose end it builds on
BUILDS_ON: dict[str, tuple[str, ...]] = {
    "sft": (), "reward": ("sft",), **dict.fromkeys(("ppo", "grpo", "distill"), ("sft", "reward")),
    **dict.fromkeys(("dpo", "kto"), ("sft",)),
}  # fmt: skip

TRAINS_POLICY = BUILDS_ON.keys() - {"reward"}


@dataclass
class RunConfig:
    phases: list[Phase] = field(default_factory=lambda: ["sft", "reward", "ppo"])
    rerun: bool = False  # begin all phases again; started again after a stop, the same command goes on
    seed: int = 1
    output_dir: str = "runs/default"
    output: str | None = None  # file written by the score and generate jobs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bfloat16 on cuda, float32 on cpu; fp8: bfloat16, and the layers' products in 8 bits (model.layers=te)
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    trace: bool = False  # what each rank does and when, in OUTPUT_DIR/PHASE/trace.json, for ui.perfetto.dev
    export_hf: bool = True  # each phase leaves its trained models in HF format, in OUTPUT_DIR/PHASE/hf
    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    kto: KTOConfig = field(default_factory=KTOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    user: UserConfig = field(default_factory=UserConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    rehearse: RehearseConfig = field(default_factory=RehearseConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    timeout: TimeoutConfig = field(default_factory=TimeoutConfig)
    # when a rank dies, start again from the last checkpoint, so often at most; by plain Python and Ray (other launchers
    # have a setting of their own, docs/launching.md)
    max_restarts: int = 0

    @property
    def starts_nothing(self) -> bool:
        """Only words about the run are wanted."""
        return self.plan.show or self.plan.search or self.schedule.explain

    @property
    def sampling(self) -> dict[str, SamplingConfig]:
        """The sections of this run's phases that sample, by phase."""
        return {phase: getattr(self, phase) for phase in self.phases if phase in SAMPLING}

    @property
    def calls_functions(self) -> bool:
        """Reward functions score responses, to learn from them or to evaluate."""
        return bool(self.reward.fns and (self.sampling or self.eval.samples))

    @property
    def most_new_tokens(self) -> int:
        """That a row may have behind its prompt."""
        if self.env.fn is None:
            return self.rollout.max_new_tokens
        return self.env.max_tokens or max(1, self.data.max_seq_len - self.data.max_prompt_len)

    @property
    def samples_like(self) -> SamplingConfig:
        """The first of them; PPO's where there is none."""
        return next(iter(self.sampling.values()), self.ppo)

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """Of all training phases, by dotted key."""
        return {
            f"{phase}.{name}": value
            for phase in BUILDS_ON
            for name, value in vars(getattr(self, phase)).items()
            if isinstance(value, OptimizerConfig)
        }


def check(config: RunConfig, mesh: MeshConfig, *models: ModelConfig, user: ModelConfig | None = None) -> None:
    """Refuses a run that could not work, before anything expensive starts.

    Args:
        mesh: resolved (`resolve_mesh`).
        models: of the run's roles, from their checkpoints where there are some.
        user: of the one that environments ask, which reads no row of the run.

    Raises:
        ConfigError: names the keys and what would be right.
    """
    if not config.phases:
        raise ConfigError(f"phases is empty: choose from {', '.join(typing.get_args(Phase))}")
    for each in (*models, *([user] if user is not None else [])):
        check_model(mesh, each)
        if config.dtype == "fp8":
            check_fp8(mesh, each)
    if config.dtype == "fp8" and config.model.layers != "te":
        raise ConfigError("dtype=fp8 needs transformer-engine's layers: use model.layers=te, or dtype=bfloat16")
    assert mesh.dp is not None
    phases = set(config.phases)
    for phase in config.phases:
        if (rows := getattr(getattr(config, phase, None), "batch_size", None)) is not None:
            check_batch(f"{phase}.batch_size", rows, mesh.dp)
    if "dpo" in phases:
        check_dpo(config.dpo)
    if "kto" in phases and config.kto.batch_size < 2:
        raise ConfigError("kto.batch_size=1 has no other answer to estimate the KL with: use 2 at least")
    for name, section in config.sampling.items():
        section.check(name, config.reward, config.rollout, mesh.dp)
        check_turns(name, section, config.env)
        check_sampled_from(config.rollout)
        check_offload(config.schedule)
    if phases & JOBS:
        _check_job(config)
    else:
        _check_lengths(config, mesh, models)
    check_rollout(config.rollout)
    check_env(config.env, config.user, config.rollout, config.phases)
    if config.env.fn is not None and config.reward.path is not None:
        raise ConfigError(f"reward.path={config.reward.path} has no use with env.fn={config.env.fn}, which rewards")
    check_eval(config.eval, config.data.sources, bool(config.reward.fns or config.env.fn))
    check_best(config.checkpoint, _figures(config))
    for key, optimizer in config.optimizers.items():
        check_optimizer(key, optimizer)


def _figures(config: RunConfig) -> dict[str, str | None]:
    """The figures of evaluations by which a checkpoint can be the best, each with the key that has it measured while a
    phase trains; None where that is so already."""
    found: dict[str, str | None] = {}
    for phase in config.phases:
        names = config.eval.figures if phase in TRAINS_POLICY else []
        if phase in BUILDS_ON and phase not in SAMPLING:
            names = [*names, "eval/loss", *(["eval/accuracy"] if phase in PAIRED | LABELLED else [])]
        every = getattr(getattr(config, phase, None), "eval_every", 0)
        found |= {name: None if every else f"{phase}.eval_every" for name in names if found.get(name, "") is not None}
    return found


def _check_job(config: RunConfig) -> None:
    if config.output is None:
        raise ConfigError("output is not set: output=FILE.jsonl names the file to write")
    if not config.data.sources:
        raise ConfigError("data.sources is empty: data.sources=[FILE.jsonl] names what to read")
    if config.policy.path is None:
        raise ConfigError("policy.path is not set: policy.path=DIR names an HF folder")


def _check_lengths(config: RunConfig, mesh: MeshConfig, models: Sequence[ModelConfig]) -> None:
    """Of rows in training, against the models' contexts."""
    for each in models:
        if each.num_experts is not None and mesh.tp > 1 and not mesh.sequence_parallel:
            raise ConfigError(f"mesh.tp={mesh.tp} trains experts with mesh.sequence_parallel=true only")
    length = min(each.max_position_embeddings - (each.score_token is not None) for each in models)
    budget = config.most_new_tokens
    if config.data.max_seq_len > length:
        raise ConfigError(f"data.max_seq_len={config.data.max_seq_len} exceeds the context of {length}")
    if not config.sampling:
        return
    kv_tokens, most = config.rollout.kv_tokens, config.data.max_prompt_len + budget
    key = "rollout.max_new_tokens" if config.env.fn is None else "env.max_tokens"
    asked = f"data.max_prompt_len={config.data.max_prompt_len} + {key}={budget}"
    if most > length:
        raise ConfigError(f"{asked} exceeds the context of {length}")
    if kv_tokens is not None and kv_tokens < most:
        raise ConfigError(f"rollout.kv_tokens={kv_tokens} has no room for {asked} = {most} tokens")
