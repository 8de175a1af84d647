"""HF folders to megatron checkpoints and back.

    convert.py import  --hf DIR --out DIR --tp N --pp M [--dtype bfloat16] [--head lm] [--processes N]
    convert.py export  --megatron DIR --out DIR [--role policy] [--hf DIR] [--max-shard-gb 5] [--processes N]
    convert.py verify  --hf DIR --megatron DIR [--role policy]
    convert.py inspect DIR

A run's checkpoints (OUTPUT_DIR/ppo/checkpoints/iteration_30) hold several roles and no config.json: --role chooses,
and --hf names the folder that the run started from, or one that the run exported. With --ignore-keys KEY ... these keys
of config.json are read as if they were not there. The shards of an import and the files of an export are dealt out to
processes, as many as there are cores and 2 GB for each, or --processes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_engine.config import ConfigError
from rlhf_engine.hf.config import family, parse, read_json
from rlhf_engine.hf.index import index, is_checkpoint, unread_files
from rlhf_engine.hf.pickles import read_index
from rlhf_engine.signals import say_errors_once


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Called with the total of bytes, gives what is told of those done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def start(total: int) -> Callable[[int], None]:
            task = bar.add_task(title, total=total)
            return lambda num_bytes: bar.advance(task, num_bytes)

        yield start


def import_hf(args: argparse.Namespace) -> int:
    """HF to Megatron."""
    import torch

    from rlhf_engine.converting.importer import import_folder

    index(args.hf)
    _say_unread(args.hf)
    _check(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with progress_bar("import") as start:
        import_folder(args.hf, args.out, args.tp, args.pp, dtype, start, args.ignore_keys, args.head, args.processes)
    print(f"{args.out}: tp {args.tp} x pp {args.pp}, loads on any mesh; policy.path={args.out} starts from it")
    return 0


def export_hf(args: argparse.Namespace) -> int:
    """Megatron to HF."""
    from rlhf_engine.converting.convert import Checkpoint, export_folder

    _check(args)
    checkpoint = Checkpoint(args.megatron, args.hf, args.role, args.ignore_keys)
    with progress_bar("export") as start:
        notes = export_folder(checkpoint, args.out, int(args.max_shard_gb * 10**9), start, args.processes)
    for note in notes:
        print(f"{args.out}: {note}")
    print(f"{args.out}: HF format")
    return 0


def verify_hf(args: argparse.Namespace) -> int:
    """Compares both, tensor by tensor."""
    from rlhf_engine.converting.convert import Checkpoint, verify

    # a checkpoint that has its own config is described by it, and not by what it is compared with
    described = None if (args.megatron / "config.json").is_file() else args.hf
    checkpoint = Checkpoint(args.megatron, described, args.role, args.ignore_keys)
    _say_unread(args.hf)
    with progress_bar("verify") as start:
        equal, differences = verify(checkpoint, args.hf, start)
    for difference in differences:
        print(f"{difference.name} {difference.what}".strip())
    print(f"{equal} tensors equal bit for bit, {len(differences)} not")
    return 1 if differences else 0


def inspect_folder(args: argparse.Namespace) -> int:
    """What a folder holds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=str(args.folder), title_justify="left")
    path = args.folder / "config.json"
    if path.is_file():
        config = read_json(path)
        model = parse(config, str(path), args.ignore_keys, "--ignore-keys")
        head = family(config, str(path))[1]
        from rlhf_engine.converting.layout import count_parameters, one_rank

        with one_rank() as mesh:
            table.add_row("parameters", f"{count_parameters(model, head, mesh):,}")
        table.add_row("head", {"lm": "language model", "scalar": "one score"}[head])
        for key, value in vars(model).items():
            if key != "init_std" and value is not None:
                table.add_row(key, str(value))
    if is_checkpoint(args.folder):
        held = read_index(args.folder).state_dict_metadata
        table.add_row("format", f"megatron checkpoint, {len(list(args.folder.glob('*.distcp')))} files")
        table.add_row("holds", ", ".join(sorted({key.split(".")[0] for key in held})))
    else:
        tensors = index(args.folder)
        if score := tensors.get(family(read_json(path), str(path))[0].score):
            table.add_row("score", f"{score.name} in {score.path.name}")
        table.add_row("format", f"HF, {len({entry.path for entry in tensors.values()})} files, {len(tensors)} tensors")
        if unread := unread_files(args.folder):
            table.add_row("not read", ", ".join(path.name for path in unread))
    Console().print(table)
    return 0


def _say_unread(folder: Path) -> None:
    if unread := unread_files(folder):
        print(f"{folder}: not read: {', '.join(path.name for path in unread)}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    out: Path = args.out
    if out.exists():
        raise ConfigError(f"{out} exists: name a folder that is not there yet")
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: 1 or more")
    out.parent.mkdir(parents=True, exist_ok=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The commands and their options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("import", help="HF folder to megatron checkpoint")
    command.set_defaults(run=import_hf)
    command.add_argument("--hf", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--tp", type=int, default=1)
    command.add_argument("--pp", type=int, default=1)
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--head", choices=["lm", "scalar"], help="of a folder that has both; else its config.json's")
    command = commands.add_parser("export", help="megatron checkpoint to HF folder")
    command.set_defaults(run=export_hf)
    command.add_argument("--megatron", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--hf", type=Path, help="folder with config.json and tokenizer, where the checkpoint has none")
    command.add_argument("--role")
    command.add_argument("--max-shard-gb", type=float, default=5.0)
    for command in commands.choices.values():
        command.add_argument("--processes", type=int, help="that write; by default as many as are worth starting")
    command = commands.add_parser("verify", help="compares the two bit for bit")
    command.set_defaults(run=verify_hf)
    command.add_argument("--hf", type=Path, required=True)
    command.add_argument("--megatron", type=Path, required=True)
    command.add_argument("--role")
    command = commands.add_parser("inspect", help="what a folder holds")
    command.set_defaults(run=inspect_folder)
    command.add_argument("folder", type=Path)
    for command in commands.choices.values():
        command.add_argument("--ignore-keys", nargs="+", default=[], help="of config.json, as if they were not there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code of what a command line asks for."""
    args = arguments(argv)
    say_errors_once()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        return args.run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        # torch's archives fail once more when they are closed over what the system has refused
        found = error if isinstance(error, OSError) else error.__context__
        if not isinstance(found, OSError):
            raise
        print(f"error: {found.filename or 'writing'}: {found.strerror or found}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with an import, and starts an export anew", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
