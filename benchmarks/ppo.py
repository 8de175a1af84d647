"""One PPO step side by side with TRL's PPOTrainer (trl 1.12.0, the last release that has it).

    python benchmarks/ppo.py [--workloads 6m 40m] [--layout 1x2t dp2 tp2] [--rounds N]

Both sides start from the same random Llamas (policy and reference the same, reward and critic the same), get prompts of
equal length, generate responses of one length with the end token switched off, and train policy and critic on them with
the same epochs and micro-batches. An epoch is one optimizer step, because TRL makes one whatever its num_mini_batches.
TRL is one process with two threads; of ours `1x2t` is one rank with two threads, dp2 and tp2 two ranks with one each.

First both compute on TRL's first rollout, from equal weights: log-probs, advantages and losses are compared. Then they
take turns, a whole step each; medians are reported, and the peak resident memory of all processes of a side, libraries
included. Appends to benchmarks/results/ppo.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
from record import append
from rollout import LLAMAS, make_llama

from rlhf_engine.launching.ranks import free_port

THREADS = 2
PROMPT, RESPONSE, EPOCHS, KL_COEF = 32, 64, 2, 0.05
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


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- TRL -----------------------------------------------------------------------------------------------------


def trl_side(pipe: Connection, name: str, policy: Path, reward: Path, steps: int) -> None:
    """Waits for a word before each step; answers with (seconds of generation, of the step, what it computed)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    import numpy as np
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    transformers.logging.set_verbosity_error()
    rows, micro = BATCH[name]
    seen: dict[str, Any] = {}
    clock = {"generation": 0.0, "start": 0.0}

    def record(key: str, function, pick):
        """The function, with what it gave or took kept under `key` the first time."""

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.setdefault(key, pick(args, result))
            return result

        return wrapped

    def generation(*args):
        pipe.recv()
        clock["start"] = started = time.perf_counter()
        result = generate(*args)
        clock["generation"] = time.perf_counter() - started
        seen.setdefault("tokens", result[0])
        return result

    generate = ppo_trainer.batch_generation
    ppo_trainer.batch_generation = generation
    # called for each part of the rollout in turn: the policy's logits, then the reference's
    log_probs: list[torch.Tensor] = []
    select = ppo_trainer.selective_log_softmax

    def selected(logits, index):
        result = select(logits, index)
        if len(log_probs) < 2 * (rows // micro):
            log_probs.append(result.detach())
        return result

    ppo_trainer.selective_log_softmax = selected
    ppo_trainer.masked_whiten = record("advantages", ppo_trainer.masked_whiten, lambda args, _: args[0])
    np.random.permutation = record("order", np.random.permutation, lambda _, order: order)
    backward = record("loss", lambda loss: loss, lambda args, _: float(args[0]))

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seconds = time.perf_counter() - clock["start"]
            seen["log_probs"] = torch.cat(log_probs[::2])
            pipe.send((clock["generation"], seconds, seen))

    with tempfile.TemporaryDirectory() as temporary:
        config = PPOConfig(
            output_dir=temporary, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
            per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro, num_mini_batches=1,
            num_ppo_epochs=EPOCHS, local_rollout_forward_batch_size=micro, response_length=RESPONSE,
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
            callbacks=[Turns()],
        )
        inner = trainer.accelerator.backward

        def and_backward(loss, **kwargs):
            inner(backward(loss), **kwargs)

        trainer.accelerator.backward = and_backward
        trainer.log = lambda *args: None
        trainer.train()
    pipe.send(peak_mb())


# -- ours ----------------------------------------------------------------------------------------------------


def our_side(
    rank: int, pipe: Connection, port: int, layout: str, name: str, policy: Path, reward: Path, steps: int
) -> None:
    """The same, every rank; the first one has the pipe. Its first word brings TRL's rollout, to compare."""
    warnings.simplefilter("ignore")
    tp, dp = {"1x2t": (1, 1), "dp2": (1, 2), "tp2": (2, 1)}[layout]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tp * dp), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(tp * dp)}
    torch.set_num_threads(THREADS // (tp * dp))
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import MeshConfig, PPOConfig, RolloutConfig, RunConfig
    from rlhf_engine.context import Context
    from rlhf_engine.experience import Experience
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.launching.preflight import read_base
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.schedule import Schedule

    rows, micro = BATCH[name]
    config = RunConfig(phases=["ppo"], device="cpu", output_dir="nowhere")
    config.policy.path, config.reward.path = str(policy), str(reward)
    config.rollout = RolloutConfig(max_new_tokens=RESPONSE, min_new_tokens=0)
    config.ppo = PPOConfig(
        iterations=steps, prompts_per_iteration=rows, epochs=EPOCHS, num_minibatches=1, micro_batch_size=micro,
        kl_coef=KL_COEF, missing_eos_penalty=0.0,
    )  # fmt: skip
    config.ppo.critic_optimizer = replace(config.ppo.optimizer)
    mesh = ParallelMesh(MeshConfig(tp=tp, pp=1, dp=dp), "cpu")
    bases = {"policy": read_base(str(policy)), "reward": read_base(str(reward), "reward")}
    tokenizer = SimpleNamespace(end_ids=[], decode=None)  # no token is an end
    ctx = Context(config, bases, mesh, tokenizer, None, None, None)  # type: ignore[arg-type]
    ctx.state.kl_coef = KL_COEF
    algorithm = ALGORITHMS["ppo"](config)
    specs = algorithm.roles()
    ctx.roles = {role: build_role(ctx, role, spec) for role, spec in specs.items()}

    def experience(step: int) -> Experience:
        prompts = prompts_of(step, rows, bases["policy"].model.vocab_size or 0)
        return Experience(prompts=prompts, reward_prompts=prompts, sample_ids=torch.arange(rows))

    schedule = Schedule(algorithm.stages, algorithm.provided, specs)
    theirs = mesh.from_main(pipe.recv() if mesh.is_main else None)
    gaps = compare(ctx, algorithm, specs, theirs)
    if mesh.is_main:
        pipe.send(gaps)
    for step in range(1, steps):
        mesh.from_main(pipe.recv() if mesh.is_main else None)
        started = time.perf_counter()
        schedule.run(ctx, experience(step))
        seconds = time.perf_counter() - started
        figures, _ = ctx.metrics.reduce(mesh)
        ctx.trace.clear()
        if mesh.is_main:
            pipe.send((figures["time/rollout"], seconds))
    peaks = mesh.all_gather_object(peak_mb())
    if mesh.is_main:
        pipe.send(sum(peaks))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def compare(ctx, algorithm, specs, theirs: dict[str, Any]) -> dict[str, float]:
    """Largest differences on TRL's rollout; its losses are those of its first micro-batch."""
    from rlhf_engine.experience import Experience
    from rlhf_engine.schedule import Schedule

    tokens = theirs["tokens"]
    rows, width = tokens.shape
    mask = torch.arange(width).expand(rows, width) >= PROMPT
    prompts = [row[:PROMPT] for row in tokens.tolist()]
    x = Experience(
        prompts=prompts, reward_prompts=prompts, tokens=tokens, response_mask=mask,
        lengths=torch.full((rows,), width), finished=torch.ones(rows, dtype=torch.bool),
        sampler_log_probs=torch.zeros(rows, width),
    )  # fmt: skip
    given = frozenset(name for name in vars(x) if getattr(x, name) is not None)
    names = ("log_probs", "ref_log_probs", "score", "values", "advantage")
    Schedule([s for s in algorithm.stages if s.name in names], given, specs).run(ctx, x)
    assert x.log_probs is not None and x.advantages is not None and x.advantage_moments is not None
    gaps = {
        "log_probs": (x.log_probs[:, PROMPT:] - theirs["log_probs"]).abs().max(),
        "advantages": (x.advantages[:, PROMPT:] - theirs["advantages"]).abs().max(),
    }
    # the losses, on the rows of TRL's first micro-batch; it divides the variance by one less than the count
    count = x.advantage_moments[0]
    x.advantage_moments[2] *= count / (count - 1)
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
    return {key: float(value) for key, value in gaps.items()}


# -- side by side --------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, layout: str, policy: Path, reward: Path) -> None:
    steps = args.rounds + 2  # the first is compared, the second warms up
    spawn = mp.get_context("spawn")
    (trl, trl_end), (ours, our_end) = spawn.Pipe(), spawn.Pipe()
    world = 1 if layout == "1x2t" else 2
    port = free_port()
    processes = [spawn.Process(target=trl_side, args=(trl_end, name, policy, reward, steps))]
    for rank in range(world):
        processes.append(
            spawn.Process(target=our_side, args=(rank, our_end, port, layout, name, policy, reward, steps))
        )
    for process in processes:
        process.start()
    try:
        trl.send("go")
        first = trl.recv()[2]
        ours.send(first)
        gaps = ours.recv()
        seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}
        for step in range(1, steps):
            for side, pipe in (("ours", ours), ("trl", trl)):
                pipe.send("go")
                times = pipe.recv()[:2]
                if step > 1:
                    seconds[side].append(times)
        peaks = {"ours": ours.recv(), "trl": trl.recv()}
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    publish(args, name, layout, gaps, seconds, peaks)


def publish(args: argparse.Namespace, name: str, layout: str, gaps: dict, seconds: dict, peaks: dict) -> None:
    def median(side: str, pick) -> float:
        return statistics.median(map(pick, seconds[side]))

    picks = {"generation": lambda t: t[0], "rest": lambda t: t[1] - t[0], "step": lambda t: t[1]}
    found = {(side, part): median(side, pick) for side in seconds for part, pick in picks.items()}
    ratios = {part: found["trl", part] / found["ours", part] for part in picks}
    print(f"{name} {layout}  largest differences: " + "  ".join(f"{key} {value:.1e}" for key, value in gaps.items()))
    for part in picks:
        print(f"  {part:10}  ours {found['ours', part]:6.2f} s  TRL {found['trl', part]:6.2f} s  {ratios[part]:5.2f} x")
    print(f"  peak memory ours {peaks['ours']:.0f} MB  TRL {peaks['trl']:.0f} MB", flush=True)
    rows, micro = BATCH[name]
    row = {
        "workload": name, "layout": layout, "rows": rows, "micro": micro,
        "prompt": PROMPT, "response": RESPONSE, "epochs": EPOCHS,
        **{f"{side}_{part}_s": f"{value:.4g}" for (side, part), value in found.items()},
        **{f"{part}_ratio": f"{value:.3g}" for part, value in ratios.items()},
        **{f"{key}_gap": f"{value:.1e}" for key, value in gaps.items()},
        **{f"{side}_peak_mb": f"{value:.0f}" for side, value in peaks.items()},
        "rounds": args.rounds,
    }  # fmt: skip
    append("ppo", [row], ["transformers", "trl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--layout", nargs="+", choices=("1x2t", "dp2", "tp2"), default=["1x2t", "dp2"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.workloads:
            policy = make_llama(name, Path(temporary) / name)
            reward = make_reward(name, Path(temporary) / f"{name}-reward")
            for layout in args.layout:
                measure(args, name, layout, policy, reward)


if __name__ == "__main__":
    main()
