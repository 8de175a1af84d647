"""Frames over a socket that makes nobody wait: what cannot be sent yet is kept, and what has come in part too.

A frame is a kind, the number of a trajectory and JSON.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

SETUP, BEGIN, ACT, END, ANSWER, FAULT, ASK, TELL = b"S", b"B", b"A", b"E", b"W", b"F", b"Q", b"T"
HEAD = struct.Struct("<cqI")  # kind, number, bytes that follow
MOST = 1 << 26  # bytes of a frame
_AT_ONCE = 1 << 18


def frame(kind: bytes, number: int, payload: bytes = b"null") -> bytes:
    """As bytes."""
    return HEAD.pack(kind, number, len(payload)) + payload


def packed(value: Any) -> bytes:
    """A value as JSON; lone surrogates, which have no bytes, become question marks.

    Raises:
        TypeError, ValueError, RecursionError: it is none.
    """
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


class Frames:
    """One end of a connection.

    Attributes:
        closed: nothing comes any more.
        unsent: whether `flush` has something to do.
    """

    def __init__(self, end: socket.socket):
        end.setblocking(False)
        self.closed, self._socket = False, end
        self._out, self._in = bytearray(), bytearray()

    def fileno(self) -> int:
        """Of the socket, to wait for."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def send(self, kind: bytes, number: int, payload: bytes = b"null") -> None:
        """What the other end does not take now is kept; where nobody is there, nothing is sent."""
        self._out += frame(kind, number, payload)
        self.flush()

    def flush(self) -> None:
        """Sends of what was kept as much as the other end takes."""
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()

    def receive(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Kind, number and JSON of all frames that have come whole.

        Raises:
            ValueError: one is larger than `MOST`.
        """
        while not self.closed:
            try:
                got = self._socket.recv(_AT_ONCE)
            except BlockingIOError:
                return
            except OSError:
                got = b""
            self.closed = not got
            self._in += got
            while len(self._in) >= HEAD.size:
                kind, number, length = HEAD.unpack_from(self._in)
                if length > MOST:
                    raise ValueError(f"{length} bytes are more than {MOST}")
                if len(self._in) < HEAD.size + length:
                    break
                payload = bytes(self._in[HEAD.size : HEAD.size + length])
                del self._in[: HEAD.size + length]
                yield kind, number, payload

    def shut(self) -> None:
        """The other end hears that nothing more comes, whoever else has a copy of this one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """In this process."""
        self._socket.close()
