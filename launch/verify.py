"""python launch/verify.py +exp=NAME [key=value ...]

Checks on the model, the rows and the mesh of an experiment that the engine computes what it should, and that the result
does not depend on the layout. Prints a line for each check, writes OUTPUT_DIR/verify.json, and exits with 0 or 1. Takes
what launch/run.py takes, and runs under torchrun and srun as well.
"""

from __future__ import annotations

import sys

from run import main

from rlhf_engine.launching.preflight import Plan


def verify(checked: Plan) -> int:
    """All checks on this rank; the exit code."""
    from rlhf_engine.verify.suite import run

    return run(checked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], verify, __file__, __doc__))
