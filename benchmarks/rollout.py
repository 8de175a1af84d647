"""Generation side by side: our rollout, transformers' `generate`, and the bare matrix products of the same tokens.

    python benchmarks/rollout.py [--stories DIR] [--smollm DIR] [--workloads 6m 40m] [--layout 1x2t dp2 tp2] [--quick]
    python benchmarks/rollout.py --workloads 6m --lengths ended --prompts 512 --memory 1 0.1

All sides sample from the same weights: prompts of 8 to 64 tokens, responses either all of one length or of geometric
length (mean 48, at most 192), drawn beforehand and the same for each side; or ended by one of the tokens that are a
48th of the vocabulary, of which our rollout knows beforehand only that 192 is the most. `--memory` is the cache's share
of what all rows need that are decoded at once, each at its longest. transformers generates in left-padded batches, of
the best of a few sizes and with the better of one thread and two, and a batch runs until its longest response is done;
tokens beyond a row's own length are not counted for it. TRL's trainers call the same `generate`. The floor multiplies
the weights with as many rows as there are tokens at each step of one big batch, and does nothing else.

Sides take turns; medians of the rounds are compared. Layouts: `1x2t` is one rank with the better of one thread and two,
dp2 and tp2 are two ranks with one thread each; the other sides always have one process. Appends to
benchmarks/results/rollout.csv.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from harness import append, argument_parser, run, seconds, take_turns

THREADS = 2
KINDS = ("fixed", "geometric", "ended")
LAYOUTS = {"1x2t": (1, 1), "dp2": (1, 2), "tp2": (2, 1)}  # tp and dp
BATCHES = (32, 64, 128, 256)
MEAN, MOST = 48, 192  # tokens of a response of geometric length
LLAMAS = {
    "6m": dict(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704,
        vocab_size=6144,
    ),
    "15m": dict(  # the shape of stories15M, with a vocabulary of Llama's size
        hidden_size=288, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, intermediate_size=768,
        vocab_size=32000,
    ),
    "40m": dict(
        hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1408,
        vocab_size=8192,
    ),
}  # fmt: skip


def make_llama(name: str, folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    common = dict(max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(LlamaConfig(**LLAMAS[name], **common)).save_pretrained(folder)
    return folder


def token_ends(vocab_size: int) -> list[int]:
    """Tokens that end a response: one in `MEAN`."""
    return list(range(5, vocab_size, MEAN))


def work(
    lengths: str, num_prompts: int, fixed: int, vocab_size: int, seed: int = 1
) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens the response to each has."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, vocab_size) for _ in range(draw.randint(8, 64))] for _ in range(num_prompts)]
    if lengths == "fixed":
        return prompts, [fixed] * num_prompts
    limits = []
    for _ in range(num_prompts):
        length = 1
        while length < MOST and draw.random() > 1 / MEAN:
            length += 1
        limits.append(length)
    return prompts, limits


class Ours:
    threads = 1

    def __init__(self, folder: Path, tp: int, dp: int, memory: float):
        from rlhf_engine.config import MeshConfig
        from rlhf_engine.hf.config import read_model_config
        from rlhf_engine.launching.build import load_base
        from rlhf_engine.mesh import ParallelMesh
        from rlhf_engine.models.role import RoleModel

        self.mesh = ParallelMesh(MeshConfig(tp=tp, pp=1, dp=dp), "cpu")
        self.role = RoleModel("policy", read_model_config(folder), self.mesh, "lm", torch.float32)
        load_base(self.role, str(folder))
        self.memory, self.is_ended = memory, False

    def __call__(self, prompts: list[list[int]], limits: list[int]) -> None:
        most, ends = ([MOST] * len(prompts), self.ends) if self.is_ended else (limits, [])
        assert self.lengths(prompts, most, ends) == limits

    @property
    def ends(self) -> list[int]:
        """Tokens that end a response."""
        return token_ends(self.role.model.vocab_size or 0)

    def lengths(self, prompts: list[list[int]], limits: list[int], ends: list[int]) -> list[int]:
        """Of the responses."""
        from rlhf_engine.config import RolloutConfig
        from rlhf_engine.rollout.generate import rollout
        from rlhf_engine.rollout.sampling import sample_keys

        config = RolloutConfig(max_new_tokens=max(limits), min_new_tokens=0)
        if self.memory < 1:
            longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
            config.kv_tokens = max(longest, int(self.memory * min(config.slots, len(prompts)) * longest))
        keys = sample_keys(1, 0, torch.arange(len(prompts)))
        found = rollout(self.role, prompts, keys, config, ends, limits=limits)
        return [len(response.tokens) for response in found]


class Transformers:
    def __init__(self, folder: Path, prompts: list[list[int]]):
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        speeds = {}
        self._batch(prompts[:8], 2)  # warm
        for size in BATCHES:
            for threads in (1, THREADS):  # more of them slow a small model down
                torch.set_num_threads(threads)
                part = prompts[:size]
                speeds[size, threads] = len(part) / seconds(partial(self._batch, part, 24))
        self.batch, self.threads = max(speeds, key=speeds.__getitem__)

    def _batch(self, prompts: list[list[int]], length: int) -> None:
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self.model.generate(
                tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length,
                min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == width + length

    def __call__(self, prompts: list[list[int]], limits: list[int]) -> None:
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            self._batch(prompts[part], max(limits[part]))


class Floor:
    """The weights of each layer, fused as they can be, times all tokens: prompts at once, then step by step."""

    threads = THREADS

    def __init__(self, folder: Path):
        from rlhf_engine.hf.config import read_model_config

        model = read_model_config(folder)
        hidden, heads, ffn = model.hidden_size, model.num_attention_heads * model.head_size, model.intermediate_size
        qkv = heads + 2 * model.num_key_value_heads * model.head_size
        shapes = [(qkv, hidden), (hidden, heads), (2 * ffn, hidden), (hidden, ffn)] * model.num_layers
        self.weights = [torch.randn(shape) for shape in shapes]
        self.head = torch.randn(model.vocab_size or 0, hidden)

    def __call__(self, prompts: list[list[int]], limits: list[int]) -> None:
        prompt_tokens = sum(map(len, prompts))
        inputs = {weight.shape[1]: torch.randn(prompt_tokens, weight.shape[1]) for weight in self.weights}
        with torch.inference_mode():
            for step in range(max(limits)):
                active = sum(limit > step for limit in limits)
                for weight in self.weights:  # the first token of a response comes with its prompt
                    inputs[weight.shape[1]][: prompt_tokens if step == 0 else active] @ weight.t()
                inputs[self.head.shape[1]][:active] @ self.head.t()


def measure(args: argparse.Namespace, name: str, folder: Path, layout: str, memory: float) -> None:
    """On a rank: all sides on one workload."""
    tp, dp = LAYOUTS[layout]
    ours = Ours(folder, tp, dp, memory)
    for lengths in args.lengths:
        prompts, limits = work(lengths, args.prompts, args.fixed, ours.role.model.vocab_size or 0)
        ours.is_ended = lengths == "ended"
        if ours.is_ended:
            limits = ours.lengths(prompts, [MOST] * len(prompts), ours.ends)
        sides, taken = compare(ours, folder, prompts, limits, args.rounds)
        if ours.mesh.is_main:
            publish(name, lengths, layout, args, sum(limits), ours, sides["transformers"], taken)


def compare(ours: Ours, folder: Path, prompts: list[list[int]], limits: list[int], rounds: int) -> tuple[dict, dict]:
    """The sides and the seconds of their turns. The first rank has the sides that know one process."""
    choices = (1, THREADS) if ours.mesh.world_size == 1 else (1,)
    ours(prompts[:8], limits[:8])
    ours.threads = min(choices, key=lambda threads: timed(ours, prompts, limits, threads))
    sides = {"ours": ours}
    if ours.mesh.is_main:
        torch.set_num_threads(THREADS)
        sides |= {"transformers": Transformers(folder, prompts), "floor": Floor(folder)}
        timed(sides["floor"], prompts, limits, THREADS)

    def turn(name: str) -> float:
        ours.mesh.barrier()
        return timed(sides[name], prompts, limits, sides[name].threads) if name in sides else 0.0

    turns = {name: partial(turn, name) for name in ("ours", "transformers", "floor")}
    return sides, take_turns(turns, rounds, warm_up=0)  # each has run


def timed(side, prompts: list[list[int]], limits: list[int], threads: int) -> float:
    torch.set_num_threads(threads)
    return seconds(lambda: side(prompts, limits))


def publish(
    name: str, lengths: str, layout: str, args, tokens: int, ours: Ours, theirs: Transformers, taken: dict
) -> None:
    median = {side: statistics.median(values) for side, values in taken.items()}
    ratio = median["transformers"] / median["ours"]
    print(
        f"{name:8} {lengths:9} {layout:5} memory {ours.memory:4.0%}"
        f" ours {median['ours']:7.2f} s ({tokens / median['ours']:7.0f} tokens/s,"
        f" {ours.threads} threads)"
        f"  transformers {median['transformers']:7.2f} s (batches of {theirs.batch}, {theirs.threads} threads)"
        f"  {ratio:5.2f} x"
        f"  floor {median['floor']:6.2f} s, {median['floor'] / median['ours']:4.0%} of ours",
        flush=True,
    )
    if args.quick:
        return
    row = {
        "workload": name, "lengths": lengths, "layout": layout, "memory": ours.memory,
        "prompts": args.prompts, "tokens": tokens, "ours_s": median["ours"],
        "transformers_s": median["transformers"], "transformers_batch": theirs.batch,
        "ours_threads": ours.threads, "transformers_threads": theirs.threads,
        "floor_s": median["floor"], "ratio": ratio, "rounds": args.rounds,
    }  # fmt: skip
    append("rollout", [row], ["transformers"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--stories", help="HF folder of stories260K; left out without one")
    parser.add_argument("--smollm", help="HF folder of SmolLM2-135M; left out without one")
    parser.add_argument("--workloads", nargs="*", choices=LLAMAS, default=["6m", "40m"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["1x2t"])
    parser.add_argument("--lengths", nargs="+", choices=KINDS, default=["fixed", "geometric"])
    parser.add_argument(
        "--memory", nargs="+", type=float, default=[1.0], help="the cache's share of the most it can need"
    )
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--fixed", type=int, default=64, help="tokens of each response of fixed length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 64 prompts, nothing recorded")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.rounds = 64, 1
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"stories": args.stories, "smollm": args.smollm}
        models = {name: Path(folder) for name, folder in folders.items() if folder}
        models |= {name: make_llama(name, Path(temporary) / name) for name in args.workloads}
        for name, folder in models.items():
            for layout, memory in itertools.product(args.layout, args.memory):
                run(measure, args, name, folder, layout, memory, size=math.prod(LAYOUTS[layout]))


if __name__ == "__main__":
    main()
