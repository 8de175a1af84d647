"""Environments found by their name, and tried before a run begins."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import ConfigError, EnvConfig, nearest
from ..signals import RunError
from .pool import Answer, Environments

BUILT_IN = {
    name: f"{__package__}.{name}:{name.title()}" for name in ("calculator", "python", "retrieve", "user", "guess")
}


def load(config: EnvConfig) -> Callable[..., Any]:
    """The class or function that is `env.fn`. What a class method `prepare(**env.args)` of it makes, where there is
    one, the processes of all trajectories share.

    Raises:
        ConfigError: there is none, or it is none, or it does not take `env.args`.
    """
    assert config.fn is not None
    about = f"env.fn={config.fn}"
    if config.fn not in BUILT_IN and not all(config.fn.partition(":")):
        raise ConfigError(f"{about} is neither package.module:name nor built in: {nearest(config.fn, BUILT_IN)}")
    module, _, name = BUILT_IN.get(config.fn, config.fn).partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ConfigError(f"{about}: {type(error).__name__}: {error}") from None
    fn = getattr(found, name, None)
    if fn is None:
        there = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{about}: there is no {name} in {module}: {nearest(name, there)}")
    if not callable(fn):
        raise ConfigError(f"{about} is neither a class nor a function")
    _check_signature(about, fn, config.args)
    if prepare := getattr(fn, "prepare", None):
        try:
            prepare(**config.args)
        except Exception as error:
            is_told = isinstance(error, ConfigError)
            raise ConfigError(f"{about}: {'' if is_told else type(error).__name__ + ': '}{error}") from None
    return fn


def _check_signature(about: str, fn: Callable[..., Any], args: Mapping[str, Any]) -> None:
    if inspect.isclass(fn):
        for method, takes in (("reset", "row"), ("step", "action")):
            if not callable(getattr(fn, method, None)):
                raise ConfigError(f"{about} has no {method}({takes}): an environment has reset(row) and step(action)")
    given = () if inspect.isclass(fn) else ("action", "row")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # it does not say
    try:
        signature.bind(*given, **args)
    except TypeError as error:
        wanted = "" if inspect.isclass(fn) else " as fn(action, row, **env.args)"
        raise ConfigError(f"{about} takes {signature}, and env.args={dict(args)}{wanted}: {error}") from None


def check_environment(config: EnvConfig, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """What `env.fn` says to the first of some rows, if there is one, as a run will ask it, in a process of its own.

    Raises:
        ConfigError: it is not there, does not take `env.args`, or fails at the row.
    """
    environments = Environments(config)
    try:
        for row in rows[:1]:
            environments.begin(0, dict(row))
        environments.wait()
        found = environments.answers(None)
    except RunError as error:
        raise ConfigError(str(error)) from None
    finally:
        environments.close()
    for answer in found:
        if answer.failure is not None:
            raise ConfigError(answer.failure)
    return found
