"""Imports point downwards only (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Longest prefix wins. A module may import modules of its own layer or of lower ones.
LAYERS = {
    "rlhf_kernels": 0,
    "rlhf_engine.config": 0,
    "rlhf_engine.experience": 0,
    "rlhf_engine.literals": 0,
    "rlhf_engine.xtuner": 0,
    "rlhf_engine.xtuner_rules": 0,
    "rlhf_engine.compose": 0,
    "rlhf_engine.environment": 0,
    "rlhf_engine.guard": 0,
    "rlhf_engine.manifest": 0,
    "rlhf_engine.overrides": 0,
    "rlhf_engine.parts": 0,
    "rlhf_engine.places": 0,
    "rlhf_engine.ranks": 0,
    "rlhf_engine.reference": 0,
    "rlhf_engine.report": 0,
    "rlhf_engine.signals": 0,
    "rlhf_engine.timeline": 0,
    "rlhf_engine.plan": 0,
    "rlhf_engine.plan.measure": 1,
    "rlhf_engine.plan.calibrate": 4,
    "rlhf_engine.plan.memory": 4,
    "rlhf_engine.plan.costs": 4,
    "rlhf_engine.plan.forecast": 4,
    "rlhf_engine.plan.search": 4,
    "rlhf_engine.plan.show": 4,
    "rlhf_engine.cpu": 1,
    "rlhf_engine.mesh": 1,
    "rlhf_engine.metrics": 1,
    "rlhf_engine.trace": 1,
    "rlhf_engine.watchdog": 1,
    "rlhf_engine.models": 2,
    "rlhf_engine.hf": 2,
    "rlhf_engine.data": 2,
    "rlhf_engine.checkpoint": 2,
    "rlhf_engine.rollout": 3,
    "rlhf_engine.schedule": 3,
    "rlhf_engine.algorithms": 3,
    "rlhf_engine.preflight": 4,
    "rlhf_engine.sizes": 4,
    "rlhf_engine.sinks": 0,
    "rlhf_engine.to_wandb": 0,
    "rlhf_engine.provenance": 4,
    "rlhf_engine.rehearse": 4,
    "rlhf_engine.logbook": 4,
    "rlhf_engine.jobs": 4,
    "rlhf_engine.trainer": 4,
    "rlhf_engine.verify": 4,
    "launch": 5,
    "tools": 5,
}


def layer(module: str) -> int | None:
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in LAYERS:
            return LAYERS[name]
    return None


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in (
        ("rlhf_engine", "rlhf_engine"),
        ("kernels", "rlhf_kernels"),
        ("launch", "launch"),
        ("tools", "tools"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join([package, *(p for p in parts if p != "__init__")]), path))
    return found


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of what a module imports at run time."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_downwards(module, path):
    mine = layer(module)
    assert mine is not None or module == "rlhf_engine", f"{module} has no layer: name it in LAYERS"
    for name in imports(module, path):
        theirs = layer(name)
        assert theirs is None or mine is None or theirs <= mine, f"{module} (L{mine}) imports {name} (L{theirs})"


def test_only_the_mesh_knows_parallel_state():
    users = {module for module, path in modules() if any("parallel_state" in n for n in imports(module, path))}
    assert users == {"rlhf_engine.mesh"}


def test_only_one_module_knows_hydra():
    users = {module for module, path in modules() if any(n.split(".")[0] == "hydra" for n in imports(module, path))}
    assert users == {"rlhf_engine.compose"}


@pytest.mark.parametrize("module", ["rlhf_engine.config", "rlhf_engine.preflight", "rlhf_engine.data.sources"])
def test_a_run_is_refused_before_torch_is_imported(module):
    """Neither directly nor through another module of the engine."""
    paths = dict(modules())
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        while name and name not in paths:
            name = name.rpartition(".")[0]
        if name and name not in seen:
            seen.add(name)
            todo += imports(name, paths[name])
            assert not {n.split(".")[0] for n in imports(name, paths[name])} & {"torch", "megatron"}, name
