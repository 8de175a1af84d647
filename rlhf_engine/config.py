"""Every setting of a run: its name, its type, its default and its checks. Standard library alone.

YAML files and command lines hold differences from these defaults. `from_dict` is strict: an unknown key, a wrong
type or an impossible combination is a `ConfigError`, one line that names the key and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Recompute = Literal["none", "selective", "full"]
Phase = Literal["sft", "reward", "ppo", "score", "generate"]
ROLES = ("policy", "critic", "reference", "reward")
JOBS = frozenset({"score", "generate"})  # phases that read a file and write a file
DeviceName = Literal["cpu", "a100", "h100", "h200", "b200"]
NEEDED = "<needed>"  # in conf/, what an experiment asks of its user
_LONGEST_LINE = 1500  # characters of an error


class ConfigError(ValueError):
    """A run that cannot start, in one line for its user, whatever of theirs the message quotes."""

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


def size(default: int) -> Any:
    """A field that may be null until `sizes.settle` has filled it in, before anything reads it."""
    return field(default=default, metadata={"is_size": True})


@dataclass
class MeshConfig:
    tp: int = 1  # tensor parallel: each layer is split over so many ranks
    pp: int = 1  # pipeline parallel: the layers are dealt to so many stages
    dp: int | None = None  # data parallel replicas; null takes what the world leaves
    ep: int = 1  # expert parallel: so many replicas share each layer's experts out among them
    sequence_parallel: bool = False  # norms and residuals split over the sequence as well (needs tp > 1)
    virtual_pp: int = 1  # chunks of layers that each stage has, apart from each other: less idle time, more messages


@dataclass
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training. `dynamic` stretches only what lies
    beyond `max_position_embeddings`, where no run goes."""

    rope_type: Literal["linear", "dynamic", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # these three belong to llama3
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class ModelConfig:
    """A decoder; the defaults are Llama's. Used for random weights; a checkpoint at `policy.path` brings its own."""

    architecture: str = "llama"  # whose HF names and keys the weights have: a module of rlhf_engine/hf
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 352  # of each expert where there are experts
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    vocab_size: int | None = None  # null: the tokenizer's
    max_position_embeddings: int = 512
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a token sees, itself included; null: all before it
    first_sliding_layer: int = 0  # layers below see everything
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-5  # of either norm
    qk_norm: bool = False  # queries and keys normalised per head
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    proj_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    num_experts: int | None = None  # null: one dense MLP a layer
    experts_per_token: int = 2
    normalize_experts: bool = True  # the weights of a token's experts add up to 1
    tie_word_embeddings: bool = True
    score_token: int | None = None  # a reward model that reads its score at this token, put behind each dialogue
    score_pad: int | None = None  # a reward model that reads its score at the last token that is not this one
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Base:
    """Where a role's weights begin: a folder, or random ones of a model (`path` None)."""

    path: str | None
    model: ModelConfig


@dataclass
class PolicyConfig:
    # HF folder, or what tools/convert_hf made of one, that the first phase starts from; null: random weights of `model`
    path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)  # of its config.json, read as if they were not there


@dataclass
class TokenizerConfig:
    path: str | None = None  # HF folder or sentencepiece model; null: the policy's, or one trained on the data
    vocab_size: int = 768  # of a tokenizer trained on the data
    # how messages become text: the name of one of the tokenizer's own chat templates or of ours (hh, internlm2, llama3,
    # chatml), or a Jinja program; null: the tokenizer's only one or its default, hh where it has none
    template: str | None = None
    date: str | None = None  # YYYY-MM-DD, for templates that write the date; null: the day on which the run began
    end_id: int | None = None  # the one token that ends a response; null: all that template and tokenizer say


@dataclass
class DataConfig:
    # name::weight[system=PRESET][reward=PRESET] each, see docs/data.md; none: the embedded hh_mini, both its subsets
    sources: list[str] = field(default_factory=list)
    # each batch has the shares of the mixture, or only the data as a whole
    strategy: Literal["in_batch", "in_data"] = "in_batch"
    num_rows: int = 3000  # rows generated by hh_mini over all its sources
    # held out: hh_mini's test split, or the last rows of each source; null: 256, but of no source more than a tenth
    num_eval_rows: int | None = None
    max_seq_len: int = size(192)  # tokens; longer dialogues are left out and counted
    max_prompt_len: int = size(128)  # tokens; rows whose prompt is longer are left out and counted, in every phase
    min_prompt_len: int = 1  # tokens; and shorter


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


@dataclass
class RolloutConfig:
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability have none; 0: off
    greedy: bool = False
    max_new_tokens: int = size(64)
    min_new_tokens: int = 1  # the end token has no probability before
    # strings that end a response; it is cut behind the token in which the first of them completes. As a shell hands on
    # what stands in quotes, \n, \t and \\ in them are a line break, a tab and a backslash
    stop: list[str] = field(default_factory=list)
    slots: int = 256  # sequences decoded at once on one replica
    kv_tokens: int | None = None  # positions of the KV cache of one replica; null: what free memory holds
    cuda_graphs: bool = True  # launch a decode step as one; false: to compare with

    @property
    def stop_texts(self) -> list[str]:
        """`stop`, its escapes read."""
        read = {"n": "\n", "t": "\t", "\\": "\\"}
        return [re.sub(r"\\([nt\\])", lambda found: read[found[1]], text) for text in self.stop]


@dataclass
class ScheduleConfig:
    infer_stream: bool = True  # under pp > 1 neighbouring forward stages share one pipeline
    train_stream: bool = True  # and so do the critic's and the policy's updates
    # activations that backward computes again and need not be kept: of attention, or of whole layers
    recompute: Recompute = "none"
    # rows of like length are packed into micro-batches of at most so many tokens, padding included (a longer row goes
    # alone); null: the tokens of micro_batch_size rows that are as long as the batch's longest
    micro_batch_tokens: int | None = None
    # where weights, gradients and optimizers are while no stage needs them: on the device or off it, which for a CPU
    # means in files; auto offloads the fewest roles that make the run fit by its plan
    residency: Literal["keep", "offload", "auto"] = "keep"
    offload: list[str] = field(default_factory=lambda: list(ROLES))  # the roles that residency=offload moves
    prefetch: bool = False  # bring roles while the stage before them works, which needs room for both
    explain: bool = False  # `schedule=explain`: say what runs together and where roles are when, and run nothing

    def moves(self, role: str) -> bool:
        """Whether a role comes and goes."""
        return self.residency == "offload" and role in self.offload


@dataclass
class PlanConfig:
    """What a run would cost, by arithmetic: nothing is run, and the devices need not be here (docs/plan.md)."""

    show: bool = False  # `plan=true`
    search: bool = False  # and the meshes of as many ranks that would be fastest
    calibrate: bool = False  # seconds by a short run of the same stages on this machine, a few layers on one rank
    device: DeviceName | None = None  # null: what is here
    world: int | None = None  # ranks; null: those of the mesh
    memory: float | None = None  # GB of a device; null: what such a device has
    prompt_tokens: int | None = None  # of a usual prompt, for FLOPs and seconds; null: data.max_prompt_len
    response_tokens: int | None = None  # of a usual response; null: rollout.max_new_tokens


@dataclass
class RehearseConfig:
    """A run on devices that are not there, of the kind `plan.device` (docs/rehearse.md)."""

    # those of the world that are rehearsed; null: all of a small run (8 ranks of a small model), of a larger one a rank
    # of each pipeline stage, of the first two and the last two of them
    ranks: list[int] | None = None
    # of each role in a pass; null: all of a small run, of a larger one a few more than it has pipeline stages
    micro_batches: int | None = None
    iterations: int = 2  # of each phase
    # as long as the configuration allows, so that no iteration needs more memory, or as they come
    rows: Literal["longest", "data"] = "longest"


@dataclass
class CheckpointConfig:
    keep_last: int = 2  # the newest so many
    keep_every: int | None = None  # and those of iterations that are a multiple of it; null: none
    async_save: bool = True  # written while training goes on, from a copy in host memory


@dataclass
class WandBConfig:
    """Weights & Biases: a run for each phase."""

    project: str | None = None  # null: none is written
    entity: str | None = None  # null: the user's own
    group: str | None = None  # of the phases' runs; null: the last part of output_dir
    name: str | None = None  # null: the last part of output_dir, and the phase
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline"] | None = None  # null: what WANDB_MODE says, online where it says nothing


@dataclass
class LogConfig:
    """Where figures go beside OUTPUT_DIR/PHASE/metrics.jsonl. What fails there is said once and ends no run."""

    tensorboard: bool = True  # events in OUTPUT_DIR/PHASE
    wandb: WandBConfig = field(default_factory=WandBConfig)


@dataclass
class GuardConfig:
    """Numbers gone bad. An update whose loss or gradient is not finite is skipped and counted (`skipped/ROLE`), and so
    are all updates of an iteration in which a stage gave something that is not."""

    max_bad_steps: int = 5  # of one role in a row; then the run stops, saved
    max_kl: float | None = None  # nats per response (kl/mean) above which it is said; null: any
    max_log_prob_gap: float | None = None  # between sampler and trainer (rollout/log_prob_gap), likewise
    stop: bool = False  # and the run stops, saved


@dataclass
class TimeoutConfig:
    stage: float = 1800.0  # seconds; a stage, a save or an evaluation that takes longer ends the run, explained


@dataclass
class RunConfig:
    phases: list[Phase] = field(default_factory=lambda: ["sft", "reward", "ppo"])
    rerun: bool = False  # run finished phases again
    seed: int = 1
    output_dir: str = "runs/default"
    output: str | None = None  # file written by the score and generate jobs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda, float32 on cpu
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
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
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


# The least value of a number, by the last part of its key; the others may have any.
_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "save_every", "keep_last", "keep_every", "num_rows", "num_eval_rows",
         "max_seq_len", "max_prompt_len", "min_prompt_len", "prompts_per_iteration", "samples_per_prompt", "epochs",
         "num_minibatches", "eval_prompts", "max_new_tokens", "micro_batch_tokens", "rows", "slots", "kv_tokens",
         "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
         "vocab_size", "max_position_embeddings", "max_bad_steps", "tp", "pp", "dp", "ep", "virtual_pp", "world",
         "prompt_tokens", "response_tokens", "measure_gap_every"),
        1,
    ),
    **dict.fromkeys(
        ("iterations", "eval_every", "critic_warmup_iterations", "warmup_steps", "top_k", "min_p", "min_new_tokens",
         "seed", "end_id", "lr", "min_lr", "weight_decay", "beta1", "beta2", "eps", "clip_grad", "kl_coef", "gamma",
         "gae_lambda", "max_log_prob_gap", "clip_ratio", "clip_value", "coef", "init_std", "max_restarts"),
        0,
    ),
}  # fmt: skip
_POSITIVE = {
    "kl_target", "kl_horizon", "max_kl", "max_log_prob_gap", "stage", "temperature", "timeout", "top_p", "rope_theta",
    "rms_norm_eps", "memory", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip

T = TypeVar("T")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A suggestion for a name that is not known: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass, sections included."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            found += keys(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def from_dict(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds the dataclass `cls` from plain values.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    sizes = {f.name for f in dataclasses.fields(cls) if f.metadata.get("is_size")}  # type: ignore[arg-type]
    built = {}
    for name, value in values.items():
        key = prefix + name
        if name not in hints:
            raise ConfigError(f"unknown key {key}: {nearest(key, [prefix + known for known in hints])}")
        if value == NEEDED:
            raise ConfigError(f"{key} is not set, and this experiment needs it")
        built[name] = None if value is None and name in sizes else _convert(hints[name], value, key)
    return cls(**built)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section with keys of its own, not {value!r}")
        return from_dict(typing.cast(type, hint), value, key + ".")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(args[0], value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value} is not one of {', '.join(map(str, args))}")
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} is not a list: write {key}=[{value}]")
        return [_convert(args[0], item, key) for item in value]
    is_number = hint in (int, float)
    kinds = (int, float) if hint is float else hint
    if not isinstance(value, kinds) or (is_number and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r} is not a {_KIND[hint]}")
    if is_number:
        name = key.split(".")[-1]
        if not -(2**62) < value < 2**62:  # NaN and infinities too
            raise ConfigError(f"{key}={value} is not a finite number")
        value = hint(value)
        if value < _AT_LEAST.get(name, value):
            raise ConfigError(f"{key}={value} must be at least {_AT_LEAST[name]}")
        if name in _POSITIVE and value <= 0:
            hint_greedy = "; rollout.greedy=true takes the likeliest token" if name == "temperature" else ""
            raise ConfigError(f"{key}={value} must be positive{hint_greedy}")
    return value


_KIND = {int: "whole number", float: "number", bool: "truth value (true or false)", str: "text"}


def resolve_mesh(config: RunConfig, world_size: int) -> MeshConfig:
    """The mesh with `dp` filled in for a world of so many ranks.

    Raises:
        ConfigError: tp x pp x dp does not make the world.
    """
    mesh = config.mesh
    model_ranks = mesh.tp * mesh.pp
    dp = mesh.dp if mesh.dp is not None else max(1, world_size // model_ranks)
    if model_ranks * dp != world_size:
        raise ConfigError(
            f"mesh.tp={mesh.tp} x mesh.pp={mesh.pp} x mesh.dp={dp} needs {model_ranks * dp} ranks,"
            f" and {world_size} are there"
        )
    if dp % mesh.ep:
        raise ConfigError(f"mesh.ep={mesh.ep} does not divide the {dp} data parallel replicas")
    return dataclasses.replace(mesh, dp=dp, sequence_parallel=mesh.sequence_parallel and mesh.tp > 1)


def check(config: RunConfig, mesh: MeshConfig, model: ModelConfig, reward: ModelConfig) -> None:
    """Refuses a run that could not work, before anything expensive starts.

    Args:
        mesh: resolved (`resolve_mesh`).
        model, reward: the policy's and the reward model's, from their checkpoints where there are some.

    Raises:
        ConfigError: names the keys and what would be right.
    """
    if config.rerun and config.max_restarts:
        raise ConfigError(f"max_restarts={config.max_restarts} with rerun=true would run finished phases once more")
    if not config.phases:
        raise ConfigError(f"phases is empty: choose from {', '.join(typing.get_args(Phase))}")
    for each in (model, reward):
        check_model(mesh, each)
    assert mesh.dp is not None
    dp = mesh.dp
    phases = set(config.phases)
    if "sft" in phases:
        _check_batch("sft.batch_size", config.sft.batch_size, dp)
    if "reward" in phases:
        _check_batch("reward.batch_size", config.reward.batch_size, dp)
    if "ppo" in phases:
        _check_ppo(config, mesh)
    if phases & JOBS:
        if config.output is None:
            raise ConfigError("output is not set: output=FILE.jsonl names the file to write")
        if not config.data.sources:
            raise ConfigError("data.sources is empty: data.sources=[FILE.jsonl] names what to read")
        if config.policy.path is None:
            raise ConfigError("policy.path is not set: policy.path=DIR names an HF folder")
    else:
        for each in (model, reward):
            if each.num_experts is not None and mesh.tp > 1 and not mesh.sequence_parallel:
                raise ConfigError(f"mesh.tp={mesh.tp} trains experts with mesh.sequence_parallel=true only")
        context = reward.max_position_embeddings - (reward.score_token is not None)
        length, budget = min(model.max_position_embeddings, context), config.rollout.max_new_tokens
        if config.data.max_seq_len > length:
            raise ConfigError(f"data.max_seq_len={config.data.max_seq_len} exceeds the context of {length}")
        if "ppo" in phases and config.data.max_prompt_len + budget > length:
            raise ConfigError(
                f"data.max_prompt_len={config.data.max_prompt_len} + rollout.max_new_tokens={budget}"
                f" exceeds the context of {length}"
            )
        kv_tokens, most = config.rollout.kv_tokens, config.data.max_prompt_len + budget
        if "ppo" in phases and kv_tokens is not None and kv_tokens < most:
            raise ConfigError(
                f"rollout.kv_tokens={kv_tokens} has no room for data.max_prompt_len={config.data.max_prompt_len}"
                f" + rollout.max_new_tokens={budget} = {most} tokens"
            )
    if config.rollout.top_p > 1:
        raise ConfigError(f"rollout.top_p={config.rollout.top_p} must lie in (0, 1]")
    if config.rollout.min_p > 1:
        raise ConfigError(f"rollout.min_p={config.rollout.min_p} must lie in [0, 1]")
    if "" in config.rollout.stop:
        raise ConfigError("rollout.stop holds an empty string, which every response has")
    if config.rollout.min_new_tokens > config.rollout.max_new_tokens:
        raise ConfigError(
            f"rollout.min_new_tokens={config.rollout.min_new_tokens} exceeds"
            f" rollout.max_new_tokens={config.rollout.max_new_tokens}"
        )
    optimizers = {
        "sft.optimizer": config.sft.optimizer,
        "reward.optimizer": config.reward.optimizer,
        "ppo.optimizer": config.ppo.optimizer,
        "ppo.critic_optimizer": config.ppo.critic_optimizer,
    }
    for key, optimizer in optimizers.items():
        if optimizer.min_lr > optimizer.lr:
            raise ConfigError(f"{key}.min_lr={optimizer.min_lr} exceeds {key}.lr={optimizer.lr}")


def check_model(mesh: MeshConfig, model: ModelConfig) -> None:
    """Refuses a mesh that the model cannot be cut for. Key-value heads are never replicated.

    Raises:
        ConfigError: names the sizes, and those of the mesh that would fit.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(model, name)
        if size % mesh.tp:
            fits = [t for t in range(1, 65) if not any(
                getattr(model, n) % t for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
            )]  # fmt: skip
            raise ConfigError(f"mesh.tp={mesh.tp} does not divide the model's {name}={size}: tp may be {fits}")
    if model.num_layers < mesh.pp:
        raise ConfigError(f"mesh.pp={mesh.pp} exceeds the model's num_layers={model.num_layers}")
    if mesh.virtual_pp > 1 and mesh.pp == 1:
        raise ConfigError(
            f"mesh.virtual_pp={mesh.virtual_pp} has no pipeline to divide: use mesh.pp=2, or virtual_pp=1"
        )
    if model.num_layers < mesh.pp * mesh.virtual_pp:
        raise ConfigError(
            f"mesh.virtual_pp={mesh.virtual_pp} x mesh.pp={mesh.pp} exceeds the model's num_layers={model.num_layers}:"
            f" use mesh.virtual_pp={model.num_layers // mesh.pp}"
        )
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide"
            f" num_attention_heads={model.num_attention_heads}"
        )
    if (model.num_experts or mesh.ep) % mesh.ep or (mesh.ep > 1 and model.num_experts is None):
        raise ConfigError(f"mesh.ep={mesh.ep} does not divide the model's num_experts={model.num_experts or 0}")
    fewest = 2 if model.normalize_experts else 1  # the weight of one expert alone would always be 1
    if model.num_experts is not None and not fewest <= model.experts_per_token <= model.num_experts:
        raise ConfigError(
            f"model.experts_per_token={model.experts_per_token} does not lie between {fewest} and"
            f" num_experts={model.num_experts}"
        )
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of num_attention_heads="
            f"{model.num_attention_heads}: change it or set model.head_dim"
        )


def _check_batch(key: str, rows: int, dp: int) -> None:
    if rows < 1 or rows % dp:
        lower, upper = rows // dp * dp, (rows // dp + 1) * dp
        fits = f"{lower} or {upper}" if lower else upper
        raise ConfigError(f"{key}={rows} is not a multiple of mesh.dp={dp}: use {fits}")


def _check_ppo(config: RunConfig, mesh: MeshConfig) -> None:
    assert mesh.dp is not None
    ppo, dp = config.ppo, mesh.dp
    samples = ppo.prompts_per_iteration * ppo.samples_per_prompt
    if ppo.num_minibatches < 1 or samples % ppo.num_minibatches:
        raise ConfigError(
            f"ppo.num_minibatches={ppo.num_minibatches} does not divide the {samples} samples of an iteration"
            " (ppo.prompts_per_iteration x ppo.samples_per_prompt)"
        )
    minibatch = samples // ppo.num_minibatches
    _check_batch("rows per minibatch", minibatch, dp)
    if ppo.ptx.sources:
        _check_batch("ppo.ptx.rows", ppo.ptx.rows, dp)
    if ppo.score_min is not None and ppo.score_max is not None and ppo.score_min > ppo.score_max:
        raise ConfigError(f"ppo.score_min={ppo.score_min} exceeds ppo.score_max={ppo.score_max}")
    if 0 < ppo.iterations <= ppo.critic_warmup_iterations:
        raise ConfigError(
            f"ppo.critic_warmup_iterations={ppo.critic_warmup_iterations} leaves the policy none of"
            f" ppo.iterations={ppo.iterations}"
        )
    sampling = config.rollout
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.greedy:
        raise ConfigError(
            "PPO needs the log-probs of the distribution sampled from: rollout.top_k=0, rollout.top_p=1,"
            " rollout.min_p=0 and rollout.greedy=false (rollout.temperature is free)"
        )
    for role in config.schedule.offload:
        if role not in ROLES:
            raise ConfigError(f"schedule.offload={role}: {nearest(role, ROLES)}")
    if config.reward.kind == "function" and config.reward.path is not None:
        raise ConfigError(f"reward.path={config.reward.path} has no use with reward.kind=function")
    if config.reward.kind == "function" and (not all((config.reward.fn or "").partition(":"))):
        raise ConfigError("reward.kind=function needs reward.fn=package.module:name")
