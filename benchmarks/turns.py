"""Rollouts of several turns whose answers take a while, beside the same rollouts with answers at once.

    python benchmarks/turns.py [--workloads 6m] [--layout 1x2t dp2] [--share 0.2] [--prompts 256] [--slots 64]

Each sample has three turns of 32 tokens, answered with 16 tokens each. Answers come so late that `--share` of the rows
that are under way wait for one; how late, the first rollout without waits tells. Rows wait outside of the decode batch,
and others take their places. Sides take turns; medians are compared. Appends to benchmarks/results/turns.csv.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from harness import append, argument_parser, run, seconds, take_turns
from rollout import LAYOUTS, LLAMAS, Ours, make_llama, work

TURNS, SAID, TOLD = 3, 32, 16


class Late:
    """Answers that come `delay` seconds after they are asked for, by the clock of this rank."""

    def __init__(self, delay: float, vocab_size: int):
        self.delay, self.vocab_size, self.counts = delay, vocab_size, Counter[int]()
        self.asked: list[tuple[float, int]] = []
        self.waited = 0.0  # seconds, of all rows together

    def ask(self, sample: int, tokens: list[int], is_cut: bool, room: int) -> None:
        self.counts[sample] += 1
        is_last = self.counts[sample] == TURNS
        self.asked.append((time.perf_counter() + (0 if is_last else self.delay), sample))

    def answers(self, wait: bool) -> list[tuple[int, list[int] | None]]:
        if wait:
            time.sleep(max(0.0, min(self.asked)[0] - time.perf_counter()))
        now = time.perf_counter()
        due = [(at, sample) for at, sample in self.asked if at <= now]
        self.asked = [(at, sample) for at, sample in self.asked if at > now]
        self.waited += sum(now - at + self.delay for at, sample in due if self.counts[sample] < TURNS)
        told = [3 + i % (self.vocab_size - 3) for i in range(TOLD)]
        return [(sample, told if self.counts[sample] < TURNS else None) for _, sample in due]


def rollout(ours: Ours, prompts: list[list[int]], slots: int, delay: float) -> float:
    """Of the rows' time under way, the share that they wait."""
    from rlhf_engine.config import RolloutConfig
    from rlhf_engine.rollout.generate import rollout
    from rlhf_engine.rollout.sampling import sample_keys

    turns, progress = Late(delay, ours.role.model.vocab_size or 0), []
    config = RolloutConfig(max_new_tokens=SAID, min_new_tokens=0, slots=slots)
    keys, limits = sample_keys(1, 0, torch.arange(len(prompts))), [TURNS * SAID + (TURNS - 1) * TOLD] * len(prompts)
    found = rollout(ours.role, prompts, keys, config, [], limits=limits, report=progress.append, turns=turns)
    assert found.sampled.sum() == len(prompts) * TURNS * SAID
    mine, decoded = (
        ours.mesh.all_gather_object(turns.waited),
        progress[-1].slot_occupancy * slots * progress[-1].seconds,
    )
    return sum(mine) / max(1e-9, sum(mine) + decoded * ours.mesh.num_replicas)


def measure(args: argparse.Namespace, name: str, folder: Path, layout: str) -> None:
    """On a rank."""
    tp, dp = LAYOUTS[layout]
    ours = Ours(folder, tp, dp, 1.0)
    torch.set_num_threads(2 // (tp * dp))
    prompts, _ = work("fixed", args.prompts, SAID, ours.role.model.vocab_size or 0)
    rollout(ours, prompts, args.slots, 0.0)
    alone = seconds(lambda: rollout(ours, prompts, args.slots, 0.0))
    per_turn = alone * min(args.slots * ours.mesh.num_replicas, args.prompts) / (args.prompts * TURNS)
    delay = ours.mesh.from_main(per_turn * TURNS / (TURNS - 1) * args.share / (1 - args.share))
    shares: list[float] = []

    def turn(late: float) -> float:
        ours.mesh.barrier()
        return seconds(lambda: shares.append(rollout(ours, prompts, args.slots, late)))

    sides = {"at_once": partial(turn, 0.0), "waiting": partial(turn, delay)}
    taken = take_turns(sides, args.rounds, warm_up=0)
    if not ours.mesh.is_main:
        return
    median = {side: statistics.median(values) for side, values in taken.items()}
    ratio, share = median["at_once"] / median["waiting"], statistics.median(shares[1::2])
    tokens = args.prompts * TURNS * SAID
    print(
        f"{name} {layout}  at once {tokens / median['at_once']:.0f} tokens/s, with {share:.0%} of the rows waiting"
        f" (answers after {delay:.2f} s) {tokens / median['waiting']:.0f}: {ratio:.2f} x",
        flush=True,
    )
    row = {"workload": name, "layout": layout, "prompts": args.prompts, "slots": args.slots, "delay_s": delay}
    row |= {"share": share, "at_once_s": median["at_once"], "waiting_s": median["waiting"], "ratio": ratio}
    append("turns", [row | {"rounds": args.rounds}])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=LLAMAS, default=["6m"])
    parser.add_argument("--layout", nargs="+", choices=["1x2t", "dp2"], default=["1x2t", "dp2"])
    parser.add_argument("--share", type=float, default=0.2, help="of the rows under way, those that wait")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64, help="rows decoded at once by a replica")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.workloads:
            folder = make_llama(name, Path(temporary) / name)
            for layout in args.layout:
                run(measure, args, name, folder, layout, size=math.prod(LAYOUTS[layout]))


if __name__ == "__main__":
    main()
