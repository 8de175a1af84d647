"""Steps side by side with TRL's: loss, gradient norm and weights of SFT, reward model, DPO, IPO and KTO.

    python benchmarks/fidelity.py [--policy DIR] [--cases sft reward dpo ipo kto] [--layout 1x2t dp2 tp2] [--steps N]

Both sides start from the same weights, a random Llama or those of DIR in Hugging Face format, and get the same rows of
token ids of many lengths, the same batches and the same Adam. Each loss and gradient norm of TRL's, before clipping, is
held to ours as a share of it, and each tensor at the end to ours as a share of the largest weight of it. More than
1e-4 apart is an exit code of 1. Appends to benchmarks/results/fidelity.csv.
"""

from __future__ import annotations

import functools
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import append, argument_parser, run
from rollout import LAYOUTS, THREADS, make_llama

CASES = ("sft", "reward", "dpo", "ipo", "kto")
ROWS, LIMIT = 16, 1e-4  # rows of a batch: pairs, answers or dialogues
ADAM = dict(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-5, clip_grad=1.0)
Side = tuple[list[float], list[float], dict[str, torch.Tensor]]  # losses, gradient norms, weights at the end


def rows_of(policy: Path, steps: int) -> list[dict[str, Any]]:
    """Prompts with two answers each, and a label."""
    from rlhf_engine.hf.config import read_model_config

    draw, vocab_size = random.Random(1), read_model_config(policy).vocab_size

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(least, most))]

    return [
        {"prompt": tokens(4, 24), "chosen": tokens(3, 40), "rejected": tokens(3, 40), "label": draw.random() < 0.6}
        for _ in range(ROWS * steps)
    ]


# -- TRL -----------------------------------------------------------------------------------------------------


def trl_side(case: str, policy: Path, rows: list[dict[str, Any]]) -> Side:
    """One process, without DDP."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[variable]
    import transformers
    import trl
    from datasets import Dataset

    be_quiet()
    name = {"sft": "SFT", "reward": "Reward", "kto": "KTO"}.get(case, "DPO")
    losses: list[float] = []

    class Trainer(getattr(trl, f"{name}Trainer")):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # which is in token ids

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found[0] if isinstance(found, tuple) else found))
            return found

    of_case = {"dpo": {"loss_type": ["sigmoid"]}, "ipo": {"loss_type": ["ipo"]}}.get(case, {})
    config = getattr(trl, f"{name}Config")(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=ROWS, num_train_epochs=1, logging_steps=1, gradient_checkpointing=False,
        train_sampling_strategy="sequential", learning_rate=ADAM["lr"], adam_beta1=ADAM["beta1"],
        adam_beta2=ADAM["beta2"], adam_epsilon=ADAM["eps"], max_grad_norm=ADAM["clip_grad"], weight_decay=0.0,
        lr_scheduler_type="constant", max_length=None, **of_case,
    )  # fmt: skip
    kinds = transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM
    model = kinds[case != "reward"].from_pretrained(policy, dtype=torch.float32)
    data = Dataset.from_list([row for i in range(0, len(rows), ROWS) for row in trl_rows(case, rows[i : i + ROWS])])
    trainer = Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer(policy))
    trainer.log = lambda logs, *_: norms.append(float(logs["grad_norm"])) if "grad_norm" in logs else None
    norms: list[float] = []
    trainer.train()
    return losses, norms, {key: value.detach().clone() for key, value in model.state_dict().items()}


def trl_rows(case: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch as TRL has it behind its tokenisation."""
    if case == "sft":
        masks = [[-100] * len(row["prompt"]) + row["chosen"] for row in rows]
        return [{"input_ids": r["prompt"] + r["chosen"], "labels": mask} for r, mask in zip(rows, masks, strict=True)]
    if case == "reward":
        return [{f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if case != "kto":
        return [{f"{part}_ids": row[part] for part in ("prompt", "chosen", "rejected")} for row in rows]
    said = [row["chosen" if row["label"] else "rejected"] for row in rows]
    return [
        {"prompt_ids": row["prompt"], "completion_ids": own, "KL_completion_ids": other, "label": row["label"]}
        for row, own, other in zip(rows, said, [said[-1], *said[:-1]], strict=True)
    ]


def tokenizer(policy: Path) -> Any:
    """What a trainer asks for, and has no use for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", name_or_path=str(policy)
    )


# -- ours ----------------------------------------------------------------------------------------------------


def our_side(case: str, policy: Path, start: Path, rows: list[dict[str, Any]], layout: str) -> Side:
    """Every rank; the main one has the weights.

    Args:
        start: what is trained, the policy or a scorer.
    """
    from rlhf_engine.algorithms import ALGORITHMS
    from rlhf_engine.config import MeshConfig
    from rlhf_engine.context import Context
    from rlhf_engine.hf.weights import Table, parameters, whole_tensors
    from rlhf_engine.launching.build import begin, build_role
    from rlhf_engine.launching.folders import read_base
    from rlhf_engine.mesh import ParallelMesh
    from rlhf_engine.schedule import Schedule

    tp, dp = LAYOUTS[layout]
    phase, losses, norms = "dpo" if case == "ipo" else case, [], []
    with tempfile.TemporaryDirectory() as folder:
        config = our_config(case, phase, len(rows) // ROWS, folder)
        config.policy.path, config.reward.path = str(policy), str(start) if start != policy else None
        mesh = ParallelMesh(MeshConfig(tp=tp, pp=1, dp=dp), "cpu")
        bases = {"policy": read_base(str(policy))}
        bases["reward"] = read_base(str(start), "reward") if start != policy else bases["policy"]
        data = [our_row(case, row) for row in rows]
        drawn = SimpleNamespace(batch=lambda start, size: data[start : start + size], held_out=data[:2])
        ctx = Context(config, bases, mesh, SimpleNamespace(end_ids=[]), {phase: drawn}, None, None)  # type: ignore[arg-type]
        ctx.build = functools.partial(build_role, ctx)
        algorithm = ALGORITHMS[phase](config)
        specs = {name: spec for name, spec in algorithm.roles().items() if spec.optimizer}
        schedule = Schedule(algorithm.stages, algorithm.provided, specs)
        begin(ctx, phase, specs)
        role = next(iter(ctx.roles.values()))
        for _ in range(algorithm.iterations):
            schedule.run(ctx, algorithm.batch(ctx))
            ctx.state.iteration += 1
            figures, _ = ctx.metrics.reduce(mesh)
            losses.append(figures[f"{role.name}/loss"])
            norms.append(figures[f"{role.name}/grad_norm"])
        role.gather()
        mine = {name: parameter.detach() for name, parameter in parameters(role.chunks)}
        return losses, norms, dict(whole_tensors(mine, Table(role.model, role.head), mesh))


def our_config(case: str, phase: str, steps: int, folder: str) -> Any:
    from rlhf_engine.config import OptimizerConfig, RunConfig

    config = RunConfig(phases=[phase], device="cpu", output_dir=folder)  # type: ignore[list-item]
    config.dpo.loss = "ipo" if case == "ipo" else "dpo"
    section = getattr(config, phase)
    section.iterations, section.batch_size, section.micro_batch_size = steps, ROWS, ROWS // 4
    section.optimizer = OptimizerConfig(**ADAM)  # type: ignore[arg-type]
    return config


def our_row(case: str, row: dict[str, Any]) -> Any:
    from rlhf_engine.data.dataset import Example

    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if case == "kto":
        chosen, rejected = (chosen, None) if row["label"] else (None, rejected)
    return Example(prompt, prompt, [False] * len(prompt), chosen, rejected, prompt, prompt)


# -- side by side --------------------------------------------------------------------------------------------


def compare(ours: Side, theirs: Side) -> dict[str, float]:
    """The largest differences."""
    gaps = {}
    for name, mine, other in zip(("loss", "grad_norm"), ours, theirs, strict=False):
        gaps[name] = max(abs(x - y) / abs(y) for x, y in zip(mine, other, strict=True))
    weights = [(ours[2][name], tensor) for name, tensor in theirs[2].items() if name in ours[2]]
    gaps["weights"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in weights)
    return gaps


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["1x2t", "dp2"])
    parser.add_argument("--steps", type=int, default=20)
    args, worst = parser.parse_args(), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        policy = args.policy or make_llama("6m", Path(temporary) / "6m")
        rows = rows_of(policy, args.steps)
        print(f"{'':10}{'layout':8}{'first and last loss':>24}{'loss':>12}{'grad norm':>12}{'weights':>12}")
        for case in args.cases:
            start = make_scorer(policy, Path(temporary) / "scorer") if case == "reward" else policy
            (theirs,) = run(trl_side, case, start, rows, threads=THREADS)
            for layout in args.layout:
                size = math.prod(LAYOUTS[layout])
                ours = run(our_side, case, policy, start, rows, layout, size=size, threads=THREADS // size)[0]
                gaps = compare(ours, theirs)
                worst = max(worst, *gaps.values())
                ends = f"{ours[0][0]:.6f} {ours[0][-1]:.6f}"
                print(f"{case:10}{layout:8}{ends:>24}" + "".join(f"{gap:12.1e}" for gap in gaps.values()), flush=True)
                about = {"case": case, "layout": layout, "policy": policy.name, "steps": args.steps}
                append(
                    "fidelity", [about | {f"{name}_gap": gap for name, gap in gaps.items()}], ["transformers", "trl"]
                )
    sys.exit(worst > LIMIT)


def be_quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_scorer(policy: Path, folder: Path) -> Path:
    """The policy with a scalar head in the place of its LM head."""
    from transformers import AutoModelForSequenceClassification

    be_quiet()
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
