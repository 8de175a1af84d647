"""No folder that is read can run code, wherever in it a pickle has been planted."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_convert_hf import Executed, convert  # noqa: F401 (a fixture)
from test_hf_architectures import SIZES, make
from test_hf_folders import logits, role_of
from torch.distributed import checkpoint as dcp

from rlhf_engine.config import ConfigError
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.hf.pickles import read_index
from rlhf_engine.launching.folders import folder_notes, read_base


@pytest.fixture(scope="module")
def made(convert, tmp_path_factory):  # noqa: F811
    """An HF folder and the checkpoint that it was converted to."""
    folder = tmp_path_factory.mktemp("made")
    source = make(folder / "hf", "LlamaForCausalLM", SIZES)
    assert convert("import", "--hf", source, "--out", folder / "mg", "--tp", 2) == 0
    return folder


@pytest.fixture
def planted(made, tmp_path):
    """`planted(kind, name)`: a copy with a pickle at `name` that would make a file `executed` in the test's folder."""

    def get(kind: str, name: str) -> Path:
        shutil.copytree(made / kind, tmp_path / kind)
        (tmp_path / kind / name).write_bytes(pickle.dumps(Executed(str(tmp_path / "executed"))))
        return tmp_path / kind

    return get


def test_an_index_beside_the_weights_of_an_hf_folder(convert, planted, made, tmp_path, capsys):  # noqa: F811
    """It is what it would be without: the safetensors are read, and what is not read is said."""
    folder = planted("hf", ".metadata")
    assert convert("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "HF, " in out and "not read" in out and ".metadata" in out
    base = read_base(str(folder))
    assert any("not read: .metadata" in note for note in folder_notes_of(base))
    torch.testing.assert_close(logits(folder), logits(made / "hf"), atol=0, rtol=0)
    assert not (tmp_path / "executed").exists()


def folder_notes_of(base):
    from rlhf_engine.config import RunConfig

    return folder_notes(RunConfig(), base, base, None)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_checkpoint_that_asks_for_code(convert, planted, tmp_path, capsys, name):  # noqa: F811
    folder = planted("mg", name)
    with pytest.raises(ConfigError, match="cannot be read without running code from it"), one_rank() as mesh:
        role_of(folder, mesh)
    if name == ".metadata":  # before a process group exists
        with pytest.raises(ConfigError, match=r"\.metadata cannot .* without running code from it: .* _?io\.open"):
            read_base(str(folder))
        assert convert("inspect", folder) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder}/.metadata cannot be read without running code")
    assert not (tmp_path / "executed").exists()


def test_an_object_among_the_tensors(tmp_path):
    """What torch's and megatron's planners read of a `.distcp` file besides tensors."""
    saved = {"a": torch.arange(3.0), "b": Executed(str(tmp_path / "executed"))}
    dcp.save(saved, checkpoint_id=tmp_path / "mg", no_dist=True)
    assert set(read_index(tmp_path / "mg").state_dict_metadata) == {"a", "b"}
    found = {"a": torch.zeros(3), "b": None}
    with pytest.raises(dcp.api.CheckpointException, match="Weights only load failed"):
        dcp.load(found, checkpoint_id=tmp_path / "mg", no_dist=True)
    assert not (tmp_path / "executed").exists()
    dcp.save({"a": torch.arange(3.0), "b": {"c": [1, "d"]}}, checkpoint_id=tmp_path / "other", no_dist=True)
    found["b"] = {"c": None}
    dcp.load(found, checkpoint_id=tmp_path / "other", no_dist=True)
    assert found["a"].tolist() == [0.0, 1.0, 2.0] and found["b"] == {"c": [1, "d"]}


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"no pickle", pickle.dumps(print), pickle.dumps(torch.load)])
def test_what_is_no_index(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    for is_wanted in (True, False):
        with pytest.raises(ConfigError, match=r"\.metadata cannot be read"):
            read_index(tmp_path, is_wanted)
