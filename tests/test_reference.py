"""--help, what docs/ says of the code, and the experiments of conf/ that are too large to be run here."""

from __future__ import annotations

import re
import runpy

import pytest
from conftest import ROOT
from test_layers import FOLDERS, ROOMS

from rlhf_engine.config import ModelConfig, check, keys, resolve_mesh
from rlhf_engine.launching import reference
from rlhf_engine.launching.compose import CONF, compose


def test_documentation_of_keys_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.markdown() + "\n", "run `make docs`"


def test_picture_of_the_layers_is_current():
    draw = runpy.run_path(str(ROOT / "docs" / "layers.py"))["draw"]
    assert (ROOT / "docs" / "layers.svg").read_text() == draw(), "run `make docs`"


def test_every_room_is_explained():
    folders = {package: folder for folder, package in FOLDERS.items()}
    found = re.findall(r"^\| `([\w.]+)/?` \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    rooms = [folders.get(name, name) for name in ROOMS]
    assert sorted(name.removesuffix(".py") for name in found) == sorted(rooms)
    assert all((ROOT / name).exists() or (ROOT / "rlhf_engine" / name).exists() for name in found)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_paths_that_a_page_names_are_there(page):
    """Modules with their folder, from the root or from rlhf_engine/, and links."""
    text = (ROOT / "docs" / page).read_text()
    modules = [(ROOT / path, ROOT / "rlhf_engine" / path) for path in re.findall(r"`(\w[\w.]*/[\w./]*\.py)[:`]", text)]
    links = [(ROOT / "docs" / path,) for path in re.findall(r"\]\(([\w./]+)(?:#[\w-]*)?\)", text)]
    assert [places[0] for places in modules + links if not any(path.exists() for path in places)] == []


def test_every_key_is_there_with_its_own_default():
    found = {key.name: key for key in reference.every_key()}
    sections = {name for name in keys(type(compose([]))) if any(key.startswith(f"{name}.") for key in found)}
    assert set(found) | sections == set(keys(type(compose([]))))
    assert found["ppo.optimizer.lr"].default == "0.0001" and found["sft.optimizer.lr"].default == "0.001"
    assert found["phases"].default == "[sft, reward, ppo]" and found["output"].default == "null"
    # a comment behind the field, above it, and over two lines
    assert found["mesh.tp"].comment == "tensor parallel: each layer is split over so many ranks"
    assert found["tokenizer.template"].comment.startswith("how messages become text:")
    assert found["policy.path"].kind == "text" and found["rollout.stop"].kind == "list of text"


def test_help_begins_with_what_is_used_most():
    said = reference.text()
    names = [path.stem for path in (CONF / "exp").glob("*.yaml")]
    places = [said.index(f"+exp={name} ") for name in sorted(names)]
    assert places == sorted(places)
    assert said.index("+exp=") < said.index("mesh=1x8 ") < said.index("ppo.kl_coef=0.05") < said.index("ppo.gamma=1.0")


LLAMA = {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
INTERNLM = {"vocab_size": 92544, "max_position_embeddings": 32768, "num_key_value_heads": 8}
# layers, hidden size, heads, intermediate size, as the models' own config.json says
INTERNLM2_2B = ModelConfig(None, 24, 2048, 16, intermediate_size=8192, **INTERNLM)  # type: ignore[arg-type]
INTERNLM2_7B = ModelConfig(None, 32, 4096, 32, intermediate_size=14336, **INTERNLM)  # type: ignore[arg-type]
LLAMA3_8B = ModelConfig(None, 32, 4096, 32, intermediate_size=14336, **LLAMA)  # type: ignore[arg-type]
LLAMA3_70B = ModelConfig(None, 80, 8192, 64, intermediate_size=28672, **LLAMA)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "world_size", "policy", "reward"),
    [
        (["+exp=hh_rlhf_full"], 8, INTERNLM2_2B, INTERNLM2_2B),
        (["+exp=hh_rlhf_full", "mesh=2x8"], 16, INTERNLM2_2B, INTERNLM2_2B),
        (["+exp=hh_rlhf_7b"], 8, INTERNLM2_7B, INTERNLM2_7B),
        (["+exp=hh_rlhf_70b"], 64, LLAMA3_70B, LLAMA3_8B),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_large_experiments_pass_the_checks(overrides, world_size, policy, reward):
    config = compose(overrides)
    mesh = resolve_mesh(config.mesh, world_size)
    check(config, mesh, policy, reward)
    assert mesh.tp * mesh.pp * mesh.dp == world_size and config.ppo.prompts_per_iteration == 64
    assert [source.rpartition("::")[2] for source in config.data.sources] == ["1.0", "0.5"]
