"""The phases of training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .environments import EnvConfig
from .reading import ConfigError, size
from .rollout import RolloutConfig


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
class CodeConfig:
    """What each test that the reward `code` runs may use."""

    timeout: float = 10.0  # seconds of a test; those behind one that takes longer fail with it
    memory: float = 1.0  # GiB
    # in Linux namespaces: no network, no files but Python's and no other process; false: these limits alone
    isolated: bool = True


@dataclass
class JudgeConfig:
    """The model behind an OpenAI-compatible endpoint that the reward `judge` asks."""

    url: str | None = None  # of the endpoint, as http://host:port/v1
    model: str | None = None  # its name there
    # what it is asked, with {prompt}, {response} and fields of the row in braces; null: for a mark from 0 to 10
    prompt: str | None = None
    pattern: str = r"Score:\s*(-?\d+(?:\.\d+)?)"  # of the reply, its last match is taken
    key: str = "OPENAI_API_KEY"  # the environment variable that has the key, if there is one
    max_tokens: int = 512  # of a reply
    timeout: float = 60.0  # seconds of one request
    retries: int = 5  # of a request that failed, the first after a second, each after twice as long
    concurrency: int = 16  # requests at once
    cache: str | None = None  # file of the replies so far; null: OUTPUT_DIR/judge.jsonl


@dataclass
class RewardConfig:
    # functions that score a response instead of the reward model, each NAME::WEIGHT[ARGUMENT=FIELD]; NAME alone has the
    # weight 1, and is package.module:name or one of math, exact, regex, format, length, code, judge (docs/rewards.md)
    fns: list[str] = field(default_factory=list)
    # that call the functions, with one response at a time; 0: a call has all responses, in the main rank, but for math
    # and code, which have a process for each of its cores
    processes: int = 0
    timeout: float = 600.0  # seconds that one call of a function may take
    regex: str = r"####\s*(\S+)"  # of `regex`: its last match counts, and is the row's answer if it has a group
    format: str = r"<think>.*?</think>\s*<answer>.*?</answer>\s*"  # of `format`: the whole response
    code: CodeConfig = field(default_factory=CodeConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # HF folder, or what tools/convert_hf made of one: what scores responses, or what the reward phase, if there is one,
    # goes on from; null: the reward phase starts from the SFT policy
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
class SamplingConfig:
    """What every phase has that samples answers to prompts and learns from their scores."""

    iterations: int = 30
    prompts_per_iteration: int = size(64)
    samples_per_prompt: int = 1
    epochs: int = 2  # passes over the samples of an iteration
    num_minibatches: int = 2  # optimizer steps per epoch
    micro_batch_size: int = size(16)  # rows, likewise
    kl_coef: float = 0.05
    kl: str = "reward"  # where the KL to another policy is, which each phase has its choices of
    # what the ratio is taken to: log-probs of the trainer's forward, or the sampler's own, which saves that forward
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    # nats between the two above which the trainer's are taken all the same; null: 1e-4 in float32, 0.5 in bfloat16
    max_log_prob_gap: float | None = None
    measure_gap_every: int = 10  # iterations; in between nothing is computed that could tell
    loss: Literal["ppo", "gspo", "cispo", "reinforce"] = "ppo"  # which policy loss (docs/algorithms.md)
    # over what it is a mean: all tokens; responses, each a mean over its tokens; or responses, each a sum over its
    # tokens divided by rollout.max_new_tokens (with env.fn env.max_tokens)
    loss_mean: Literal["tokens", "sequences", "constant"] = "tokens"
    clip_ratio: float = 0.2
    clip_ratio_high: float | None = None  # above 1; null: as below
    dual_clip: float | None = None  # most that the loss of a token with a negative advantage is, in times of that
    entropy_coef: float = 0.0
    # how much a token counts that the sampler has drawn: 1, or the trainer's probability over the sampler's, of it or
    # of its response; cut to importance_limit, or 0 beyond it and below its inverse
    importance: Literal["none", "truncated", "masked"] = "none"
    importance_of: Literal["tokens", "sequences"] = "tokens"
    importance_limit: float = 2.0
    importance_low: float | None = None  # the lower bound; null: 0 if truncated, 1 / importance_limit if masked
    score_min: float | None = None  # raise scores to this at least
    score_max: float | None = None  # and lower them to this at most
    score_center: bool = False  # then take off their running mean
    score_scale: bool = False  # and divide them by their running standard deviation
    missing_eos_penalty: float = 1.0  # taken off the score of a response without an end
    # taken off the score of one of rollout.max_new_tokens (with env.fn env.max_tokens, what is observed included), and
    # less off those that are up to so many tokens shorter
    overlong_penalty: float = 1.0
    overlong_buffer: int = 0  # 0: off
    std_correction: int = 1  # taken off the count in a standard deviation: 1 as most, 0 as numpy
    write_rollouts: bool = False  # every iteration's responses, in OUTPUT_DIR/PHASE/rollouts/ITERATION.jsonl
    write_arrays: bool = False  # and all that its updates were computed from, in ITERATION.npz (docs/data.md)
    eval_prompts: int = 128
    eval_every: int = 0  # iterations; 0: at the end alone
    save_every: int = 10
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt

    def prompts_under_way(self, rollout: RolloutConfig) -> int:
        """That an iteration generates for, of which it learns from `prompts_per_iteration`."""
        share = rollout.done_share if rollout.carries else 1.0
        return math.ceil(self.prompts_per_iteration / share - 1e-9)

    @property
    def is_scored(self) -> bool:
        """Whether responses have scores that something is learned from."""
        return True

    @property
    def other_text(self) -> list[str]:
        """Sources whose rows join each step of the policy."""
        return []

    def shrink(self, rows: int, micro_batch_size: int) -> None:
        """One step of so many rows, of two to a prompt where there are several."""
        self.samples_per_prompt = min(2, self.samples_per_prompt)
        self.prompts_per_iteration = rows // self.samples_per_prompt
        self.micro_batch_size, self.epochs, self.num_minibatches = micro_batch_size, 1, 1
        self.write_rollouts = self.write_arrays = False

    def check(self, name: str, reward: RewardConfig, rollout: RolloutConfig, dp: int) -> None:
        """Refuses numbers of an iteration that do not fit each other.

        Args:
            name: of this section.
        """
        if self.overlong_buffer >= rollout.max_new_tokens:
            raise ConfigError(
                f"{name}.overlong_buffer={self.overlong_buffer} must be less than"
                f" rollout.max_new_tokens={rollout.max_new_tokens}"
            )
        if self.importance != "none" and self.old_log_probs == "sampler":
            raise ConfigError(
                f"{name}.importance={self.importance} compares the sampler with the trainer, whose log-probs"
                f" {name}.old_log_probs=sampler does not compute: use {name}.old_log_probs=trainer"
            )
        if rollout.carries and self.importance == "none":
            raise ConfigError(
                f"rollout.tail=carry has tokens of older policies, and {name}.importance=none counts them as the"
                f" present one's: use {name}.importance=truncated, or masked"
            )
        if self.importance_limit <= 1:
            raise ConfigError(f"{name}.importance_limit={self.importance_limit} must be above 1")
        if self.importance_low is not None and not 0 <= self.importance_low <= 1:
            raise ConfigError(f"{name}.importance_low={self.importance_low} must lie between 0 and 1")
        if self.std_correction not in (0, 1):
            raise ConfigError(f"{name}.std_correction={self.std_correction} must be 0 or 1")
        if self.num_minibatches < 1 or self.samples % self.num_minibatches:
            raise ConfigError(
                f"{name}.num_minibatches={self.num_minibatches} does not divide the {self.samples} samples of an"
                f" iteration ({name}.prompts_per_iteration x {name}.samples_per_prompt)"
            )
        check_batch("rows per minibatch", self.samples // self.num_minibatches, dp)
        if self.score_min is not None and self.score_max is not None and self.score_min > self.score_max:
            raise ConfigError(f"{name}.score_min={self.score_min} exceeds {name}.score_max={self.score_max}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"{name}.dual_clip={self.dual_clip} must be above 1, as 3.0")
        if reward.fns and reward.path is not None:
            raise ConfigError(f"reward.path={reward.path} has no use with reward.fns={reward.fns}")


@dataclass
class PPOConfig(SamplingConfig):
    # where the KL to the reference is: in the reward, or in the loss by one of its estimates (docs/algorithms.md)
    kl: Literal["reward", "k1", "k2", "k3", "k3+"] = "reward"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 6.0  # nats per response, for the adaptive controller
    kl_horizon: int = 10000  # samples, for the adaptive controller
    gamma: float = 1.0
    gae_lambda: float = 0.95
    gae_alpha: float | None = (
        None  # lambda of a response of n tokens is 1 - 1 / (gae_alpha n), as 0.05; null: gae_lambda
    )
    critic_lambda: float | None = None  # of the returns that the critic learns; null: as the advantages'
    clip_value: float = 0.2
    whiten_advantages: bool = True
    std_correction: int = 0  # taken off the count of tokens in it: 1 as verl, TRL and others, 0 as OpenRLHF
    critic_warmup_iterations: int = 0  # first iterations train the critic alone
    ptx: PTXConfig = field(default_factory=PTXConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=3e-4))

    @property
    def other_text(self) -> list[str]:
        """Of PPO-ptx."""
        return self.ptx.sources

    def shrink(self, rows: int, micro_batch_size: int) -> None:
        """The same, with the policy in it."""
        super().shrink(rows, micro_batch_size)
        self.ptx.rows, self.critic_warmup_iterations = rows, 0

    def check(self, name: str, reward: RewardConfig, rollout: RolloutConfig, dp: int) -> None:
        """The same, and what is PPO's own."""
        super().check(name, reward, rollout, dp)
        if self.other_text:
            check_batch(f"{name}.ptx.rows", self.ptx.rows, dp)
        if self.kl_controller == "adaptive" and self.kl != "reward":
            raise ConfigError(f"{name}.kl_controller=adaptive needs {name}.kl=reward, not {self.kl}")
        if self.kl_controller == "adaptive" and self.samples >= 5 * self.kl_horizon:  # its error is cut to 0.2
            raise ConfigError(
                f"{name}.kl_horizon={self.kl_horizon} lets one iteration of {self.samples} samples take all of the KL"
                f" coefficient: use more than {self.samples // 5}"
            )
        if 0 < self.iterations <= self.critic_warmup_iterations:
            raise ConfigError(
                f"{name}.critic_warmup_iterations={self.critic_warmup_iterations} leaves the policy none of"
                f" {name}.iterations={self.iterations}"
            )


@dataclass
class GroupConfig(SamplingConfig):
    """What phases have besides that compare a score with those of other responses to the prompt."""

    # what a score is compared with (docs/algorithms.md)
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "remax", "none"] = "grpo"
    # with env.fn, what is compared: trajectories by their scores; or each turn, by what it and the turns behind it are
    # rewarded with, with the same turn of the prompt's other samples
    credit: Literal["trajectory", "turn"] = "trajectory"
    turn_discount: float = 1.0  # of the next turn's rewards, in what a turn is compared by
    std_eps: float = 1e-6  # added to it
    redraws: int = 0  # rounds, at most, in which further prompts take the place of those whose scores are all equal

    def shrink(self, rows: int, micro_batch_size: int) -> None:
        """The same, without further prompts."""
        super().shrink(rows, micro_batch_size)
        self.redraws = 0

    def check(self, name: str, reward: RewardConfig, rollout: RolloutConfig, dp: int) -> None:
        """The same, and that there is something to compare a score with."""
        super().check(name, reward, rollout, dp)
        if self.samples_per_prompt == 1 and self.redraws:
            raise ConfigError(f"{name}.redraws={self.redraws} needs {name}.samples_per_prompt of 2 or more")
        if self.redraws and rollout.carries:
            raise ConfigError(
                f"{name}.redraws={self.redraws} finishes what it draws, and rollout.tail=carry does not: use"
                f" {name}.redraws=0 or rollout.tail=finish"
            )
        if rollout.replay is not None and (self.redraws or self.advantage == "remax"):
            key = "redraws" if self.redraws else "advantage"
            raise ConfigError(
                f"{name}.{key}={getattr(self, key)} samples more than rollout.replay={rollout.replay} has recorded"
            )
        is_alone = self.is_scored and self.samples_per_prompt == 1
        if is_alone and self.advantage not in ("reinforce++", "remax", "none"):
            raise ConfigError(
                f"{name}.samples_per_prompt=1 leaves {name}.advantage={self.advantage} nothing to compare a response"
                f" with: use 2 or more, or {name}.advantage=reinforce++"
            )


@dataclass
class GRPOConfig(GroupConfig):
    samples_per_prompt: int = 8
    epochs: int = 1
    kl_coef: float = 0.04  # 0: no reference model
    kl: Literal["reward", "k1", "k2", "k3", "k3+"] = "k3"  # as ppo.kl
    loss_mean: Literal["tokens", "sequences", "constant"] = "sequences"


@dataclass
class TeacherConfig:
    # HF folder, or what tools/convert_hf made of one, of the model that `distill` learns from: of any size, its token
    # ids those of the policy
    path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)  # of its config.json, read as if they were not there


@dataclass
class DistillConfig(GroupConfig):
    epochs: int = 1
    kl_coef: float = 1.0  # of the KL to the teacher
    # how the KL is learned: by the tokens that were sampled, as their advantages, or in the loss over all of the
    # vocabulary (docs/algorithms.md)
    kl: Literal["token", "full"] = "token"
    reward_coef: float = 0.0  # of the scores' advantages beside it, as grpo's; 0: nothing is scored

    @property
    def is_scored(self) -> bool:
        """Where scores count."""
        return self.reward_coef > 0

    def check(self, name: str, reward: RewardConfig, rollout: RolloutConfig, dp: int) -> None:
        """The same, and that scores which something is done with are there."""
        super().check(name, reward, rollout, dp)
        what = f"redraws={self.redraws}" if self.redraws else f"advantage={self.advantage}"
        if not self.is_scored and (self.redraws or self.advantage == "remax"):
            raise ConfigError(f"{name}.{what} needs scores, and {name}.reward_coef=0 asks for none: use 1")


def check_turns(name: str, section: SamplingConfig, env: EnvConfig) -> None:
    """Refuses turns that are compared where there are none, or by what knows none."""
    shaping = [key for key in ("score_min", "score_max") if getattr(section, key) is not None]
    shaping += [key for key in ("score_center", "score_scale") if getattr(section, key)]
    of_turns = isinstance(section, PPOConfig) or getattr(section, "credit", "") == "turn"
    if env.fn is not None and of_turns and shaping:
        raise ConfigError(
            f"{name}.{shaping[0]}={getattr(section, shaping[0])} changes scores as a whole, and rewards of turns stay"
            f" as env.fn={env.fn} gives them: leave it out"
        )
    if not isinstance(section, GroupConfig):
        return
    if env.fn is not None and section.redraws:
        raise ConfigError(f"{name}.redraws={section.redraws} draws single turns again: use 0 with env.fn={env.fn}")
    if env.fn is not None and section.advantage == "remax":
        raise ConfigError(
            f"{name}.advantage=remax compares with the likeliest response of one turn: use {name}.advantage=rloo with"
            f" env.fn={env.fn}"
        )
    if section.credit == "turn":
        if env.fn is None:
            raise ConfigError(
                f"{name}.credit=turn compares the turns of an environment, and env.fn=null has none: use"
                f" env.fn=package.module:Class, or {name}.credit=trajectory"
            )
        if not section.is_scored:
            raise ConfigError(f"{name}.credit=turn needs scores, and {name}.reward_coef=0 asks for none: use 1")
        if not 0 <= section.turn_discount <= 1:
            raise ConfigError(f"{name}.turn_discount={section.turn_discount} must lie between 0 and 1")
    elif section.turn_discount != 1:
        raise ConfigError(f"{name}.turn_discount={section.turn_discount} has no use with {name}.credit=trajectory")


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


@dataclass
class DPOConfig:
    # dpo, ipo, cdpo (labels that may be wrong), or without a reference simpo and orpo (docs/preference.md)
    loss: Literal["dpo", "ipo", "cdpo", "simpo", "orpo"] = "dpo"
    beta: float | None = None  # how near to the reference; orpo's lambda; null: 0.1, and 2 for simpo
    label_smoothing: float = 0.0  # cdpo's share of pairs whose answers are taken to be the wrong way round
    margin: float = 1.0  # simpo's gamma, by which the chosen answer is to be ahead
    # what a loss takes of an answer's tokens; null: as its authors, the mean for ipo, simpo and orpo, else the sum
    log_probs: Literal["sum", "mean"] | None = None
    # the reference's log-probs: of all rows before the first iteration, kept in OUTPUT_DIR/dpo/reference.json, or of
    # each iteration's with the reference beside the policy
    reference: Literal["cached", "each_step"] = "cached"
    iterations: int = 100
    batch_size: int = size(32)  # pairs per optimizer step, over all replicas
    micro_batch_size: int = size(8)  # pairs, likewise
    eval_every: int = 50
    eval_prompts: int = 128  # answered at the end, by the policy and by that which it began as
    save_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))

    @property
    def has_reference(self) -> bool:
        """Whether the loss asks for one."""
        return self.loss not in ("simpo", "orpo")

    @property
    def takes_means(self) -> bool:
        """Of an answer's tokens, not their sum."""
        return (self.log_probs or ("mean" if self.loss in ("ipo", "simpo", "orpo") else "sum")) == "mean"

    @property
    def strength(self) -> float:
        """Beta, with its default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1


@dataclass
class KTOConfig:
    beta: float = 0.1  # how near to the reference
    desirable_weight: float = 1.0  # of the loss of good answers (lambda_D)
    undesirable_weight: float = 1.0  # and of bad ones (lambda_U)
    reference: Literal["cached", "each_step"] = "cached"  # as dpo.reference
    iterations: int = 100
    batch_size: int = size(64)  # answers per optimizer step, over all replicas
    micro_batch_size: int = size(16)  # rows, likewise
    eval_every: int = 50
    eval_prompts: int = 128  # as dpo.eval_prompts
    save_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


def check_dpo(dpo: DPOConfig) -> None:
    """Refuses a share of wrong labels that the loss has no use for, or that turns it round."""
    share = dpo.label_smoothing
    if dpo.loss == "cdpo" and not 0 < share < 0.5:
        raise ConfigError(f"dpo.label_smoothing={share} must lie between 0 and 0.5 for dpo.loss=cdpo")
    if dpo.loss != "cdpo" and share:
        raise ConfigError(f"dpo.label_smoothing={share} has no use with dpo.loss={dpo.loss}: use dpo.loss=cdpo")
