"""Curves of every algorithm on the embedded dialogues, from one SFT policy per seed.

    python benchmarks/curves.py [--cases grpo rloo dpo ...] [--seeds 1 2 3] [--jobs 1] [--folder runs/curves]

Each case is an experiment and what it changes; runs of `--folder` that have ended are not made again. Every fifth
iteration is a row, and behind the last one what the final evaluation says: the gold rule's score of the policy's
answers to held-out prompts, KL per answer to the policy at the start, and the share of answers that the rule prefers to
that policy's. Without a KL there is no reference, and neither of the two. Writes
benchmarks/results/curves.csv and prints its last rows as a table, means over the seeds.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from harness import RESULTS, ROOT, argument_parser, launched

SAMPLED = ["+exp=hh_grpo", "phases=[grpo]", "grpo.iterations=25"]
FREE = [*SAMPLED, "grpo.kl_coef=0"]
# one update an iteration, of whole responses
ONCE = [*SAMPLED, "grpo.loss=reinforce", "grpo.loss_mean=constant", "grpo.num_minibatches=1", "grpo.optimizer.lr=1e-3"]
# at 1e-3, ReMax's policy is 90 nats from the reference after four iterations, and falls
ALONE = [*ONCE[:-1], "grpo.optimizer.lr=3e-4", "grpo.samples_per_prompt=1", "grpo.prompts_per_iteration=128"]
PAIRED = ["+exp=hh_dpo", "phases=[dpo]"]
CASES = {
    "ppo": ["+exp=hh_rlhf", "phases=[reward,ppo]", "ppo.iterations=25"],
    "grpo": SAMPLED,
    "dr_grpo": [*FREE, "grpo.advantage=dr_grpo", "grpo.loss_mean=constant"],
    "rloo": [*ONCE, "grpo.advantage=rloo", "grpo.kl=reward"],
    "remax": [*ALONE, "grpo.advantage=remax", "grpo.kl=reward"],
    "reinforce++": [*SAMPLED, "grpo.advantage=reinforce++", "grpo.kl=reward", "grpo.loss_mean=tokens"],
    "reinforce++_baseline": [*SAMPLED, "grpo.advantage=reinforce++_baseline", "grpo.kl=k2"],
    "dapo": [*FREE, "grpo.clip_ratio_high=0.28", "grpo.loss_mean=tokens", "grpo.redraws=4"],
    "gspo": [*FREE, "grpo.loss=gspo", "grpo.clip_ratio=3e-4", "grpo.clip_ratio_high=4e-4"],
    "cispo": [*FREE, "grpo.loss=cispo", "grpo.clip_ratio=1", "grpo.clip_ratio_high=0.28", "grpo.loss_mean=tokens"],
    "reinforce": [*ALONE, "grpo.advantage=none"],
    "dpo": PAIRED,
    "cdpo": [*PAIRED, "dpo.loss=cdpo", "dpo.label_smoothing=0.1"],
    "ipo": [*PAIRED, "dpo.loss=ipo", "dpo.beta=5"],  # a tenth of a nat a token; at the experiment's 0.5 a whole one
    "simpo": [*PAIRED, "dpo.loss=simpo", "dpo.beta=2"],
    "orpo": [*PAIRED, "dpo.loss=orpo", "dpo.beta=0.1"],
    "kto": ["+exp=hh_dpo", "phases=[kto]"],
}
COLUMNS = {
    "gold": ("gold/mean", "eval/gold_after"),
    "kl": ("kl/mean", "eval/kl"),
    "loss": ("policy/loss", "eval/loss"),
    "accuracy": ("policy/accuracy", "eval/accuracy"),
    "gold_before": ("", "eval/gold_before"),
    "win_rate": ("", "eval/win_rate"),
}  # of an iteration, and of the end


def make(folder: Path, settings: list[str]) -> None:
    """A run, on one core."""
    said = launched(*settings, "mesh.dp=1", f"output_dir={folder}")
    print(f"{folder.name}: {said.splitlines()[-1]}", flush=True)


def rows(folder: Path, case: str, seed: int) -> Iterator[dict[str, object]]:
    """Of a run's last phase."""
    (phase,) = (setting for setting in CASES[case] if setting.startswith("phases="))
    folder /= phase.removeprefix("phases=[").removesuffix("]").split(",")[-1]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for found in metrics[::5]:
        yield row(case, seed, found["iteration"], {key: found.get(name) for key, (name, _) in COLUMNS.items()})
    summary = json.loads((folder / "summary.json").read_text())
    yield row(case, seed, "end", {key: summary.get(name) for key, (_, name) in COLUMNS.items()})


def row(case: str, seed: int, iteration: object, figures: dict[str, float | None]) -> dict[str, object]:
    """One line of the file."""
    return {"case": case, "seed": seed, "iteration": iteration} | {
        key: "" if value is None else f"{value:.4g}" for key, value in figures.items()
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "curves")
    args = parser.parse_args()
    folder = args.folder.resolve()

    def sft(seed: int) -> Path:
        return folder / f"sft_{seed}"

    def of(case: str, seed: int) -> tuple[Path, list[str]]:
        policy = sft(seed) / "sft" / "hf"
        return folder / f"{case}_{seed}", [*CASES[case], f"policy.path={policy}", f"seed={seed}"]

    made = list(product(args.cases, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: make(sft(seed), ["+exp=hh_grpo", "phases=[sft]", f"seed={seed}"]), args.seeds))
        list(pool.map(lambda each: make(*of(*each)), made))
    found = [line for case, seed in made for line in rows(of(case, seed)[0], case, seed)]
    with (RESULTS / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for case in args.cases:
        ends = [line for line in found if line["case"] == case and line["iteration"] == "end"]
        means = {key: statistics.mean(float(str(line[key])) for line in ends) for key in COLUMNS if ends[0][key]}
        print(f"{case:22}" + "  ".join(f"{key} {value:.3g}" for key, value in means.items()))


if __name__ == "__main__":
    main()
