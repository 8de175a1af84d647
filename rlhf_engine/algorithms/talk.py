"""The samples of one replica and their environments: who is asked, what is answered, and how it ends."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..config import ConfigError
from ..context import Context
from ..data.conversation import Conversation
from ..data.formats import offered
from ..environments.pool import Answer
from ..signals import RunError
from .user import User, key_of

_RESETS = 64  # environments of a replica that are made at once
_SOON = 0.1  # seconds without a further question, after which those that are there are answered
_LOOKS = 16  # trajectories of a rollout that are held to the template's rendering, until one differs


@dataclass
class Trajectory:
    """What became of one, besides its tokens.

    Attributes:
        prompt: as reset has given it.
        rewards: of each turn the tokens behind the prompt up to its end, and its reward.
        end: "terminated" or "truncated" by its environment; "turns" or "tokens" by `env.max_turns` or `env.max_tokens`,
            "length" by a turn that came to no end; "failed".
        failure: what went wrong, a line.
        info: numbers that the environment tells.
        rewritten: what the template would have written otherwise, a line.
    """

    prompt: list[int] = field(default_factory=list)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    end: str = ""
    failure: str | None = None
    info: dict[str, float] = field(default_factory=dict)
    rewritten: str | None = None

    def rewards_of(self, length: int) -> list[float]:
        """Of so many tokens behind the prompt, each turn's at its last token; where it has failed, nothing."""
        found = [0.0] * length
        for end, reward in self.rewards if self.failure is None else ():
            found[end - 1] = reward
        return found


class Talk:
    """The policy's samples and their environments, on one replica (`rollout.turns.Turns`). Whatever an environment or a
    template does wrong costs its trajectory, and is told to all ranks of the replica at the same place.

    Args:
        rows: of each sample the JSON object that its environment is reset with.
        keys: `(B,)`, of all samples' noise.
        user: the model that environments may ask.
    """

    def __init__(self, ctx: Context, rows: Mapping[int, str], keys: Tensor, user: User | None):
        self.ctx, self.rows, self.config, self.keys, self.user = ctx, rows, ctx.config.env, keys.tolist(), user
        self.leads = ctx.mesh.tp_rank == 0
        self.trajectories = {i: Trajectory() for i in rows}
        self.conversations: dict[int, Conversation] = {}
        self.cut: dict[int, tuple[bool, int]] = {}  # of the turn that is asked about: whether it was cut, and the room
        # of the samples that are generated, by their numbers there, and these by them
        self.names, self.places = list[int](), dict[int, int]()
        self.looks, self.num_open = _LOOKS, len(rows)
        self.asks: dict[int, tuple[int, list[int]]] = {}  # of environments: their noise's key, and what they ask
        self.num_asks = Counter[int]()
        self.refused: list[Answer] = []  # turns that could not be read, which count as answered
        self.error: str | None = None

    def start(self) -> dict[int, Trajectory]:
        """Resets all environments: trajectories with their prompts."""
        resets = self._resets()
        while True:  # as often as environments ask
            if self.leads:
                next(resets)
            if not self._speak():
                return self.trajectories if self.leads else {}

    def _resets(self) -> Iterator[None]:
        """Goes on until all are reset, or ask."""
        rows, left = iter(self.rows.items()), len(self.rows)
        for i, row in itertools.islice(rows, _RESETS):  # no more at once, or they would be late for each other's sake
            self.ctx.environments.begin(i, json.loads(row))
        while True:
            while left and self.error is None and (answers := self._waited()):
                left -= len(answers)
                for answer in answers:
                    self._reset(answer)
                for i, row in itertools.islice(rows, len(answers)):
                    self.ctx.environments.begin(i, json.loads(row))
            yield

    def _heard(self, timeout: float | None) -> list[Answer]:
        """What environments answer. Who asks the model is noted; so is an error of all of them, for every rank has to
        raise it."""
        try:
            said = self.ctx.environments.answers(timeout if not self.refused else 0)
        except RunError as error:
            self.error, said = str(error), []
        for answer in said:
            self._note(answer)
        answers = self.refused + [answer for answer in said if answer.asks is None]
        self.refused = []
        return answers

    def _note(self, answer: Answer) -> None:
        number = answer.number
        if answer.asks is None:
            self.asks.pop(number, None)  # its process has ended
            return
        try:
            if self.user is None:
                raise ConfigError("it asks a model, and user.path names none")
            asked = key_of(self.keys[number], self.num_asks[number]), self.user.prompt(answer.asks)
        except Exception as error:  # whatever messages do to a template
            self.refused.append(Answer(number, failure=self._line(error)))
            return
        self.asks[number] = asked
        self.num_asks[number] += 1

    def _waited(self) -> list[Answer]:
        """What environments answer, one at least, if not all who are at work ask the model, or have long to work."""
        while True:
            count = len(self.asks)
            answers = self._heard(_SOON if count else None)
            if answers or self.error is not None or len(self.asks) == count:
                return answers

    def _speak(self) -> bool:
        """The model answers all who ask, on every rank. Whether anybody does."""
        if self.user is None:
            return False
        asked = self.ctx.mesh.from_first_of_tp(self.asks)
        if not asked:
            return False
        self.asks = {}
        try:
            said = self.user.say(asked)
        except FloatingPointError as error:
            self.error = f"user.path={self.ctx.config.user.path}: {error}"
            return False
        for number, text in said.items() if self.leads else ():
            self.ctx.environments.tell(number, text)
        return True

    def _reset(self, answer: Answer) -> None:
        number, found, row = answer.number, self.trajectories[answer.number], json.loads(self.rows[answer.number])
        context = self.ctx.model.max_position_embeddings - 1
        longest = min(context, self.ctx.config.data.max_prompt_len) if self.ctx.phase else context
        if answer.failure is not None:
            return self._fail(number, answer.failure)
        conversation = self.conversations[number] = Conversation()
        try:
            tools = offered(row, answer.messages, "") if answer.tools is None else answer.tools
            found.prompt = conversation.start(answer.messages, tools, self.ctx.tokenizer)
        except Exception as error:  # likewise
            return self._fail(number, self._line(error))
        if not 0 < len(found.prompt) <= longest:
            self._fail(number, f"env.fn={self.config.fn}: a prompt of {len(found.prompt)} tokens, and {longest} fit")

    def _line(self, error: Exception) -> str:
        name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        return f"env.fn={self.config.fn}: {name}{error}"

    def ask(self, sample: int, tokens: list[int], is_cut: bool, room: int) -> None:
        """See `Turns`."""
        number = self.names[sample]
        self.cut[number] = is_cut, room
        if self.leads:
            try:
                self.ctx.environments.act(number, dict(self.conversations[number].sampled(tokens)))
            except Exception as error:  # likewise
                self.refused.append(Answer(number, failure=self._line(error)))

    def answers(self, wait: bool) -> list[tuple[int, list[int] | None]]:
        """See `Turns`."""
        while True:
            found, is_asked, error = self.ctx.mesh.from_first_of_tp(self._answers(wait) if self.leads else None)
            if error is not None:
                raise RunError(error)
            if is_asked and not self._speak():
                raise RunError(self.error)
            if found or not (wait and is_asked):
                return found

    def _answers(self, wait: bool) -> tuple[list[tuple[int, list[int] | None]], bool, str | None]:
        """The same, whether the model is to speak now, and what has gone wrong."""
        answers = self._waited() if wait else self._heard(0)
        found = [(self.places[answer.number], self._next(answer)) for answer in answers]
        # when nobody else has anything to do, or most wait for it
        is_asked = bool(self.asks) and ((wait and not found) or 2 * len(self.asks) >= self.num_open)
        return found, is_asked, self.error

    def _next(self, answer: Answer) -> list[int] | None:
        number, found = answer.number, self.trajectories[answer.number]
        conversation, (is_cut, room) = self.conversations[number], self.cut[number]
        if answer.failure is not None:
            self._fail(number, answer.failure)
            return None
        found.rewards.append((len(conversation.tokens) - len(found.prompt), answer.reward))
        for name, value in answer.info.items():
            found.info[name] = found.info.get(name, 0.0) + value
        by_itself = "terminated" if answer.terminated else "truncated" if answer.truncated else ""
        is_last = len(found.rewards) >= self.config.max_turns
        cut = ("length" if room else "tokens") if is_cut else "turns" if is_last else ""
        if end := by_itself or cut:
            self._end(number, end)
            return None
        try:
            tokens = conversation.observe(answer.messages)
        except Exception as error:  # likewise
            self._fail(number, self._line(error))
            return None
        if len(tokens) >= room:
            self._end(number, "tokens")
            return None
        return tokens

    def _end(self, number: int, end: str) -> None:
        found = self.trajectories[number]
        found.end = end
        self.num_open -= 1
        if len(found.rewards) > 1 and self.looks and not self.ctx.has_told_rewriting:
            self.looks -= 1
            with contextlib.suppress(Exception):  # of a template that takes no such dialogue as a whole
                found.rewritten = self.conversations[number].rewritten()
                self.looks *= found.rewritten is None
        self.ctx.environments.end(number)

    def _fail(self, number: int, failure: str) -> None:
        found = self.trajectories[number]
        found.failure = f"sample {number}: {failure} ({self.rows[number]:.160})"
        if self.config.on_failure == "stop" and self.error is None:
            self.error = found.failure
        self._end(number, "failed")

    def close(self) -> None:
        """Ends what is still under way."""
        for number, found in self.trajectories.items():
            if self.leads and not found.end:
                with contextlib.suppress(OSError, KeyError):  # of a server that has ended, which was said
                    self.ctx.environments.end(number)
