"""Model families through the engine, against vLLM's own CPU attention.

`kivi_raw` keeps K and V verbatim in the same pages, ring and tails as the
quantized dtypes, so what differs is the plumbing and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.choice import some
from tests.engine import engine, generate, on_worker, tiny_model
from tests.models.harness import (
    LOSSLESS,
    PROMPTS,
    attention_layers,
    backends,
    change_attention,
    own_attention,
    worst,
)


@dataclass(frozen=True)
class Family:
    """A tiny model, and a mistake in its attention that must show."""

    model_type: str
    mistake: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return tiny_model(self.model_type, **self.overrides)


_OTHER_SCALE = {"scale": 0.1}

FAMILIES = {
    "llama": Family("llama", _OTHER_SCALE),
    "mistral-window": Family(
        "mistral", {"sliding_window": 0}, dict(sliding_window=100, head_dim=96)
    ),
    "falcon-rotary": Family(
        "falcon",
        _OTHER_SCALE,
        dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False),
    ),
    "falcon-alibi": Family(
        "falcon",
        {"alibi_slopes": None},
        dict(
            new_decoder_architecture=False,
            multi_query=True,
            alibi=True,
            bias=True,
            parallel_attn=False,
        ),
    ),
    "qwen2": Family("qwen2", _OTHER_SCALE),
    "qwen3": Family("qwen3", _OTHER_SCALE, dict(head_dim=64)),
    "phi3": Family("phi3", _OTHER_SCALE),
    "gemma2": Family(
        "gemma2",
        {"logits_soft_cap": 0.0},
        dict(
            head_dim=64,
            sliding_window=200,
            query_pre_attn_scalar=48,
            attn_logit_softcapping=5.0,
            tie_word_embeddings=True,
        ),
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {"sink_logits": None},
        dict(
            head_dim=64,
            sliding_window=128,
            intermediate_size=128,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "llama4": Family(
        "llama4_text",
        {"chunk_size": 0},
        dict(
            head_dim=64,
            attention_chunk_size=256,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size=128,
            intermediate_size_mlp=256,
            interleave_moe_layer_step=1,
            no_rope_layer_interval=2,
            use_qk_norm=False,
        ),
    ),
}


@pytest.mark.parametrize("name", some([*FAMILIES], [1, 3, 7, 8]))
def test_chunks_with_the_lossless_codec_equal_vllms_own_attention(name: str) -> None:
    family = FAMILIES[name]
    expected = own_attention(family.path)
    options = dict(kivi={"prefill": "cached"}, max_num_batched_tokens=200)
    with engine(family.path, "kivi_raw", **options) as llm:
        assert backends(llm) == {"KIVI"}
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS

        # The same comparison must see a mistake.
        change_attention(llm, **family.mistake)
        assert worst(generate(llm, PROMPTS[:1], 20), expected[:1]) > 1e-2


@pytest.mark.parametrize(
    "name", some(["mistral-window", "falcon-alibi", "gemma2", "gpt-oss", "llama4"], [1])
)
def test_whole_prompts_with_the_lossless_codec_equal_vllms_own_attention(name: str) -> None:
    path = FAMILIES[name].path
    expected = own_attention(path)
    with engine(path, "kivi_raw", kivi={"prefill": "exact", "residual_length": 64}) as llm:
        assert backends(llm) == {"KIVI"}
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS


@pytest.mark.parametrize("name", some(["gpt-oss", "llama4"], [0]))
def test_prefixes_that_are_cached_equal_vllms_own_attention(name: str) -> None:
    """Hits of all lengths, one that ends inside of an attention chunk among them."""
    path = FAMILIES[name].path
    prompts = (*PROMPTS, (*PROMPTS[3][:400], *PROMPTS[1]))
    expected = own_attention(path, prompts)
    with engine(path, "kivi_raw", kivi={"prefill": "cached"}) as llm:
        for _ in range(2):
            answers = generate(llm, prompts, 20)
            assert worst(answers, expected) < LOSSLESS
        assert [a.num_cached_tokens for a in answers] == [256, 0, 0, 512, 384]


def test_sink_logits_follow_the_models_weights() -> None:
    """The kernels' copies, in fp32, of numbers that are there only after the layers are made."""

    def check(runner: Any) -> None:
        layers = runner.model.model.layers
        for layer in layers:
            weight, impl = layer.attn.sinks, layer.attn.attn.impl
            assert weight.dtype == torch.bfloat16 and weight.abs().max() > 0
            kept = impl.params.sink_logits
            assert kept.dtype == torch.float32 and torch.equal(kept, weight.float())
            with torch.no_grad():
                weight += 1  # as new weights would be loaded
            impl.process_weights_after_loading(torch.bfloat16)
            assert impl.params.sink_logits is kept and torch.equal(kept, weight.float())
            kept.fill_(torch.nan)
            impl._filled = False  # as after a loader that does not say that it is done
        assert len(layers) == 2

    def check_again(runner: Any) -> None:
        for layer in runner.model.model.layers:
            logits = layer.attn.attn.impl.params.sink_logits
            assert torch.equal(logits, layer.attn.sinks.float())

    with engine(FAMILIES["gpt-oss"].path, "kivi2", dtype="bfloat16") as llm:
        on_worker(llm, check)
        generate(llm, PROMPTS[:1], 2)
        on_worker(llm, check_again)


def test_slopes_are_exact_whatever_the_models_dtype() -> None:
    """ALiBi's: Falcon's are divided by the root of the head size, 32 here, and no bf16 numbers."""

    def check(runner: Any) -> None:
        wanted = torch.tensor([2.0**-i for i in range(1, 9)]) / 32**0.5
        for layer in attention_layers(runner):
            slopes = layer.impl.params.alibi_slopes
            assert slopes.dtype == torch.float32
            torch.testing.assert_close(slopes, wanted, rtol=1e-6, atol=0)

    family = FAMILIES["falcon-alibi"]
    sizes = dict(num_attention_heads=8, hidden_size=256)
    path = tiny_model(family.model_type, **family.overrides | sizes)
    with engine(path, "kivi_raw", dtype="bfloat16") as llm:
        on_worker(llm, check)


@pytest.mark.slow
def test_gemma2s_alternating_window_matters() -> None:
    path = FAMILIES["gemma2"].path
    expected = own_attention(path)[:1]
    with engine(path, "kivi_raw") as llm:
        for wrong in (0, 201):
            change_attention(llm, sliding_window=wrong)
            assert worst(generate(llm, PROMPTS[:1], 20), expected) > 1e-2
