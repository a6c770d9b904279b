"""LoRA adapters beside their base model: each answers as on vLLM's own cache."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import BASE, Answer, answer, engine, random_prompt, sampling, tiny_model
from tests.models.harness import LOSSLESS, backends, worst

RANK = 8
HEAD_SIZE = 32
# Of the tiny Llama: inputs and outputs of what makes queries, keys, values and outputs.
SHAPES = {
    "q_proj": (BASE["hidden_size"], 4 * HEAD_SIZE),
    "k_proj": (BASE["hidden_size"], 2 * HEAD_SIZE),
    "v_proj": (BASE["hidden_size"], 2 * HEAD_SIZE),
    "o_proj": (4 * HEAD_SIZE, BASE["hidden_size"]),
}

PROMPTS = tuple(tuple(random_prompt(n, seed=n)) for n in (300, 129))
CACHED = (256, 128)
"""Tokens of the prompts that a prefix hit finds."""

# One slot more than adapters: vLLM's CPU operators take slot -1, the last one, for requests
# without an adapter that share a batch with others. While it is empty, that adds nothing.
SETTINGS: dict[str, Any] = dict(enable_lora=True, max_loras=3, max_lora_rank=RANK)


def _adapter(folder: Path, seed: int) -> str:
    """Write an adapter in PEFT's format: it changes keys and values, and so the cache."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=256,
        lora_dropout=0.0,
        bias="none",
        target_modules=[*SHAPES],
        base_model_name_or_path="",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(int(BASE["num_hidden_layers"])):
        for name, (inputs, outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                tensor = torch.randn(shape, generator=generator) * 0.05
                tensors[f"{prefix}.lora_{half}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The base model and two adapters, as vLLM's requests name them."""
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    return [None, *(LoRARequest(n, i, _adapter(folder / n, i)) for i, n in ((1, "a"), (2, "b")))]


def _ask(llm: Any, adapters: list[Any], prompts: Any = PROMPTS) -> list[Answer]:
    """Every prompt with every adapter, all in one batch."""
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in adapters]
    requests = adapters * len(prompts)
    outputs = llm.generate(inputs, sampling(16), use_tqdm=False, lora_request=requests)
    return [answer(output) for output in outputs]


@pytest.fixture(scope="module")
def expected(adapters: list[Any]) -> list[Answer]:
    """Answers of vLLM's own attention."""
    with engine(tiny_model(), "auto", **SETTINGS) as llm:
        answers = _ask(llm, adapters)
    # Else pages could cross from one to another and nobody would see it.
    for of_prompt in (answers[:3], answers[3:]):
        for one, other in itertools.combinations(of_prompt, 2):
            assert one.difference(other) > 1e-2, "the adapters change nothing"
    return answers


@pytest.mark.slow
def test_adapters_with_the_lossless_codec_equal_vllms_own_attention(
    adapters: list[Any], expected: list[Answer]
) -> None:
    options = dict(kivi={"prefill": "cached"}, max_num_batched_tokens=200)
    with engine(tiny_model(), "kivi_raw", **options, **SETTINGS) as llm:
        assert backends(llm) == {"KIVI"}
        # One after the other: whoever comes later finds pages of the same tokens.
        one_by_one = [_ask(llm, [adapter], PROMPTS[:1])[0] for adapter in adapters]
        assert worst(one_by_one, expected[:3]) < LOSSLESS
        assert [a.num_cached_tokens for a in one_by_one] == [0, 0, 0]
        assert llm.reset_prefix_cache()

        # In one batch, then again on the pages of each.
        assert worst(_ask(llm, adapters), expected) < LOSSLESS
        again = _ask(llm, adapters)
        assert worst(again, expected) < LOSSLESS
        assert [a.num_cached_tokens for a in again] == [n for n in CACHED for _ in adapters]


@pytest.mark.slow
def test_pages_that_cross_from_adapter_to_adapter_are_seen(
    adapters: list[Any], expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the adapter in a page's hash, hits give other answers."""
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(kv_cache_utils, "_gen_lora_extra_hash_keys", lambda request: [])
    with engine(tiny_model(), "kivi_raw", kivi={"prefill": "cached"}, **SETTINGS) as llm:
        crossed = [_ask(llm, [adapter], PROMPTS[:1])[0] for adapter in adapters]
    assert [a.num_cached_tokens for a in crossed] == [0, 256, 256]
    assert worst(crossed[:1], expected[:1]) < LOSSLESS
    assert all(worst([c], [e]) > 1e-2 for c, e in zip(crossed[1:], expected[1:3], strict=True))
