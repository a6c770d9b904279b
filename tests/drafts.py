"""Tiny draft models of every kind that vLLM has, for tiny models with random weights."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine import BASE, VOCAB, tiny_model

HIDDEN: int = BASE["hidden_size"]


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kivi-drafts-"))


def _weights(model: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(model) / "model.safetensors")


def _save(name: str, like: str, weights: dict[str, torch.Tensor], **config: Any) -> str:
    """A model with these weights, and the configuration of another but for `config`."""
    path = _folder() / name
    shutil.copytree(like, path, dirs_exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(path)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


@functools.cache
def foreseeable(heads: int = 4, head_dim: int = 32) -> str:
    """A llama whose second layer changes little: the first one alone often says what comes next.

    Its embeddings have the norm that its first layer would give them: EAGLE's has none.
    """
    model = tiny_model(num_attention_heads=heads, num_key_value_heads=2, head_dim=head_dim)
    weights = _weights(model)
    embeddings = weights["model.embed_tokens.weight"]
    embeddings /= embeddings.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)  # one is zero
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"] *= 0.3
    return _save(f"foreseeable-{heads}-{head_dim}", model, weights)


def eagle(model: str) -> str:
    """An EAGLE head that is the model's first layer: it reads tokens, and no hidden states."""
    layer = "model.layers.0."
    weights = {
        name.removeprefix("model."): weight
        for name, weight in _weights(model).items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    weights["fc.weight"] = torch.eye(HIDDEN, 2 * HIDDEN)
    return _save(f"eagle-{Path(model).name}", model, weights, num_hidden_layers=1)


def eagle3(model: str, head_dim: int = 32, kv_heads: int = 2) -> str:
    """An EAGLE-3 head of random weights."""
    heads, kv = 4 * head_dim, kv_heads * head_dim
    shapes = {
        "fc": (HIDDEN, 3 * HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "midlayer.self_attn.q_proj": (heads, 2 * HIDDEN),
        "midlayer.self_attn.k_proj": (kv, 2 * HIDDEN),
        "midlayer.self_attn.v_proj": (kv, 2 * HIDDEN),
        "midlayer.self_attn.o_proj": (HIDDEN, heads),
        "midlayer.mlp.gate_proj": (256, HIDDEN),
        "midlayer.mlp.up_proj": (256, HIDDEN),
        "midlayer.mlp.down_proj": (HIDDEN, 256),
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    weights = {f"{name}.weight": _random(*shape) for name, shape in shapes.items()}
    weights |= {f"midlayer.{name}.weight": torch.ones(HIDDEN) for name in norms}
    weights["norm.weight"] = torch.ones(HIDDEN)
    return _save(
        f"eagle3-{head_dim}-{kv_heads}",
        model,
        weights,
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=VOCAB,
        head_dim=head_dim,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )


def similar(model: str) -> str:
    """The model with a little noise: a draft model that is often right."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2
        else weight
        for name, weight in _weights(model).items()
    }
    return _save(f"similar-{Path(model).name}", model, weights)


@functools.cache
def with_mtp() -> str:
    """A mixture of experts with a layer for MTP: the last one again, and random weights before."""
    model = tiny_model(
        "glm4_moe",
        head_dim=32,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    weights = _weights(model)
    last, added = "model.layers.1.", "model.layers.2."
    weights |= {
        name.replace(last, added): weight.clone()
        for name, weight in weights.items()
        if name.startswith(last)
    }
    weights[f"{added}eh_proj.weight"] = _random(HIDDEN, 2 * HIDDEN)
    weights[f"{added}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{added}{norm}.weight"] = torch.ones(HIDDEN)
    return _save("with-mtp", model, weights)


METHODS: dict[str, tuple[Callable[[], str], Callable[[str], dict[str, Any]]]] = {
    "ngram": (
        tiny_model,
        lambda model: dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3),
    ),
    "eagle": (foreseeable, lambda model: dict(method="eagle", model=eagle(model))),
    "eagle3": (
        lambda: tiny_model(num_hidden_layers=8, initializer_range=0.08),
        lambda model: dict(method="eagle3", model=eagle3(model)),
    ),
    "eagle3, other heads": (
        lambda: tiny_model(num_hidden_layers=8, initializer_range=0.08),
        lambda model: dict(method="eagle3", model=eagle3(model, head_dim=64, kv_heads=4)),
    ),
    "mtp": (with_mtp, lambda model: dict(method="mtp")),
    "draft_model": (
        foreseeable,
        lambda model: dict(method="draft_model", model=similar(model)),
    ),
}
"""By name: a model, and vLLM's `speculative_config` for it."""
