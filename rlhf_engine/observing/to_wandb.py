"""Writes what arrives on standard input to Weights & Biases: a process of its own, so that no network, login or fault
of the package can end or delay a run (`sinks.WandB` starts it).

Each line is a JSON object. The first says how the run is called (arguments of `wandb.init`); then `{"figures": {...}}`
are a step's and `{"dialogues": [{...}, ...]}` a table. The end of the input ends the run there.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from typing import Any, NoReturn

_SECONDS_TO_START = 10
_SECONDS_TO_FINISH = 50  # less than the run waits; nor does a run that was killed leave this process behind


def has_wandb() -> bool:
    """Whether the package is here; a folder `wandb`, which it leaves where it was used, is none."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the run: its end is the input's
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lines = map(json.loads, sys.stdin)
    import wandb

    about: dict[str, Any] = next(lines)
    silent = wandb.Settings(init_timeout=_SECONDS_TO_START, console="off", silent=True)
    try:
        run = wandb.init(**about, resume="allow", settings=silent)
    except Exception as error:  # no login, no network, no such project
        say(f"{' '.join(str(error).split())[:200]}: its files are kept in {about['dir']} for `wandb sync`")
        wandb.teardown()  # its service still holds the run that did not begin
        run = wandb.init(**about | {"mode": "offline"}, resume="allow", settings=silent)
    run.define_metric("*", step_metric="iteration")  # of a run that goes on from an earlier iteration too
    for line in lines:
        if figures := line.get("figures"):
            run.log(figures)
        if dialogues := line.get("dialogues"):
            columns = list(dialogues[0])
            run.log({"dialogues": wandb.Table(columns, [[row.get(name) for name in columns] for row in dialogues])})
    signal.alarm(_SECONDS_TO_FINISH)
    run.finish()
    return 0


def say(what: str) -> None:
    print(f"wandb: {what}", file=sys.stderr, flush=True)


def fail(error: BaseException) -> NoReturn:
    say(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        fail(error)
