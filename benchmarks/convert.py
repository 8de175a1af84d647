"""Import of a synthetic checkpoint against reading and writing the same bytes with plain safetensors.

    python benchmarks/convert.py [--gb 4] [--tp 2] [--pp 2] [--folder /tmp]

Each side runs in a process of its own, in turns; medians of their work are compared. The peak is resident memory,
imports included. Appends a line to benchmarks/results/convert.csv.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from harness import append, argument_parser, medians, peak, run, seconds, take_turns
from safetensors.torch import load_file, save_file

ROUNDS = 3
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 64000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
PER_LAYER = 2 * (2048 * 2048 * 2 + 512 * 2048 * 2 + 3 * 2048 * 8192)  # bytes


def make(folder: Path, gb: float) -> int:
    """A Llama of about `gb` GB in several files; the bytes of its largest tensor."""
    embedding = 2 * MODEL["vocab_size"] * MODEL["hidden_size"]
    layers = max(1, round((gb * 1e9 - 2 * embedding) / PER_LAYER))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers}))
    hidden, ffn, kv = 2048, 8192, 512
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    parts = [{"model.embed_tokens.weight": (MODEL["vocab_size"], hidden), "model.norm.weight": (hidden,)}]
    for i in range(layers):
        part = {f"model.layers.{i}.self_attn.{x}_proj.weight": shape for x, shape in shapes.items()}
        part |= {f"model.layers.{i}.mlp.{x}_proj.weight": (ffn, hidden) for x in ("gate", "up")}
        part |= {f"model.layers.{i}.mlp.down_proj.weight": (hidden, ffn)}
        part |= {f"model.layers.{i}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        parts.append(part)
    parts.append({"lm_head.weight": (MODEL["vocab_size"], hidden)})
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16).normal_() for key, shape in part.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return embedding


def copy(source: Path, target: Path) -> None:
    """What any conversion has to do at least: read every tensor, write every tensor."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name)


def measure(side: str, source: Path, target: Path, tp: int, pp: int) -> tuple[float, float]:
    """Seconds of a side's work, and its peak memory in GB."""
    # both sides wait for it: a virtual machine gives memory that was idle so long back to its host
    from rlhf_engine.converting.importer import import_folder

    def work() -> None:
        if side == "import":
            import_folder(source, target, tp, pp, None, lambda total: lambda num_bytes: None)
        else:
            copy(source, target)
        os.sync()

    os.sync()  # what the side before left to be written would be written on this one's time
    return seconds(work), peak() / 1e9


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))

    def turn(side: str) -> tuple[float, float]:
        started = time.perf_counter()
        # of one thread, as the tool has it: its reader is one more
        [(work, held)] = run(measure, side, root / "hf", root / "out", args.tp, args.pp)
        whole = time.perf_counter() - started
        shutil.rmtree(root / "out")
        print(f"{side:7} {whole:6.1f} s, {work:6.1f} s of work, peak {held:.2f} GB", flush=True)
        return work, held

    try:
        largest = make(root / "hf", args.gb) / 1e9
        total = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors")) / 1e9
        # after the first round the source is in the page cache for both
        samples = take_turns({side: functools.partial(turn, side) for side in ("copy", "import")}, ROUNDS)
    finally:
        shutil.rmtree(root)
    (copied, copy_peak), (imported, import_peak) = medians(samples["copy"]), medians(samples["import"])
    ratio, limit = imported / copied, 1 + 4 * largest
    print(
        f"{total:.2f} GB, largest tensor {largest:.2f} GB: {ratio:.2f} x the copy (work), memory limit {limit:.2f} GB"
    )
    fields = ["gb", "tp", "pp", "copy_s", "import_s", "ratio", "copy_peak_gb", "import_peak_gb"]
    values = [total, args.tp, args.pp, copied, imported, ratio, copy_peak, import_peak]
    append("convert", [dict(zip(fields, values, strict=True))])


if __name__ == "__main__":
    main()
