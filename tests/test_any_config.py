"""Any configuration is taken or refused in one line that can be printed: values, overrides, whole command lines."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import ANY, SAID
from worlds import launcher

from rlhf_engine.config import ConfigError, RunConfig, check, from_dict, keys, resolve_mesh
from rlhf_engine.launching.compose import compose, config_groups

SECTIONS = {key for key in keys(RunConfig) if any(other.startswith(key + ".") for other in keys(RunConfig))}
KEYS = sorted(set(keys(RunConfig)) - SECTIONS)
NUMBERS = st.integers() | st.integers(-2, 9) | st.floats() | st.sampled_from([10**400, -(2**62), 2**63])
VALUES = NUMBERS | ANY | st.sampled_from(["cpu", "ppo", "auto", ["ppo"], ["sft", "generate"], "null", "${seed}"])
# as a shell hands them over: no lone surrogates, and no null bytes
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["{", "[1,", "'", "${", "${seed}", "${x:y}", "???", "null", "=", "~", "\n", "1e999", "[[],{}]", "{a:1}", "a,b", "$"]
)


def nested(flat: dict) -> dict:
    """Dotted keys to sections; a key that lies within another's value takes its place."""
    found: dict = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[name] = value
    return found


def assert_one_line(error: ConfigError) -> None:
    assert "\n" not in str(error) and 0 < len(str(error)) < 2000
    str(error).encode()


CONFIG = st.dictionaries(st.sampled_from(KEYS) | st.sampled_from(sorted(SECTIONS)) | SAID, VALUES, max_size=4)


@settings(max_examples=1000)
@given(CONFIG)
def test_any_values(flat):
    try:
        config = from_dict(RunConfig, nested(flat))
        world_size = config.mesh.tp * config.mesh.pp * (config.mesh.dp or 1)
        check(config, resolve_mesh(config.mesh, world_size), config.model, config.model)
    except ConfigError as error:
        assert_one_line(error)


OVERRIDE = st.tuples(
    st.sampled_from(["", "", "+", "++", "~"]),
    st.sampled_from([*KEYS, *sorted(SECTIONS), *config_groups()]) | WORDS,
    st.sampled_from(["=", "=", "=", ""]),
    WORDS | NUMBERS.map(str) | st.sampled_from([name for names in config_groups().values() for name in names]),
).map("".join)


@settings(max_examples=300)
@given(st.lists(OVERRIDE, min_size=1, max_size=3))
def test_any_overrides(overrides):
    try:
        compose(overrides)
    except ConfigError as error:
        assert_one_line(error)


PLAIN = st.integers(-1, 20).map(str) | st.sampled_from(
    ["null", "true", "auto", "[ppo]", "[sft,reward]", "x", "0.5", ""]
)


@settings(max_examples=100)
@given(overrides=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=3))
def test_any_command_line(tmp_path_factory, overrides):
    """It starts ranks, or nothing but a plan, or is refused."""
    folder = tmp_path_factory.mktemp("any")
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    (folder / "a.jsonl").write_text((json.dumps(row) + "\n") * 300)
    given_, said, started = [f"{k}={v}" for k, v in overrides.items()], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where it leaves a tokenizer of these rows
        patch.setattr(launcher, "start_ranks", lambda *args: started.append(args) or 0)
        patch.setattr("builtins.print", lambda *args, file=None, **_: said.append(" ".join(map(str, args))))
        code = launcher.main(["+exp=hh_rlhf", "device=cpu", f"data.sources=[{folder}/a.jsonl]", *given_])
    assert code == (2 if said and said[0].startswith("error: ") else 0), said
    if code:
        assert not started and len(said) == 1 and "\n" not in said[0]
