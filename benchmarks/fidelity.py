"""Steps side by side with TRL's: loss, gradient norm and weights, and how long an iteration takes.

    python benchmarks/fidelity.py [--policy DIR] [--cases sft ... grpo ...] [--layout 1x2t dp2 tp2] [--steps N]
    python benchmarks/fidelity.py --policy 15m --prompt 32 128 --answer 64 384 --cases dpo grpo  # realistic lengths

Both sides start from the same weights, a random Llama (6m, 15m, 40m) or those of DIR in Hugging Face format, and get
the same rows of token ids of many lengths, the same batches and the same Adam; where an algorithm samples, responses
and their scores are given to both. Each loss and gradient norm of TRL's, before clipping, is held to ours as a share
of it (losses of given responses, whose terms cancel, as a share of the largest), and each tensor at the end to ours as
a share of the largest weight of it. More than 1e-4 apart is an exit code of 1.

The sides take turns, an iteration each, and the medians of its seconds are compared. TRL is one process with two
threads; of ours `1x2t` is one rank with two threads, dp2 and tp2 two ranks with one each. Appends to
benchmarks/results/fidelity.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from harness import World, append, argument_parser, take_turns
from rollout import LAYOUTS, LLAMAS, THREADS, make_llama
from sides import Case, Row, Side, be_quiet, our_side, trl_side

LIMIT = 1e-4
WHOLE = {"max_length": None}
_OURS = {"samples_per_prompt": 4, "epochs": 2, "std_eps": 1e-4, "kl_coef": 0.0}
_THEIRS = {"num_generations": 4, "num_iterations": 2, "shuffle_dataset": False}
CASES = {
    "sft": Case("sft", "SFT", theirs=WHOLE),
    "reward": Case("reward", "Reward", theirs=WHOLE),
    "dpo": Case("dpo", "DPO", theirs=WHOLE),  # the reference at each step there, once and beforehand here
    "dpo_each": Case("dpo", "DPO", {"reference": "each_step"}, WHOLE),
    "ipo": Case("dpo", "DPO", {"loss": "ipo"}, WHOLE | {"loss_type": ["ipo"]}),
    "kto": Case("kto", "KTO", theirs=WHOLE),
    "grpo": Case(
        "grpo", "GRPO", _OURS | {"kl_coef": 0.04},
        _THEIRS | {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "grpo_k3+": Case(  # what they have where nothing is said, of one step on the same rows
        "grpo", "GRPO", _OURS | {"epochs": 1, "kl_coef": 0.04, "kl": "k3+"},
        _THEIRS | {"num_iterations": 1, "loss_type": "grpo", "beta": 0.04},
    ),
    "dapo": Case(
        "grpo", "GRPO", _OURS | {"loss_mean": "tokens", "clip_ratio_high": 0.28},
        _THEIRS | {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "dr_grpo": Case(
        "grpo", "GRPO", _OURS | {"advantage": "dr_grpo", "loss_mean": "constant"},
        _THEIRS | {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "gspo": Case(
        "grpo", "GRPO", _OURS | {"loss": "gspo", "clip_ratio": 0.02, "clip_ratio_high": 0.03},
        _THEIRS | {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "cispo": Case(
        "grpo", "GRPO", _OURS | {"loss": "cispo", "loss_mean": "tokens", "clip_ratio": 1.0, "clip_ratio_high": 0.1},
        _THEIRS | {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
}  # fmt: skip


def rows_of(args: argparse.Namespace, policy: Path, case: Case) -> list[list[Row]]:
    """The rows of each iteration, `case.group` to a prompt."""
    from rlhf_engine.hf.config import read_model_config

    draw, vocab_size = random.Random(1), read_model_config(policy).vocab_size

    def tokens(lengths: tuple[int, int]) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(*lengths))]

    def row(prompt: list[int]) -> Row:
        answers = {"chosen": tokens(args.answer), "rejected": tokens(args.answer)}
        return {"prompt": prompt, **answers, "label": draw.random() < 0.6}

    prompts = [[tokens(args.prompt) for _ in range(args.rows // case.group)] for _ in range(args.steps // case.epochs)]
    return [[row(prompt) for prompt in each for _ in range(case.group)] for each in prompts]


def compare(case: Case, ours: Side, theirs: Side) -> dict[str, float]:
    """The largest differences."""
    gaps = {}
    for name, mine, other in zip(("loss", "grad_norm"), ours, theirs, strict=False):
        least = max(map(abs, other)) if name == "loss" and case.is_given else 0.0
        gaps[name] = max(abs(x - y) / max(abs(y), least) for x, y in zip(mine, other, strict=True))
    weights = [(ours[2][name], tensor) for name, tensor in theirs[2].items() if name in ours[2]]
    gaps["weights"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in weights)
    return gaps


def measure(args: argparse.Namespace, name: str, policy: Path, start: Path) -> float:
    """One case, all layouts; returns the largest difference."""
    parts = {"per_device_train_batch_size": args.rows // args.parts, "gradient_accumulation_steps": args.parts}
    case, worst = replace(CASES[name], theirs=parts | CASES[name].theirs), 0.0
    batches = rows_of(args, policy, case)
    with contextlib.ExitStack() as stack:
        worlds = {"trl": World(trl_side, case, start, batches, threads=THREADS)}
        for layout in args.layout:
            size = math.prod(LAYOUTS[layout])
            common = (case, policy, start, batches, layout)
            worlds[layout] = World(our_side, *common, size=size, threads=THREADS // size)
        for world in worlds.values():
            stack.enter_context(world)
        turns = take_turns({side: world.ask for side, world in worlds.items()}, len(batches) - 1)
        seconds = {side: statistics.median(samples) for side, samples in turns.items()}
        found = {side: world.results()[0] for side, world in worlds.items()}
    for layout in args.layout:
        gaps = compare(case, found[layout], found["trl"])
        worst = max(worst, *gaps.values())
        publish(args, name, layout, found[layout][0], gaps, seconds[layout], seconds["trl"])
    return worst


def publish(
    args: argparse.Namespace, name: str, layout: str, losses: list[float], gaps: dict[str, float], ours: float,
    theirs: float,
) -> None:  # fmt: skip
    ends = f"{losses[0]:.6f} {losses[-1]:.6f}"
    differences = "".join(f"{gap:12.1e}" for gap in gaps.values())
    print(f"{name:10}{layout:8}{ends:>24}{differences}{ours:10.3f}{theirs:10.3f}{theirs / ours:8.2f}", flush=True)
    lengths = {key: "-".join(map(str, getattr(args, key))) for key in ("prompt", "answer")}
    row = {
        "case": name, "layout": layout, "policy": Path(args.policy).name, "steps": args.steps,
        **{f"{key}_gap": gap for key, gap in gaps.items()},
        "rows": args.rows, "trl_parts": args.parts, **lengths, "ours_s": ours, "trl_s": theirs, "ratio": theirs / ours,
    }  # fmt: skip
    append("fidelity", [row], ["transformers", "trl"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--policy", default="6m", help=f"a folder, or {', '.join(LLAMAS)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["1x2t", "dp2"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="of a batch: pairs, answers, dialogues or responses")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches that TRL cuts a batch into; ours are four")
    parser.add_argument("--prompt", type=int, nargs=2, default=(4, 24), help="least and most tokens")
    parser.add_argument("--answer", type=int, nargs=2, default=(3, 40), help="likewise")
    args, worst = parser.parse_args(), 0.0
    be_quiet()
    print(
        f"{'':10}{'layout':8}{'first and last loss':>24}{'loss':>12}{'grad norm':>12}{'weights':>12}"
        f"{'ours s':>10}{'TRL s':>10}{'ratio':>8}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = make_llama(args.policy, folder / args.policy) if args.policy in LLAMAS else Path(args.policy)
        for name in args.cases:
            start = make_scorer(policy, folder / "scorer") if CASES[name].phase == "reward" else policy
            worst = max(worst, measure(args, name, policy, start))
    sys.exit(worst > LIMIT)


def make_scorer(policy: Path, folder: Path) -> Path:
    """The policy with a scalar head in the place of its LM head."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
