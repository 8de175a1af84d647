"""A short version of `make chaos`, whose kills are always the same: all signals, in a save, behind the last one of a
phase and by the clock. torchrun has a test of its own."""

from __future__ import annotations

from chaos import SHORT, chaos


def test_killed_three_times(tmp_path):
    chaos(tmp_path, 3, seed=823, phases=SHORT)
