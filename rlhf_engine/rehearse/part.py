"""Which run is rehearsed, which of its ranks, and what each of them is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ..config import BUILDS_ON, ConfigError, LogConfig, RunConfig
from ..data.dataset import cache_of
from ..hf.config import family, read_json
from ..hf.index import index
from ..launching import folders, preflight
from ..launching.compose import compose
from ..models.partition import num_parameters

_SMALL_WORLD, _SMALL_MODEL = 8, 50e6  # ranks and parameters of a run that is rehearsed whole, with all that it writes
_FEW_STAGES = 4  # pipeline stages of which a rank each is rehearsed in a larger one


@dataclass(frozen=True)
class Part:
    """What a rank is told.

    Args:
        overrides: of the command line.
        present: the ranks that are rehearsed.
        place: folder of the rehearsal; what the run writes goes to `run` in it.
        stops_in: the phase whose first iteration ends with a request to stop; None where the run goes to its end.
        writes: whether checkpoints and exports are small enough to be written.
        micro_batches: of each role in a pass, at most.
        before: `module:function` that is called before the run.
    """

    overrides: list[str]
    rank: int
    world_size: int
    present: list[int]
    place: str
    stops_in: str | None
    writes: bool
    micro_batches: int | None
    before: str | None


def is_small(plan: preflight.Plan) -> bool:
    """Whether the run is rehearsed whole, with all that it writes."""
    largest = max(num_parameters(model, "lm") for model in plan.models.values())
    return plan.world_size <= _SMALL_WORLD and largest <= _SMALL_MODEL


def chosen(plan: preflight.Plan) -> list[int]:
    """The ranks that are rehearsed, in order.

    Raises:
        ConfigError: there is no such rank, or two of one pipeline stage are named.
    """
    world_size, pp, asked = plan.world_size, plan.mesh.pp, plan.config.rehearse.ranks
    if asked is not None:
        ranks = sorted({0, *asked})  # the main rank writes
        if ranks[-1] >= world_size or ranks[0] < 0:
            raise ConfigError(f"rehearse.ranks={asked}: the world has ranks 0 to {world_size - 1}")
        of_stages = {rank // (world_size // pp) for rank in ranks}
        if pp > 1 and len(of_stages) < len(ranks) < world_size:
            raise ConfigError(
                f"rehearse.ranks={asked}: with rank 0, which writes, two are of one pipeline stage of"
                f" {world_size // pp} ranks: name one of each, or all"
            )
        return ranks
    if is_small(plan):
        return list(range(world_size))
    stages = list(range(pp)) if pp <= _FEW_STAGES else [0, 1, pp - 2, pp - 1]
    # of the last stage the last rank: what hangs on the place in the other groups shows there
    return sorted({stage * (world_size // pp) for stage in stages[:-1]} | {0, world_size - 1})


def named_tensors(path: str) -> dict[str, Any]:
    """`hf.index.index` of a folder. Of one that has no weights yet, its config.json says whether they will have a
    score's head, which is all that is asked."""
    folder = Path(path)
    if any(path.name.endswith((".safetensors", ".bin", ".index.json")) for path in folder.iterdir()):
        return index(path)
    where = folder / "config.json"
    architecture, head = family(read_json(where), str(where))
    return {architecture.score: None} if head == "scalar" else {}


def settle(overrides: Sequence[str], world_size: int, output_dir: str) -> preflight.Plan:
    """The run as it is rehearsed: each phase as many iterations, saved after each."""
    config = compose(overrides)
    config.data.cache_dir = str(cache_of(config))
    config.output_dir, config.rerun, config.device = output_dir, False, "cuda"
    for phase in (getattr(config, name) for name in BUILDS_ON):
        phase.iterations = min(phase.iterations, config.rehearse.iterations)
        phase.save_every = 1
    config.log = LogConfig()
    config.timeout.stage = 1e9
    unread: dict[str, Any] = dict(index=named_tensors, unread_files=lambda path: [])
    with mock.patch.object(preflight, "num_gpus", lambda: world_size), mock.patch.multiple(folders, **unread):
        return preflight.plan(config, world_size)


def world_of(config: RunConfig) -> int:
    """Ranks of the run."""
    model_ranks = config.mesh.tp * config.mesh.pp
    return config.plan.world or model_ranks * (config.mesh.dp or 1)
