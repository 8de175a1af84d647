"""Where the messages of rehearsed ranks meet. It runs in the process that started them.

Every rank posts each of its calls: to which group, which of that group's calls it is, the operation, sizes and types.
The exchange holds the posts of a call against each other, hands on the values that integers have, and knows at once
when ranks wait for a call that cannot come, where NCCL would hang.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Post:
    """A rank's side of a call.

    Attributes:
        channel: the ranks that take part, those that are rehearsed; and of the group its name, its size, and which of
            those that are alike it is.
        number: of the call on this channel.
        what: operation, types, sizes: the same on all of them.
        values: what others read of it, pickled.
        waits: whether the rank stands still until it has the values of the others.
    """

    channel: tuple[tuple[int, ...], tuple[str, int, int]]
    number: int
    what: str
    place: str
    values: bytes = b""
    waits: bool = False


class Exchange:
    """Serves the connections of all rehearsed ranks, in threads.

    Attributes:
        fault: the first thing that is wrong, in one line; None while nothing is.
    """

    def __init__(self, ranks: Sequence[int]):
        self.ranks = list(ranks)
        self.fault: str | None = None
        self._calls: dict[tuple, dict[int, dict[int, Post]]] = defaultdict(dict)  # channel, number, rank
        self._waiting: dict[int, tuple[Post, Connection]] = {}
        self._ended: set[int] = set()
        self._lock = threading.Lock()

    def serve(self, rank: int, connection: Connection) -> None:
        """Takes the posts of a rank until it hangs up."""
        threading.Thread(target=self._serve, args=(rank, connection), daemon=True).start()

    def _serve(self, rank: int, connection: Connection) -> None:
        try:
            while True:
                post = connection.recv()
                with self._lock:
                    self._take(rank, post, connection)
        except (EOFError, OSError):
            with self._lock:
                self._ended.add(rank)
                self._look_for_a_hang()

    def _take(self, rank: int, post: Post, connection: Connection) -> None:
        if self.fault is not None and post.waits:
            connection.send(None)
            return
        members = post.channel[0]
        call = self._calls[post.channel].setdefault(post.number, {})
        call[rank] = post
        if post.waits:
            self._waiting[rank] = post, connection
        for other, theirs in call.items():
            if theirs.what != post.what:
                self._refuse(
                    f"call {post.number} of {_group(post)} is {post.what} on rank {rank} at {post.place},"
                    f" and {theirs.what} on rank {other} at {theirs.place}"
                )
                return
        if len(call) == len(members):
            del self._calls[post.channel][post.number]
            values = {other: theirs.values for other, theirs in call.items()}
            for other in call:
                if other in self._waiting and self._waiting[other][0] is call[other]:
                    self._waiting.pop(other)[1].send(values)
        elif post.waits:
            self._look_for_a_hang()

    def _look_for_a_hang(self) -> None:
        """Whether every rank that has not ended waits for one that will not come."""
        if not self._waiting or len(self._waiting) + len(self._ended) < len(self.ranks):
            return
        rank, (post, _) = min(self._waiting.items())
        here = self._calls[post.channel][post.number]
        missing = [other for other in post.channel[0] if other not in here]
        others = []
        for other in missing:
            waiting = self._waiting.get(other)
            others.append(f"rank {other} {_waits(waiting[0]) if waiting else 'has ended'}")
        self._refuse(f"rank {rank} {_waits(post)}, and {' and '.join(others)}")

    def _refuse(self, line: str) -> None:
        self.fault = self.fault or line
        for _, connection in self._waiting.values():
            connection.send(None)
        self._waiting.clear()

    def left_over(self) -> str | None:
        """A call that some of its ranks never made."""
        for channel, calls in self._calls.items():
            for number, call in sorted(calls.items()):
                rank, post = min(call.items())
                missing = [str(other) for other in channel[0] if other not in call]
                return (
                    f"call {number} of {_group(post)} is {post.what} on rank {rank} at {post.place}, and"
                    f" rank {', '.join(missing)} never makes it"
                )
        return None


def _waits(post: Post) -> str:
    return f"waits in {post.what}, call {post.number} of {_group(post)}, at {post.place}"


def _group(post: Post) -> str:
    ranks, about = post.channel
    return f"{about[0]} {list(ranks)}"
