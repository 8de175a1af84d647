"""Checkpoints that are damaged, that cannot be written, that pile up, that are written while weights change."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from conftest import ROOT, SMALL

from rlhf_engine.config import CheckpointConfig
from rlhf_engine.surviving import manifest

# -- on the ranks --------------------------------------------------------------------------------------------


def policy(overrides: list[str], layout: tuple):
    from rlhf_engine.algorithms.algorithm import RoleSpec
    from rlhf_engine.launching.build import build_role

    ctx = cases.context(overrides, layout)
    return ctx.mesh, build_role(ctx, "policy", RoleSpec("lm", optimizer=ctx.config.sft.optimizer))


@torch.no_grad()
def fill(role, value: float) -> None:
    """Every weight, and every moment of Adam, which has made a step, is `value`."""
    from rlhf_engine.models.optim import optimizer_tensors, torch_optimizers

    for entry in (entry for adam in torch_optimizers(role.optimizer) for entry in adam.state.values()):
        entry["step"] = torch.tensor(1.0)

    for tensor in (*role.chunks.parameters(), *optimizer_tensors(role.optimizer, ())):
        tensor.fill_(value)


def save(overrides: list[str], layout: tuple, folder: str, iterations: list[int], full: int | None = None, **config):
    """Saves a policy whose weights are the iteration's number. Gives what was said, and what `finish` said of each.

    Args:
        full: a rank whose files cannot grow.
    """
    from rlhf_engine.models.checkpoint import Checkpoints

    mesh, role = policy(overrides, layout)
    said, answers = io.StringIO(), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(said):
        checkpoints = Checkpoints(Path(folder), mesh, CheckpointConfig(**config))
        checkpoints.newest()
        for iteration in iterations:
            fill(role, iteration)
            if mesh.rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
            try:
                checkpoints.save(iteration, {"policy": role}, {"iteration": iteration})
                fill(role, -1.0)  # as the next step would, while the thread writes
                answers.append(checkpoints.finish())
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said.getvalue(), answers


def load(overrides: list[str], layout: tuple, folder: str, is_finished: bool = False):
    """What is found, its state, its weights (which are all the same), and what was said; an error in its place."""
    from rlhf_engine.config import ConfigError
    from rlhf_engine.models.checkpoint import Checkpoints
    from rlhf_engine.models.checkpoint import load as load_checkpoint
    from rlhf_engine.models.optim import optimizer_tensors

    mesh, role = policy(overrides, layout)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            found = Checkpoints(Path(folder), mesh, CheckpointConfig()).newest(is_finished)
        except ConfigError as error:
            return str(error), None, None, said.getvalue()
    if found is None:
        return None, None, None, said.getvalue()
    state = load_checkpoint(found, {"policy": role})
    tensors = [*role.chunks.parameters(), *optimizer_tensors(role.optimizer, ())]
    return found.name, state, {float(v) for t in tensors for v in t.unique()}, said.getvalue()


def recorded(overrides: list[str], folder: str) -> list[str]:
    """What this rank syncs, renames and removes in `folder` as it saves twice."""
    with pytest.MonkeyPatch.context() as patch:
        calls = cases.disk_calls(patch, Path(folder))
        save(overrides, TWO, folder, [1, 2], keep_last=1)
    return calls


def losing(overrides: list[str], folder: str, lost: str):
    """A save of which the main rank does not find a file that a rank has written."""
    from rlhf_engine.models import checkpoint

    def complete(checkpoints, writing, reports, original=checkpoint.Checkpoints._complete):
        (writing.target / lost).unlink()
        return original(checkpoints, writing, reports)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_complete", complete)
        return save(overrides, TWO, folder, [8])


def without_room_for(overrides: list[str], folder: str, file: str):
    """A save whose main rank cannot write `file`."""
    from rlhf_engine.surviving import durable

    def write(path, content, original=durable.aside):
        if path.name == file:
            raise durable.WriteError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return original(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "aside", write)
        return save(overrides, TWO, folder, [8])


# -- the tests -----------------------------------------------------------------------------------------------

TWO = (2, 1, 1)  # every rank writes a file


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    return [*SMALL, "phases=[sft]", f"output_dir={tmp_path_factory.mktemp('run')}"]


@pytest.fixture
def three(worlds, overrides, tmp_path) -> Path:
    """Checkpoints of iterations 2, 4 and 6."""
    folder = tmp_path / "checkpoints"
    results = worlds(2).run(save_three, overrides, str(folder))
    assert results == [("", [True] * 3)] * 2
    return folder


def save_three(overrides: list[str], folder: str):
    return save(overrides, TWO, folder, [2, 4, 6], keep_last=3)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(folder: Path) -> str:
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "__1_0.distcp has another checksum"


def delete(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    return "__0_0.distcp: No such file"


def truncate(folder: Path) -> str:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-1])
    return ".metadata has"


def no_manifest(folder: Path) -> str:
    (folder / manifest.NAME).write_text("{")
    return "manifest.json cannot be read"


def nowhere(folder: Path) -> str:
    (folder.parent / "latest").write_text("iteration_7")
    folder.rename(folder.parent / "iteration_8")  # of an earlier, longer run
    return "iteration_7 is damaged: it is not there"


@pytest.mark.parametrize("harm", [flip, delete, truncate, no_manifest, nowhere])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(worlds, overrides, three, harm):
    line = harm(three / "iteration_6")
    results = worlds(2).run(load, overrides, (1, 1, 2), str(three))  # two replicas read what TP 2 has written
    for name, state, weights, _ in results:
        assert (name, state, weights) == ("iteration_4", {"iteration": 4}, {4.0})
    said = results[0][3]
    assert line in said and said.count("\n") == 1 and results[1][3] == ""
    error = worlds(2).run(load, overrides, TWO, str(three), True)[0][0]
    assert "finished phase" in error and "iteration_" in error
    # the run goes on from there and leaves nothing of what it did not build on
    assert worlds(2).run(save, overrides, TWO, str(three), [6])[0][1] == [True]
    newest = (three / "latest").read_text()
    assert newest in ("iteration_6", "iteration_6.1") and kept(three) == ["iteration_4", newest, "latest"]
    assert manifest.damage(three / newest) is None


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_what_changes_while_it_is_written_is_not_in_it(worlds, overrides, tmp_path, distributed):
    """Whoever holds weights and moments: flat buffers, or each parameter its own."""
    settings = [*overrides, f"sft.optimizer.distributed={distributed}"]
    for layout in ((1, 1, 2), (2, 1, 1)):
        folder = str(tmp_path / str(layout))
        worlds(2).run(save, settings, layout, folder, [3])
        assert worlds(2).run(load, settings, layout, folder)[0][:3] == ("iteration_3", {"iteration": 3}, {3.0})


def test_where_none_is_whole_the_run_is_refused(worlds, overrides, three):
    for n in (2, 4, 6):
        flip(three / f"iteration_{n}")
    error, _, _, said = worlds(2).run(load, overrides, TWO, str(three))[0]
    assert "no checkpoint in" in error and "is whole" in error and said.count("is damaged") == 3


def test_a_lost_pointer_and_half_a_save(worlds, overrides, three):
    """As a kill before the first `latest`, and one in the middle of a save, leave them."""
    (three / "latest").unlink()
    (three / "saving").mkdir()
    (three / "saving" / "__0_0.distcp").write_bytes(b"half")
    assert worlds(2).run(load, overrides, TWO, str(three))[0][:3] == ("iteration_6", {"iteration": 6}, {6.0})
    worlds(2).run(save, overrides, TWO, str(three), [8])
    assert kept(three) == ["iteration_6", "iteration_8", "latest"]


def test_everything_is_on_the_disk_before_it_is_named_and_before_older_ones_are_removed(worlds, overrides, tmp_path):
    folder = tmp_path / "sft" / "checkpoints"
    first, other = worlds(2).run(recorded, overrides, str(folder))
    made = ["fsync ../..", "fsync ..", "fsync ."]  # the names of `sft`, `checkpoints` and `saving`
    for iteration, start in (1, made), (2, ["fsync ."]):
        n = first.index("fsync saving/manifest.json.tmp")
        assert first[: len(start)] == start
        written = {f"fsync saving/{name}" for name in kept(folder / "iteration_2")} - {"fsync saving/manifest.json"}
        assert written <= {*first[:n], *other}
        assert first[n : n + 8] == [
            "fsync saving/manifest.json.tmp",
            "replace saving/manifest.json.tmp saving/manifest.json",
            "fsync saving",
            "fsync latest.tmp",  # all that takes room
            f"replace saving iteration_{iteration}",
            "fsync .",
            "replace latest.tmp latest",
            "fsync .",
        ]
        first = first[n + 8 :]
    assert first == ["rmtree iteration_1"]
    assert other == ["fsync saving/__1_0.distcp"] * 2


def test_no_two_saves_have_a_name_in_common(worlds, overrides, tmp_path):
    """Another client of a shared file system may still know where an earlier one was."""
    found = worlds(2).run(names_of_saves, overrides, str(tmp_path))
    assert found[0] == found[1] and len(set(found[0])) == 3


def names_of_saves(overrides: list[str], folder: str) -> list[str]:
    from rlhf_engine.models import checkpoint

    names = []

    def write(writing, buckets, original=checkpoint._Writing._write):
        names.append(writing.target.name)
        original(writing, buckets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Writing, "_write", write)
        save(overrides, TWO, folder, [1, 2, 3])
    return names


def test_the_main_rank_looks_at_every_file(worlds, overrides, three):
    """One that it does not find, as on a file system that is not the same for both."""
    before = kept(three)
    (said, answers), _ = worlds(2).run(losing, overrides, str(three), "__1_0.distcp")
    assert answers == [False] and kept(three) == before
    line = r"checkpoint of iteration 8 not saved: 0 of \d+ bytes are there of __1_0.distcp, which rank 1 has written; "
    assert re.fullmatch(line + "iteration_6 is kept\n", said)


@pytest.mark.parametrize("file", ["manifest.json", "latest"])
def test_no_room_for_the_last_files(worlds, overrides, three, file):
    """Nothing is left that would keep the disk full."""
    before = kept(three)
    (said, answers), _ = worlds(2).run(without_room_for, overrides, str(three), file)
    assert answers == [False] and kept(three) == before and (three / "latest").read_text() == "iteration_6"
    assert said == "checkpoint of iteration 8 not saved: No space left on device; iteration_6 is kept\n"


def test_no_room_for_a_folder(worlds, overrides, tmp_path):
    """Found by the main rank; the others do not wait for it."""
    (tmp_path / "sft").write_text("")
    folder = str(tmp_path / "sft" / "checkpoints")
    for rank, (said, answers) in enumerate(worlds(2).run(save, overrides, TWO, folder, [8])):
        assert answers == [False]
        assert said == "checkpoint of iteration 8 not saved: File exists (rank 0); nothing is kept\n" * (rank == 0)


def test_which_are_kept(worlds, overrides, tmp_path):
    theirs = ["iteration_10.copy", "iteration_1e3", "iteration_best"]  # a user's, who has put them beside ours
    for name in theirs:
        (tmp_path / name).mkdir()
    worlds(2).run(save_many, overrides, str(tmp_path))
    assert kept(tmp_path) == sorted(["iteration_10", "iteration_11", "iteration_5", "latest", *theirs])
    # going back: what lies beyond is no part of this run
    (tmp_path / "latest").write_text("iteration_5")
    worlds(2).run(save, overrides, TWO, str(tmp_path), [6])
    assert kept(tmp_path) == sorted(["iteration_5", "iteration_6", "latest", *theirs])
    assert (tmp_path / "latest").read_text() == "iteration_6"


def save_many(overrides: list[str], folder: str):
    return save(overrides, TWO, folder, [4, 5, 6, 10, 11], keep_last=2, keep_every=5)


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk(worlds, overrides, three, full):
    """One rank cannot write: it is said, nothing changes, and later there is room again."""
    before = kept(three)
    for rank, (said, answers) in enumerate(worlds(2).run(save, overrides, TWO, str(three), [8], full)):
        assert answers == [False]
        if rank == 0:
            assert "checkpoint of iteration 8 not saved" in said and f"(rank {full})" in said
            assert "iteration_6 is kept" in said and said.count("\n") == 1
    assert kept(three) == before and (three / "latest").read_text() == "iteration_6"
    assert worlds(2).run(save, overrides, TWO, str(three), [8])[0][1] == [True]
    assert worlds(2).run(load, overrides, TWO, str(three))[0][:3] == ("iteration_8", {"iteration": 8}, {8.0})


def test_a_run_on_a_full_disk(tmp_path):
    """It trains to its end, saying at each save that it failed, and then ends in one line."""
    command = [*SMALL, "phases=[sft]", "mesh.dp=1", "sft.save_every=1", f"output_dir={tmp_path}"]
    size = 400_000  # bytes: more than a tokenizer and less than a checkpoint
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "run.py"), *command], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert result.returncode == 69 and result.stdout.count(" not saved: ") == 3, result.stdout + result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: sft: what follows needs the last checkpoint")
    assert "Traceback" not in result.stderr
    assert (tmp_path / "sft" / "metrics.jsonl").read_text().count("\n") == 3
    assert list((tmp_path / "sft" / "checkpoints").iterdir()) == []


def test_a_manifest_names_every_file(three):
    folder = three / "iteration_6"
    entries = json.loads((folder / manifest.NAME).read_text())
    assert set(entries) == {path.name for path in folder.iterdir()} - {manifest.NAME}
    assert sum(size for size, _ in entries.values()) == sum((folder / name).stat().st_size for name in entries)
