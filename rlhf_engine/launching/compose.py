"""Hydra's composition of conf/ and a command line. The only importer of hydra."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..config import ConfigError, RunConfig, from_dict, keys, nearest
from ..xtuner.read import from_command_line
from .overrides import mistake

_SWITCHES = {"plan=true": "plan.show=true", "schedule=explain": "schedule.explain=true"}  # sections have no values
_OPEN = "env.args."  # a mapping, of any names
CONF = Path(__file__).resolve().parents[2] / "conf"


def config_groups() -> dict[str, list[str]]:
    """Groups of conf/ and the options of each."""
    return {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}


def compose(overrides: Sequence[str]) -> RunConfig:
    """The engine's dataclass from `+exp=NAME key=value ...`, of which one may be `xtuner_config=FILE.py`.

    Raises:
        ConfigError: an override names a key, a group or an option that is not there; or as `xtuner.read`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    theirs, overrides = from_command_line([_SWITCHES.get(override, override) for override in overrides])
    changes, emptied = dict[int, str](), list[str]()
    defaults = asdict(RunConfig())
    for key, value in theirs.values.items() if theirs else ():
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, defaults)[name] = value
    groups, known = config_groups(), keys(RunConfig)
    parser = OverridesParser.create()

    def can_read(argument: str) -> bool:
        try:
            return bool((found := parser.parse_override(argument)).key_or_group) and not found.is_sweep_override()
        except HydraException:
            return False

    try:
        for i, argument in enumerate(overrides):
            if not can_read(argument):
                raise ConfigError(mistake(overrides, i, can_read))
            override = parser.parse_override(argument)
            key, value = override.key_or_group.split("@")[0], override.value()
            if key == "exp" and isinstance(value, str) and not override.is_add():
                raise ConfigError(f"{argument}: an experiment is added to the defaults: +exp={value}")
            if key in groups:
                for option in value if isinstance(value, list) else [value]:
                    if option not in groups[key] and not (option is None and override.is_delete()):
                        raise ConfigError(f"{key}={option}: {nearest(str(option), groups[key])}")
            elif f"{key}.".startswith(_OPEN):
                if not override.is_delete():
                    changes[i] = f"++{argument.lstrip('+')}"
                    emptied += ["~env.args", "++env.args={}"] if key == "env.args" else []
            elif key not in known:
                raise ConfigError(f"unknown key {key}: {nearest(key, [*known, *groups])}")
        ConfigStore.instance().store("defaults", defaults)
        with initialize_config_dir(str(CONF), version_base=None):
            given = [changes.get(i, argument) for i, argument in enumerate(overrides)]
            composed = compose("config", overrides=[*emptied, *given])
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{error.full_key}: {reason}" if error.full_key else reason) from None
    except HydraException as error:
        raise ConfigError(str(error)) from None
    return from_dict(RunConfig, values)  # type: ignore[arg-type]
