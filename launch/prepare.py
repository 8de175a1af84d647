"""python launch/prepare.py +exp=NAME [key=value ...]

Reads, checks and tokenises the data of an experiment, as its run would do first, and says what each phase draws from.
The run, on this machine or another that sees `data.cache_dir`, finds it done.
"""

from __future__ import annotations

import sys

from rlhf_engine.config import JOBS, ConfigError
from rlhf_engine.launching.compose import compose
from rlhf_engine.launching.preflight import plan
from rlhf_engine.launching.reference import text
from rlhf_engine.launching.rows import prepare
from rlhf_engine.signals import RunError, leave_at_once


def main(argv: list[str]) -> int:
    """The exit code of what a command line asks for."""
    if {"--help", "-h"} & set(argv):
        print(__doc__, text(), sep="\n")
        return 0
    leave_at_once()
    try:
        checked = plan(compose(argv))
        if set(checked.config.phases) & JOBS:
            raise ConfigError(f"phases={checked.config.phases} reads its rows itself, and needs nothing prepared")
        datasets = prepare(checked)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else error.code
    from rich.console import Console

    from rlhf_engine.launching.header import mixture, remarks

    console = Console()
    (console if console.is_terminal else Console(width=140)).print(mixture(checked, datasets))
    for line in remarks(checked, datasets):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
