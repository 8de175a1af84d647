"""tools/convert_hf: import, export, verify and inspect, and the folders that a run exports."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys

import cases
import pytest
import torch
import warm
from conftest import ROOT, SMALL, launch
from safetensors.torch import load_file, save_file
from test_exports import own_scores
from test_hf_architectures import GPT2, LAYOUTS, SIZES, assert_same_weights, expected, make, rows, transformers
from test_hf_folders import role_of

from rlhf_engine.converting import importer
from rlhf_engine.converting.layout import one_rank
from rlhf_engine.data.tokenizer import Tokenizer
from rlhf_engine.hf.files import file_names
from rlhf_engine.launching.preflight import plan

TOOL = ROOT / "tools" / "convert_hf" / "convert.py"


@pytest.fixture(scope="module")
def convert():
    """`convert(*words)`: the tool's exit status, in this process."""
    spec = importlib.util.spec_from_file_location("convert_hf", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words) -> int:
        try:
            return module.main([str(word) for word in words])
        finally:
            module.logging.disable(module.logging.NOTSET)

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source"), "Qwen2ForCausalLM", SIZES | dict(tie_word_embeddings=True), "40KB")


@pytest.fixture(scope="module")
def imported(convert, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "tp2_pp2"
    assert convert("import", "--hf", source, "--out", out, "--tp", 2, "--pp", 2) == 0
    return out


def test_there_is_a_file_for_each_rank(imported):
    assert len(list(imported.glob("*.distcp"))) == 4
    assert [path.name for path in imported.parent.iterdir()] == ["tp2_pp2"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_imported_folder_loads_on_any_mesh(worlds, imported, source, tmp_path, layout):
    world = worlds(layout[0] * layout[1])
    logits = world.run(cases.hf_round_trip, str(imported), layout, rows(), str(tmp_path / "out"))[0]
    torch.testing.assert_close(logits, expected(source), atol=1e-4, rtol=0)
    assert_same_weights(tmp_path / "out", source)


def test_export_and_verify(convert, imported, source, tmp_path, capsys):
    out = tmp_path / "hf"
    assert convert("export", "--megatron", imported, "--out", out, "--max-shard-gb", 40e-6) == 0
    assert len(list(out.glob("*.safetensors"))) > 2
    assert_same_weights(out, source)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text())
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert convert("verify", "--hf", source, "--megatron", imported) == 0
    assert "62 tensors equal bit for bit, 0 not" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "LlamaForSequenceClassification"])
def test_other_shapes_of_models(convert, worlds, tmp_path, name):
    """Transposed and fused weights, experts, a scalar head, a tp that pads the vocabulary otherwise."""
    sizes = SIZES | dict(num_key_value_heads=3, intermediate_size=57)
    options = {"GPT2LMHeadModel": GPT2, "MixtralForCausalLM": sizes | dict(num_local_experts=3)}
    source = make(tmp_path / "source", name, options.get(name, sizes | dict(num_labels=1)))
    assert convert("import", "--hf", source, "--out", tmp_path / "mg", "--tp", 3, "--pp", 3) == 0
    assert convert("verify", "--hf", source, "--megatron", tmp_path / "mg") == 0
    head = "scalar" if "Sequence" in name else "lm"
    words = (str(tmp_path / "mg"), (1, 2, 1), rows(), str(tmp_path / "out"), head)
    found = worlds(2).run(cases.hf_round_trip, *words)[0]
    torch.testing.assert_close(found, expected(source), atol=1e-4, rtol=0)
    assert_same_weights(tmp_path / "out", source)


def test_verify_tells_what_differs(convert, imported, source, tmp_path, capsys):
    other = tmp_path / "other"
    assert convert("export", "--megatron", imported, "--out", other) == 0
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.bias"][3] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert convert("verify", "--hf", other, "--megatron", imported) == 1
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.k_proj.bias differs by up to 0.5" in out and "61 tensors equal" in out


def test_another_dtype(convert, source, tmp_path):
    assert convert("import", "--hf", source, "--out", tmp_path / "bf16", "--dtype", "bfloat16") == 0
    assert convert("export", "--megatron", tmp_path / "bf16", "--out", tmp_path / "hf") == 0
    found = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = {key: value for path in source.glob("*.safetensors") for key, value in load_file(path).items()}
    assert all(torch.equal(found[key], value.bfloat16()) for key, value in wanted.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bfloat16_folder_stays_as_it_is(convert, source, tmp_path):
    folder = tmp_path / "bf16"
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    assert convert("import", "--hf", folder, "--out", tmp_path / "mg", "--tp", 2, "--pp", 3) == 0
    assert convert("verify", "--hf", folder, "--megatron", tmp_path / "mg") == 0
    assert convert("export", "--megatron", tmp_path / "mg", "--out", tmp_path / "out") == 0
    assert_same_weights(tmp_path / "out", folder)


def test_inspect(convert, imported, source, capsys):
    assert convert("inspect", imported) == 0
    out = capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert f"{model.num_parameters():,}" in out and "megatron checkpoint, 4 files" in out and "qwen2" in out
    assert convert("inspect", source) == 0
    assert "HF, " in capsys.readouterr().out


@pytest.mark.parametrize(("command", "left"), [("import", ["out.incomplete"]), ("export", [])])
def test_ctrl_c(imported, source, tmp_path, command, left):
    """One line; an import keeps what it can go on from, an export nothing."""
    words = ["import", "--hf", str(source)] if command == "import" else ["export", "--megatron", str(imported)]
    code = (
        "import runpy, sys\nfrom rlhf_engine.converting import convert, importer\n"
        "def interrupt(*args):\n    raise KeyboardInterrupt\n"
        "importer.copy_assets = convert.complete = interrupt\n"
        f"sys.argv = ['convert.py', *{words!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    result = warm.run([sys.executable, "-c", code])
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == left


def test_several_processes(convert, source, tmp_path, monkeypatch, capsys):
    """Each writes files of its own, and what one refuses is refused and leaves nothing."""
    warm.start_server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: warm.CONTEXT)
    hf, mg, out = tmp_path / "hf", tmp_path / "mg", tmp_path / "out"
    assert convert("import", "--hf", source, "--out", mg, "--processes", 0) == 2
    assert "--processes 0: 1 or more" in capsys.readouterr().err
    shutil.copytree(source, hf)
    for path in hf.glob("*.safetensors"):
        save_file(
            {key: x.fill_(torch.nan) if key == "model.norm.weight" else x for key, x in load_file(path).items()},
            path,
            {"format": "pt"},
        )
    words = ("--out", mg, "--pp", 2, "--processes", 2)
    assert convert("import", "--hf", hf, *words) == 2
    assert "model.norm.weight has entries that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert convert("import", "--hf", source, *words) == 0
    assert convert("export", "--megatron", mg, "--out", out, "--max-shard-gb", 100e-6, "--processes", 2) == 0
    assert_same_weights(out, source)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == file_names(len(files)) and len(files) > 1


def test_an_import_that_was_killed_goes_on(convert, source, tmp_path):
    """Killed after its first shard, the second run keeps that file and the result is whole."""
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; sys.argv[0] = 'x'; import importlib.util as u;"
        f"s = u.spec_from_file_location('c', {str(TOOL)!r}); m = u.module_from_spec(s); s.loader.exec_module(m);"
        "import rlhf_engine.converting.importer as c; write = c._write_results\n"
        "def stop(path, results):\n    write(path, results); os.kill(os.getpid(), signal.SIGKILL)\n"
        "c._write_results = stop\n"
        f"m.main(['import', '--hf', {str(source)!r}, '--out', {str(out)!r}, '--tp', '2'])"
    )
    killed = warm.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    first = tmp_path / "out.incomplete" / "__0_0.distcp"
    os.utime(first, ns=(10**18, 10**18))
    assert convert("import", "--hf", source, "--out", out, "--tp", 2) == 0
    assert (out / "__0_0.distcp").stat().st_mtime_ns == 10**18
    assert convert("verify", "--hf", source, "--megatron", out) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("changed", [False, True])
def test_an_import_whose_source_has_changed_begins_again(convert, source, tmp_path, monkeypatch, capsys, changed):
    """Interrupted behind its first shard, which was on the disk before it was called done."""
    hf, out, seen = tmp_path / "hf", tmp_path / "out", []
    shutil.copytree(source, hf)
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: [seen.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)])
    monkeypatch.setattr(os, "replace", lambda path, to: [seen.append(str(to)), replace(path, to)])
    with monkeypatch.context() as patch:
        patch.setattr(importer, "_write_results", stop_behind(importer._write_results))
        assert convert("import", "--hf", hf, "--out", out, "--tp", 2) == 130
    places = [seen.index(str(tmp_path / "out.incomplete" / name)) for name in ("__0_0.distcp", "rank_0.json")]
    assert places == sorted(places)
    if changed:
        for path in hf.glob("*.safetensors"):
            save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    first = tmp_path / "out.incomplete" / "__0_0.distcp"
    os.utime(first, ns=(10**18, 10**18))
    assert convert("import", "--hf", hf, "--out", out, "--tp", 2) == 0
    assert ((out / "__0_0.distcp").stat().st_mtime_ns == 10**18) is not changed
    assert convert("verify", "--hf", hf, "--megatron", out) == 0


def stop_behind(act):
    def stop(*args):
        act(*args)
        raise KeyboardInterrupt

    return stop


# -- what a folder holds besides -------------------------------------------------------------------------------


def weights_of(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()}


@pytest.fixture
def single(source, tmp_path):
    """The source as one file, and no other."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(weights_of(source), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_index_that_is_left_over(convert, source, single, tmp_path, capsys):
    """Neither imported, nor compared with, and said."""
    new = {key: value + 0.5 for key, value in weights_of(source).items()}
    for path in source.glob("*.safetensors*"):
        shutil.copy(path, single)
    save_file(new, single / "model.safetensors", {"format": "pt"})
    assert convert("import", "--hf", single, "--out", tmp_path / "new", "--tp", 2) == 0
    assert "not read: model-00001-of-" in capsys.readouterr().err
    assert convert("export", "--megatron", tmp_path / "new", "--out", tmp_path / "out") == 0
    found = weights_of(tmp_path / "out")
    assert found.keys() == new.keys() and all(torch.equal(found[key], value) for key, value in new.items())
    assert convert("verify", "--hf", single, "--megatron", tmp_path / "new") == 0
    assert convert("import", "--hf", source, "--out", tmp_path / "old") == 0
    assert convert("verify", "--hf", single, "--megatron", tmp_path / "old") == 1
    capsys.readouterr()
    assert convert("inspect", single) == 0
    out = capsys.readouterr().out
    assert "HF, 1 files, 62 tensors" in out and "not read" in out and "model.safetensors.index.json" in out


def test_a_score_beside_a_language_model(convert, single, imported, tmp_path, capsys):
    torch.manual_seed(2)
    head = {"v_head.summary.weight": torch.randn(1, 36), "v_head.summary.bias": torch.full((1,), 0.25)}
    save_file(head, single / "value_head.safetensors", {"format": "pt"})
    assert convert("import", "--hf", single, "--out", tmp_path / "mg") == 2
    assert "v_head.summary.weight" in (message := capsys.readouterr().err) and "--head lm or scalar" in message
    # a checkpoint without it is not the whole folder
    assert convert("verify", "--hf", single, "--megatron", imported) == 1
    out = capsys.readouterr().out
    assert "v_head.summary.weight is in the HF folder alone" in out and "62 tensors equal bit for bit, 2 not" in out
    assert convert("import", "--hf", single, "--out", tmp_path / "mg", "--head", "scalar", "--tp", 2) == 0
    assert convert("verify", "--hf", single, "--megatron", tmp_path / "mg") == 0
    assert convert("export", "--megatron", tmp_path / "mg", "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["score_bias"] == 0.25
    assert torch.equal(weights_of(tmp_path / "out")["score.weight"], head["v_head.summary.weight"])


def test_a_group_of_mixed_types(convert, single, tmp_path, capsys):
    """What is packed into one tensor is kept in the widest type, whichever part comes first."""
    weights = weights_of(single)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        weights[f"model.layers.1.{name}.weight"] = weights[f"model.layers.1.{name}.weight"].bfloat16()
    save_file(weights, single / "model.safetensors", {"format": "pt"})
    assert convert("import", "--hf", single, "--out", tmp_path / "mg", "--tp", 2) == 0
    capsys.readouterr()
    assert convert("verify", "--hf", single, "--megatron", tmp_path / "mg") == 1
    found = capsys.readouterr().out.splitlines()[:-1]
    assert len(found) == 2 and all("is torch.float32 for torch.bfloat16, otherwise equal" in line for line in found)


def test_keys_that_a_user_has_looked_at(convert, single, tmp_path, capsys):
    config = json.loads((single / "config.json").read_text())
    rope = config["rope_parameters"] | {"sharpness": 2.0}
    (single / "config.json").write_text(json.dumps(config | {"gate": "x", "rope_parameters": rope}))
    assert convert("import", "--hf", single, "--out", tmp_path / "mg") == 2
    assert "--ignore-keys sharpness gate reads" in capsys.readouterr().err
    words = ("--ignore-keys", "gate", "sharpness")
    assert convert("import", "--hf", single, "--out", tmp_path / "mg", *words) == 0
    assert json.loads((tmp_path / "mg" / "config.json").read_text()) == config  # without what was not imported
    assert convert("inspect", single, *words) == 0 and convert("inspect", single) == 2


# -- folders that runs export ----------------------------------------------------------------------------------


def test_a_run_from_random_weights_exports_llama(convert, small_run, capsys):
    policy, reward = small_run / "sft" / "hf", small_run / "reward" / "hf"
    model, info = transformers.LlamaForCausalLM.from_pretrained(policy, output_loading_info=True)
    assert not any(info.values()) and (policy / "tokenizer.model").is_file()
    assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).shape[1] > 3
    _, info = transformers.LlamaForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    assert not any(info.values())
    assert json.loads((reward / "config.json").read_text())["score_bias"] != 0
    for phase, role in (("sft", "policy"), ("reward", "reward")):
        words = ("verify", "--hf", small_run / phase / "hf", "--megatron", trained(small_run / phase), "--role", role)
        assert convert(*words) == 0, capsys.readouterr().out


def trained(phase):
    """The last checkpoint of a phase's folder."""
    return phase / "checkpoints" / (phase / "checkpoints" / "latest").read_text()


def contents(folder) -> dict:
    """Of its files, the order of keys left out."""
    return {p.name: json.loads(p.read_text()) if p.suffix == ".json" else p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("phase", "role", "described"),
    [
        ("sft", "policy", "sft"),
        ("reward", "reward", "reward"),
        ("reward", "reward", "sft"),
        ("sft", "policy", "reward"),
    ],
)
def test_an_export_of_a_checkpoint_is_that_of_its_run(convert, small_run, tmp_path, capsys, phase, role, described):
    """Whichever head the model has that the folder with its config.json is of."""
    wanted = small_run / phase / "hf"
    words = ("--megatron", trained(small_run / phase), "--role", role, "--hf", small_run / described / "hf")
    assert convert("export", *words, "--out", tmp_path / "hf") == 0
    assert contents(tmp_path / "hf") == contents(wanted)
    bias = json.loads((wanted / "config.json").read_text()).get("score_bias")
    said = f"transformers leaves out score_bias of config.json: its scores are ours less {bias or 0:.4g}"
    assert (said in capsys.readouterr().out) == (bias is not None) == (phase == "reward")


def test_a_run_that_begins_with_what_another_exported(small_run, tmp_path):
    """It has its prompts, its ends and its scores."""
    paths = {"policy": small_run / "sft" / "hf", "reward": small_run / "reward" / "hf"}
    settings = [*SMALL, "phases=[ppo]", f"output_dir={tmp_path}", *(f"{k}.path={v}" for k, v in paths.items())]
    run = plan(cases.compose(settings), 1)
    own = Tokenizer(str(small_run / "tokenizer" / "tokenizer.model"))
    prompts = [row.prompt for source in run.sources for row in source.first_rows(64)[0]]
    assert len(prompts) > 50
    assert [run.tokenizer.render_prompt(p) for p in prompts] == [own.render_prompt(p) for p in prompts]
    assert run.tokenizer.end_ids == own.end_ids and not [note for note in run.notes if "pad_token_id" in note]
    rows = [[5 + i, 9, 11, 40 + i, own.end_id] for i in range(4)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(paths["reward"])
    with torch.no_grad():
        wanted = model(torch.tensor(rows)).logits.squeeze(1) + model.config.score_bias
    with one_rank() as mesh:
        found = own_scores(role_of(paths["reward"], mesh, "scalar"), rows)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_ppo_from_an_exported_policy(convert, small_run, tmp_path):
    """A folder that one run exported is where the next starts from, critic and all."""
    path = small_run / "sft" / "hf"
    settings = [*SMALL, f"policy.path={path}", "phases=[sft,reward,ppo]", "mesh.tp=2", f"output_dir={tmp_path}"]
    launch(*settings, "sft.iterations=1", "reward.iterations=1", "ppo.iterations=1")
    for name, cls in (("hf", "LlamaForCausalLM"), ("hf_critic", "LlamaForSequenceClassification")):
        _, info = getattr(transformers, cls).from_pretrained(tmp_path / "ppo" / name, output_loading_info=True)
        assert not any(info.values()) and (tmp_path / "ppo" / name / "tokenizer.model").is_file()
        role = "critic" if name == "hf_critic" else "policy"
        words = ("--megatron", trained(tmp_path / "ppo"), "--role", role, "--hf", path)
        assert convert("export", *words, "--out", tmp_path / name) == 0
        assert contents(tmp_path / name) == contents(tmp_path / "ppo" / name)


# -- what is refused -------------------------------------------------------------------------------------------


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["model.safetensors is cut off"]


def no_header(folder):
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    return ["model.safetensors is cut off or no safetensors file"]


def absent_file(folder):
    (folder / "model.safetensors").unlink()
    listing = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    return ["model.safetensors.index.json names model-00001-of-00002.safetensors, which is not there"]


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return ["has no weights"]


def edit_weights(change, *words):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return words

    return edit


def edit_config(*words, **changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return words

    return edit


def code_in_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Executed(str(folder / "executed"))))
    return ["pytorch_model.bin cannot be read without running code from it"]


class Executed:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


KEY = "model.layers.1.self_attn.q_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"
BROKEN = {
    "cut": cut,
    "no header": no_header,
    "absent file": absent_file,
    "no weights": no_weights,
    "absent tensor": edit_weights(lambda w: w.pop(KEY), KEY, "has no tensor"),
    "shape": edit_weights(lambda w: w.update({KEY: w[KEY][:-1].clone()}), KEY, "(59, 36)", "(60, 36)"),
    "nan": edit_weights(lambda w: w[KEY][3].fill_(torch.nan), KEY, "not finite"),
    "left over": edit_weights(lambda w: w.update({BIAS: torch.ones(60)}), BIAS, "has no place"),
    "architecture": edit_config("'LamaForCausalLM'", "LlamaForCausalLM", architectures=["LamaForCausalLM"]),
    "rope": edit_config("config.json", "rope_type=yarn", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
    "rope key": edit_config("config.json", "beta", rope_parameters={"rope_type": "linear", "factor": 4.0, "beta": 1.0}),
    "key": edit_config("config.json", "logit_scale=0.5", "may matter", logit_scale=0.5),
    "quantised": edit_config("config.json", "quantization_config", quantization_config={"bits": 4}),
    "activation": edit_config("config.json", "hidden_act='gelu'", "'silu'", hidden_act="gelu"),
    "kv heads": edit_config("mesh.tp=2", "num_key_value_heads=3", num_key_value_heads=3),
    "pickle": code_in_a_pickle,
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_line_and_nothing_left_behind(convert, tmp_path, capsys, name):
    folder = make(tmp_path / "hf", "LlamaForCausalLM", SIZES | dict(head_dim=10))
    words = BROKEN[name](folder)
    capsys.readouterr()
    assert convert("import", "--hf", folder, "--out", tmp_path / "out", "--tp", 2) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and not (folder / "executed").exists()


@pytest.mark.parametrize(("command", "size"), [("import", 60_000), ("import", 102_400), ("export", 60_000)])
def test_a_full_disk(imported, source, tmp_path, command, size):
    """A limit on the size of files stands for it. Within an archive of torch's, another error hides the system's."""
    words = ["import", "--hf", str(source)] if command == "import" else ["export", "--megatron", str(imported)]
    code = (
        f"import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
        f"sys.argv = ['convert.py', *{words!r}, '--out', {str(tmp_path / 'out')!r}];"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    result = warm.run([sys.executable, "-c", code])
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(convert, tmp_path, source, sharded):
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weights = {key: value for path in source.glob("*.safetensors") for key, value in load_file(path).items()}
    if sharded:
        names = sorted(weights)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for name, keys in parts.items():
            torch.save({key: weights[key] for key in keys}, folder / name)
        listing = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(listing))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    assert convert("import", "--hf", folder, "--out", tmp_path / "mg", "--tp", 2) == 0
    assert convert("verify", "--hf", source, "--megatron", tmp_path / "mg") == 0


def test_a_run_is_refused_in_one_line(small_run, tmp_path):
    """What only the ranks find, while they read."""
    folder = tmp_path / "hf"
    shutil.copytree(small_run / "sft" / "hf", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = launch(*SMALL, f"policy.path={folder}", "phases=[sft]", f"output_dir={tmp_path / 'run'}", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert "model.norm.weight has entries that are not finite" in errors[0]
