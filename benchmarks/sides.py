"""The two sides of fidelity.py: TRL and the engine on the same rows, an iteration whenever they are asked.

A row is a prompt with two answers, `chosen` and `rejected`, and a label. Where responses are sampled `chosen` is one,
given to both sides, and the label its score.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rollout import LAYOUTS

ADAM = dict(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-5, clip_grad=1.0)
Row = dict[str, Any]
Side = tuple[list[float], list[float], dict[str, torch.Tensor]]  # losses, gradient norms, weights at the end


@dataclass(frozen=True)
class Case:
    """What is trained on both sides, and what differs from their defaults."""

    phase: str
    trainer: str
    ours: Row = field(default_factory=dict)
    theirs: Row = field(default_factory=dict)

    @property
    def is_given(self) -> bool:
        """Whether rows are responses that the algorithm would sample, with their scores."""
        return self.group > 1

    @property
    def group(self) -> int:
        """Rows of one prompt."""
        return self.ours.get("samples_per_prompt", 1)

    @property
    def epochs(self) -> int:
        """Steps on the same rows."""
        return self.ours.get("epochs", 1)


def longest(batches: list[list[Row]]) -> int:
    """Tokens of the longest answer."""
    return max(len(row["chosen"]) for rows in batches for row in rows)


# -- TRL -----------------------------------------------------------------------------------------------------


def trl_side(pipe: Connection, case: Case, policy: Path, batches: list[list[Row]]) -> Side:
    """One process, without DDP. Waits for a word before each iteration, and answers with its seconds."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[variable]
    import transformers

    be_quiet()
    losses, norms, started = [], [], 0.0

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            nonlocal started
            if state.global_step % case.epochs == 0:
                pipe.recv()
                started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % case.epochs == 0:
                pipe.send(time.perf_counter() - started)

    def log(logs: Row, *_) -> None:
        if "grad_norm" in logs:
            losses.append(logs["loss"])
            norms.append(logs["grad_norm"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, policy, batches, folder)
        trainer.add_callback(Turns())
        trainer.log = log
        trainer.train()
    return losses, norms, {key: value.detach() for key, value in trainer.model.state_dict().items()}


def trl_trainer(case: Case, policy: Path, batches: list[list[Row]], folder: str) -> Any:
    """Its trainer on these rows."""
    import transformers
    import trl
    from datasets import Dataset

    class Trainer(getattr(trl, f"{case.trainer}Trainer")):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # which is in token ids

    own = {"max_completion_length": longest(batches)} if case.is_given else {}
    config = getattr(trl, f"{case.trainer}Config")(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        num_train_epochs=1, logging_steps=1, gradient_checkpointing=False,
        train_sampling_strategy="sequential", learning_rate=ADAM["lr"], adam_beta1=ADAM["beta1"],
        adam_beta2=ADAM["beta2"], adam_epsilon=ADAM["eps"], max_grad_norm=ADAM["clip_grad"], weight_decay=0.0,
        lr_scheduler_type="constant", **own, **case.theirs,
    )  # fmt: skip
    kinds = transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM
    model = kinds[case.phase != "reward"].from_pretrained(policy, dtype=torch.float32)
    data = Dataset.from_list([row for rows in batches for row in trl_rows(case, rows)])
    rollouts, given = map(trl_rollout, batches), {}
    if case.is_given:
        given = {"rollout_func": lambda *_: next(rollouts), "reward_funcs": lambda score, **_: score}
    return Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer(policy), **given)


def trl_rows(case: Case, rows: list[Row]) -> list[Row]:
    """A batch as TRL has it behind its tokenisation."""
    if case.phase == "sft":
        masks = [[-100] * len(row["prompt"]) + row["chosen"] for row in rows]
        return [{"input_ids": r["prompt"] + r["chosen"], "labels": mask} for r, mask in zip(rows, masks, strict=True)]
    if case.phase == "reward":
        return [{f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if case.phase == "dpo":
        return [{f"{part}_ids": row[part] for part in ("prompt", "chosen", "rejected")} for row in rows]
    if case.is_given:
        return [{"prompt": ""}] * (len(rows) // case.group)  # what it is, `trl_rollout` says
    said = [row["chosen" if row["label"] else "rejected"] for row in rows]
    return [
        {"prompt_ids": row["prompt"], "completion_ids": own, "KL_completion_ids": other, "label": row["label"]}
        for row, own, other in zip(rows, said, [said[-1], *said[:-1]], strict=True)
    ]


def trl_rollout(rows: list[Row]) -> Row:
    """Responses as its `rollout_func` has them, with their scores."""
    ids = {"prompt_ids": [row["prompt"] for row in rows], "completion_ids": [row["chosen"] for row in rows]}
    return {**ids, "logprobs": None, "score": [float(row["label"]) for row in rows]}


def tokenizer(policy: Path) -> Any:
    """What a trainer asks for, and has no use for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", name_or_path=str(policy)
    )


def be_quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# -- ours ----------------------------------------------------------------------------------------------------

GIVEN = frozenset({"tokens", "lengths", "response_mask", "finished", "sampler_log_probs", "scores"})


def our_side(
    pipe: Connection, case: Case, policy: Path, start: Path, batches: list[list[Row]], layout: str
) -> Side | None:
    """The same, every rank; the first one has the pipe, and the weights.

    Args:
        start: what is trained, the policy or a scorer.
    """
    from rlhf_engine.hf.shares import whole_tensors
    from rlhf_engine.hf.weights import Table, parameters
    from rlhf_engine.schedule import Schedule

    losses, norms = [], []
    with tempfile.TemporaryDirectory() as folder:
        ctx, algorithm = our_trainer(case, policy, start, batches, layout, folder)
        mesh, given = ctx.mesh, algorithm.provided | (GIVEN if case.is_given else set())
        stages = [stage for stage in algorithm.stages if not stage.writes or not given.issuperset(stage.writes)]
        specs = {role: spec for role, spec in algorithm.roles().items() if role in {stage.role for stage in stages}}
        ctx.roles = {role: ctx.build(role, spec) for role, spec in specs.items()}
        (role,) = (role for role in ctx.roles.values() if role.is_trained)

        def stepped(*_) -> None:
            figures, _ = ctx.metrics.reduce(mesh)
            losses.append(figures[f"{role.name}/loss"])
            norms.append(figures[f"{role.name}/grad_norm"])

        ctx.guard = SimpleNamespace(stepped=stepped)  # which hears of each
        schedule = Schedule(stages, given, specs)
        algorithm.batch(ctx)  # which looks up what the reference says of all rows, once
        ctx.state.position = 0
        for rows in batches:
            mesh.from_main(pipe.recv() if mesh.is_main else None)
            started = time.perf_counter()
            x = algorithm.batch(ctx)
            if case.is_given:
                give(x, rows, mesh.tp)
            schedule.run(ctx, x)
            ctx.state.iteration += 1
            if mesh.is_main:
                pipe.send(time.perf_counter() - started)
            ctx.trace.clear()
        role.gather()
        mine = {name: parameter.detach() for name, parameter in parameters(role.chunks)}
        weights = dict(whole_tensors(mine, Table(role.model, role.head), mesh))
        return (losses, norms, weights) if mesh.is_main else None


def our_trainer(
    case: Case, policy: Path, start: Path, batches: list[list[Row]], layout: str, folder: str
) -> tuple[Any, Any]:
    """The engine on these rows: its context and algorithm."""
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import MeshConfig, OptimizerConfig, RunConfig
    from rlhf_engine.context import Context
    from rlhf_engine.launching.build import build_role
    from rlhf_engine.launching.folders import read_base
    from rlhf_engine.mesh import ParallelMesh

    config, size = RunConfig(phases=[case.phase], device="cpu", output_dir=folder), len(batches[0])
    config.rollout.min_new_tokens, config.rollout.max_new_tokens = 0, longest(batches)
    own = {"num_minibatches": 1, "prompts_per_iteration": size // case.group} if case.is_given else {"batch_size": size}
    own |= {"iterations": len(batches), "micro_batch_size": size // 4, "optimizer": OptimizerConfig(**ADAM)}
    setattr(config, case.phase, replace(getattr(config, case.phase), **own, **case.ours))
    tp, dp = LAYOUTS[layout]
    mesh = ParallelMesh(MeshConfig(tp=tp, pp=1, dp=dp), "cpu")
    bases = {"policy": read_base(str(policy))}
    bases["reward"] = read_base(str(start), "reward") if start != policy else bases["policy"]
    data = [our_row(case, row) for rows in batches for row in rows[:: case.group]]
    drawn = SimpleNamespace(batch=lambda start, size: data[start : start + size], held_out=data[:2])
    tokens = SimpleNamespace(end_ids=[])
    ctx = Context(config, bases, mesh, tokens, {case.phase: drawn}, None, None, phase=case.phase)
    ctx.build = functools.partial(build_role, ctx)
    return ctx, ALGORITHMS[case.phase](config)


def our_row(case: Case, row: Row) -> Any:
    from rlhf_engine.data.dataset import Example

    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if case.phase == "kto":
        chosen, rejected = (chosen, None) if row["label"] else (None, rejected)
    return Example(prompt, prompt, [False] * len(prompt), chosen, rejected, prompt, prompt)


def give(x: Any, rows: list[Row], multiple: int) -> None:
    """An iteration's responses and their scores."""
    from rlhf_engine.algorithms.reference import answered

    found = answered([(row["prompt"], row["chosen"]) for row in rows], multiple)
    x.tokens, x.lengths, x.response_mask = found.tokens, found.lengths, found.loss_mask
    x.finished, x.sampler_log_probs = torch.ones(len(rows), dtype=torch.bool), torch.zeros(x.tokens.shape)
    x.scores = torch.tensor([float(row["label"]) for row in rows])
