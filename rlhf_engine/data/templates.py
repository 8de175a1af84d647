"""Which chat template a tokenizer has: its folder's own, one of ours, or a Jinja program from the configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, nearest

# `bos_token` is here what the tokenizer puts in front of any text, which may be nothing.
_CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_HH = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '\n\nAssistant: ' + m.content + eos_token }}{% else %}"
    "{{ {'user': '\n\nHuman: ', 'tool': '\n\nTool: '}.get(m.role, '') + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
BUILT_IN = {"hh": _HH, "internlm2": _CHATML, "llama3": _LLAMA3, "chatml": _CHATML}


@dataclass(frozen=True)
class Source:
    """A chat template's program.

    Args:
        name: how errors call it.
        about: what it is and where it comes from, for the table at the start of a run.
        is_own: the tokenizer brings it, so its model has seen what it writes, whatever that is.
        is_ours: built in.
    """

    program: str
    name: str
    about: str
    is_own: bool = False
    is_ours: bool = False


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: the file is in another encoding.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start + 1}): save it as UTF-8") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return found


def choose(folder: Path, config: dict[str, Any], key: str | None) -> Source:
    """The template that `tokenizer.template` names.

    Args:
        folder: of the tokenizer, or its file.
        config: its tokenizer_config.json.
        key: a name that the folder gives to one of its templates, or else one of ours, or a Jinja program, which is
            told by its braces; None: the folder's only one or its default, and hh where it has none.

    Raises:
        ConfigError: there is none of that name, there are several and none is the default, or one is unreadable.
    """
    if key is not None and "{" in key:
        return Source(key, "tokenizer.template", "the Jinja program of tokenizer.template")
    own = _own(folder, config)
    if key is None and own and "default" not in own:
        raise ConfigError(
            f"{folder} has the chat template{'s' * (len(own) > 1)} {', '.join(sorted(own))} and none called default:"
            f" choose with tokenizer.template={min(own)}"
        )
    if own and (name := key or "default") in own:
        program, file = own[name]
        of_several = name != "default" or len(own) > 1
        about = f"{name} (of {', '.join(sorted(own))}) in {file}" if of_several else str(file)
        if program.startswith("\ufeff"):
            about += ", with a byte-order mark in front of every prompt, as in transformers"
        return Source(program, f"the chat template {f'{name} ' * of_several}of {file}", about, is_own=True)
    name = key or "hh"
    if name not in BUILT_IN:
        raise ConfigError(f"tokenizer.template={name}: {nearest(name, [*BUILT_IN, *own])}")
    about = f"{name}, built in" + (f": {folder} has none" * (key is None))
    return Source(BUILT_IN[name], f"tokenizer.template={name}", about, is_ours=True)


def _own(folder: Path, config: dict[str, Any]) -> dict[str, tuple[str, Path]]:
    """Name to program and file of a folder's templates, found as transformers does: in files of their own, or else in
    tokenizer_config.json. chat_template.json, which its processors read, comes last."""
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (file := folder / "chat_template.jinja").is_file():
        files["default"] = file
    if files:
        return {name: (read_text(file), file) for name, file in files.items()}
    older = folder / "chat_template.json"
    for file, found in ((folder / "tokenizer_config.json", config), (older, read_json(older))):
        if template := found.get("chat_template"):
            return {name: (program, file) for name, program in _named(template, file).items()}
    return {}


def _named(found: Any, file: Path) -> dict[str, str]:
    """The templates of a JSON file: one, an object of several, or a list of them with their names."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict) and all(isinstance(text, str) for pair in found.items() for text in pair):
        return found
    raise ConfigError(
        f"{file}: chat_template is a Jinja program, or a list of objects that have a name and a template; this is"
        f" {json.dumps(found)!s:.60}"
    )
