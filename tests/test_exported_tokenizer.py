"""What an export says of tokens: transformers and our reader make of it what the run had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL
from test_chat import CHATML, DIALOGUE, LLAMA3, MISTRAL, transformers_ids, write_tokenizer

from rlhf_engine.data.fast import tokenizer_json
from rlhf_engine.data.saved import read_back, save_tokenizer, special
from rlhf_engine.data.tokenizer import Tokenizer, train_tokenizer

PROMPTS = [DIALOGUE[:1], DIALOGUE[:3], [{"role": "user", "content": " <b>naïve</b> 漢  \n"}]]


def exported(tokenizer: Tokenizer, folder: Path, num_ids: int, is_score: bool = False) -> dict:
    """Its files, with a config.json; the ids that this has."""
    tokens = special(tokenizer, num_ids, is_score)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **tokens.ids}))
    save_tokenizer(tokenizer, folder, tokens)
    return tokens.ids


def assert_same(tokenizer: Tokenizer, folder: Path, ids: dict) -> None:
    from transformers import AutoTokenizer

    assert read_back(tokenizer, folder, PROMPTS) == []
    back, hf = Tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    for messages in PROMPTS:
        wanted = tokenizer.render_prompt(messages)
        assert back.render_prompt(messages) == wanted == transformers_ids(folder, messages, True)
    assert hf.encode("One  two\n") == back.encode("One  two\n") == tokenizer.encode("One  two\n")
    assert back.end_ids == tokenizer.end_ids
    assert hf.pad_token_id == ids["pad_token_id"] and hf.bos_token_id == ids["bos_token_id"]


@pytest.mark.parametrize("template", [None, "hh", "chatml", "llama3", "internlm2", LLAMA3, MISTRAL])
@pytest.mark.parametrize("kind", ["bytes", "first", "every"])
def test_hf_tokenizers(tmp_path, kind, template):
    source = write_tokenizer(tmp_path / "source", kind, {"chat_template": CHATML})
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "other.jinja").write_text("{{ 'x' }}" + CHATML)
    (source / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer(str(source), template)
    ids = exported(tokenizer, tmp_path / "out", tokenizer.vocab_size)
    assert_same(tokenizer, tmp_path / "out", ids)
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    assert ends == list(tokenizer.end_ids)
    program = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == program
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


@pytest.mark.parametrize("name", ["trained", "stories260K", "internlm2", "mistral"])
def test_sentencepiece_models(request, tmp_path, name):
    """Which transformers reads with tokens of their own, and ours without transformers."""
    if name == "trained":
        file = tmp_path / "t.model"
        train_tokenizer(
            [text + turn["content"] for turn in DIALOGUE for text in ("\n\nHuman: ", "\n\nAssistant: ")] * 9, file, 300
        )
    else:
        shared, places = request.getfixturevalue("shared"), {
            "stories260K": "models/stories260K_hf/tokenizer.model", "internlm2": "tokenizers/internlm2_tokenizer.model",
            "mistral": "tokenizers/mistral_instruct_tokenizer_240323.model.v3",
        }  # fmt: skip
        file = shared / places[name]
    tokenizer = Tokenizer(str(file), "internlm2" if name == "internlm2" else None)
    ids = exported(tokenizer, tmp_path / "out", tokenizer.vocab_size, is_score=True)
    assert_same(tokenizer, tmp_path / "out", ids)
    assert ids["pad_token_id"] == 0  # <unk>, which no text becomes


@pytest.mark.parametrize(("more", "wanted"), [(0, "[INST]"), (3, "<|pad|>")], ids=["a control token", "the tail"])
def test_a_pad_token_that_ends_no_row(tmp_path, more, wanted):
    """Of a tokenizer whose own pad token ends responses."""
    source = write_tokenizer(tmp_path / "source", "bytes", {"chat_template": CHATML, "pad_token": "<|eos|>"})
    tokenizer = Tokenizer(str(source))
    controls = tokenizer.vocabulary.controls
    score = exported(tokenizer, tmp_path / "score", tokenizer.vocab_size + more, is_score=True)
    assert score["pad_token_id"] not in tokenizer.end_ids and score["pad_token_id"] < tokenizer.vocab_size + more
    assert (score["pad_token_id"] == tokenizer.vocab_size) == (wanted == "<|pad|>")
    assert_same(tokenizer, tmp_path / "score", score)
    policy = exported(tokenizer, tmp_path / "policy", tokenizer.vocab_size + more)
    assert policy["pad_token_id"] == controls["<|eos|>"]
    assert_same(tokenizer, tmp_path / "policy", policy)


def test_other_tokens_are_told(tmp_path):
    source = write_tokenizer(tmp_path / "source", "bytes", {"chat_template": CHATML})
    tokenizer = Tokenizer(str(source))
    exported(tokenizer, tmp_path / "out", tokenizer.vocab_size)
    (tmp_path / "out" / "chat_template.jinja").write_text(CHATML.replace("Be kind", "Be rude"))
    lines = read_back(tokenizer, tmp_path / "out", PROMPTS)
    assert [line.reader for line in lines] == ["read back", "transformers"]
    assert all("other tokens than the run's for 3 of 3 prompts" in line.what for line in lines)


def verified(settings: list[str], folder: Path, is_faulty: bool) -> tuple[float, str]:
    """In a rank: the figure of the check that launch/verify.py makes, and what it says."""
    import cases

    from rlhf_engine.data import saved
    from rlhf_engine.verify import export

    ctx = cases.context(settings, (1, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        if is_faulty:
            patch.setattr(saved, "tokenizer_json", lambda *args: {**(tokenizer_json(*args) or {}), "normalizer": None})
        found = export.tokenizer(ctx, "sft", folder)
    return found.figure, found.detail


@pytest.mark.parametrize("is_faulty", [False, True], ids=["", "faulty"])
def test_verify(worlds, tmp_path, is_faulty):
    settings = [*SMALL, "phases=[sft]", f"output_dir={tmp_path}"]
    figure, detail = worlds(1).run(verified, settings, tmp_path / "verify", is_faulty)[0]
    assert (figure == 0) != is_faulty and (is_faulty or detail == "8 prompts"), detail
