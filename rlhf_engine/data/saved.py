"""A run's tokenizer in an HF folder: the files of one source, the template that was trained with, and special tokens
that mean to transformers and vLLM what they mean here."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import Messages
from .fast import added_token, tokenizer_json
from .templates import read_json
from .tokenizer import Tokenizer
from .vocabulary import MADE_FROM, HFVocabulary, PieceVocabulary

CONFIG, FAST, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
# what of an HF folder transformers makes a tokenizer of, besides its configuration and templates. Never code.
FILES = (FAST, "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_PAD = "<|pad|>"  # of a tokenizer that has nothing else to pad with
_SAID = "Which words are these? 1, 2, 3: naïve\n\n  tokens, 漢字. "


@dataclass(frozen=True)
class Special:
    """Names and ids of the tokens that config.json, generation_config.json and the tokenizer speak of.

    Args:
        pad: None: no token of the vocabulary can be one. Without a name: it is text, which tokenizers do not pad with.
    """

    bos: tuple[str, int] | None
    ends: tuple[int, ...]
    pad: tuple[str | None, int] | None

    @property
    def ids(self) -> dict[str, Any]:
        """As config.json has them."""
        ends = self.ends[0] if len(self.ends) == 1 else list(self.ends)
        bos, pad = (token and token[1] for token in (self.bos, self.pad))
        return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}


def special(tokenizer: Tokenizer, num_ids: int, is_score: bool, score_pad: int | None = None) -> Special:
    """The special tokens of an export.

    Args:
        num_ids: of the model.
        is_score: transformers reads its score at the last token that is not the pad token.
        score_pad: the pad token that the run itself read scores by; one that no row has is like none.
    """
    names = tokenizer.vocabulary.controls
    bos = tokenizer.vocabulary.variables.get("bos_token") or ""
    pad: tuple[str | None, int] | None
    if score_pad is not None and 0 <= score_pad < tokenizer.vocab_size:
        known = {i: name for name, i in (*names.items(), *_candidates(tokenizer, num_ids))}
        pad = (known.get(score_pad), score_pad)
    else:
        own = tokenizer.vocabulary.variables.get("pad_token") or ""
        is_kept = not is_score and names.get(own, num_ids) < num_ids
        pad = (own, names[own]) if is_kept else next(_candidates(tokenizer, num_ids), None)
    return Special((bos, names[bos]) if bos in names else None, tokenizer.end_ids, pad)


def _candidates(tokenizer: Tokenizer, num_ids: int) -> Iterator[tuple[str, int]]:
    """Tokens that end no row, best first: that text does not become, that the template does not write, and that end
    no response. Those made for it come first, then what the model has rows for and the tokenizer no names."""
    vocabulary, program = tokenizer.vocabulary, tokenizer.template.source.program
    free = {
        name: i
        for name, i in vocabulary.controls.items()
        if i < num_ids and i not in (*tokenizer.end_ids, *vocabulary.begin) and name not in program
    }
    unknown = vocabulary.unknown
    if unknown and unknown[1] < num_ids and unknown[1] not in tokenizer.end_ids:
        free.pop(unknown[0], None)
        unknown = unknown if unknown[1] not in vocabulary.encode(_SAID + "\u0378\U000e0041") else None
    else:
        unknown = None
    own = vocabulary.variables.get("pad_token")
    yield from ((name, i) for name, i in free.items() if name == own)
    yield from ((name, i) for name, i in free.items() if re.search("pad", name, re.IGNORECASE))
    if unknown:
        yield unknown
    kept = "reserved|unused|dummy|extra|placeholder|^.control_"
    yield from ((name, i) for name, i in free.items() if re.search(kept, name, re.IGNORECASE))
    if vocabulary.size < num_ids:
        yield _PAD, vocabulary.size
    yield from free.items()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, tokens: Special) -> None:
    """Writes the tokenizer's files to `folder`, all of them from where the run has it.

    Args:
        tokens: of `special`.
    """
    vocabulary, template = tokenizer.vocabulary, tokenizer.template
    if isinstance(vocabulary, PieceVocabulary):
        config = _save_pieces(vocabulary, folder)
    else:
        config = _save_copy(vocabulary, folder)
    # what the template calls eos_token stays; otherwise it is what ends the assistant's turn
    eos = template.variables.get("eos_token") if "eos_token" in template.needs else None
    named = {
        "bos_token": tokens.bos and tokens.bos[0],
        "eos_token": eos or vocabulary.name(tokenizer.end_id),
        "pad_token": tokens.pad and tokens.pad[0],
    }
    if tokens.pad and tokens.pad[0]:
        _add(folder, config, tokens.pad[0], tokens.pad[1], is_new=tokens.pad[1] >= vocabulary.size)
    for file in (config, mapping := read_json(folder / "special_tokens_map.json")):
        for key, name in named.items():
            held = file.get(key)
            if name is None:
                file.pop(key, None)
            elif name != (held.get("content") if isinstance(held, dict) else held):
                file[key] = name
    if mapping:
        _write(folder / "special_tokens_map.json", mapping)
    program = template.source.program
    for name in sorted(name for name in template.needs if name.endswith("_token")):
        # what the template knows of the tokenizer here and would not know there
        if (value := template.variables.get(name) or "") != ((config | named).get(name) or ""):
            program = f"{{%- set {name} = {json.dumps(value)} -%}}{program}"
    config["chat_template"] = program
    (folder / TEMPLATE).write_text(program, encoding="utf-8")
    _write(folder / CONFIG, config)


def _save_copy(vocabulary: HFVocabulary, folder: Path) -> dict[str, Any]:
    """Copies what transformers reads; the tokenizer_config.json. Of another kind of model than the export's, it is
    written as it was here: transformers takes some classes by the model, and they rebuild what they read."""
    for name in FILES:
        if (vocabulary.folder / name).is_file():
            shutil.copyfile(vocabulary.folder / name, folder / name)
    config = read_json(vocabulary.folder / CONFIG)
    config.pop("auto_map", None)  # names code, which is not copied
    here, there = (read_json(place / "config.json").get("model_type") for place in (vocabulary.folder, folder))
    if here != there:
        fast: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", MADE_FROM: FAST}
        config = {**vocabulary.variables, **config, **fast}
    if here != there or not (folder / FAST).is_file():
        (folder / FAST).write_text(vocabulary.loaded().backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    bos = vocabulary.controls.get(vocabulary.variables.get("bos_token") or "")
    return {"add_bos_token": bos in vocabulary.begin, **config}  # transformers 4 takes its classes' word otherwise


def _save_pieces(vocabulary: PieceVocabulary, folder: Path) -> dict[str, Any]:
    """Copies a sentencepiece model, and writes what makes transformers give its ids; the tokenizer_config.json."""
    shutil.copyfile(vocabulary.file, folder / "tokenizer.model")
    begin = {str(vocabulary.name(i)): i for i in vocabulary.begin}
    fast = tokenizer_json(vocabulary.file, vocabulary.controls, begin)
    if fast is not None:
        _write(folder / FAST, fast)
    kept: dict[str, Any] = {
        key: vocabulary.config[key] for key in ("model_max_length", "padding_side") if key in vocabulary.config
    }
    return {
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(begin),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): added_token(name) for name, i in vocabulary.controls.items()},
        MADE_FROM: "tokenizer.model",
    }


def _add(folder: Path, config: dict[str, Any], name: str, i: int, is_new: bool) -> None:
    """Makes a token special, in the files that say which are."""
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"].setdefault(str(i), added_token(name))
    if is_new:
        fast = read_json(folder / FAST)
        fast["added_tokens"] = [*fast["added_tokens"], {"id": i, **added_token(name)}]
        _write(folder / FAST, fast)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- read back -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """
    Args:
        has_way: the files are right, and `what` says who reads them so.
    """

    reader: str
    what: str
    has_way: bool = False

    def __str__(self) -> str:
        return f"{self.reader}: {self.what}"


def read_back(tokenizer: Tokenizer, folder: Path, prompts: Sequence[Messages]) -> list[Difference]:
    """How an export's tokenizer differs from that of the run, at most once for each of its readers.

    Args:
        folder: with its config.json.
        prompts: dialogues that the template takes.
    """
    found = []
    for reader, read in (("read back", _ours), ("transformers", _theirs)):
        try:
            if (what := read(tokenizer, folder, prompts)) is not None:
                found.append(Difference(reader, *what))
        except Exception as error:  # of whatever kind transformers, tokenizers and jinja2 raise
            found.append(Difference(reader, str(error).splitlines()[0] if str(error) else type(error).__name__))
    return found


def _ours(tokenizer: Tokenizer, folder: Path, prompts: Sequence[Messages]) -> tuple[str] | None:
    back = Tokenizer(str(folder), date=tokenizer.date)
    if not set(tokenizer.end_ids) <= set(back.end_ids):
        return (f"responses end with {list(back.end_ids)}, the run's with {list(tokenizer.end_ids)}",)
    line = _apart(tokenizer, prompts, back.render_prompt, back.encode)
    return (line,) if line else None


def _theirs(tokenizer: Tokenizer, folder: Path, prompts: Sequence[Messages]) -> tuple[str, bool] | None:
    """Nothing where transformers is not installed. Its users' words may be control tokens, and its date is today's:
    such prompts differ for a reason."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        return None
    names = tokenizer.vocabulary.pattern
    plain = [messages for messages in prompts if not any(names.search(m["content"]) for m in messages)]
    if tokenizer.template.is_dated and tokenizer.date != str(datetime.date.today()):
        plain = []

    def read(reader: Any) -> tuple[str, str | None]:
        hf = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        config = read_json(folder / "config.json")
        for key, mine in (("pad_token_id", hf.pad_token_id), ("bos_token_id", hf.bos_token_id)):
            if mine is not None and config.get(key, mine) != mine:
                return type(hf).__name__, f"the tokenizer's {key} is {mine}, that of config.json {config[key]}"

        def prompt(messages: Messages) -> list[int]:
            text = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return hf.encode(text, add_special_tokens=False)

        return type(hf).__name__, _apart(tokenizer, plain, prompt, hf.encode)

    name, line = read(AutoTokenizer)
    if line is None:
        return None
    if read(PreTrainedTokenizerFast)[1] is not None:
        return line, False
    way = f"AutoTokenizer takes {name} for such a model, PreTrainedTokenizerFast.from_pretrained reads the run's"
    return f"{line}; {way}", True


def _apart(
    tokenizer: Tokenizer,
    prompts: Sequence[Messages],
    render: Callable[[Messages], list[int]],
    encode: Callable[[str], list[int]],
) -> str | None:
    """What of some text and prompts has other tokens than the run's."""
    if encode(_SAID) != tokenizer.encode(_SAID):
        return f"other tokens than the run's for {_SAID!r}"
    wrong = [messages for messages in prompts if render(messages) != tokenizer.render_prompt(messages)]
    if wrong:
        return (
            f"other tokens than the run's for {len(wrong)} of {len(prompts)} prompts, {wrong[0][-1]['content']!r:.60}"
        )
    return None
