"""What a phase is made with, and what of it has changed when it is started again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..config import BUILDS_ON, SAMPLING, RunConfig
from ..surviving import durable

_SHARED = ("seed", "data", "model", "policy", "tokenizer")  # that every phase's weights depend on
_OF_SAMPLING = ("reward", "rollout", "teacher", "env", "user")
_OF_ONE_START = {"phases", "rerun", "max_restarts", "output", "output_dir", "plan"}


def write_config(folder: Path, config: RunConfig, goes_on: bool) -> None:
    """`config.yaml` of this start. That of an earlier one stays beside it as `config.N.yaml`, where it is another; of a
    phase that goes on it is said what is."""
    path, now, before = folder / "config.yaml", asdict(config), durable.read(folder / "config.yaml")
    if before is not None and before != now:
        durable.write(folder / f"config.{1 + len(list(folder.glob('config.*.yaml')))}.yaml", path.read_bytes())
        others = _OF_ONE_START | (BUILDS_ON.keys() - {folder.name, "reward" if folder.name in SAMPLING else ""})
        for key, was, value in changes(before, now) if goes_on else ():
            if key.partition(".")[0] not in others:
                print(f"{folder.name}: {key}={value} from here on, {was} before", flush=True)
    durable.write(path, yaml.safe_dump(now, sort_keys=False))


def say_finished(folder: Path, config: RunConfig) -> None:
    """That a phase needs nothing more, and what it was made with that would be another thing now."""
    print(f"{folder.name}: finished before, in {folder} (rerun=true runs it again)", flush=True)
    relevant = {*_SHARED, folder.name, *(_OF_SAMPLING if folder.name in SAMPLING else ())}
    for key, was, value in changes(durable.read(folder / "config.yaml") or {}, asdict(config)):
        if key.partition(".")[0] in relevant:
            print(f"{folder.name}: was made with {key}={was}, not {value}", flush=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each key that has another value now, with the earlier one and this."""
    for name, value in now.items():
        was = before.get(name, value)
        if isinstance(value, dict) and isinstance(was, dict):
            yield from changes(was, value, f"{prefix}{name}.")
        elif was != value:
            yield prefix + name, json.dumps(was), json.dumps(value)
