"""Roles that leave the device between their stages: the same results, and memory that is really free."""

from __future__ import annotations

import json
import shutil

import cases
import pytest
import torch
from conftest import SMALL, launch

from rlhf_engine.models.residency import Parcel, Presence

KINDS = ("constant", "changing", "scratch")


def test_a_parcel_comes_back_as_it_left(tmp_path):
    flat = torch.arange(12.0)
    views = [flat[:5], flat[5:].view(1, 7)]
    parcels = {kind: Parcel(lambda: views, kind, torch.device("cpu"), tmp_path / kind) for kind in KINDS}
    for kind in ("constant", "changing"):
        parcels[kind].leave()
        assert flat.untyped_storage().nbytes() == 0
        parcels[kind].arrive()
        assert torch.cat([views[0], views[1][0]]).tolist() == list(range(12))
    flat += 1
    parcels["changing"].leave()
    parcels["changing"].arrive()
    assert views[1][0, -1] == 12
    parcels["constant"].leave()  # was copied off before it changed
    parcels["constant"].arrive()
    assert views[1][0, -1] == 11
    parcels["scratch"].leave()
    assert flat.untyped_storage().nbytes() == 0
    parcels["scratch"].arrive()
    assert flat.untyped_storage().nbytes() == 48 and not (tmp_path / "scratch.0").exists()


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("more", [[], ["schedule.prefetch=true", "ppo.optimizer.distributed=false"]], ids=str)
def test_offloading_changes_nothing(worlds, small_run, tmp_path, layout, more):
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    settings = [*SMALL, "phases=[ppo]", f"output_dir={tmp_path}", *more, "ppo.epochs=2"]
    world = worlds(layout[0] * layout[1] * layout[2])
    keeps = world.run(cases.first_iteration, settings, layout, "ppo")
    moves = world.run(cases.first_iteration, [*settings, "schedule.residency=offload"], layout, "ppo")
    for mine, theirs in zip(moves, keeps, strict=True):
        # at the end only the weights of the policy, which the next iteration begins with
        away = dict.fromkeys(("critic", "reference", "reward"), Presence.AWAY)
        assert mine.pop("away") == {**away, "policy": Presence.WEIGHTS} and theirs.pop("away") == {}
        assert mine.pop("times") and theirs.pop("times")
        assert mine == theirs


def test_a_run_with_everything_offloaded(small_run, tmp_path):
    """Evaluations, checkpoints, exports and going on from a checkpoint bring back what they need."""
    rows = {}
    for residency in ("keep", "offload"):
        folder = tmp_path / residency
        shutil.copytree(small_run, folder)
        settings = [*SMALL, f"schedule.residency={residency}", f"output_dir={folder}", "mesh.dp=1", "ppo.save_every=1"]
        if residency == "offload":
            launch(*settings, "ppo.iterations=1", "ppo.optimizer.schedule=constant")
            (folder / "ppo" / "summary.json").unlink()
        launch(*settings)
        lines = (folder / "ppo" / "metrics.jsonl").read_text().splitlines()
        rows[residency] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(cases.MEASURED)} for line in lines
        ]
        assert (folder / "ppo" / "hf" / "model.safetensors").is_file()
    assert rows["offload"] == rows["keep"]
