"""How many sequences real models' caches hold, by vLLM's own accounting on their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.cli.plan import capacity
from tests.choice import some

GIB = 1 << 30


def _gemma3_27b() -> tuple[str, str, dict[str, Any]]:
    return (
        "gemma3_text",
        "Gemma3ForCausalLM",
        dict(
            vocab_size=262208,
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            sliding_window=1024,
            max_position_embeddings=131072,
            layer_types=[
                "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)
            ],
        ),
    )


def _gpt_oss_120b() -> tuple[str, str, dict[str, Any]]:
    shape = dict(num_hidden_layers=36, num_local_experts=128, max_position_embeddings=131072)
    return "gpt_oss", "GptOssForCausalLM", shape


def _qwen3_next_80b() -> tuple[str, str, dict[str, Any]]:
    shape = dict(num_hidden_layers=48, max_position_embeddings=262144)
    return "qwen3_next", "Qwen3NextForCausalLM", shape


# The least that they must hold in 40 GiB, in terms of bf16's, at these lengths.
LENGTHS = (8192, 32768, 131072)
MODELS = {
    "gemma-3-27b": (_gemma3_27b, (5.2, 5.2, 5.2), {}),
    "gpt-oss-120b": (_gpt_oss_120b, (4.8, 5.0, 5.2), {}),
    # Where it has AVX-512 BF16, vLLM's CPU keeps states in fp32 unless told so.
    "qwen3-next-80b": (_qwen3_next_80b, (2.1, 3.5, 4.5), {"mamba_ssm_cache_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", some([*MODELS], [0]))
def test_sequences_in_40_gib(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    make, least, options = MODELS[name]
    model_type, architecture, shape = make()
    config = AutoConfig.for_model(model_type, **shape)
    config.architectures, config.dtype = [architecture], "bfloat16"
    config.save_pretrained(tmp_path)
    for length, ratio in zip(LENGTHS, least, strict=True):
        auto, kivi2 = (
            capacity(
                str(tmp_path),
                dtype,
                40 * GIB,
                length,
                dtype="bfloat16",
                max_num_batched_tokens=8192,
                **options,
            )
            for dtype in ("auto", "kivi2")
        )
        assert kivi2.sequences >= ratio * auto.sequences, (length, kivi2, auto)
