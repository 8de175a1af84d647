"""Import and export of a synthetic checkpoint against reading and writing the same bytes with plain safetensors.

    python benchmarks/convert.py [--gb 4] [--tp 2] [--pp 2] [--processes 2] [--folder /tmp]

Each side runs in a process of its own, in turns; medians of their work are compared. Import and export are there twice:
in that process, and in several. The peak is resident memory of the process that has most, imports included. Appends a
line to benchmarks/results/convert.csv.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from harness import append, argument_parser, medians, peak, run, seconds, take_turns
from safetensors.torch import load_file, save_file

ROUNDS = 3
FILE = 5 * 10**8  # bytes of a file of an export
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


def measure(side: str, folder: Path, tp: int, pp: int, processes: int) -> tuple[float, float]:
    """Seconds of a side's work, and its peak memory in GB."""
    # all sides wait for it: a virtual machine gives memory that was idle so long back to its host
    from rlhf_engine.converting.convert import Checkpoint, export_folder
    from rlhf_engine.converting.importer import import_folder

    def silent(total: int):
        return lambda num_bytes: None

    def work() -> None:
        if side == "copy":
            copy(folder / "hf", folder / "out")
        elif side.startswith("import"):
            import_folder(folder / "hf", folder / "out", tp, pp, None, silent, processes=processes)
        else:
            export_folder(Checkpoint(folder / "megatron"), folder / "out", FILE, silent, processes)
        os.sync()

    os.sync()  # what the side before left to be written would be written on this one's time
    taken = seconds(work)
    of_children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return taken, max(peak(), of_children) / 1e9


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))

    def turn(side: str, processes: int) -> tuple[float, float]:
        started = time.perf_counter()
        # of one thread, as the tool has it: an import's reader is one more
        [(work, held)] = run(measure, side, root, args.tp, args.pp, processes)
        whole = time.perf_counter() - started
        if side == "import" and not (root / "megatron").exists():
            (root / "out").rename(root / "megatron")
        else:
            shutil.rmtree(root / "out")
        print(f"{side:9} {whole:6.1f} s, {work:6.1f} s of work, peak {held:.2f} GB", flush=True)
        return work, held

    several = args.processes
    processes = {"copy": 1, "import": 1, "import_n": several, "export": 1, "export_n": several}
    try:
        largest = make(root / "hf", args.gb) / 1e9
        total = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors")) / 1e9
        # after the first round the source is in the page cache for all
        samples = take_turns({side: functools.partial(turn, side, n) for side, n in processes.items()}, ROUNDS)
    finally:
        shutil.rmtree(root)
    found = {side: medians(samples[side]) for side in processes}
    ratio, limit = found["import"][0] / found["copy"][0], 1 + 4 * largest
    print(f"{total:.2f} GB, largest tensor {largest:.2f} GB: memory limit {limit:.2f} GB")
    for side, (work, held) in found.items():
        print(f"{side:9} {work:6.2f} s, {work / found['copy'][0]:.2f} x the copy, peak {held:.2f} GB")
    row = {"gb": total, "tp": args.tp, "pp": args.pp, "processes": several, "ratio": ratio}
    row |= {f"{side}_s": work for side, (work, _) in found.items()}
    row |= {f"{side}_peak_gb": held for side, (_, held) in found.items()}
    append("convert", [row])


if __name__ == "__main__":
    main()
