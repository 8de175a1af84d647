"""A trajectory as messages, and as the tokens that were given and sampled. What was sampled is never rendered again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..config import ConfigError
from .calls import FORMATS, CallError, call, numbered, read_calls
from .chat import Message, Messages, shared_start
from .tokenizer import Tokenizer
from .tools import Tools, read_tools


def check_turns(tokenizer: Tokenizer, role: str, tools: Tools = None) -> None:
    """Tries what a run with turns needs of its template, before it starts.

    Args:
        role: of what is observed.

    Raises:
        ConfigError: nothing shows how tools are called, or the template goes on behind no message of that role.
    """
    template = tokenizer.template
    if tools and tokenizer.call_format is None:
        raise ConfigError(
            f"{template.source.name} does not show how tools are called: set tokenizer.tool_calls to one of"
            f" {', '.join(FORMATS)}"
        )
    trial = Conversation()
    trial.start([{"role": "user", "content": "?"}], tools, tokenizer)
    trial.sampled(tokenizer.encode("?", continues=True))
    if role == "tool" and template.writes_calls:
        trial.messages[-1] |= {"tool_calls": [{**call("call_of_a_trial", {}), "id": numbered(1)}]}
    trial.observe([{"role": role, "content": "?"}])
    trial.rewritten()  # which finds calls that are left out


class Conversation:
    """One trajectory: `start`, and then `sampled` and `observe` in turn.

    Attributes:
        messages: all that was said.
        tokens: ids of all that was given and sampled.
        mask: 1 on the tokens that were sampled.
        turns: where each sampled turn begins and ends in `tokens`.
    """

    def start(self, messages: Messages, tools: Tools, tokenizer: Tokenizer) -> list[int]:
        """The tokens of a prompt.

        Args:
            tools: schemas or functions, by which calls are checked; None: any call is right. The template shows them to
                the model where it can.

        Raises:
            ConfigError: the chat template refuses the dialogue, or a tool is none.
        """
        self._tokenizer, self._tools, self._num_calls, self._waiting = tokenizer, read_tools(tools), 0, list[str]()
        self._shown = self._tools if tokenizer.template.writes_tools else None
        self.messages: Messages = list(messages)
        self.tokens: list[int] = []
        self.mask: list[int] = []
        self.turns: list[tuple[int, int]] = []
        return self._add(tokenizer.render_prompt(messages, self._shown), 0)

    def sampled(self, tokens: Sequence[int]) -> Message:
        """What the assistant says: `content`, and where it calls tools `tool_calls`, or `error`: what is wrong with a
        call, for the model to read.

        Args:
            tokens: as sampled; a turn that was cut has no end token.
        """
        start = len(self.tokens)
        self._add(tokens, 1)
        self.turns.append((start, len(self.tokens)))
        said: Message = {"role": "assistant", "content": self._tokenizer.said(tokens)}
        self._waiting = []
        try:
            content, calls = self._calls(self._tokenizer.without_end(tokens))
        except CallError as error:
            self.messages.append(said)
            return {**said, "error": str(error)}
        if not calls:
            self.messages.append(said)
            return said
        self._waiting = [made["id"] for made in calls]
        called: Message = {"role": "assistant", "content": content, "tool_calls": calls}
        self.messages.append(called if self._tokenizer.template.writes_calls else said)
        return called

    def observe(self, messages: Messages) -> list[int]:
        """The tokens of what follows a sampled turn, up to where the assistant is to speak again: the end token, if the
        turn was cut, the messages, and the next prompt. Results of tools belong to the calls in turn.

        Args:
            messages: of a user, a tool or the system, `{"role", "content"}`.

        Raises:
            ConfigError: the chat template refuses them, or leaves out what they say.
        """
        if not messages or any(message["role"] == "assistant" for message in messages):
            raise ValueError("an observation is messages of a user, a tool or the system")
        if self.messages[-1]["role"] != "assistant":
            raise ValueError("an observation follows a sampled turn")
        messages = [self._answering(m) if m["role"] == "tool" and "tool_call_id" not in m else m for m in messages]
        new = self._tokenizer.render_observation(self.messages, messages, self.tokens, self._shown)
        self.messages += messages
        return self._add(new, 0)

    def rewritten(self) -> str | None:
        """What the template's whole rendering of the messages has otherwise than the tokens, a line; None: nothing."""
        is_open = self.messages[-1]["role"] == "assistant"
        messages = self.messages[:-1] if is_open else self.messages
        tokens = self.tokens[: self.turns[-1][0]] if is_open else self.tokens
        whole = self._tokenizer.render_prompt(messages, self._shown)
        if whole == tokens:
            return None
        start = shared_start(tokens, whole)
        ours, theirs = Counter(tokens[start:]), Counter(whole[start:])
        return (
            f"{self._tokenizer.template.source.name} writes earlier turns otherwise than they were sampled: of"
            f" {len(tokens)} tokens it leaves out {(ours - theirs).total()} and adds {(theirs - ours).total()}, from"
            f" position {start} on. The tokens that were sampled are kept"
        )

    def _add(self, tokens: Sequence[int], mark: int) -> list[int]:
        self.tokens += tokens
        self.mask += [mark] * len(tokens)
        return list(tokens)

    def _calls(self, tokens: Sequence[int]) -> tuple[str, list[dict]]:
        """What is said beside the calls, and these.

        Raises:
            CallError: one is wrong, or the template writes no such turn.
        """
        form = self._tokenizer.call_format
        if form is None:
            return "", []
        content, calls = read_calls(self._tokenizer.spell(tokens), form, self._tools)
        content = content.removeprefix(self._tokenizer.template.opening)
        for made in calls:
            made.setdefault("id", self._next_id())
        if calls and self._tokenizer.template.writes_calls:
            turn: Message = {"role": "assistant", "content": content, "tool_calls": calls}
            try:
                self._tokenizer.template.parts([*self.messages, turn], True, tools=self._shown)
            except ConfigError as error:
                raise CallError(str(error).rpartition("refuses a dialogue: ")[2]) from None
        return content, calls

    def _answering(self, message: Message) -> Message:
        return {**message, "tool_call_id": self._waiting.pop(0) if self._waiting else self._next_id()}

    def _next_id(self) -> str:
        self._num_calls += 1
        return numbered(self._num_calls)
