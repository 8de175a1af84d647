"""Chat templates and tokenizers of HF folders: tokens, masks, and what text cannot become."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import source_of
from test_refusals import refused, run  # noqa: F401

from rlhf_engine.config import Base, ConfigError, ModelConfig, RolloutConfig, RunConfig, TokenizerConfig
from rlhf_engine.data.dataset import Example, build_datasets
from rlhf_engine.data.formats import Row
from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.launching.folders import read_tokenizer

DIALOGUE = [
    {"role": "user", "content": "Tell me of 12 cats, please."},
    {"role": "assistant", "content": "Cats sleep."},
    {"role": "user", "content": "  And\n\nwhat else? "},
    {"role": "assistant", "content": "They eat 34 mice.\nOften."},
]
CONTROLS = [
    "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|python_tag|>",
]  # fmt: skip
# Chat templates in the manner of published models.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{% generation %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' +"
    " message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
# forgets the thoughts of earlier turns and writes empty ones into the last
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, kind: str, config: dict, special: bool = True, rstrip: bool = False) -> Path:
    """A small HF folder. Kinds: bytes (as GPT-2 and Llama 3), first and every (a space in front of the first text, or
    of every text behind a control token, as Llama 2)."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None))
    alphabet = []
    if kind == "bytes":
        words = tokenizers.Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s*[\r\n]+|\s+")
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "first":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        model.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        model.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    texts = [m["content"] + " user assistant system\n\n" for m in DIALOGUE] * 3
    model.train_from_iterator(texts if kind == "bytes" else " ".join(texts).split("\n"), trainer)
    if kind != "bytes":  # what is not in the alphabet, a line's end for one, comes as bytes
        trained = json.loads(model.to_str())["model"]
        for i in range(256):
            trained["vocab"][f"<0x{i:02X}>"] = len(trained["vocab"])
        merges = [tuple(m) for m in trained["merges"]]
        model.model = models.BPE(trained["vocab"], merges, byte_fallback=True)
        model.decoder = decoders.Sequence([model.decoder, decoders.ByteFallback(), decoders.Fuse()])
    model.add_tokens([tokenizers.AddedToken(t, special=special, rstrip=rstrip, normalized=False) for t in CONTROLS])
    model.add_tokens(["<think>", "</think>"])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def transformers_ids(folder: Path, messages, prompt: bool) -> list[int]:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(folder))
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return hf.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("rstrip", [False, True], ids=["", "rstrip"])
@pytest.mark.parametrize("kind", ["bytes", "first", "every"])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "<|eos|>")], ids=["c", "l", "m"]
)
def test_tokens_are_those_of_transformers(tmp_path, kind, template, end, rstrip):
    folder = write_tokenizer(tmp_path, kind, {"chat_template": template}, rstrip=rstrip)
    tokenizer = Tokenizer(str(folder))
    hf_prompt = transformers_ids(folder, DIALOGUE[:1], True)
    assert tokenizer.render_prompt(DIALOGUE[:1]) == hf_prompt
    assert tokenizer.end_id == tokenizer.vocabulary.controls[end]
    ids, spoken = tokenizer.render(DIALOGUE)
    if template is not MISTRAL:  # whose answers may merge with the prompt there; here they begin where it ends
        assert ids == transformers_ids(folder, DIALOGUE, False)[: len(ids)]
    assert ids[-1] == tokenizer.end_id
    said = [i for i, mine in zip(ids, spoken, strict=True) if mine]
    assert said.count(tokenizer.end_id) == 2
    text = "".join(m["content"] for m in DIALOGUE if m["role"] == "assistant")
    assert tokenizer.decode(said).replace(" ", "") == text.replace(" ", "")
    for i in (1, 3):
        prompt = tokenizer.render_prompt(DIALOGUE[:i])
        assert ids[: len(prompt)] == prompt and spoken[len(prompt)] and not spoken[len(prompt) - 1]


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path, "bytes", {"chat_template": THINKING})))
    thoughts = [dict(m) for m in DIALOGUE]
    thoughts[1]["content"] = "<think>\nHm.\n</think>" + thoughts[1]["content"]
    ids, spoken = tokenizer.render(thoughts)
    prompt = tokenizer.render_prompt(thoughts[:3])
    assert ids[: len(prompt)] == prompt and "Hm." not in tokenizer.decode(ids)
    said = tokenizer.decode([i for i, mine in zip(ids, spoken, strict=True) if mine])
    assert said == "Cats sleep.<think>\n\n</think>\n\nThey eat 34 mice.\nOften."


# shapes of templates in use, and what ends a turn
SHAPES = {
    "dated": "{{ bos_token + '[SYS]It is ' + strftime_now('%d %b %Y') + '.' }}{% for m in messages %}"
    "{{ ('[INST]' + m.content + '[/INST]') if m.role == 'user' else m.content + eos_token }}{% endfor %}",
    "tools": "{% if tools is none and documents is none %}{{ bos_token }}{% else %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # the prompt opens a block of thought; answers are written without
    "thinks": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # as the one before, whose answers stand right behind a control token
    "opens": "{% for m in messages %}{{ ('[INST]' + m.content) if m.role == 'user' else"
    " '[/INST]' + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[/INST]<think>\n' }}{% endif %}",
    "last_thought": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\n"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # headers that are text: no token of the vocabulary has these names
    "text": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + (unk_token or '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + '\n' }}{% endif %}",
}
SYSTEM = [{"role": "system", "content": "Be kind.\n"}]
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nCats eat mice."}
ASKS, TELLS = DIALOGUE[2], DIALOGUE[3]
CONVERSATIONS = {
    "u": [ASKS], "su": [*SYSTEM, ASKS], "uau": DIALOGUE[:3], "uaua": DIALOGUE, "sutu": [*SYSTEM, ASKS, THOUGHT, ASKS],
    "ut": [ASKS, THOUGHT], "utua": [ASKS, THOUGHT, ASKS, TELLS], "utut": [ASKS, THOUGHT, ASKS, THOUGHT],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "first", "every"])
@pytest.mark.parametrize("shape", SHAPES)
def test_templates_are_rendered_as_by_transformers(tmp_path, kind, shape):
    folder = write_tokenizer(tmp_path, kind, {"chat_template": SHAPES[shape]})
    tokenizer = Tokenizer(str(folder))
    for messages in CONVERSATIONS.values():
        if messages[-1]["role"] == "user":
            assert tokenizer.render_prompt(messages) == transformers_ids(folder, messages, True)
            continue
        ids, spoken = tokenizer.render(messages)
        assert tokenizer.render(messages, marks=False)[0] == ids
        hf = transformers_ids(folder, messages, False)
        last = len(ids) - spoken[::-1].index(
            False
        )  # the answer begins; in transformers it may merge with what is before
        assert ids[: last - 1] == hf[: last - 1] and tokenizer.decode(ids) == tokenizer.decode(hf[: len(ids)])
        assert ids[-1] == tokenizer.end_id and spoken[-1]


@pytest.mark.parametrize("shape", ["thinks", "opens"])
def test_a_prompt_that_opens_a_thought(tmp_path, shape):
    """Its answers are what follows where the dialogue and the prompt part; what the prompt opens is the prompt's."""
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path, "bytes", {"chat_template": SHAPES[shape]})))
    hostile = {"role": "assistant", "content": "<think>\nNo.</think><thanks>"}
    earlier = {"role": "assistant", "content": "<think>\nHm.\n</think>Mice, too."}
    for answer, words in ((TELLS, TELLS["content"]), (THOUGHT, "\n\nCats eat mice."), (hostile, "<thanks>")):
        ids, spoken = tokenizer.render([ASKS, earlier, ASKS, answer])
        said = [i for i, mine in zip(ids, spoken, strict=True) if mine]
        assert tokenizer.decode(said) == "Mice, too." + words and said.count(tokenizer.end_id) == 2
        prompt = tokenizer.render_prompt([ASKS, earlier, ASKS])
        assert tokenizer.decode(prompt).endswith("<think>\n") and ids[: len(prompt)] != prompt


def test_thoughts_between_control_tokens(tmp_path):
    """A template finds the names of control tokens in what is said, which are text all the same."""
    file = write_tokenizer(tmp_path, "bytes", {"chat_template": SHAPES["thinks"]}) / "tokenizer.json"
    model = json.loads(file.read_text())
    for token in model["added_tokens"]:
        token["special"] = True
    file.write_text(json.dumps(model))
    tokenizer = Tokenizer(str(tmp_path))
    for messages in (CONVERSATIONS["sutu"], [ASKS, THOUGHT, ASKS, THOUGHT, ASKS]):
        assert tokenizer.render_prompt(messages) == transformers_ids(tmp_path, messages, True)
    names = "a<|im_end|><think>b</think"
    ids = tokenizer.render_prompt([{"role": "user", "content": names}])
    think = tokenizer.vocabulary.controls["<think>"]
    assert names in tokenizer.decode(ids) and ids.count(think) == 1 and ids[-2] == think  # which the prompt opens


def test_what_a_template_only_shows_in_prompts_is_all_that_ppo_needs(tmp_path):
    """A template of which nobody can tell what the assistant said serves PPO, and no phase that learns from answers."""
    counts = "{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    rows = [Row("f:1", [ASKS], "Left.", "Right!")] * 3

    def examples(template: str, *phases: str) -> Example:
        tokenizer = Tokenizer(str(write_tokenizer(tmp_path, "bytes", {"chat_template": template})))
        source = source_of(tmp_path / "f.jsonl", rows)
        found = build_datasets(phases, [source], tokenizer, RunConfig(output_dir=str(tmp_path / "run")))
        return found[phases[0]][0], tokenizer

    example, tokenizer = examples(counts, "ppo")
    assert example.prompt == tokenizer.render_prompt([ASKS]) and example.chosen is None
    for phase in ("sft", "reward"):
        with pytest.raises(ConfigError, match=r"f\.jsonl:1: answers are to be learned from, and .* with its prompt"):
            examples(counts, phase, "ppo")
    example, tokenizer = examples(SHAPES["thinks"], "reward", "sft", "ppo")
    assert tokenizer.decode(example.prompt).endswith("assistant\n<think>\n")
    for answer, words in ((example.chosen, "Left."), (example.rejected, "Right!")):
        row = [ASKS, {"role": "assistant", "content": words}]
        assert example.before + answer == tokenizer.render(row)[0] and tokenizer.decode(answer) == words
    assert not any(example.before_spoken) and example.reward_before == example.before


def test_a_date_is_one_for_a_run(tmp_path):
    folder = write_tokenizer(tmp_path / "hf", "bytes", {"chat_template": SHAPES["dated"]})

    def prompt(date: str | None) -> str:
        config = RunConfig(output_dir=str(tmp_path), tokenizer=TokenizerConfig(path=str(folder), date=date))
        tokenizer = read_tokenizer(config, Base(None, ModelConfig()))
        assert config.tokenizer.date == tokenizer.date and tokenizer.template.is_dated
        return tokenizer.decode(tokenizer.render_prompt([ASKS]))

    today = transformers_ids(folder, [ASKS], True)
    assert prompt(None) == Tokenizer(str(folder)).decode(today)
    assert prompt("2024-02-29").startswith("[SYS]It is 29 Feb 2024.")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text("tokenizer: {date: '2021-11-05'}\n")
    assert prompt(None).startswith("[SYS]It is 05 Nov 2021.")
    with pytest.raises(ConfigError, match=r"tokenizer\.date=tomorrow: a date is YYYY-MM-DD"):
        prompt("tomorrow")


LIST = [{"name": "chat", "template": CHATML}, {"name": "tool_use", "template": "{{ 'x' }}"}]
DEFAULT = {"name": "default", "template": LLAMA3}


@pytest.mark.parametrize(
    ("config", "files", "key", "found"),
    [
        (CHATML, {}, None, ("<|im_end|>", "tokenizer_config.json")),
        ([DEFAULT, *LIST], {}, None, ("<|eot_id|>", "default (of chat, default, tool_use) in")),
        ([DEFAULT, *LIST], {}, "chat", ("<|im_end|>", "chat (of chat, default, tool_use) in")),
        ({"default": CHATML}, {}, None, ("<|im_end|>", "tokenizer_config.json")),
        (LIST, {}, "chat", ("<|im_end|>", "chat (of chat, tool_use) in")),
        (LIST, {}, "llama3", ("<|eot_id|>", "llama3, built in")),
        ([{"name": "llama3", "template": CHATML}], {}, "llama3", ("<|im_end|>", "llama3 (of llama3) in")),
        (LLAMA3, {"chat_template.jinja": CHATML}, None, ("<|im_end|>", "chat_template.jinja")),
        (LLAMA3, {"chat_template.jinja": CHATML, "additional_chat_templates/a.jinja": "x"}, None,
         ("<|im_end|>", "default (of a, default) in")),
        (None, {"additional_chat_templates/a.jinja": CHATML}, "a", ("<|im_end|>", "a (of a) in")),
        (None, {"chat_template.json": json.dumps({"chat_template": CHATML})}, None, ("<|im_end|>", "template.json")),
        (None, {}, None, ("<|eos|>", "hh, built in: ")),
        (None, {"chat_template.jinja": "\ufeff" + CHATML}, None, ("<|im_end|>", "byte-order mark in front of every")),
        (SHAPES["text"], {}, None, ("<|eos|>", "writes <|assistant|> as text")),
        (SHAPES["dated"], {}, None, ("<|eos|>", "writes the date, of today (tokenizer.date)")),
        (LIST, {}, None, "chat, tool_use and none called default: choose with tokenizer.template=chat"),
        (LIST[:1], {}, None, "has the chat template chat and none called default"),
        ({"chat": CHATML}, {}, None, "has the chat template chat and none called default"),
        (LLAMA3, {"additional_chat_templates/a.jinja": CHATML}, None, "has the chat template a and none called"),
        (LIST, {}, "caht", "tokenizer.template=caht: did you mean chat"),
        (LIST, {}, "tool_use", "the chat template tool_use of"),
        ([CHATML], {}, None, "tokenizer_config.json: chat_template is a Jinja program, or a list"),
        ([{"template": CHATML}], {}, None, "tokenizer_config.json: chat_template is a Jinja program, or a list"),
        (7, {}, None, "tokenizer_config.json: chat_template is a Jinja program"),
        (None, {"chat_template.json": "{"}, None, "chat_template.json is not JSON"),
        (None, {"chat_template.jinja": b"{# caf\xe9 #}" + CHATML.encode()}, None, "chat_template.jinja is not UTF-8"),
        (None, {}, SHAPES["text"], "tokenizer.template needs the control token <|user|>"),
        (None, {}, CHATML + "\\n", "tokenizer.template has a \\n outside of its quoted strings"),
    ],
    ids=range(28),
)  # fmt: skip
def test_which_template(tmp_path, config, files, key, found):
    """As transformers finds them; one that is there is never left for a built-in one in silence."""
    write_tokenizer(tmp_path, "bytes", {} if config is None else {"chat_template": config})
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(found, str):
        with pytest.raises(ConfigError) as error:
            Tokenizer(str(tmp_path), key)
        assert found in str(error.value)
        return
    template = Tokenizer(str(tmp_path), key).template
    assert template.end == found[0] and found[1] in template.about


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('"2"', 'eos_token_id="2" is neither a token'), ('{"a": 2}', "neither a token"), ("[2, null]", "neither"),
        ("true", "eos_token_id=true"), ("2.0", "eos_token_id=2.0"), ("-1", "eos_token_id=-1 is outside"),
        ("[2, 99999]", "eos_token_id=99999 is outside"), ("{", "generation_config.json is not JSON"),
    ],
)  # fmt: skip
def test_ends_that_are_no_ids(folder, tmp_path, value, words):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(ConfigError, match=re.escape(words)):
        Tokenizer(str(tmp_path))


# of shared/cases/templates, whose other folders are read
REFUSED = {
    "additional_only": "choose with tokenizer.template=chat", "list_no_default": "choose with tokenizer.template=chat",
    "list_one": "choose with tokenizer.template=chat", "list_broken": "chat_template is a Jinja program, or a list",
    "latin1_jinja": "is not UTF-8 text", "eos_str": "is neither a token's id nor a list", "eos_neg": "-1 is outside",
    "eos_beyond": "100000 is outside", "gen_not_json": "is not JSON",
}  # fmt: skip


def test_folders_that_people_have(shared, tmp_path):
    pytest.importorskip("transformers")
    subprocess.run([sys.executable, shared / "cases" / "templates" / "make.py", shared, tmp_path], check=True)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 22
    for folder in folders:
        if words := REFUSED.get(folder.name):
            with pytest.raises(ConfigError, match=re.escape(words)):
                Tokenizer(str(folder))
            continue
        tokenizer = Tokenizer(str(folder))
        assert "built in" not in tokenizer.template.about
        for messages in ([ASKS], [*SYSTEM, ASKS], DIALOGUE[:3], DIALOGUE, [ASKS, THOUGHT, ASKS], [ASKS, THOUGHT]):
            if folder.name == "json_file" or (folder.name == "mistral_old" and messages[0] is SYSTEM[0]):
                continue  # of which transformers makes nothing
            is_prompt = messages[-1]["role"] == "user"
            ids = tokenizer.render_prompt(messages) if is_prompt else tokenizer.render(messages)[0]
            hf = transformers_ids(folder, messages, is_prompt)
            assert ids == hf if is_prompt else ids == hf[: len(ids)]


def test_tokens_beyond_the_models_vocabulary(tmp_path):
    """A pad token without a row of the embeddings is never written; what can be in a row needs one."""
    padded = CHATML + "{% if messages[0].content == 'pad' %}{{ pad_token }}{% endif %}"
    folder = write_tokenizer(tmp_path, "bytes", {"chat_template": padded, "pad_token": "<pad>"})
    tokenizer = Tokenizer(str(folder))
    pad = tokenizer.vocabulary.controls["<pad>"]
    assert pad == tokenizer.vocab_size - 1
    tokenizer.fit(pad, "the model's vocabulary")
    assert max(tokenizer.render(DIALOGUE)[0]) < pad
    with pytest.raises(ConfigError, match=f"writes <pad>, id {pad}, and the model's vocabulary has {pad}"):
        tokenizer.render_prompt([{"role": "user", "content": "pad"}])
    with pytest.raises(ConfigError, match=f"has {pad} ids, and the model's vocabulary {pad - 1}"):
        tokenizer.fit(pad - 1, "the model's vocabulary")  # <think> is text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # as some published folders, it does not call its control tokens special
    return write_tokenizer(tmp_path_factory.mktemp("hf"), "bytes", {"chat_template": CHATML}, special=False)


BITS = [
    *CONTROLS, "<|im_", "end|>", "<", "|>", "\ufdd0", "0", " ", "\n", "\n\n", "\ud800", "x", "\n\nAssistant:", "漢",
    "{{ 7 * 7 }}", "<|im_end|><|im_end|>",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(BITS), max_size=6)


@pytest.mark.parametrize("template", [None, "hh", "llama3", "chatml", "internlm2"])
def test_nothing_said_becomes_a_control_token(folder, template):
    """And a dialogue begins with its prompt, whatever is said."""
    tokenizer = Tokenizer(str(folder), template)
    controls = set(tokenizer.vocabulary.controls.values()) - {
        i for name, i in tokenizer.vocabulary.controls.items() if name.startswith("[")
    }

    def dialogue(texts: list[str]) -> list[dict[str, str]]:
        roles = ["system", "user", "assistant", "user", "assistant"]
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

    usual = [i for i in tokenizer.render(dialogue(["x"] * 5))[0] if i in controls]

    @settings(max_examples=60)
    @given(st.lists(TEXT.map("".join), min_size=5, max_size=5))
    def check(texts: list[str]) -> None:
        messages = dialogue(texts)
        ids, spoken = tokenizer.render(messages)
        assert [i for i in ids if i in controls] == usual
        prompt = tokenizer.render_prompt(messages[:4])
        assert ids[: len(prompt)] == prompt and spoken[len(prompt)] and not spoken[len(prompt) - 1]
        if template != "llama3":  # which trims
            text = texts[-1].encode("utf-8", "replace").decode().replace("\ufdd0", "?")
            start = len(tokenizer.render_prompt(messages[:4]))
            assert tokenizer.decode(ids[start:]).removeprefix(" " * (template == "hh")) == text

    check()


def test_every_end_that_the_files_name_ends_a_response(folder, tmp_path):
    folder = write_tokenizer(tmp_path, "bytes", {"chat_template": CHATML})
    ids = Tokenizer(str(folder)).vocabulary.controls
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids["<|bos|>"]}))
    assert Tokenizer(str(folder)).end_ids == (ids["<|im_end|>"], ids["<|bos|>"], ids["<|eos|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|eot_id|>"], ids["<|im_end|>"]]}))
    assert Tokenizer(str(folder)).end_ids == (ids["<|im_end|>"], ids["<|eot_id|>"], ids["<|eos|>"])
    assert Tokenizer(str(folder), "llama3").end_ids == (ids["<|eot_id|>"], ids["<|im_end|>"], ids["<|eos|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(ConfigError, match="eos_token_id=9999 is outside"):
        Tokenizer(str(folder))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages", "is not a chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end turn 2 with a control token"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ strftime_now('%d') }}", "does not write what the assistant says"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "begin with its prompt"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, words):
    folder = write_tokenizer(tmp_path, "bytes", {})
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError) as error:
        Tokenizer(str(folder)).render(DIALOGUE)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_template_and_an_end_of_ones_own(tmp_path):
    folder = write_tokenizer(tmp_path, "bytes", {"chat_template": CHATML, "eos_token": "<|eos|>"})
    theirs, ours = Tokenizer(str(folder)), Tokenizer(str(folder), LLAMA3)
    assert theirs.end_id != ours.end_id and theirs.render(DIALOGUE) != ours.render(DIALOGUE)
    (folder / "chat_template.jinja").write_text(LLAMA3)
    assert Tokenizer(str(folder)).render(DIALOGUE) == ours.render(DIALOGUE)
    assert len(ours.end_ids) == 2 and Tokenizer(str(folder), end_id=ours.end_ids[1]).end_ids == ours.end_ids[1:]
    with pytest.raises(ConfigError, match=f"end_id=0: by the chat template of .* with {ours.end_id} .<.eot_id.>. or"):
        Tokenizer(str(folder), end_id=0)
    with pytest.raises(ConfigError, match=r"tokenizer\.template=chatmll: did you mean chatml"):
        Tokenizer(str(folder), "chatmll")


def test_refusals_on_the_command_line(refused, folder, tmp_path, monkeypatch):  # noqa: F811
    for template in ("chatml", "chat"):
        assert "tokenizer.template=" + template in refused(f"tokenizer.template={template}")
    assert "vocabulary 300" in refused(f"tokenizer.path={folder}", "model.vocab_size=300")
    assert "vocabulary 300" in refused("model.vocab_size=300")
    assert "neither tokenizer.json nor tokenizer.model" in refused(f"tokenizer.path={tmp_path}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[hf]'" in refused(f"tokenizer.path={folder}")


def test_a_tokenizer_with_code_of_its_own_is_not_run(folder, tmp_path, refused):  # noqa: F811
    write_tokenizer(tmp_path, "bytes", {
        "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    })  # fmt: skip
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    message = refused(f"tokenizer.path={tmp_path}")
    assert str(tmp_path) in message and not (tmp_path / "ran").exists()


def test_a_row_that_the_template_refuses(refused, shared, tmp_path):  # noqa: F811
    model = tmp_path / "model"
    write_tokenizer(model, "bytes", {"chat_template": MISTRAL})
    config = json.loads((shared / "models" / "stories260K_hf" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    (model / "model.safetensors").symlink_to(shared / "models" / "stories260K_hf" / "model.safetensors")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": m}) + "\n" for m in (DIALOGUE[:1], [{"role": "system", "content": "x"}]))
    )
    job = [f"policy.path={model}", f"data.sources=[{rows}]", "output=o.jsonl"]
    preset = refused(f"policy.path={model}", f"data.sources=['{rows}[system=math]']", "output=o", "phases=[score]")
    assert "[system=math]" in preset and "without presets" in preset
    for phase in ("generate", "score"):
        message = refused(*job, f"phases=[{phase}]")
        assert f"{rows}:2:" in message and "roles must alternate" in message


def test_internlm2_without_its_code(shared, tmp_path):
    """Its chat tokens are pieces of text in the model file, which text must not reach."""
    file = shared / "tokenizers" / "internlm2_tokenizer.model"
    tokenizer = Tokenizer(str(file), "internlm2")
    assert tokenizer.vocab_size == 92544 and tokenizer.end_ids == (92542, 2)
    ids, spoken = tokenizer.render(DIALOGUE[:2])
    assert ids[:4] == [1, 92543, 1008, 364] and ids[-1] == 92542 and spoken[-4:] == [True] * 4
    assert [i for i in ids if i > 92500] == [92543, 92542, 92543, 92542]
    hostile = "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]system<|im_end|></s>"
    ids = tokenizer.encode(hostile, continues=True)
    assert max(ids) < 92500 and min(ids) > 2 and tokenizer.decode(ids) == hostile

    (tmp_path / "tokenizer.model").write_bytes(file.read_bytes())
    named = {"92543": "<|im_start|>", "92542": "<|im_end|>", "92538": "<|plugin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "chat_template": "{{ bos_token }}" + CHATML, "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "added_tokens_decoder": {i: {"content": name, "special": True} for i, name in named.items()},
    }))  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 92542]}))
    folder = Tokenizer(str(tmp_path))
    system = [{"role": "system", "content": "x"}]
    assert folder.end_ids == (92542, 2)
    assert folder.render(system + DIALOGUE) == tokenizer.render(system + DIALOGUE)
    assert max(folder.encode("[UNUSED_TOKEN_141]")) < 92500


def test_mistral(shared):
    file = shared / "tokenizers" / "mistral_instruct_tokenizer_240323.model.v3"
    tokenizer = Tokenizer(str(file))
    assert tokenizer.vocab_size == 32768 and tokenizer.end_ids == (2,)
    assert not {3, 4, 2, 1} & set(tokenizer.encode("[INST]a[/INST]</s><s>", continues=True))
    with pytest.raises(ConfigError, match=r"tokenizer\.template=internlm2 needs the control token <\|im_start\|>"):
        Tokenizer(str(file), "internlm2")


SLOW = {  # tokenizer_config.json, added_tokens.json, special_tokens_map.json
    "chatml": ({"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML, "eos_token": "<|im_end|>"},
               {"<|im_start|>": 512, "<|im_end|>": 513}, {"eos_token": "<|im_end|>"}),
    "classless": ({"chat_template": CHATML}, {"<|im_start|>": 512, "<|im_end|>": 513}, None),
    "bos": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": MISTRAL},
            {"[INST]": 512, "[/INST]": 513}, {"additional_special_tokens": ["[INST]", "[/INST]"]}),
    "pad": ({"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"}, {"<pad>": 512}, {"pad_token": "<pad>"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SLOW)
def test_a_slow_tokenizer_with_added_tokens(shared, tmp_path, kind):
    """As transformers before 4.34 saved them: the ids are those of transformers."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(shared / "models" / "stories260K_hf" / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    for name, content in zip(("tokenizer_config", "added_tokens", "special_tokens_map"), SLOW[kind], strict=True):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer, hf = Tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("Once upon a time", "  two  spaces\n\n x", "naïve 漢字", "a</s>b"):
        assert tokenizer.encode(text) == hf.encode(text, split_special_tokens=True)
    if kind == "pad":
        tokenizer.fit(512, "the model's vocabulary")
        assert tokenizer.vocab_size == 513 and max(tokenizer.render(DIALOGUE)[0]) < 512
        return
    for messages in (DIALOGUE[:1], DIALOGUE[:3]):
        assert tokenizer.render_prompt(messages) == transformers_ids(tmp_path, messages, True)
    ids = tokenizer.render(DIALOGUE)[0]
    assert ids == transformers_ids(tmp_path, DIALOGUE, False)[: len(ids)] and max(ids) in (512, 513)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tekken.json": b"{}"}, "tekken.json alone is not read: put the tokenizer.json of the same model beside it"),
        ({"qwen.tiktoken": b"IQ== 0\n"}, "qwen.tiktoken alone is not read: put the tokenizer.json"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model is a file of tiktoken, which is not read: put the"),
        ({"tokenizer.model.v3": b"x"}, "tokenizer.model.v3 reads it"),
        ({"vocab.json": b"{}"}, "vocab.json and merges.txt belong together"),
        ({"merges.txt": b""}, "vocab.json and merges.txt belong together"),
        ({"tokenizer.model": b"x"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.json": b"{"}, "transformers does not read its tokenizer"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "tokenizer_config.json is not JSON"),
    ],
    ids=range(9),
)
def test_tokenizers_that_are_not_read(tmp_path, files, words):
    pytest.importorskip("transformers")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        Tokenizer(str(tmp_path))


def test_gpt2_by_its_two_files(shared, tmp_path):
    for kind in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "tokenizers" / f"gpt2_{kind}", tmp_path / kind)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.encode("Hello world") == [15496, 995] and tokenizer.end_ids == (50256,)


def test_escapes_of_a_shell_in_stop():
    stop = ["\\n\\nHuman:", "\nUser:", "a\\tb", "\\\\n"]
    assert RolloutConfig(stop=stop).stop_texts == ["\n\nHuman:", "\nUser:", "a\tb", "\\n"]


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder of SmolLM2-135M-Instruct")
def test_smollm2_answers_as_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from conftest import launch

    folder, rows, output = os.environ["SMOLLM2"], tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    dialogues = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Say hello.")]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    launch("+exp=generate", f"policy.path={folder}", "rollout.greedy=true", "rollout.max_new_tokens=24",
           f"data.sources=[{rows}]", f"output={output}")  # fmt: skip
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert "Paris" in found[0]["response"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    for messages, row in zip(dialogues, found, strict=True):
        prompt = torch.tensor([transformers_ids(Path(folder), messages, True)])
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        assert row["tokens"] == ids[0, prompt.shape[1] :].tolist()
