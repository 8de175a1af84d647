"""Import of a synthetic checkpoint against reading and writing the same bytes with plain safetensors.

    python benchmarks/convert.py [--gb 4] [--tp 2] [--pp 2] [--folder /tmp]

Each side runs in a process of its own, in turns; medians of their work are compared. The peak is resident memory,
imports included. Appends a line to benchmarks/results/convert.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import append

ROUNDS = 3
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 64000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
PER_LAYER = 2 * (2048 * 2048 * 2 + 512 * 2048 * 2 + 3 * 2048 * 8192)  # bytes


def make(folder: Path, gb: float) -> int:
    """A Llama of about `gb` GB in several files; the bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file

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
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name)


def measure(words: list[str]) -> tuple[float, float, float]:
    """Seconds of the whole process, seconds of its work, and its peak memory in GB."""
    started = time.perf_counter()
    settings = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tool sets it: its reader is a thread of its own
    command = [sys.executable, __file__, *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=settings).stdout
    work, peak = json.loads(out.splitlines()[-1])
    return time.perf_counter() - started, work, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(args.side[0], Path(args.side[1]), Path(args.side[2]), args.tp, args.pp)
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        largest = make(root / "hf", args.gb) / 1e9
        total = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors")) / 1e9
        runs: dict[str, list[tuple[float, float, float]]] = {"copy": [], "import": []}
        for side in ("copy", "import") * (ROUNDS + 1):
            words = ["--tp", str(args.tp), "--pp", str(args.pp), "--side", side, str(root / "hf"), str(root / "out")]
            runs[side].append(measure(words))
            shutil.rmtree(root / "out")
            whole, work, peak = runs[side][-1]
            print(f"{side:7} {whole:6.1f} s, {work:6.1f} s of work, peak {peak:.2f} GB", flush=True)
    finally:
        shutil.rmtree(root)
    # after the first round the source is in the page cache for both
    rows = {}
    for side, found in runs.items():
        rows[side] = [statistics.median(column) for column in zip(*found[1:], strict=True)]
    ratio, limit = rows["import"][1] / rows["copy"][1], 1 + 4 * largest
    print(
        f"{total:.2f} GB, largest tensor {largest:.2f} GB: {ratio:.2f} x the copy (work), memory limit {limit:.2f} GB"
    )
    fields = ["gb", "tp", "pp", "copy_s", "import_s", "ratio", "copy_peak_gb", "import_peak_gb"]
    values = [total, args.tp, args.pp, rows["copy"][1], rows["import"][1], ratio, rows["copy"][2], rows["import"][2]]
    append("convert", [dict(zip(fields, values, strict=True))])


def run_side(side: str, source: Path, target: Path, tp: int, pp: int) -> None:
    # both sides wait for it: a virtual machine gives memory that was idle so long back to its host
    from rlhf_engine.converting.convert import import_folder

    os.sync()  # what the side before left to be written would be written on this one's time
    started = time.perf_counter()
    if side == "import":
        import_folder(source, target, tp, pp, None, lambda total: lambda num_bytes: None)
    else:
        copy(source, target)
    os.sync()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps([time.perf_counter() - started, peak]))


if __name__ == "__main__":
    main()
