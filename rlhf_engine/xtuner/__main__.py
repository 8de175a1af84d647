"""python -m rlhf_engine.xtuner FILE.py [key=value ...]: what becomes of each key of an XTuner-RLHF configuration."""

import sys

from ..config import ConfigError
from .read import read, said

try:
    print(read(sys.argv[1], said(sys.argv[2:])).table())
except ConfigError as error:
    sys.exit(f"error: {error}")
