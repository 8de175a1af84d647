"""Scores by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..config import ConfigError, RunConfig
from ..signals import RunError
from ..surviving import durable

_PROMPT = (
    "Rate the answer to the request from 0 (useless) to 10 (perfect).\n\n<request>\n{prompt}\n</request>\n\n<answer>\n"
    "{response}\n</answer>\n\nThink briefly, then end with a line of the form: Score: NUMBER"
)
_LONGEST_PAUSE = 60.0  # seconds between two tries
_PASSING = {408, 409, 429}  # statuses below 500 that may be others at the next try
_PLACE = re.compile(r"\{(\w+)\}")


def compiled(key: str, pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The pattern that a setting is.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"{key}={pattern} is not a regular expression: {error}") from None


class Judge:
    """The number in the reply to `reward.judge.prompt`, whose {places} are the prompt, the response and fields of the
    row. What is known is not asked for again: a file has a line of JSON for each reply, by a digest of its request."""

    def __init__(self, config: RunConfig):
        self.config = judge = config.reward.judge
        if judge.url is None or judge.model is None:
            raise ConfigError("reward.fns=judge needs reward.judge.url=http://HOST:PORT/v1 and reward.judge.model=NAME")
        self.url = judge.url.rstrip("/") + "/chat/completions"
        self.file = Path(judge.cache or Path(config.output_dir) / "judge.jsonl")
        self.pattern = compiled("reward.judge.pattern", judge.pattern)
        if self.pattern.groups != 1:
            raise ConfigError(f"reward.judge.pattern={judge.pattern} needs one group, which is the score")
        self.prompt = judge.prompt or _PROMPT
        self.places = set(_PLACE.findall(self.prompt))
        self.needed = self.places - {"prompt", "response"}

    @functools.cached_property
    def _known(self) -> dict[str, float]:
        known = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else ():
            with contextlib.suppress(LookupError, TypeError, ValueError):  # a line that was cut is one less
                row = json.loads(line)
                known[row["key"]] = self._score(row["reply"])
        return known

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **fields: Sequence[Any]) -> list[float]:
        columns = {**fields, "prompt": prompts, "response": responses}
        requests = [self._request({name: columns[name][i] for name in self.places}) for i in range(len(responses))]
        keys = [hashlib.sha256(self.url.encode() + request).hexdigest() for request in requests]
        missing = {key: i for i, key in enumerate(keys) if key not in self._known}
        pool = ThreadPoolExecutor(self.config.concurrency)
        asked = {pool.submit(self._ask, requests[i], responses[i]): key for key, i in missing.items()}
        try:
            for future in as_completed(asked):
                self._keep(asked[future], future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [self._known[key] for key in keys]

    def _keep(self, key: str, reply: str) -> None:
        self._known[key] = self._score(reply)
        with durable.spared(self.file):
            durable.make_folder(self.file.parent)
            durable.append(self.file, json.dumps({"key": key, "reply": reply}) + "\n")

    def _score(self, reply: str) -> float:
        return float(self.pattern.findall(reply)[-1])

    def _request(self, values: Mapping[str, Any]) -> bytes:
        said = _PLACE.sub(lambda match: str(values[match[1]]), self.prompt)
        messages = [{"role": "user", "content": said}]
        body = {"model": self.config.model, "messages": messages, "max_tokens": self.config.max_tokens}
        return json.dumps(body | {"temperature": 0}).encode()

    def _ask(self, request: bytes, response: str) -> str:
        """A reply with a score; asks again where the endpoint is busy or broken, or gives none.

        Raises:
            RunError: it was in vain.
        """
        pause = 1.0
        for left in range(self.config.retries, -1, -1):
            try:
                reply = self._post(request)
                self._score(reply)
                return reply
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.reason}"
                if error.code not in _PASSING and error.code < 500:
                    break
                wanted = error.headers.get("Retry-After", "")
                pause = max(pause, float(wanted)) if wanted.isdecimal() else pause
            except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
            if left:
                time.sleep(min(pause, _LONGEST_PAUSE))
                pause *= 2
        raise RunError(f"reward.fns=judge: {self.url}: {why}, for the response {response!r:.80}")

    def _post(self, request: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key):
            headers["Authorization"] = f"Bearer {key}"
        asked = urllib.request.Request(self.url, request, headers)
        with urllib.request.urlopen(asked, timeout=self.config.timeout) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]
