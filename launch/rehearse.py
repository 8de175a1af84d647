"""python launch/rehearse.py +exp=NAME [key=value ...]

Runs the experiment's own code, from the reading of its data to the export of its models, as some or all ranks of its
world on GPUs that are not there (`plan.device`), and says what each stage needs, waits for and sends. Exit code 0: the
run starts, fits, saves and resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_engine.config import ConfigError
from rlhf_engine.launching.reference import text


def main(argv: list[str]) -> int:
    """The exit code of what a command line asks for."""
    if {"--help", "-h"} & set(argv):
        print(__doc__, text(), sep="\n")
        return 0
    from rlhf_engine.rehearse.rehearsal import rehearse

    try:
        found = rehearse(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rlhf_engine.rehearse.report import show, write

    show(found, argv)
    write(found, argv, Path(found.plan.config.output_dir) / "rehearsal.json")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
