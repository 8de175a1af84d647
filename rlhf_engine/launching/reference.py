"""What can be said on a command line, read from where it is defined: the options of conf/ and the keys of config/.

`python launch/run.py --help` prints it; `make docs` writes it to docs/configuration.md.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

from ..config import RunConfig
from .compose import CONF, config_groups

MOST_USED = (
    "phases", "output_dir", "rerun", "seed", "policy.path", "reward.path", "data.sources", "data.max_prompt_len",
    "mesh.tp", "mesh.pp", "mesh.dp", "ppo.iterations", "ppo.prompts_per_iteration", "ppo.micro_batch_size",
    "ppo.kl_coef", "ppo.optimizer.lr", "rollout.max_new_tokens", "rollout.temperature", "trace",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of the command line; `comment` is the one beside its definition, or above it."""

    name: str
    kind: str
    default: str
    comment: str


def options(group: str) -> list[tuple[str, str]]:
    """Options of a group of conf/, each with the first line of its file that says something."""
    found = []
    for name in config_groups()[group]:
        lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
        said = [line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("# @package")]
        found.append((name, said[0]))
    return found


def every_key(config: typing.Any = None, prefix: str = "") -> Iterator[Key]:
    """Every key with a value, in the order of the dataclasses."""
    config = RunConfig() if config is None else config
    hints, comments = typing.get_type_hints(type(config)), _comments(type(config))
    sizes = {f.name for f in fields(config) if f.metadata.get("is_size")}
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from every_key(value, f"{prefix}{name}.")
        else:
            default = value if isinstance(value, str) else json.dumps(value).replace('"', "")
            kind = _kind(hints[name]) + " or null" * (name in sizes)
            yield Key(prefix + name, kind, default, comments[name])


def _comments(cls: type) -> dict[str, str]:
    """By field: the comment behind it, or the whole lines of comment above it; else that of the class it comes from."""
    found = _comments(cls.__base__) if is_dataclass(cls.__base__) else {}
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            _, _, behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")  # type: ignore[operator,index]
            above: list[str] = []
            while (line := lines[node.lineno - 2 - len(above)].strip()).startswith("# "):
                above.insert(0, line.removeprefix("# "))
            name = ast.unparse(node.target)
            found[name] = behind or " ".join(above) or found.get(name, "")
    return found


def _kind(hint: typing.Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(typing.get_args(hint))
    if args := [_kind(arg) for arg in typing.get_args(hint) if arg is not type(None)]:
        kinds = {list: f"list of {args[0]}", dict: "mapping"}
        return kinds.get(typing.get_origin(hint), args[0])  # type: ignore[call-overload]
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(hint, "section")


def text() -> str:
    """For a terminal."""
    lines = ["experiments:"]
    lines += [f"  +exp={name:<16} {said}" for name, said in options("exp")]
    lines += ["", "groups:"]
    for group in sorted(set(config_groups()) - {"exp"}):
        lines += [f"  {f'{group}={name}':<21} {said}" for name, said in options(group)]
    known = {key.name: key for key in every_key()}
    for title, names in (("most used keys:", MOST_USED), ("the others:", [n for n in known if n not in MOST_USED])):
        lines += ["", title, *(f"  {f'{n}={known[n].default}':<40} {known[n].comment}".rstrip() for n in names)]
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Written by `make docs` from `conf/` and `rlhf_engine/config`; a test keeps it current. A command line says",
        "an experiment, options of groups, and keys. A key has the last word over options, and of two equal keys the",
        "later one:",
        "",
        "    python launch/run.py +exp=hh_rlhf data=hh_rlhf mesh.tp=2 ppo.kl_coef=0.02",
    ]
    for group in ["exp", *sorted(set(config_groups()) - {"exp"})]:
        lines += ["", f"## {'+exp' if group == 'exp' else group}=", "", "| option | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {said} |" for name, said in options(group)]
    lines += ["", "## Keys", "", "| key | default | value | what it is |", "|---|---|---|---|"]
    for key in every_key():
        lines.append(f"| `{key.name}` | `{key.default}` | {key.kind} | {key.comment} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
