"""A Llama in plain torch, written from its description for the tests: no cache, no kernels, no parallelism."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@torch.no_grad()
def llama_log_probs(folder: Path, tokens: list[int]) -> tuple[list[float], list[float]]:
    """Log-prob of tokens 1, 2, ... and the entropy of the distributions that they come from, in float64."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["hidden_size"] // heads, len(tokens)

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name]

    frequency = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)

    def rotate(x):  # (heads, length, size)
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    x = w["model.embed_tokens.weight"][tokens]
    future = torch.ones(length, length).triu(1).bool()
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        h = norm(x, name + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{name}self_attn.{part}_proj.weight"].T).view(length, n, size).transpose(0, 1)
            for part, n in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (part.repeat_interleave(heads // groups, 0) for part in (rotate(k), v))
        scores = (rotate(q) @ k.transpose(1, 2) / size**0.5).masked_fill(future, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        x = x + out @ w[name + "self_attn.o_proj.weight"].T
        h = norm(x, name + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[name + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    log_p = (norm(x, "model.norm.weight") @ head.T).log_softmax(-1)[:-1]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1).tolist(), entropy.tolist()
