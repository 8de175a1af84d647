"""What roles that come and go move between a device and the memory beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.residency import Presence


def moved(needed: Sequence[Presence], sizes: Mapping[Presence, float], prefetch: bool) -> list[float]:
    """Bytes that a role moves for each group of stages, both ways together, once iterations are alike.

    As the schedule has it: what a group needs arrives before it, or with `prefetch` before the one that comes first;
    behind each group leaves what the next one does not need, and is copied only if it was changed since it last was.

    Args:
        needed: how much of the role each group works with.
        sizes: bytes of the parts that are copied.
    """
    here, changed, found = Presence.AWAY, set[Presence](), list[float]()
    for i, now in [*enumerate(needed)] * 2:  # the first iteration begins otherwise
        following = needed[(i + 1) % len(needed)]
        there = max(here, now, following if prefetch else Presence.AWAY)
        if now is Presence.TRAINING:
            changed |= sizes.keys()
        arrives = {part for part in sizes if here < part <= there}
        leaves = {part for part in sizes if following < part <= there}
        found.append(sum(sizes[part] for part in [*arrives, *leaves & changed]))
        changed -= leaves
        here = min(there, following)
    return found[len(needed) :]
