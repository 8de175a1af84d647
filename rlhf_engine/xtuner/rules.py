"""What becomes of each key of an XTuner-RLHF configuration: a rule for each, as the code in InternLM/xtuner's
xtuner/rlhf/ uses it. No key is passed over in silence: it sets one of ours, is refused, or is said to change nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT, AS_OURS = object(), object()

SECTIONS = (
    "dataset_config", "prompt_dataset_config", "pretrain_dataset_config", "model_configs", "rollout_config",
    "repeater_config", "train_config", "tokenizer_config",
)  # fmt: skip

Values = Mapping[str, Any]  # their dotted keys, those that the file leaves out with XTuner's defaults
Convert = Callable[[Any, Values], Any]


class Refused(Exception):
    """Why a value cannot be honoured."""


@dataclass(frozen=True)
class Rule:
    """What becomes of a key of theirs.

    Args:
        ours: the key that it sets; None: it sets nothing.
        convert: our value, or `AS_OURS` where theirs is what happens here anyway.
        default: XTuner's own value where the file has none, if ours is another.
        why: a key that sets nothing may do so because of this.
    """

    ours: str | None
    convert: Convert = lambda value, _: value
    default: Any = ABSENT
    why: str = ""


def nothing(why: str) -> Rule:
    """A key that needs no counterpart, and why."""
    return Rule(None, why=why)


def only(*accepted: Any, why: str, ours: str | None = None) -> Rule:
    """These values are what happens here; others are refused, unless our key `ours` is said."""

    def convert(value: Any, _: Values) -> Any:
        if value not in accepted:
            raise Refused(why)
        return AS_OURS

    return Rule(ours, convert)


def _updates(values: Values) -> int:
    """Optimizer steps in an epoch over an iteration's samples."""
    rows = _prompts(values["dataset_config.num_samples_each_epoch"], values)
    size = values.get("train_config.ppo_minibatch", rows)
    if rows % size:
        raise Refused(f"it does not divide the {rows} samples of an iteration")
    return rows // size


def _prompts(rows: int, values: Values) -> int:
    return rows - values.get("dataset_config.pt_data_samples", 0)


def _text_rows(rows: int, values: Values) -> Any:
    """Rows of text that go with a minibatch, of those of an iteration."""
    if rows % _updates(values):
        raise Refused(f"it is not a multiple of the {_updates(values)} minibatches of an iteration")
    return rows // _updates(values) if rows else AS_OURS


def _sources(number: str) -> Convert:
    """A mixture, of which `number` has so many rows; XTuner has no use for it where that is 0."""

    def convert(names: list[str] | None, values: Values) -> Any:
        if names is None or not values.get(number, 0):
            return AS_OURS
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
        return [name.removeprefix("[HF]") for name in names]

    return convert


def _mode(name: str, _: Values) -> bool:
    if name not in ("ddp", "deepspeed", "fsdp"):
        raise Refused("it is ddp, or deepspeed or fsdp, which split the optimizer")
    return name != "ddp"


def _dtype(name: str | None, _: Values) -> Any:
    if name in ("auto", None, "no"):
        return AS_OURS
    known = {"torch.bfloat16": "bfloat16", "bf16": "bfloat16", "torch.float32": "float32"}
    if name not in known:
        raise Refused("weights are bfloat16 or float32 here")
    return known[name]


def _schedule(role: str) -> Convert:
    """Their schedulers run over `num_training_steps`, 10^10 where nobody says otherwise, and ours over the run."""

    def convert(name: str, values: Values) -> Any:
        kwargs = f"model_configs.{role}.trainer_config.train_kwargs.lr_scheduler_kwargs"
        if name not in ("constant", "constant_with_warmup", "linear", "cosine"):
            raise Refused("schedules are constant, linear and cosine here")
        if name.startswith("constant") or values.get(f"{kwargs}.num_training_steps", 1e10) >= 1e9:
            return "constant"
        steps = values.get("train_config.max_train_step", 0) * _updates(values)
        steps *= values.get("train_config.policy_learn_time", 1)
        if values[f"{kwargs}.num_training_steps"] != steps:
            raise Refused(f"the rate falls over the whole run here, {steps} steps")
        return name

    return convert


_ONE_MODEL = "figures do not depend on it, and all models share the actor's ranks"
_SAME_BATCH = "figures do not depend on it"
_SPLIT = "figures do not depend on how weights are kept; mesh.tp and mesh.pp split them"
_WHOLE = "PPO needs the log-probs of the distribution that it samples from"
_FROM_SIZES = "it follows from the sizes in train_config"
_RESUMES = "a run goes on from its last checkpoint when the same command is given again"
_UNREAD = "XTuner does not read it"
_NO_EFFECT_THERE = "XTuner passes over it, and here it is not done"


def _engine(role: str, optimizer: str | None) -> Iterator[tuple[str, Rule]]:
    """`trainer_config` of a role; `optimizer` is our section for one that trains."""
    is_actor = role == "actor"
    yield "trainer_type", nothing("Megatron trains")
    yield "parallel.data.size", Rule("mesh.dp") if is_actor else nothing(_ONE_MODEL)
    yield "parallel.data.mode", Rule(f"{optimizer}.distributed", _mode) if optimizer else nothing(_SPLIT)
    yield "parallel.tensor.size", Rule("mesh.tp")
    yield "parallel.tensor.mode", only("1d", why="weights are split along one dimension here")
    yield "parallel.pipeline.size", Rule("mesh.pp")
    yield "parallel.pipeline.interleaved_overlap", only(False, why="stages wait for messages here")
    yield "parallel.sequence", Rule("mesh.sequence_parallel")
    yield "mixed_precision", Rule("dtype", _dtype)
    if optimizer:
        kwargs = "train_kwargs"
        yield f"{kwargs}.lr", Rule(f"{optimizer}.lr", default=1e-5)
        yield f"{kwargs}.clip_grad_norm", Rule(f"{optimizer}.clip_grad")
        yield f"{kwargs}.lr_scheduler", Rule(f"{optimizer}.schedule", _schedule(role), "linear")
        yield f"{kwargs}.lr_scheduler_kwargs.num_warmup_steps", Rule(f"{optimizer}.warmup_steps")
        yield f"{kwargs}.lr_scheduler_kwargs.num_training_steps", nothing("lr_scheduler was checked against it")
        yield f"{kwargs}.optimizer", only("torch.optim.AdamW", why="AdamW trains here")
        yield f"{kwargs}.micro_bsz", nothing(f"{_UNREAD}: train_config has the sizes")
        yield f"{kwargs}.total_steps", nothing(f"{_UNREAD}; it is the span of a decay that lr_decay_rate=1 turns off")
        yield f"{kwargs}.lr_decay_rate", only(1, why=f"{_UNREAD}: use lr_scheduler")
        yield f"{kwargs}.loss_type", only("per_seq", why=f"{_UNREAD}: its losses are means over tokens, as ours are")
    deepspeed = "deepspeed_config"
    yield f"{deepspeed}.bf16.enabled", Rule("dtype", lambda on, values: _dtype("bf16", values) if on else AS_OURS)
    yield f"{deepspeed}.fp16.enabled", Rule("dtype", lambda on, values: _dtype("fp16", values) if on else AS_OURS)
    yield f"{deepspeed}.gradient_clipping", Rule(f"{optimizer}.clip_grad") if optimizer else nothing("nothing trains")
    yield f"{deepspeed}.prescale_gradients", only(False, why="gradients are reduced in float32")
    yield f"{deepspeed}.data_types.grad_accum_dtype", only("fp32", why="gradients are added up in float32")
    yield f"{deepspeed}.wall_clock_breakdown", nothing("stages are always timed")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        yield f"{deepspeed}.{key}", nothing(_FROM_SIZES)
    zero = f"{deepspeed}.zero_optimization"
    for key in ("stage", "overlap_comm", "reduce_bucket_size", "zero_hpz_partition_size", "contiguous_gradients",
                "stage3_gather_16bit_weights_on_model_save"):  # fmt: skip
        yield f"{zero}.{key}", nothing(_SPLIT)
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        yield f"{zero}.{key}", only(False, why="nothing is sent in fewer bits here")
    for key in ("offload_param", "offload_optimizer"):
        yield (
            f"{zero}.{key}.device",
            only("none", why="schedule.residency=offload moves roles", ours="schedule.residency"),
        )


def _model(role: str, weights: str, optimizer: str | None) -> Iterator[tuple[str, Rule]]:
    """`model_configs.ROLE`."""
    yield "model_path", Rule(weights, lambda path, _: AS_OURS if path is None else path)
    kinds = (role, "policy") if role == "actor" else (role,)
    yield "model_type", only(*kinds, why=f"this is the {role} model")
    yield "tokenizer_path", Rule("tokenizer.path")
    yield (
        "head_name",
        only(None, "v_head", "score", why="a score's weight is v_head.weight (InternLM2) or score.weight"),
    )
    trainer = dict(_engine(role, optimizer))
    for prefix in ("", "trainer_config."):  # XTuner looks in both
        yield f"{prefix}torch_dtype", Rule("dtype", _dtype)
        yield f"{prefix}use_flash_attn", nothing("torch's attention takes flash kernels where it can")
        recompute = Rule("schedule.recompute", lambda on, _: "full" if on else "none")
        yield f"{prefix}gradient_checkpointing", recompute if optimizer else nothing("nothing trains")
    yield from ((f"trainer_config.{key}", rule) for key, rule in trainer.items())
    if role == "actor":
        generator = "the policy generates with the weights that train, on the ranks that train"
        yield "generator_config.shared_with_trainer", nothing(generator)
        yield "generator_config.generator_type", nothing(generator)
        for key in trainer:
            if key.startswith("parallel."):
                yield f"generator_config.{key}", nothing(generator)


_END = "tokenizer.end_id"
_PADDING = "rows are padded on the right, and padding is neither seen nor counted"


def _data() -> Iterator[tuple[str, Rule]]:
    data = "dataset_config"
    yield f"{data}.ppo_datas", Rule("data.sources", _sources(f"{data}.num_samples_each_epoch"))
    yield f"{data}.num_samples_each_epoch", Rule("ppo.prompts_per_iteration", _prompts, 64)
    yield f"{data}.max_seq_len", Rule("data.max_prompt_len", default=4096)
    yield f"{data}.random_seed", Rule("seed", default=110)
    yield f"{data}.sample_strategy", Rule("data.strategy", default="in_batch")
    yield f"{data}.ratio_within_datas", only(True, why="weights are shares of a batch here, not of a file")
    yield f"{data}.pt_datas", Rule("ppo.ptx.sources", _sources(f"{data}.pt_data_samples"))
    yield f"{data}.pt_data_samples", Rule("ppo.ptx.rows", _text_rows)
    # of the examples that came later, where each kind of data has a section of its own
    later = "pretrain_dataset_config"
    yield f"{later}.message_datasets", Rule("ppo.ptx.sources", _sources(f"{later}.samples_each_epoch"))
    yield f"{later}.samples_each_epoch", Rule("ppo.ptx.rows", _text_rows)
    yield f"{later}.max_len", Rule("data.max_seq_len")
    yield f"{later}.message_type", only("pretrain", why="this section is for texts")
    yield f"{later}.random_seed", Rule("seed")
    yield f"{later}.sample_strategy", Rule("data.strategy")
    yield f"{data}.message_type", only("prompt", why="this section is for prompts")
    yield "tokenizer_config.eos_token_id", Rule(_END)
    yield "tokenizer_config.pad_token_id", nothing(_PADDING)
    yield "tokenizer_config.padding_side", nothing(_PADDING)
    yield "tokenizer_config.chat_template", Rule("tokenizer.template")


def _rollouts() -> Iterator[tuple[str, Rule]]:
    roll = "rollout_config"
    generate = f"{roll}.generate_kwargs"
    yield f"{generate}.do_sample", only(True, why=_WHOLE)
    yield f"{generate}.temperature", Rule("rollout.temperature")
    yield f"{generate}.min_new_tokens", Rule("rollout.min_new_tokens")
    yield f"{generate}.top_k", only(0, None, -1, why=_WHOLE, ours="rollout.top_k")
    yield f"{generate}.top_p", only(1, None, why=_WHOLE, ours="rollout.top_p")
    yield f"{generate}.num_beams", only(1, why="PPO samples, and searches no beams")
    yield f"{generate}.early_stopping", nothing("it is about beams")
    yield f"{generate}.eos_token_id", Rule(_END)
    yield f"{generate}.pad_token_id", nothing(_PADDING)
    yield f"{roll}.max_new_tokens", Rule("rollout.max_new_tokens", default=1024)
    yield f"{roll}.actor_micro_bs", Rule("rollout.slots")
    yield f"{roll}.reward_micro_bs", nothing(_SAME_BATCH)
    yield f"{roll}.async_reward", nothing("stages share a pipeline by themselves (schedule.infer_stream)")
    yield f"{roll}.write_to_file", Rule("ppo.write_rollouts", default=True)
    for section in (roll, "repeater_config"):  # the later examples have the bounds in the other
        yield f"{section}.clip_reward_min", Rule("ppo.score_min", default=-5 if section == roll else ABSENT)
        yield f"{section}.clip_reward_max", Rule("ppo.score_max", default=5 if section == roll else ABSENT)


def _updates_of_policy_and_critic() -> Iterator[tuple[str, Rule]]:
    repeat, train = "repeater_config", "train_config"
    yield f"{repeat}.kl_coeff", Rule("ppo.kl_coef", lambda value, _: max(value, 0), 0.02)
    yield f"{repeat}.gamma", Rule("ppo.gamma", default=1.0)
    yield f"{repeat}.gae_lambda", Rule("ppo.gae_lambda", default=0.95)
    yield f"{repeat}.norm_adv", Rule("ppo.whiten_advantages", default=False)
    yield f"{repeat}.norm_rewards", Rule("ppo.score_scale", default=True)
    yield f"{repeat}.answer_end_id", Rule(_END)
    for key in ("reward_scale", "fine_grained_rm", "value_ema"):
        yield f"{repeat}.{key}", only(False, why=_NO_EFFECT_THERE)
    for key in ("actor", "ref", "critic", "reward"):
        yield f"{repeat}.{key}_micro_bs", nothing(_SAME_BATCH)

    yield f"{train}.ppo_minibatch", Rule("ppo.num_minibatches", lambda _, values: _updates(values))
    yield f"{train}.value_minibatch", Rule("ppo.num_minibatches", _value_updates)
    yield f"{train}.pt_minibatch", Rule("ppo.ptx.rows")
    yield f"{train}.actor_micro_bs", Rule("ppo.micro_batch_size", default=2)
    yield f"{train}.critic_micro_bs", Rule("ppo.micro_batch_size")
    yield f"{train}.policy_learn_time", Rule("ppo.epochs", default=1)
    yield f"{train}.value_learn_time", Rule("ppo.epochs")
    for key in ("pretrain_step", "critic_warmup_step"):  # the same thing, early and late
        yield f"{train}.{key}", Rule("ppo.critic_warmup_iterations")
    yield f"{train}.ppo_loss_weight", only(1, why="PPO's loss has the weight 1: divide pretrain_loss_weight by it")
    yield f"{train}.pretrain_loss_weight", Rule("ppo.ptx.coef")
    yield f"{train}.save_interval", Rule("ppo.save_every")
    yield f"{train}.max_train_step", Rule("ppo.iterations")
    yield f"{train}.async_learn", nothing("updates share a pipeline by themselves (schedule.train_stream)")
    for section in ("rollout_config", train):
        yield f"{section}.resume_step", only(-1, 0, None, why=_RESUMES)


def _models() -> Iterator[tuple[str, Rule]]:
    for role, weights, optimizer in (
        ("actor", "policy.path", "ppo.optimizer"),
        ("reference", "policy.path", None),
        ("critic", "reward.path", "ppo.critic_optimizer"),
        ("reward", "reward.path", None),
    ):
        yield from ((f"model_configs.{role}.{key}", rule) for key, rule in _model(role, weights, optimizer))


def _value_updates(size: int, values: Values) -> int:
    return _updates({**values, "train_config.ppo_minibatch": size})


RULES = dict(itertools.chain(_data(), _rollouts(), _updates_of_policy_and_critic(), _models()))

# What a run cannot do without, and XTuner has no default for that would be one here.
REQUIRED = {
    "data.sources": "dataset_config.ppo_datas",
    "policy.path": "model_configs.actor.model_path",
    "ppo.iterations": "train_config.max_train_step, without which XTuner trains on and on,",
}

# What XTuner's code does without a key for it.
FIXED = {
    "phases": ["ppo"],
    "data.min_prompt_len": 5,
    "ppo.clip_ratio": 0.2,
    "ppo.clip_value": 0.5,
    "ppo.missing_eos_penalty": 0.0,
    **{
        f"ppo.{name}.{key}": value
        for name in ("optimizer", "critic_optimizer")
        for key, value in {"weight_decay": 0.01, "beta2": 0.999, "eps": 1e-8}.items()
    },
}

# The later examples say policy for actor, and have a section for prompts.
RENAMED = {
    "model_configs.policy.": "model_configs.actor.",
    "rollout_config.policy_micro_bs": "rollout_config.actor_micro_bs",
    "repeater_config.policy_micro_bs": "repeater_config.actor_micro_bs",
    "train_config.policy_micro_bs": "train_config.actor_micro_bs",
    "prompt_dataset_config.message_datasets": "dataset_config.ppo_datas",
    "prompt_dataset_config.samples_each_epoch": "dataset_config.num_samples_each_epoch",
    "prompt_dataset_config.max_len": "dataset_config.max_seq_len",
    "prompt_dataset_config.": "dataset_config.",
}
