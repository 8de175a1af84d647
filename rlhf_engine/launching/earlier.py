"""What an output_dir has from earlier starts of the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..config import BUILDS_ON, JOBS, ConfigError, RunConfig
from ..surviving import durable

SUMMARY = "summary.json"  # of a finished phase
_COMPUTED = {"layers"}  # how a model is computed: what is there can be loaded whatever it is


def check_output_dir(config: RunConfig) -> None:
    """A run goes on only where it began as the same: another model or tokenizer cannot load what is there.

    Raises:
        ConfigError: names the key that differs from the config.yaml of an earlier phase, or a record that is not whole.
    """
    now = {name: asdict(getattr(config, name)) for name in ("model", "tokenizer", "policy")}
    with_reward = now | {"reward": {"path": config.reward.path}}
    for phase, builds_on in BUILDS_ON.items():
        path = Path(config.output_dir) / phase / "config.yaml"
        durable.read(path.with_name(SUMMARY))
        if (before := durable.read(path)) is None or config.rerun:
            continue
        for section, values in (with_reward if "reward" in (phase, *builds_on) else now).items():
            for key, value in values.items():
                if (old := (before.get(section) or {}).get(key, value)) != value and key not in _COMPUTED:
                    raise ConfigError(
                        f"{section}.{key}={value}, and {path.parent} was made with {old}: use another output_dir"
                    )


def check_finished(config: RunConfig) -> None:
    """A phase builds on the end of those before it.

    Raises:
        ConfigError: one of them was stopped before its end, and is not to go on.
    """
    for phase in BUILDS_ON:
        folder = Path(config.output_dir) / phase
        later = [name for name in config.phases if phase in BUILDS_ON.get(name, ())]
        has_begun = (folder / "checkpoints" / "latest").is_file()
        if later and phase not in config.phases and has_begun and not (folder / SUMMARY).is_file():
            raise ConfigError(
                f"phases=[{','.join(config.phases)}]: {later[0]} builds on {folder}, which was stopped before its end:"
                f" use phases=[{','.join([phase, *config.phases])}], or another output_dir"
            )


def kept_date(config: RunConfig) -> str | None:
    """The date that the templates of a run wrote when it began, which a resumed one goes on with."""
    for phase in BUILDS_ON:
        before = durable.read(Path(config.output_dir) / phase / "config.yaml")
        if not set(config.phases) & JOBS and before is not None:
            return (before.get("tokenizer") or {}).get("date")
    return None
