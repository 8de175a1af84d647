"""The phases of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .reading import ConfigError, size


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    clip_grad: float = 1.0
    distributed: bool = True  # optimizer state split over DP (ZeRO-1)
    # gradients are reduced during the last backward, and split weights gathered during the next forward; null: on GPUs
    overlap: bool | None = None


@dataclass
class SFTConfig:
    iterations: int = 200
    batch_size: int = size(64)  # dialogues per optimizer step, over all replicas
    micro_batch_size: int = size(16)  # rows of a forward and backward on one replica, were all as long as the longest
    eval_every: int = 50
    save_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RewardConfig:
    kind: Literal["model", "function"] = "model"  # what scores a response in PPO
    fn: str | None = None  # package.module:name for kind=function
    timeout: float = 600.0  # seconds that one call of fn may take
    # HF folder, or what tools/convert_hf made of one: what PPO scores with, or the reward phase, if there is one, goes
    # on from; null: the reward phase starts from the SFT policy
    path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)  # of its config.json, read as if they were not there
    iterations: int = 100
    batch_size: int = size(32)  # pairs per optimizer step, over all replicas
    micro_batch_size: int = size(8)  # pairs, likewise
    eval_every: int = 50
    save_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class PTXConfig:
    """Text whose log-likelihood is mixed into the policy's update (PPO-ptx, Ouyang et al. 2022, eq. 2)."""

    sources: list[str] = field(default_factory=list)  # as data.sources; none: PPO alone
    coef: float = 1.0  # of its loss, a mean over its own tokens
    rows: int = 32  # with each minibatch, over all replicas


@dataclass
class PPOConfig:
    iterations: int = 30
    prompts_per_iteration: int = size(64)
    samples_per_prompt: int = 1
    epochs: int = 2  # passes over the samples of an iteration
    num_minibatches: int = 2  # optimizer steps per epoch
    micro_batch_size: int = size(16)  # rows, likewise
    kl_coef: float = 0.05
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 6.0  # nats per response, for the adaptive controller
    kl_horizon: int = 10000  # samples, for the adaptive controller
    gamma: float = 1.0
    gae_lambda: float = 0.95
    # what the ratio is taken to: log-probs of the trainer's forward, or the sampler's own, which saves that forward
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    # nats between the two above which the trainer's are taken all the same; null: 1e-4 in float32, 0.5 in bfloat16
    max_log_prob_gap: float | None = None
    measure_gap_every: int = 10  # iterations; in between nothing is computed that could tell
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    score_min: float | None = None  # raise scores to this at least
    score_max: float | None = None  # and lower them to this at most
    score_center: bool = False  # then take off their running mean
    score_scale: bool = False  # and divide them by their running standard deviation
    missing_eos_penalty: float = 1.0  # taken off the score of a response without an end
    critic_warmup_iterations: int = 0  # first iterations train the critic alone
    ptx: PTXConfig = field(default_factory=PTXConfig)
    write_rollouts: bool = False  # every iteration's responses, in OUTPUT_DIR/ppo/rollouts/ITERATION.jsonl
    write_arrays: bool = False  # and all that its updates were computed from, in ITERATION.npz (docs/data.md)
    eval_prompts: int = 128
    save_every: int = 10
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=3e-4))


def check_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    """Refuses a rate below its least value."""
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"{key}.min_lr={optimizer.min_lr} exceeds {key}.lr={optimizer.lr}")


def check_batch(key: str, rows: int, dp: int) -> None:
    """Refuses rows that the replicas do not divide."""
    if rows < 1 or rows % dp:
        lower, upper = rows // dp * dp, (rows // dp + 1) * dp
        fits = f"{lower} or {upper}" if lower else upper
        raise ConfigError(f"{key}={rows} is not a multiple of mesh.dp={dp}: use {fits}")


def check_ppo(ppo: PPOConfig, reward: RewardConfig, dp: int) -> None:
    """Refuses numbers of an iteration that do not fit each other."""
    samples = ppo.prompts_per_iteration * ppo.samples_per_prompt
    if ppo.num_minibatches < 1 or samples % ppo.num_minibatches:
        raise ConfigError(
            f"ppo.num_minibatches={ppo.num_minibatches} does not divide the {samples} samples of an iteration"
            " (ppo.prompts_per_iteration x ppo.samples_per_prompt)"
        )
    check_batch("rows per minibatch", samples // ppo.num_minibatches, dp)
    if ppo.ptx.sources:
        check_batch("ppo.ptx.rows", ppo.ptx.rows, dp)
    if ppo.score_min is not None and ppo.score_max is not None and ppo.score_min > ppo.score_max:
        raise ConfigError(f"ppo.score_min={ppo.score_min} exceeds ppo.score_max={ppo.score_max}")
    if ppo.kl_controller == "adaptive" and samples >= 5 * ppo.kl_horizon:  # its error is cut to 0.2
        raise ConfigError(
            f"ppo.kl_horizon={ppo.kl_horizon} lets one iteration of {samples} samples take all of the KL coefficient:"
            f" use more than {samples // 5}"
        )
    if 0 < ppo.iterations <= ppo.critic_warmup_iterations:
        raise ConfigError(
            f"ppo.critic_warmup_iterations={ppo.critic_warmup_iterations} leaves the policy none of"
            f" ppo.iterations={ppo.iterations}"
        )
    if reward.kind == "function" and reward.path is not None:
        raise ConfigError(f"reward.path={reward.path} has no use with reward.kind=function")
    if reward.kind == "function" and (not all((reward.fn or "").partition(":"))):
        raise ConfigError("reward.kind=function needs reward.fn=package.module:name")
