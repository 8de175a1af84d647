"""In a rank process: what passes through it, counted."""

from __future__ import annotations

import errno
import os
import pickle
from collections import Counter
from pathlib import Path

import cases
import pytest


def counted(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that this rank has from others, by the kind of what brought them, and that it reads and writes."""
    import torch.distributed as dist

    from rlhf_engine.hf import files

    found: Counter[str] = Counter()
    gather, recv, all_gather, objects = dist.gather, dist.recv, dist.all_gather, dist.all_gather_object
    add, read = files.TensorFile.add, files.HFFolder.read

    def count_gather(tensor, parts, dst, group):
        found["gathered"] += (len(parts) - 1) * tensor.nbytes if parts else 0
        return gather(tensor, parts, dst, group)

    def count_recv(tensor, *args):
        found["received"] += tensor.nbytes
        return recv(tensor, *args)

    def count_all_gather(parts, tensor, group):
        found["rows"] += (len(parts) - 1) * tensor.nbytes
        return all_gather(parts, tensor, group)

    def count_objects(parts, value, *args):
        found["objects"] += (len(parts) - 1) * len(pickle.dumps(value))
        return objects(parts, value, *args)

    def count_add(self, tensor):
        found["written"] += tensor.nbytes
        return add(self, tensor)

    def count_read(self, window):
        tensor = read(self, window)
        found["read"] += tensor.nbytes
        return tensor

    for name, value in (("gather", count_gather), ("recv", count_recv), ("all_gather", count_all_gather)):
        patch.setattr(dist, name, value)
    patch.setattr(dist, "all_gather_object", count_objects)
    patch.setattr(files.TensorFile, "add", count_add)
    patch.setattr(files.HFFolder, "read", count_read)
    return found


def load_and_export(folder: str, layout: tuple, out: str, full: int | None = None) -> Counter[str] | str:
    """What passes through this rank, or what fails.

    Args:
        full: a rank that cannot write.
    """
    from rlhf_engine.converting.export import export_role, head_config
    from rlhf_engine.hf import files, shares

    with pytest.MonkeyPatch.context() as patch:
        found = counted(patch)
        role = cases.hf_role(folder, layout)
        found["objects"] = 0
        patch.setattr(shares, "_LEAST_BYTES", 1)
        if full == role.mesh.rank:
            patch.setattr(files.PieceFile, "write", fail)
        try:
            export_role(role, Path(out), head_config(role.model, "lm", Path(folder)))
        except OSError as error:
            return str(error)
    return found


def fail(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rollout(overrides: list[str], layout: tuple, prompts: list[list[int]], ids: list[int]) -> tuple[list, Counter[str]]:
    """Responses, and what brings them here."""
    with pytest.MonkeyPatch.context() as patch:
        found = counted(patch)
        responses, _ = cases.generate(overrides, layout, prompts, ids)
    return responses, found
