"""The mesh of ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .reading import ConfigError


@dataclass
class MeshConfig:
    tp: int = 1  # tensor parallel: each layer is split over so many ranks
    pp: int = 1  # pipeline parallel: the layers are dealt to so many stages
    dp: int | None = None  # data parallel replicas; null takes what the world leaves
    ep: int = 1  # expert parallel: so many replicas share each layer's experts out among them
    sequence_parallel: bool = False  # norms and residuals split over the sequence as well (needs tp > 1)
    virtual_pp: int = 1  # chunks of layers that each stage has, apart from each other: less idle time, more messages


def resolve_mesh(mesh: MeshConfig, world_size: int) -> MeshConfig:
    """The mesh with `dp` filled in for a world of so many ranks.

    Raises:
        ConfigError: tp x pp x dp does not make the world.
    """
    model_ranks = mesh.tp * mesh.pp
    dp = mesh.dp if mesh.dp is not None else max(1, world_size // model_ranks)
    if model_ranks * dp != world_size:
        raise ConfigError(
            f"mesh.tp={mesh.tp} x mesh.pp={mesh.pp} x mesh.dp={dp} needs {model_ranks * dp} ranks,"
            f" and {world_size} are there"
        )
    if dp % mesh.ep:
        raise ConfigError(f"mesh.ep={mesh.ep} does not divide the {dp} data parallel replicas")
    return dataclasses.replace(mesh, dp=dp, sequence_parallel=mesh.sequence_parallel and mesh.tp > 1)
