"""How an environment asks the model of `user.path`, from its own process."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

from .frames import ASK, HEAD, TELL, frame, packed

_pipe: Any = None  # to the server, of this process
_lock = threading.Lock()  # a coroutine may ask from a thread


def connect(pipe: Any) -> None:
    """This process is an environment's, which hears the server through this file."""
    global _pipe
    _pipe = pipe


def ask(messages: Sequence[dict[str, Any]]) -> str:
    """What the model says behind messages, in which `assistant` is itself. Waits for it, within `reset` or `step`; what
    it says is the same on every mesh, for its noise belongs to the sample and the question's number.

    Raises:
        TypeError: they are none.
        RuntimeError: no environment asks.
    """
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"the model is asked with messages, {{'role': text, 'content': text}}, not {message!r:.60}")
    if not messages or messages[-1]["role"] == "assistant":
        raise TypeError("the model is asked with messages that end with what another has said")
    if _pipe is None:
        raise RuntimeError("ask() is for the reset and the step of an environment")
    with _lock:
        _pipe.write(frame(ASK, 0, packed({"asks": list(messages)})))
        _pipe.flush()
        head = _pipe.read(HEAD.size)
        if len(head) < HEAD.size or head[:1] != TELL:
            raise SystemExit  # nobody is there any more
        return json.loads(_pipe.read(HEAD.unpack(head)[2]))
