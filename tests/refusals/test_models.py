"""Models that the KIVI cache cannot serve: refused from their config, before any weight."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.pictures import gemma3, image_processors, llava
from tests.refusals.configs import config_only, engine_config, llama4, refusal

_MLA = dict(
    kv_lora_rank=64,
    q_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    num_key_value_heads=4,
)
_WHISPER = dict(
    d_model=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
)


@pytest.mark.parametrize(
    ("model_type", "architecture", "overrides", "kind"),
    [
        ("deepseek_v2", "DeepseekV2ForCausalLM", _MLA, "multi-head latent attention (MLA)"),
        ("whisper", "WhisperForConditionalGeneration", _WHISPER, "an encoder-decoder"),
        ("mamba", "MambaForCausalLM", {}, "no attention layers"),
        ("bert", "BertModel", {}, "pooling over attention that is not causal"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else "",
)
def test_kind_of_model(
    model_type: str, architecture: str, overrides: dict[str, Any], kind: str
) -> None:
    message = refusal(config_only(model_type, architecture, **overrides), max_model_len=256)
    assert f"--kv-cache-dtype kivi2: models with {kind} are not supported" in message
    assert "use --kv-cache-dtype auto or fp8 for this model" in message


def test_attention_chunks() -> None:
    message = refusal(llama4(200))
    kind = "attention chunks of 200 tokens, no multiple of 128,"
    assert f"--kv-cache-dtype kivi2: models with {kind} are not supported" in message


def test_pooling() -> None:
    engine_config(runner="pooling")  # a model of generation, whose attention is causal
    message = refusal(runner="pooling", hf_overrides={"is_causal": False})
    assert "models with pooling over attention that is not causal are not supported" in message


def test_images_whose_tokens_attend_to_each_other_are_kept_whole() -> None:
    with image_processors():
        for model, whole in ((gemma3().path, True), (llava().path, False)):
            scheduler = engine_config(model).scheduler_config
            assert scheduler.disable_chunked_mm_input == whole
        other = engine_config(gemma3().path, kv_cache_dtype="auto").scheduler_config
        assert not other.disable_chunked_mm_input
        engine_config(gemma3().path, language_model_only=True)
        message = refusal(gemma3().path, long_prefill_token_threshold=64)
        assert "--long-prefill-token-threshold may forbid forever; leave it out" in message


_JAMBA = dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2)


def test_hybrid_models() -> None:
    model = config_only("jamba", "JambaForCausalLM", **_JAMBA)
    engine_config(model, max_model_len=256)
    message = refusal(model, max_model_len=256, pipeline_parallel_size=2)
    assert "a hybrid model in a pipeline is not supported" in message
    assert "leave out --pipeline-parallel-size" in message


@pytest.mark.parametrize("head_size", [16, 72, 384])
def test_head_size(head_size: int) -> None:
    message = refusal(config_only(head_dim=head_size))
    assert f"head size {head_size} is not supported by the KIVI cache" in message
    assert "supported: 32, 64, 80, 96, 112, 128, 160, 192, 256, 512" in message
    assert "--kv-cache-dtype auto or fp8" in message
