"""What passes through each rank: weights that are loaded and exported, responses that all are told. Nothing through one
rank."""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import traffic
from safetensors.torch import load_file
from test_hf_architectures import EXPERTS, SIZES, assert_same_weights, make
from test_rollout import IDS, PROMPTS, settings

from rlhf_engine.config import ConfigError
from rlhf_engine.converting import workers
from rlhf_engine.hf import index
from rlhf_engine.hf.files import TensorFile, cut, file_names
from rlhf_engine.hf.shares import deal
from rlhf_engine.rollout.generate import split
from rlhf_engine.rollout.progress import Response
from rlhf_engine.rollout.responses import pack, unpack

__all__ = ["settings"]  # a fixture

LARGE = SIZES | dict(vocab_size=256, num_hidden_layers=8, head_dim=10)  # a vocabulary without padding
MODELS = {"LlamaForCausalLM": LARGE, "Qwen3MoeForCausalLM": LARGE | EXPERTS | dict(num_experts=6)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name), name, options) for name, options in MODELS.items()}


def num_bytes(folder: Path) -> int:
    return sum(entry.stop - entry.start for entry in index.index(folder).values())


# -- who gets what ---------------------------------------------------------------------------------------------


def test_each_gets_as_much_of_what_it_holds():
    sizes = {"a": 5, "b": 3, "c": 3, "d": 2, "e": 1}
    assert deal(sizes, dict.fromkeys(sizes, (0, 1)), [0, 1]) == {0: ["a", "d"], 1: ["b", "c", "e"]}
    held = {"a": [0, 1], "b": [0, 1], "c": [0, 1], "d": [2, 3], "e": [2, 3]}
    assert deal(sizes, held, [0, 1, 2, 3]) == {0: ["a"], 1: ["b", "c"], 2: ["d"], 3: ["e"]}
    assert deal(sizes, held, [0, 2]) == {0: ["a", "b", "c"], 2: ["d", "e"]}
    assert deal(sizes, held, [1]) == {1: ["a", "b", "c", "d", "e"]}  # who holds the rest does not write


def test_files_of_a_limited_size():
    assert cut({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert file_names(1) == ["model.safetensors"]
    assert file_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_file_that_is_written_one_tensor_after_the_other(tmp_path):
    tensors = {
        "double": torch.arange(3).double(),
        "transposed": torch.randn(5, 3).t(),
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(1, 1).half(),
    }
    with TensorFile(tmp_path / "x", {name: tensor.to("meta") for name, tensor in tensors.items()}) as file:
        for tensor in tensors.values():
            file.add(tensor)
    found = load_file(tmp_path / "x")
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())
    # 3 of 8 bytes, 15 of 4, 7 and 1 of 2
    assert {name: e.stop - e.start for name, e in index.stored_tensors(tmp_path / "x").items()} == {
        "double": 24, "transposed": 60, "bfloat16": 14, "half": 2
    }  # fmt: skip


def test_a_process_that_is_killed(monkeypatch):
    broken: Future = Future()
    broken.set_exception(BrokenProcessPool("as the executor says it"))
    pool = contextlib.nullcontext(SimpleNamespace(submit=lambda *args: broken))
    monkeypatch.setattr(workers, "_processes", lambda count: pool)
    with pytest.raises(ConfigError, match=r"^one of 2 processes was killed, .*: --processes N for fewer$"):
        list(workers.spread(lambda unit, advance: unit, {"a": 1, "b": 1}, print, 2))
    # what is not worth a process more is done in this one
    done: list[int] = []
    found = workers.spread(lambda unit, advance: advance(unit), {3: 10**9, 4: 10**9}, done.append)
    assert [unit for unit, _ in found] == [3, 4] and done == [3, 4]


# -- weights ---------------------------------------------------------------------------------------------------

LAYOUTS = [("LlamaForCausalLM", layout) for layout in ((2, 1, 2), (2, 2, 1), (1, 2, 2))]
LAYOUTS += [("Qwen3MoeForCausalLM", (1, 2, 2, False, 2)), ("Qwen3MoeForCausalLM", (2, 1, 2, True, 2))]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_every_rank_reads_and_writes_its_share(worlds, folders, tmp_path, name, layout):
    folder, out = folders[name], tmp_path / "hf"
    total, (tp, pp, *_) = num_bytes(folder), layout
    ep = layout[4] if len(layout) > 4 else 1
    found = worlds(4).run(traffic.load_and_export, str(folder), layout, str(out))
    assert_same_weights(out, folder)
    assert sum(each["written"] for each in found) == total
    experts = total - sum(math.prod(e.shape) * 4 for e in index.index(folder).values() if ".experts." not in e.name)
    for rank, each in enumerate(found):
        file = out / f"model-0000{rank + 1}-of-00004.safetensors"
        assert each["written"] == sum(e.stop - e.start for e in index.stored_tensors(file).values())
        assert each["written"] <= 1.1 * total / 4
        # of what it writes, it has one of tp shards; nothing comes from other stages
        assert each["gathered"] <= each["written"] * (tp - 1) / tp and each["received"] == 0
        assert each["read"] <= 1.1 * ((total - experts) / (tp * pp) + experts / (tp * pp * ep))
        assert each["objects"] < 3 * 30_000


@pytest.mark.parametrize("full", [0, 3])
def test_one_that_cannot_write_is_heard_of_by_all(worlds, folders, tmp_path, full):
    folder = folders["LlamaForCausalLM"]
    found = worlds(4).run(traffic.load_and_export, str(folder), (2, 2, 1), str(tmp_path / "hf"), full)
    assert found == ["[Errno 28] No space left on device"] * 4
    assert list(tmp_path.iterdir()) == []


# -- responses -------------------------------------------------------------------------------------------------


def test_responses_as_numbers():
    """Bit for bit, whatever follows them; of two that have one the later."""
    said = {2: Response([7, 8, 2], [-0.5, -1e-30, -3.25], True), 0: Response([9], [-0.1], False)}
    more = {1: Response([5, 5], [0.0, -2.0], False), 0: Response([6, 1], [-7.0, -8.0], True)}
    parts = [pack(said), pack({}), pack(more)]
    assert parts[0].dtype == torch.int32 and [len(part) for part in parts] == [1 + 2 * 3 + 2 * 4, 1, 1 + 2 * 3 + 2 * 4]
    assert parts[0][:11].tolist() == [2, 2, 3, 1, 0, 1, 0, 7, 8, 2, 9]
    padded = [torch.nn.functional.pad(part, (0, 20 - len(part))) for part in parts]
    found = unpack(padded, 3)
    f32 = [torch.tensor([-0.5, -1e-30, -3.25]).tolist()]
    assert list(found) == [more[0], more[1], Response([7, 8, 2], *f32, True)]
    assert found.lengths.tolist() == [2, 2, 3] and found.tokens.tolist() == [6, 1, 5, 5, 7, 8, 2]
    tokens, lengths, mask = found.behind([[1], [1, 3, 3], [1, 4]], 4)
    assert tokens.tolist() == [[1, 6, 1, 0, 0, 0, 0, 0], [1, 3, 3, 5, 5, 0, 0, 0], [1, 4, 7, 8, 2, 0, 0, 0]]
    assert lengths.tolist() == [3, 5, 5] and mask.sum(1).tolist() == [2, 2, 3]
    assert tokens[mask].tolist() == found.tokens.tolist()
    assert [len(r.tokens) for r in found.take(torch.tensor([2, 0, 2]))] == [3, 2, 3]
    assert len(unpack([pack({})] * 2, 0)) == 0


@pytest.mark.parametrize("layout", [(1, 1, 4), (1, 2, 2)], ids=str)
def test_responses_come_once_to_each_rank(worlds, settings, layout):
    """As 8 bytes a token, padded to the replica that has most, and in no object."""
    found = worlds(4).run(traffic.rollout, settings, layout, PROMPTS, IDS)
    (responses, _), limit = found[0], 10
    shares = split(PROMPTS, [len(prompt) + limit for prompt in PROMPTS], 4)
    most = max(1 + sum(3 + 2 * len(responses[i][0]) for i in share) for share in shares)
    for others, each in found:
        assert others == responses
        assert each["rows"] == 3 * 4 * most
        assert each["objects"] < 3 * 2_000
