"""PPO with a reward model that comes from elsewhere: another architecture, another size, a score token of its own."""

from __future__ import annotations

import json

import cases
import pytest
import torch
from conftest import SMALL, launch
from test_hf_architectures import SIZES, internlm2, make, reference, transformers

SCORER = SIZES | dict(vocab_size=697, hidden_size=24, num_labels=1, max_position_embeddings=256)
SCORE_TOKEN = 696


@pytest.fixture(scope="module")
def policy(small_run) -> str:
    return f"policy.path={small_run / 'sft' / 'hf'}"


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> dict:
    """A Llama that scores, and the same as InternLM2's, which reads its score behind an additional token."""
    llama = make(tmp_path_factory.mktemp("llama"), "LlamaForSequenceClassification", SCORER | dict(head_dim=10))
    other = internlm2(llama, tmp_path_factory.mktemp("internlm2"), score=True)
    config = json.loads((other / "config.json").read_text()) | {"reward_token_id": SCORE_TOKEN}
    (other / "config.json").write_text(json.dumps(config))
    return {"llama": llama, "internlm2": other}


@pytest.mark.parametrize("name", ["llama", "internlm2"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1, True), (1, 2, 1)], ids=str)
def test_its_scores_are_those_of_transformers(worlds, policy, scorers, tmp_path, name, layout):
    settings = [*SMALL, policy, f"reward.path={scorers[name]}", "phases=[ppo]", f"output_dir={tmp_path}"]
    found = worlds(layout[0] * layout[1]).run(cases.first_iteration, settings, layout, "ppo")[0]
    model = reference(scorers["llama"], transformers.AutoModelForSequenceClassification)
    end = [SCORE_TOKEN] if name == "internlm2" else []
    with torch.no_grad():
        hidden = [model.model(torch.tensor([row + end])).last_hidden_state[0, -1] for row in found["tokens"]]
        wanted = model.score(torch.stack(hidden)).mean()
    assert found["figures"]["score/mean"] == pytest.approx(float(wanted), abs=1e-5)
    assert found["figures"]["kl/mean"] == 0


def test_a_run_and_what_it_exports(policy, scorers, tmp_path):
    settings = [*SMALL, policy, f"reward.path={scorers['internlm2']}", f"output_dir={tmp_path}"]
    result = launch(*settings, "phases=[ppo]", "ppo.iterations=1", "mesh.dp=1")
    assert str(scorers["internlm2"]) in result.stdout.replace("\n", "")
    configs = {name: json.loads((tmp_path / "ppo" / name / "config.json").read_text()) for name in ("hf", "hf_critic")}
    assert configs["hf"]["architectures"] == ["LlamaForCausalLM"] and configs["hf"]["hidden_size"] == 32
    assert configs["hf_critic"]["architectures"] == ["InternLM2ForRewardModel"]
    assert configs["hf_critic"]["hidden_size"] == 24 and configs["hf_critic"]["reward_token_id"] == SCORE_TOKEN
    # a reward phase goes on from it, and PPO then from what the phase made of it
    launch(*settings, "phases=[reward,ppo]", "reward.iterations=1", "ppo.iterations=1", "rerun=true", "mesh.dp=1")
    assert json.loads((tmp_path / "reward" / "hf" / "config.json").read_text())["hidden_size"] == 24
    other = launch(*settings[:-2], f"output_dir={tmp_path}", "phases=[ppo]", "ppo.iterations=1", check=False)
    assert other.returncode == 2 and "reward.path=None" in other.stderr


def test_a_model_without_a_score_is_refused(policy, tmp_path):
    folder = make(tmp_path, "LlamaForCausalLM", SCORER | dict(head_dim=10))
    settings = [*SMALL, policy, f"reward.path={folder}", "phases=[ppo]", f"output_dir={tmp_path / 'run'}"]
    refused = launch(*settings, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert all(word in refused.stderr for word in ("score.weight", "phases=[reward,ppo]")), refused.stderr


@pytest.mark.parametrize(
    ("change", "overrides", "words"),
    [
        ({"vocab_size": 500}, [], ["reward.path", "694 ids", "500"]),
        ({"max_position_embeddings": 64}, [], ["data.max_seq_len=192", "64"]),
        ({"num_attention_heads": 5}, [], ["num_attention_heads"]),
        ({}, ["reward.fns=[length]"], ["reward.path", "reward.fns"]),
        ({}, ["policy.path=null"], ["reward.path", "tokenizer.path"]),
    ],
)
def test_refusals(policy, scorers, tmp_path, change, overrides, words):
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(scorers["llama"] / "model.safetensors")
    config = json.loads((scorers["llama"] / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    settings = [*SMALL, policy, f"reward.path={folder}", "phases=[ppo]", f"output_dir={tmp_path / 'run'}"]
    refused = launch(*settings, *overrides, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert all(word in refused.stderr for word in words), refused.stderr
