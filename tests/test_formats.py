"""Rows: what each format gives, the most specific first, and what is refused in one line."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from rlhf_engine.config import ConfigError
from rlhf_engine.data.formats import Row, read_row
from rlhf_engine.data.messages import parse_hh
from rlhf_engine.data.sources import kind_of, serves

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM, WORSE = {"role": "system", "content": "S"}, {"role": "assistant", "content": "B"}
EARLIER = [{"role": "user", "content": "P"}, {"role": "assistant", "content": "O"}]
HH = "\n\nHuman: Q\n\nAssistant: "
PAIR = {"chosen": [USER, BOT], "rejected": [USER, WORSE]}
TEXTS = {"chosen": "A", "rejected": "B"}
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
TOOL = {"role": "tool", "content": "sunny"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def called(*calls: tuple[str, dict, str], said: str = "") -> dict:
    made = [{"id": i, "type": "function", "function": {"name": name, "arguments": args}} for name, args, i in calls]
    return {"role": "assistant", "content": said, "tool_calls": made}


def result(id: str, said: str = "sunny") -> dict:
    return {"role": "tool", "content": said, "tool_call_id": id}


FIRST, SECOND = "call00001", "call00002"
F, IN_ROME = {"name": "f", "parameters": {"type": "object", "properties": {}}}, {"city": "Rome"}
OFFERED = [{"type": "function", "function": F}]
OPENAI = {"id": "call_AbC", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome", "day": null}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


def test_hh_text_to_messages():
    text = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nHuman: Four\n\nAssistant:"
    assert parse_hh(text, "f:1", "chosen") == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\nFour"},
        {"role": "assistant", "content": ""},
    ]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


# a row, and the prompt, the chosen and the rejected answer that it has
FORMATS = {
    "messages in a list": ([SYSTEM, USER, BOT], [SYSTEM, USER], "A", None),
    "up to the last user turn": ([USER, BOT, USER], [USER, BOT, USER], None, None),
    "begins with the assistant": ({"messages": [*EARLIER[1:], USER, BOT]}, [*EARLIER[1:], USER], "A", None),
    "messages": ({"messages": [USER, BOT], "id": 7}, [USER], "A", None),
    "joined turns": ({"messages": [USER, USER, BOT]}, [{"role": "user", "content": "Q\nQ"}], "A", None),
    "two system messages": ([SYSTEM, SYSTEM, USER], [{"role": "system", "content": "S\nS"}, USER], None, None),
    "developer": ([{"role": "developer", "content": "S"}, USER, BOT], [SYSTEM, USER], "A", None),
    "parts": ([{"role": "user", "content": parts("Q")}, {"role": "assistant", "content": ["A"]}], [USER], "A", None),
    "several parts": ([USER, {"role": "assistant", "content": parts("A", "B")}], [USER], "AB", None),
    "no tools called": ([USER, BOT | {"tool_calls": [], "function_call": None}], [USER], "A", None),
    "messages as JSON": ({"messages": json.dumps([USER, BOT])}, [USER], "A", None),
    "messages and the system": ({"messages": [USER, BOT], "system": "S"}, [SYSTEM, USER], "A", None),
    "a system message of its own": ({"messages": [SYSTEM, USER, BOT], "system": "T"}, [SYSTEM, USER], "A", None),
    "messages before the prompt": ({"prompt": "P", "messages": [USER, BOT]}, [USER], "A", None),
    "sharegpt": ({"conversations": SHAREGPT}, [USER], "A", None),
    "sharegpt, with a system": (
        {"conversations": [{"from": "system", "value": "S"}, *SHAREGPT]}, [SYSTEM, USER], "A", None
    ),
    "sharegpt, roles": ({"conversations": [USER, BOT], "tools": "[]"}, [USER], "A", None),
    "lmsys": ({"conversation": [USER, BOT], "model": "m"}, [USER], "A", None),
    "hh": ({"chosen": HH + "A", "rejected": HH + "B"}, [USER], "A", "B"),
    "hh, two prompts": ({"chosen": HH + "A", "rejected": HH + "A\n\nHuman: R\n\nAssistant: B"}, [USER], "A", None),
    "hh, stripped": ({"chosen": HH.lstrip() + "A", "rejected": HH.lstrip() + "B"}, [USER], "A", "B"),
    "hh, one line break": ({"chosen": HH[1:] + "A", "rejected": HH[1:] + "B"}, [USER], "A", "B"),
    "hh without an answer": (
        {"chosen": HH + "A" + HH[:10], "rejected": HH + "A" + HH[:10]}, [USER, BOT, USER], None, None
    ),
    "lists": (PAIR, [USER], "A", "B"),
    "ultrafeedback": ({"prompt": "Q", "messages": [USER, BOT], **PAIR, "score_chosen": 8.5}, [USER], "A", "B"),
    "messages and answers": ({"messages": [SYSTEM, USER], "chosen": BOT, "rejected": WORSE}, [SYSTEM, USER], "A", "B"),
    "sharegpt and two answers": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}},
        [USER], "A", "B",
    ),
    "prompt and lists": ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, [USER], "A", "B"),
    "prompt and dialogues": ({"prompt": "Q", **PAIR}, [USER], "A", "B"),
    "prompt with a system message": ({"prompt": [SYSTEM, USER], **PAIR}, [SYSTEM, USER], "A", "B"),
    "a system message alone": ({"prompt": [SYSTEM], **PAIR}, [SYSTEM, USER], "A", "B"),
    "earlier turns": ({"prompt": [SYSTEM, *EARLIER, USER], **PAIR}, [SYSTEM, *EARLIER, USER], "A", "B"),
    "earlier turns alone": ({"prompt": EARLIER, **PAIR}, [*EARLIER, USER], "A", "B"),
    "all repeated": (
        {"prompt": [SYSTEM, *EARLIER, USER], "chosen": [*EARLIER, USER, BOT],
         "rejected": [SYSTEM, *EARLIER, USER, WORSE]},
        [SYSTEM, *EARLIER, USER], "A", "B",
    ),
    "the last turn of several": (
        {"prompt": "Q", "chosen": [*EARLIER, USER, BOT], "rejected": [*EARLIER, USER, WORSE]},
        [*EARLIER, USER], "A", "B",
    ),
    "prompt and text": ({"prompt": "Q", **TEXTS}, [USER], "A", "B"),
    "prompt, system and text": ({"prompt": "Q", "system": "S", **TEXTS}, [SYSTEM, USER], "A", "B"),
    "prompt list and text": ({"prompt": [SYSTEM, USER], **TEXTS}, [SYSTEM, USER], "A", "B"),
    "rm-static": ({"prompt": HH.rstrip(), "response": " A", "chosen": " A", "rejected": " B"}, [USER], "A", "B"),
    "orca": ({"system": "S", "question": "Q", **TEXTS}, [SYSTEM, USER], "A", "B"),
    "alpaca pairs": ({"instruction": "Q", "input": "", **TEXTS}, [USER], "A", "B"),
    "instruction": ({"instruction": "Q", "output": "A"}, [USER], "A", None),
    "input": ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}], "A", None),
    "no input": ({"instruction": "Q", "input": "", "output": "A"}, [USER], "A", None),
    "dolly": (
        {"instruction": "Q", "context": "I", "response": "A"}, [{"role": "user", "content": "Q\n\nI"}], "A", None
    ),
    "alpaca with history": (
        {"instruction": "Q", "input": "", "output": "A", "history": [["P", "O"]], "system": "S"},
        [SYSTEM, *EARLIER, USER], "A", None,
    ),
    "history of messages": ({"prompt": "Q", "completion": "A", "history": EARLIER}, [*EARLIER, USER], "A", None),
    "no history": ({"instruction": "Q", "output": "A", "history": [], "system": None}, [USER], "A", None),
    "completion": ({"prompt": "Q", "completion": "A"}, [USER], "A", None),
    "conversational completion": ({"prompt": [SYSTEM, USER], "completion": [BOT]}, [SYSTEM, USER], "A", None),
    "a good answer": ({"prompt": "Q", "completion": "A", "label": True}, [USER], "A", None),
    "a bad answer": ({"prompt": "Q", "completion": "A", "label": False}, [USER], None, "A"),
    "response": ({"prompt": "Q", "response": "A"}, [USER], "A", None),
    "question": ({"question": "Q", "answer": "A"}, [USER], "A", None),
    "open orca": ({"system_prompt": "S", "question": "Q", "response": "A"}, [SYSTEM, USER], "A", None),
    "input and output": ({"input": "Q", "output": "A"}, [USER], "A", None),
    "an instruction that nothing answers": ({"instruction": "I", "question": "Q", "answer": "A"}, [USER], "A", None),
    "prompt": ({"prompt": "Q"}, [USER], None, None),
    "prompt as JSON": ({"prompt": json.dumps([SYSTEM, USER])}, [SYSTEM, USER], None, None),
    "verl": ({"data_source": "d", "prompt": [USER], "reward_model": {"ground_truth": "2"}}, [USER], None, None),
    "a call and its result": ([USER, CALL, TOOL, BOT], [USER, called(("f", {}, FIRST)), result(FIRST)], "A", None),
    "a call is the answer": ([USER, CALL], [USER], called(("f", {}, FIRST)), None),
    "openai": (
        [USER, BOT | {"tool_calls": [OPENAI, OPENAI | {"id": "b"}]}, TOOL | {"tool_call_id": "b", "name": "f"},
         TOOL | {"tool_call_id": "call_AbC"}],
        [USER, called(("f", {**IN_ROME, "day": None}, FIRST), ("f", {**IN_ROME, "day": None}, SECOND), said="A"),
         result(SECOND), result(FIRST)], None, None,
    ),
    "an id that is kept": (
        [USER, CALL | {"tool_calls": [OPENAI["function"] | {"id": "abcdEF123"}]}, TOOL, BOT],
        [USER, called(("f", {**IN_ROME, "day": None}, "abcdEF123")), result("abcdEF123")], "A", None,
    ),
    "a table's columns": (
        [USER, CALL | {"tool_calls": [{"name": "f", "arguments": {"city": "Rome", "x": None}}]}, TOOL, BOT],
        [USER, called(("f", IN_ROME, FIRST)), result(FIRST)], "A", None,
    ),
    "function_call": (
        [USER, BOT | {"function_call": OPENAI["function"]}, {"role": "function", "name": "f", "content": "5"}, BOT],
        [USER, called(("f", {**IN_ROME, "day": None}, FIRST), said="A"), result(FIRST, "5")], "A", None,
    ),
    "llama-factory": (
        {"conversations": [*SHAREGPT,
                           {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "Rome"}}'},
                           {"from": "observation", "value": "4"}, SHAREGPT[1]]},
        [USER, called(("f", IN_ROME, FIRST), said="A"), result(FIRST, "4")], "A", None,
    ),
    "hermes": (
        {"conversations": [{"from": "system", "value": "You have <tools>[]</tools>"}, SHAREGPT[0],
                           {"from": "gpt", "value": "<tool_call>\n{'name': 'f'}\n</tool_call>"},
                           {"from": "tool", "value": "<tool_response>\n4\n</tool_response>\n"}, SHAREGPT[1]],
         "tools": json.dumps(OFFERED)},
        [{"role": "system", "content": "You have <tools>[]</tools>"}, USER,
         {"role": "assistant", "content": "<tool_call>\n{'name': 'f'}\n</tool_call>"}, result(FIRST, "4")], "A", None,
    ),
    "toolace": (
        {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": '[f(x="1")]'},
                                          {"from": "tool", "value": '[{"name": "f"}]'}, SHAREGPT[1]]},
        [SYSTEM, USER, {"role": "assistant", "content": '[f(x="1")]'}, result(FIRST, '[{"name": "f"}]')], "A", None,
    ),
    "xlam": (
        {"query": "Q", "answers": '[{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {}}]'},
        [USER], called(("f", IN_ROME, FIRST), ("g", {}, SECOND)), None,
    ),
    "pairs of calls": (
        {"prompt": "Q", "chosen": [CALL], "rejected": [WORSE]}, [USER], called(("f", {}, FIRST)), "B",
    ),
    "a result that is no text": ([USER, CALL, TOOL | {"content": {"x": 1}}], [USER, called(("f", {}, FIRST)),
                                                                            result(FIRST, '{"x": 1}')], None, None),
    "text": ({"text": "T", "label": 1, "input": {"of": "another format"}}, [], "T", None),
    "columns of other rows": ({"messages": None, "text": "T", "chosen": None, "prompt": float("nan")}, [], "T", None),
    "empty columns of other rows": ({"messages": [USER, BOT], "chosen": [], "rejected": []}, [USER], "A", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    row, prompt, chosen, rejected = FORMATS[name]
    before = deepcopy(row)
    assert replace(read_row(row, "f:1"), fields={}, tools=None) == Row("f:1", prompt, chosen, rejected)
    assert repr(row) == repr(before)


@pytest.mark.parametrize(
    ("chosen", "rejected", "phases"),
    [
        ("A", "B", ["sft", "reward", "ppo", "dpo", "kto"]),
        ("A", "A", ["sft", "ppo"]),
        ("A", " A\n", ["sft", "ppo"]),
        ("A", "", ["sft", "ppo"]),
        ("", "B", ["ppo"]),
        ("", "", ["ppo"]),
    ],
)
@pytest.mark.parametrize("is_hh", [True, False])
def test_a_pair_is_two_different_answers(chosen, rejected, phases, is_hh):
    """Of which neither is empty; the row still serves the other phases."""
    row = {"prompt": "Q", "chosen": chosen, "rejected": rejected}
    row = {key: HH + row[key] for key in ("chosen", "rejected")} if is_hh else row
    found, every = read_row(row, "f:1"), ("sft", "reward", "ppo", "dpo", "kto")
    assert [phase for phase in every if serves(found, kind_of(phase))] == phases


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (3, "JSON object or a list"),
        ([], "list of messages"),
        ([1], "message 1 is not an object"),
        ({}, "'instruction' and 'output'"),
        ({"messages": []}, "['messages'] fit no format"),
        ({"instruction": "Q", "response1": "A", "response2": "B"}, "['instruction', 'response1', 'response2'] fit no"),
        ([BOT], "no turn of the user"),
        ([USER, SYSTEM], "message 2: a system message stands first"),
        ([{"role": "narrator", "content": "Q"}], "message 1: role 'narrator' is not one of system, user, assistant"),
        ([{"content": "Q"}], "role None is not one of"),
        ([{"role": "user", "content": None}], "content must be text, not NoneType"),
        ([{"role": "user", "content": 5}], "content must be text, not int"),
        ([USER | {"tool_calls": [{"name": "f"}]}, BOT], "message 1: only the assistant calls tools, not 'user'"),
        ([USER, CALL | {"tool_calls": [{"function": {"arguments": {}}}]}], "message 2: a call is {'name': …"),
        ([USER, CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}], "message 2: the arguments of f are no JSON"),
        ([USER, CALL | {"tool_calls": [{"name": "f", "arguments": [1]}]}], "message 2: a call is {'name': …"),
        ({"conversations": [*SHAREGPT[:1], {"from": "tool_call", "value": "f(1)"}]}, "message 2: its calls are no"),
        ({"messages": [USER, BOT], "tools": "f"}, "tools must be a list of {'type': 'function'"),
        ({"messages": [USER, BOT], "tools": [{"description": "f"}]}, "tools: tool 1 has no name"),
        ({"query": "Q", "answers": ["f"]}, "answers: message 1: a call is {'name': …"),
        ([USER, CALL | {"tool_calls": [{"function": "f"}]}], "message 2: a call is {'name': …"),
        ([{"role": "user", "content": [*parts("Q"), IMAGE]}, BOT], "message 1 has a part of the type 'image_url'"),
        ({"image": "x.png", "conversations": SHAREGPT}, "'image': only text"),
        ({"messages": "Q"}, "messages must be a list of messages, {'role': …, 'content': text}, and is text"),
        ({"prompt": "[{'role': 'user', 'content': 'Q'}]"}, "prompt must be a list of messages"),
        ({"text": 3}, "'text' must be text, not int"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "'input'"),
        ({"instruction": "Q", "output": "A", "history": ["P", "O"]}, "history: message 1 is not an object"),
        ({"instruction": "Q", "output": "A", "history": "P"}, "'history' must be a list of pairs"),
        ({"question": "Q", "answer": ["A", "B"]}, "answer: message 1 is not an object"),
        ({"prompt": "\n\nHuman:", "completion": ["A"]}, "message 1 is not an object"),
        ({"chosen": HH + "A"}, "no 'rejected'"),
        ({"chosen": "A", "rejected": "B"}, "'chosen' must be"),
        ({"chosen": "\n\nAssistant: O" + HH + "A", "rejected": "\n\nAssistant: O" + HH + "B"}, "begins with a"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "no 'rejected'"),
        ({"prompt": [*EARLIER, USER], "chosen": [EARLIER[0], BOT], "rejected": "B"}, "'chosen' neither repeats"),
    ],
)  # fmt: skip
def test_rows_that_fit_no_format(row, words):
    with pytest.raises(ConfigError) as error:
        read_row(row, "f:1")
    assert str(error.value).startswith("f:1: ") and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        (OFFERED, OFFERED),
        (F, OFFERED),
        (json.dumps([F]), OFFERED),
        ([{"type": "function", "function": F | {"description": None, "strict": None}}], OFFERED),
        ("[]", None),
        ("", None),
        (  # xLAM's
            [{"name": "f", "description": "d", "parameters": {
                "a": {"type": "str", "description": "A"}, "b": {"type": "List[int]", "default": 3},
                "c": {"type": "float, optional"}}}],
            [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": "A"}, "b": {"type": "array", "default": 3},
                               "c": {"type": "number"}},
                "required": ["a"]}}}],
        ),
    ],
    ids=range(7),
)  # fmt: skip
def test_tools(tools, found):
    row = {"messages": [USER, BOT], "tools": tools}
    assert read_row(row, "f:1").tools == found and read_row(row, "f:1").fields == {"tools": tools}
    written = {"role": "system", "content": "<tools>[]</tools>"}
    assert read_row(row | {"messages": [written, USER, BOT]}, "f:1").tools is None


def test_fields():
    """What reward functions see of a row: as the file has it, without what is a dialogue."""
    row = {"prompt": "Left?", "answer": 72, "tests": [1, [2]], "source": None, "chosen": "a", "rejected": "b"}
    assert read_row(row, "f:1").fields == {"answer": 72, "tests": [1, [2]], "source": None}
    assert read_row({"question": "Left?", "answer": "#### 72"}, "f:1").fields == {
        "question": "Left?", "answer": "#### 72",
    }  # fmt: skip
    for key in ("messages", "conversations", "conversation"):
        assert read_row({key: [{"role": "user", "content": "Left?"}], "id": 1}, "f:1").fields == {"id": 1}
    assert read_row([{"role": "user", "content": "Left?"}], "f:1").fields == {}
