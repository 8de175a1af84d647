"""Metrics of an iteration: sums and counts where they arise, one reduction at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..mesh import ParallelMesh


class Metrics:
    """Collects named figures. Tensors stay tensors until `reduce`, so that collecting never waits for a device."""

    def __init__(self) -> None:
        self._partial: dict[str, list[Tensor | float]] = {}
        self._whole: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """This replica's share of a mean. Called on the last pipeline stage of each replica; of what every rank knows,
        by the main rank alone."""
        entry = self._partial.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + total
        entry[1] = entry[1] + count

    def record(self, name: str, value: Tensor | float) -> None:
        """A figure that every rank knows whole."""
        self._whole[name] = float(value)

    def most(self, name: str, value: Tensor | float) -> None:
        """The largest that is recorded of a figure that every rank knows whole."""
        self._whole[name] = max(self._whole.get(name, float("-inf")), float(value))

    def mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Records the (masked) mean of something that every rank knows whole."""
        weight = mask.float() if mask is not None else values.new_ones(values.shape)
        self.record(name, (values * weight).sum() / weight.sum().clamp_min(1))

    def held(self, mesh: ParallelMesh) -> dict[str, Any]:
        """What all ranks have collected so far, for `hold` of a run that goes on from here."""
        mine = {n: [x.cpu() if isinstance(x, Tensor) else x for x in entry] for n, entry in self._partial.items()}
        parts = mesh.all_gather_object(mine if mesh.tp_rank == 0 else {})
        return {"layout": [mesh.tp, mesh.pp, mesh.dp], "parts": parts, "whole": self._whole}

    def hold(self, held: dict[str, Any], mesh: ParallelMesh) -> None:
        """Goes on collecting where `held` was: on the same mesh to the last digit, on another up to rounding."""
        self._whole = dict(held["whole"])
        if held["layout"] == [mesh.tp, mesh.pp, mesh.dp]:
            self._partial = held["parts"][mesh.rank]
        elif mesh.is_main:
            for part in held["parts"]:
                for name, (total, count) in part.items():
                    self.add(name, total, count)

    def reduce(self, mesh: ParallelMesh, flags: Sequence[bool] = ()) -> tuple[dict[str, float], list[bool]]:
        """Every figure, and of each flag whether any rank raised it, the same on all ranks. Clears the collection."""
        mine = {n: (float(t), float(c)) for n, (t, c) in self._partial.items()} if mesh.tp_rank == 0 else {}
        sums: dict[str, tuple[float, float]] = {}
        parts, raised = zip(*mesh.all_gather_object((mine, flags)), strict=True)
        for part in parts:
            for name, (total, count) in part.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + total, old[1] + count)
        result = self._whole | {name: total / max(count, 1e-12) for name, (total, count) in sums.items()}
        self._partial, self._whole = {}, {}
        return result, [any(each) for each in zip(*raised, strict=True)]
