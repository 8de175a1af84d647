"""One PPO step side by side with TRL's PPOTrainer (trl 1.12.0, the last release that has it).

    python benchmarks/ppo.py [--workloads 6m 40m] [--lengths fixed ended] [--layout 1x2t dp2 tp2] [--rounds N]

Both sides start from the same random Llamas (policy and reference the same, reward and critic the same), get prompts of
equal length, generate responses, and train policy and critic on them with the same epochs and micro-batches. Responses
are of one length, or ended by one of the tokens that are a 48th of the vocabulary (192 at most). An epoch is one
optimizer step, because TRL makes one whatever its num_mini_batches. TRL is one process with two threads; of ours `1x2t`
is one rank with two threads, dp2 and tp2 two ranks with one each. The floor is one process with two threads that makes
the products of a step with its weights, those of backward included, for real tokens alone, and nothing else.

First both compute on TRL's first rollout, from equal weights: log-probs are compared, and at a fixed length advantages
and losses (where a response ends, TRL has the score one position behind it, and a value there in its loss). Then they
take turns, a whole step each; medians are reported, and the peak resident memory of all processes of a side, libraries
included. Appends to benchmarks/results/ppo.csv.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import World, append, argument_parser, medians, peak, take_turns
from rollout import LAYOUTS, LLAMAS, MOST, THREADS, Floor, make_llama, token_ends, work

PROMPT, EPOCHS, KL_COEF = 32, 2, 0.05
RESPONSE = {"fixed": 64, "ended": MOST}  # tokens, at most
BATCH = {"6m": (64, 16), "40m": (32, 8)}  # rows of a step, rows of a micro-batch


def make_reward(name: str, folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(2)
    config = LlamaConfig(**LLAMAS[name], max_position_embeddings=512, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def prompts_of(step: int, rows: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(step)
    return [[draw.randrange(3, vocab_size) for _ in range(PROMPT)] for _ in range(rows)]


# -- TRL -----------------------------------------------------------------------------------------------------


def trl_side(pipe: Connection, name: str, lengths: str, policy: Path, reward: Path, steps: int) -> int:
    """Waits for a word before each step, and answers with the seconds of its generation, the seconds of all of it, and
    what was computed in the first step. Returns the most bytes that it held."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # which would bring DDP
        del os.environ[variable]
    import transformers
    from trl.experimental.ppo import ppo_trainer

    transformers.logging.set_verbosity_error()
    seen: dict[str, Any] = {}
    generate, times = ppo_trainer.batch_generation, [0.0, 0.0]  # when generation starts and ends

    def generation(*args):
        pipe.recv()
        times[0] = time.perf_counter()
        result = generate(*args)
        times[1] = time.perf_counter()
        seen.setdefault("tokens", result[0])
        return result

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pipe.send((times[1] - times[0], time.perf_counter() - times[0], seen))

    ppo_trainer.batch_generation = generation
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(name, lengths, policy, reward, steps, folder, Turns())
        keep_first(trainer, BATCH[name][0] // BATCH[name][1], seen)
        trainer.log = lambda *args: None
        trainer.train()
    return peak()


def trl_trainer(name: str, lengths: str, policy: Path, reward: Path, steps: int, folder: str, callback):
    """TRL's PPOTrainer at the workload, with prompts for so many steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rows, micro = BATCH[name]
    config = PPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro, num_mini_batches=1,
        num_ppo_epochs=EPOCHS, local_rollout_forward_batch_size=micro, response_length=RESPONSE[lengths],
        temperature=1.0, kl_coef=KL_COEF, missing_eos_penalty=None, num_sample_generations=0, vf_coef=1.0,
        total_episodes=rows * steps, learning_rate=1e-4, gradient_checkpointing=False, cliprange=0.2,
        cliprange_value=0.2, gamma=1.0, lam=0.95,
    )  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32) for _ in range(2)]
    scorers = [AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32) for _ in range(2)]
    vocab_size = models[0].config.vocab_size
    prompts = [p for step in range(steps) for p in prompts_of(step, rows, vocab_size)]
    trainer = PPOTrainer(
        args=config,
        # no token is padding and none an end
        processing_class=SimpleNamespace(pad_token_id=vocab_size, eos_token_id=vocab_size),  # type: ignore[arg-type]
        model=models[0],
        ref_model=models[1],
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[callback],
    )
    if lengths == "ended":  # by any of several tokens, where TRL knows one
        ends = token_ends(vocab_size)
        trainer.policy_model.generation_config.eos_token_id = trainer.stop_token_id = ends

        def truncated(_, padding: int, responses: torch.Tensor) -> torch.Tensor:
            return responses.masked_fill(~answer_mask(responses, ends), padding)

        select = ppo_trainer.selective_log_softmax

        def within(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return select(logits, index.clamp(max=vocab_size - 1))  # of padding, which TRL masks afterwards

        ppo_trainer.truncate_response, ppo_trainer.selective_log_softmax = truncated, within
    return trainer


def answer_mask(responses: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Tokens of responses `(B, T)` up to the first end, that one included."""
    is_end = torch.isin(responses, torch.tensor(ends, dtype=torch.int64))
    return is_end.cumsum(1) - is_end.long() == 0


def keep_first(trainer, parts: int, seen: dict[str, Any]) -> None:
    """Has TRL keep in `seen` what it computes in its first step.

    Args:
        parts: of the rollout. Their log-probs come in turn, the policy's and the reference's of each.
    """
    import numpy as np
    from trl.experimental.ppo import ppo_trainer

    def after(place: Any, function: str, note: Callable[[tuple, Any], None]) -> None:
        inner = getattr(place, function)

        def noted(*args, **kwargs):
            result = inner(*args, **kwargs)
            note(args, result)
            return result

        setattr(place, function, noted)

    def log_probs(args: tuple, result: torch.Tensor) -> None:
        found = seen.setdefault("log_probs", [])
        if len(found) < 2 * parts:
            found.append(result.detach())

    after(ppo_trainer, "selective_log_softmax", log_probs)
    after(ppo_trainer, "masked_whiten", lambda args, _: seen.setdefault("advantages", args[0]))
    after(np.random, "permutation", lambda _, order: seen.setdefault("order", order))
    after(trainer.accelerator, "backward", lambda args, _: seen.setdefault("loss", float(args[0])))


# -- ours ----------------------------------------------------------------------------------------------------


def our_side(pipe: Connection, layout: str, name: str, lengths: str, policy: Path, reward: Path, steps: int) -> int:
    """The same, every rank; the first one has the pipe. Its first word brings TRL's rollout, to compare."""
    from rlhf_engine.experience import Experience
    from rlhf_engine.schedule import Schedule

    rows, _ = BATCH[name]
    ctx, algorithm, specs = our_trainer(layout, name, lengths, policy, reward, steps)
    mesh, vocab_size = ctx.mesh, ctx.bases["policy"].model.vocab_size or 0
    schedule = Schedule(algorithm.stages, algorithm.provided, specs)
    gaps = compare(ctx, algorithm, specs, mesh.from_main(pipe.recv() if mesh.is_main else None))
    if mesh.is_main:
        pipe.send(gaps)
    for step in range(1, steps):
        mesh.from_main(pipe.recv() if mesh.is_main else None)
        prompts = prompts_of(step, rows, vocab_size)
        experience = Experience(prompts=prompts, reward_prompts=prompts, sample_ids=torch.arange(rows))
        started = time.perf_counter()
        schedule.run(ctx, experience)
        seconds = time.perf_counter() - started
        figures, _ = ctx.metrics.reduce(mesh)
        ctx.trace.clear()
        if mesh.is_main:
            pipe.send((figures["time/rollout"], seconds))
    return peak()


def our_trainer(layout: str, name: str, lengths: str, policy: Path, reward: Path, steps: int) -> tuple:
    """The engine at the workload: its context, algorithm and roles."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import MeshConfig, PPOConfig, RolloutConfig, RunConfig
    from rlhf_engine.context import Context
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.launching.folders import read_base
    from rlhf_engine.mesh import ParallelMesh

    tp, dp = LAYOUTS[layout]
    rows, micro = BATCH[name]
    config = RunConfig(phases=["ppo"], device="cpu", output_dir="nowhere")
    config.policy.path, config.reward.path = str(policy), str(reward)
    config.rollout = RolloutConfig(max_new_tokens=RESPONSE[lengths], min_new_tokens=0)
    config.ppo = PPOConfig(
        iterations=steps, prompts_per_iteration=rows, epochs=EPOCHS, num_minibatches=1, micro_batch_size=micro,
        kl_coef=KL_COEF, missing_eos_penalty=0.0, std_correction=1,
    )  # fmt: skip
    config.ppo.critic_optimizer = replace(config.ppo.optimizer)
    mesh = ParallelMesh(MeshConfig(tp=tp, pp=1, dp=dp), "cpu")
    bases = {"policy": read_base(str(policy)), "reward": read_base(str(reward), "reward")}
    ends = token_ends(bases["policy"].model.vocab_size or 0) if lengths == "ended" else []
    tokenizer = SimpleNamespace(end_ids=ends, decode=None)
    ctx = Context(config, bases, mesh, tokenizer, None, None, None, phase="ppo")  # type: ignore[arg-type]
    ctx.state.kl_coef = KL_COEF
    algorithm = ALGORITHMS["ppo"](config)
    specs = algorithm.roles()
    ctx.roles = {role: build_role(ctx, role, spec) for role, spec in specs.items()}
    return ctx, algorithm, specs


def compare(ctx, algorithm, specs, theirs: dict[str, Any]) -> dict[str, float]:
    """Largest differences on TRL's rollout; its losses are those of its first micro-batch.

    Where responses end by themselves, those of log-probs alone.
    """
    from rlhf_engine.experience import Experience
    from rlhf_engine.schedule import Schedule

    tokens = theirs["tokens"]
    rows, width = tokens.shape
    mask = torch.arange(width).expand(rows, width) >= PROMPT
    mask[:, PROMPT:] &= answer_mask(tokens[:, PROMPT:], ctx.tokenizer.end_ids)
    tokens[:, PROMPT:] *= mask[:, PROMPT:]  # TRL's padding is no token
    prompts = [row[:PROMPT] for row in tokens.tolist()]
    x = Experience(
        prompts=prompts, reward_prompts=prompts, tokens=tokens, response_mask=mask,
        lengths=PROMPT + mask.sum(1), finished=torch.ones(rows, dtype=torch.bool),
        sampler_log_probs=torch.zeros(rows, width),
    )  # fmt: skip
    given = frozenset(name for name in vars(x) if getattr(x, name) is not None)
    names = ("log_probs", "ref_log_probs", "score", "values", "advantage")
    Schedule([s for s in algorithm.stages if s.name in names], given, specs).run(ctx, x)
    assert x.log_probs is not None and x.advantages is not None
    log_probs = torch.nn.functional.pad(torch.cat(theirs["log_probs"][::2]), (PROMPT, 0))
    gaps = {"log_probs": float((x.log_probs - log_probs)[mask].abs().max())}
    if ctx.tokenizer.end_ids:
        return gaps
    gaps["advantages"] = float((x.advantages[:, PROMPT:] - theirs["advantages"]).abs().max())
    # the losses, on the rows of TRL's first micro-batch
    chosen = torch.as_tensor(theirs["order"][: ctx.config.ppo.micro_batch_size])
    chosen = chosen.repeat(ctx.mesh.dp)  # as many on every replica, so that the mean is the same
    whole = ("tokens", "lengths", "response_mask", "log_probs", "values", "returns", "advantages")
    for name in whole:
        setattr(x, name, getattr(x, name)[chosen])
    epochs, ctx.config.ppo.epochs = ctx.config.ppo.epochs, 1
    given = frozenset(name for name in vars(x) if getattr(x, name) is not None)
    Schedule([s for s in algorithm.stages if s.kind == "train"], given, specs).run(ctx, x)
    ctx.config.ppo.epochs = epochs
    figures, _ = ctx.metrics.reduce(ctx.mesh)
    gaps["loss"] = abs(figures["policy/loss"] + figures["critic/loss"] - theirs["loss"])
    return gaps


# -- the floor -----------------------------------------------------------------------------------------------


def floor_side(pipe: Connection, name: str, lengths: str, policy: Path, steps: int) -> None:
    """Waits for a word, and answers with the seconds of generation's products and of all."""
    rows, micro = BATCH[name]
    floor, head = Floor(policy), "head"
    shapes = {i: weight for i, weight in enumerate(floor.weights)} | {head: floor.head}
    grads = {key: torch.zeros_like(weight) for key, weight in shapes.items()}
    for step in range(steps - 1):
        prompts = prompts_of(step, rows, len(floor.head))
        kinds = {"fixed": ("fixed", RESPONSE["fixed"]), "ended": ("geometric", 0)}
        _, limits = work(kinds[lengths][0], rows, kinds[lengths][1], len(floor.head), step)
        pipe.recv()
        started = time.perf_counter()
        floor(prompts, limits)
        generated = time.perf_counter()
        for part in range(0, rows, micro):
            answers = sum(limits[part : part + micro])
            tokens = sum(map(len, prompts[part : part + micro])) + answers
            # forwards of policy, reference, reward and critic; then epochs of policy and critic
            for has_head, is_trained in [*zip((1, 1, 0, 0), (0, 0, 0, 0), strict=True), *[(1, 1), (0, 1)] * EPOCHS]:
                for key, weight in shapes.items():
                    if key != head or has_head:
                        products(weight, answers if key == head else tokens, grads[key] if is_trained else None)
        pipe.send((generated - started, time.perf_counter() - started))


def products(weight: torch.Tensor, tokens: int, grad: torch.Tensor | None) -> None:
    """Of a layer's forward, and of its backward where the weight has a gradient."""
    x = torch.randn(1, weight.shape[1]).expand(tokens, -1).contiguous()
    out = x @ weight.t()
    if grad is not None:
        out @ weight
        grad.addmm_(out.t(), x)


# -- side by side --------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, lengths: str, layout: str, policy: Path, reward: Path) -> None:
    steps, world = args.rounds + 2, math.prod(LAYOUTS[layout])  # the first is compared, the second warms up
    common = (name, lengths, policy)
    with (
        World(trl_side, *common, reward, steps, threads=THREADS) as trl,
        World(our_side, layout, *common, reward, steps, size=world, threads=THREADS // world) as ours,
        World(floor_side, *common, steps, threads=THREADS) as floor,
    ):
        gaps = ours.ask(trl.ask()[2])
        sides = {"ours": ours.ask, "trl": lambda: trl.ask()[:2], "floor": floor.ask}
        seconds = take_turns(sides, args.rounds)
        peaks = {"ours": sum(ours.results()) / 2**20, "trl": sum(trl.results()) / 2**20}
    publish(args, name, lengths, layout, gaps, seconds, peaks)


def publish(
    args: argparse.Namespace, name: str, lengths: str, layout: str, gaps: dict, seconds: dict, peaks: dict
) -> None:
    parts = ("generation", "rest", "step")
    found = {}
    for side, turns in seconds.items():
        columns = medians([(generation, step - generation, step) for generation, step in turns])
        found |= {(side, part): median for part, median in zip(parts, columns, strict=True)}
    ratios = {part: found["trl", part] / found["ours", part] for part in parts}
    differences = "  ".join(f"{key} {value:.1e}" for key, value in gaps.items())
    print(f"{name} {lengths} {layout}  largest differences: {differences}")
    for part in parts:
        print(
            f"  {part:10}  ours {found['ours', part]:6.2f} s  TRL {found['trl', part]:6.2f} s  {ratios[part]:5.2f} x"
            f"  floor {found['floor', part]:6.2f} s, {found['floor', part] / found['ours', part]:.0%} of ours"
        )
    print(f"  peak memory ours {peaks['ours']:.0f} MB  TRL {peaks['trl']:.0f} MB", flush=True)
    rows, micro = BATCH[name]
    row = {
        "workload": name, "lengths": lengths, "layout": layout, "rows": rows, "micro": micro,
        "prompt": PROMPT, "response": RESPONSE[lengths], "epochs": EPOCHS,
        **{f"{side}_{part}_s": value for (side, part), value in found.items()},
        **{f"{part}_ratio": value for part, value in ratios.items()},
        **{f"{key}_gap": value for key, value in gaps.items()},
        **{f"{side}_peak_mb": f"{value:.0f}" for side, value in peaks.items()},
        "rounds": args.rounds,
    }  # fmt: skip
    append("ppo", [row], ["transformers", "trl"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--lengths", nargs="+", choices=RESPONSE, default=list(RESPONSE))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["1x2t", "dp2"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.workloads:
            policy = make_llama(name, Path(temporary) / name)
            reward = make_reward(name, Path(temporary) / f"{name}-reward")
            for lengths, layout in itertools.product(args.lengths, args.layout):
                measure(args, name, lengths, layout, policy, reward)


if __name__ == "__main__":
    main()
