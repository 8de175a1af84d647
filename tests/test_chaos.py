"""A short version of `make chaos`."""

from __future__ import annotations

import random

from chaos import chaos


def test_killed_three_times(tmp_path):
    chaos(tmp_path, 3, random.SystemRandom().randrange(10**6))
