"""Preparing a data set once, against `datasets.map` with the same template and tokenizer on the same cores; and what a
start costs that finds it prepared.

    python benchmarks/data.py --tokenizer DIR [--rows 92472 2000000] [--file ROWS.jsonl.gz] [--cores 1 2] [--rounds 1]

Dialogues are those of `--file`, over and over with a number in front of each, or generated ones of hh_mini. A row is
rendered and tokenised as a prompt with both its answers; `datasets.map` renders and tokenises both dialogues, and no
prompt and no marks of who speaks. Beyond 200,000 rows it is left out, and only the last number of cores is used. Memory
is anonymous memory: the pages of mapped files are the system's, who takes them back when others need them. Appends to
benchmarks/results/data.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import append, argument_parser, medians, run, take_turns

_MOST_ROWS_OF_OTHERS = 200_000
_FAR = 10_000_000  # a position at which a run is resumed
PHASES = ["sft", "reward", "ppo"]


def rows(file: str | None, count: int) -> Iterator[dict]:
    """So many preference rows, no two alike."""
    from rlhf_engine.data import hh_mini
    from rlhf_engine.data.files import read_rows

    if file is None:
        yield from hh_mini.pairs("helpful-base", "train", count, 1)
        return
    found = [row for _, row in read_rows(file)]
    for i in range(count):
        row = found[i % len(found)]
        yield {side: row[side].replace("Human: ", f"Human: {i} ", 1) for side in ("chosen", "rejected")}


def anonymous() -> int:
    """Bytes of this process's memory that no file lies behind."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def start(folder: str, file: str, tokenizer: str, cores: int) -> dict[str, float]:
    """A start of a run, as far as its data goes: seconds, and bytes."""
    from rlhf_engine.config import DataConfig, RunConfig
    from rlhf_engine.data.dataset import build_datasets
    from rlhf_engine.data.sources import look, mixture
    from rlhf_engine.data.tokenizer import Tokenizer

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    made = Tokenizer(tokenizer)
    config = RunConfig(data=DataConfig(cache_dir=folder, max_seq_len=1024, max_prompt_len=512))
    before, began = anonymous(), time.perf_counter()
    sources = mixture([file], 0, None, 1)
    look(sources, PHASES)
    with contextlib.redirect_stdout(io.StringIO()):
        datasets = build_datasets(PHASES, sources, made, config)
    seconds, began = time.perf_counter() - began, time.perf_counter()
    for dataset in datasets.values():
        assert dataset[_FAR].prompt
    far = time.perf_counter() - began
    worker = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "bytes": anonymous() - before, "worker": worker, "far": far}


@functools.cache
def known(tokenizer: str):
    """Of this process."""
    from rlhf_engine.data.tokenizer import Tokenizer

    return Tokenizer(tokenizer)


def tokens(batch: dict[str, list], tokenizer: str) -> dict[str, list]:
    """Both dialogues of each row, rendered and tokenised."""
    from rlhf_engine.data.formats import read_row
    from rlhf_engine.data.vocabulary import PieceVocabulary

    template, vocabulary = known(tokenizer).template, known(tokenizer).vocabulary
    read = [read_row({"chosen": c, "rejected": r}, "") for c, r in zip(batch["chosen"], batch["rejected"], strict=True)]
    found = {}
    for side in ("chosen", "rejected"):
        dialogues = [[*row.prompt, {"role": "assistant", "content": getattr(row, side) or ""}] for row in read]
        texts = [template._program.render(messages=messages, **template.variables) for messages in dialogues]
        if isinstance(vocabulary, PieceVocabulary):
            found[side] = vocabulary.model.encode(texts, num_threads=1)
        else:
            found[side] = [each.ids for each in vocabulary.model.encode_batch(texts, add_special_tokens=False)]
    return found


def mapped(folder: str, file: str, tokenizer: str, cores: int) -> dict[str, float]:
    """The same rows by `datasets.map`."""
    import datasets

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    began = time.perf_counter()
    data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
    processes, arguments = cores if cores > 1 else None, {"tokenizer": tokenizer}
    data.map(tokens, batched=True, num_proc=processes, remove_columns=data.column_names, fn_kwargs=arguments)
    return {"seconds": time.perf_counter() - began}


def compare(args: argparse.Namespace, count: int, cores: int, name: str) -> dict[str, object]:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file, made = Path(folder) / "rows.jsonl", iter(range(1000))
        with file.open("w") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows(args.file, count))

        def side(function) -> dict[str, float]:
            return run(function, f"{folder}/{next(made)}", str(file), args.tokenizer, cores)[0]

        sides = {"prepare": lambda: side(start)}
        if count <= _MOST_ROWS_OF_OTHERS:
            sides["map"] = lambda: side(mapped)
        found = take_turns(sides, args.rounds, warm_up=0)
        again = run(start, f"{folder}/0", str(file), args.tokenizer, cores)[0]
    (prepare,) = medians([[each["seconds"]] for each in found["prepare"]])
    row: dict[str, object] = {"rows": count, "tokenizer": name, "cores": cores, "prepare_rows_per_s": count / prepare}
    if "map" in found:
        (other,) = medians([[each["seconds"]] for each in found["map"]])
        row |= {"map_rows_per_s": count / other, "ratio": other / prepare}
    row |= {
        "parent_mb": max(each["bytes"] for each in found["prepare"]) / 2**20,
        "worker_mb": max(each["worker"] for each in found["prepare"]) / 2**20,
        "second_start_s": again["seconds"],
        "second_start_mb": again["bytes"] / 2**20,
        "far_position_s": again["far"],
    }
    return row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="a sentencepiece model or a folder of Hugging Face form")
    parser.add_argument("--name", help="of the tokenizer in the table; its path where it is not given")
    parser.add_argument("--rows", type=int, nargs="+", default=[92_472, 2_000_000])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--file")
    parser.add_argument("--folder", help="where the files are written; a temporary one where it is not given")
    args = parser.parse_args()
    for count in args.rows:
        for cores in args.cores if count <= _MOST_ROWS_OF_OTHERS else args.cores[-1:]:
            row = compare(args, count, cores, args.name or Path(args.tokenizer).name)
            append("data", [row], ["sentencepiece", "tokenizers", "datasets", "pyarrow"])
            print(
                "  ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
