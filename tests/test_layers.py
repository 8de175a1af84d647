"""Rooms and the doors between them: imports lead from an upper room to a lower one, at run time and for types."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = "rlhf_engine."
# From the foundation up. A room is a package or a module of its own; it imports what stands before it.
ROOMS = [
    "rlhf_kernels", "config", "signals", "surviving", "rewards", "environments", "experience", "cpu", "xtuner", "mesh",
    "data", "observing", "hf", "models", "rollout", "converting", "context", "schedule", "algorithms", "launching",
    "plan", "trainer", "verify", "rehearse", "launch", "tools",
]  # fmt: skip
FOLDERS = {"rlhf_engine": "rlhf_engine", "kernels": "rlhf_kernels", "launch": "launch", "tools": "tools"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def imports(module: str) -> set[tuple[str, str]]:
    """Modules of the project that a module imports, each with a name that it takes, "" for the module itself."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(f"{name}.{a.name}", "") if f"{name}.{a.name}" in MODULES else (name, a.name) for a in node.names}
    return found


def room(module: str) -> str:
    return module.removeprefix(ENGINE).split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_downwards(module):
    for other, name in imports(module):
        if other in MODULES and other not in (module, "rlhf_engine"):
            assert not name.startswith("_"), f"{module} takes the private {other}.{name}"
            assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}"
            assert module not in {back for back, _ in imports(other)}, f"{module} and {other} import each other"


@pytest.mark.parametrize(("package", "user"), [("parallel_state", "mesh"), ("hydra", "launching.compose")])
def test_only_one_module_knows(package, user):
    users = {module for module in MODULES for name in imports(module) if package in ".".join(name).split(".")}
    assert users == {ENGINE + user}


def test_a_run_is_refused_before_torch_is_imported():
    names = ("config", "launching.preflight", "data.sources")
    loads = "; ".join(f"import {ENGINE}{name}" for name in names)
    heavy = '{"torch", "megatron"} & sys.modules.keys()'
    subprocess.run([sys.executable, "-c", f"import sys; {loads}; assert not {heavy}, {heavy}"], check=True)
