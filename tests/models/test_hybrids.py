"""Hybrid models through the engine: states of Mamba and convolution layers beside our pages.

vLLM's own kernels for those layers decide what can be compared on a CPU: with Mamba-2 its prefix
caching fails there, and a convolution's answers depend on the chunks, whatever the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.choice import some
from tests.engine import MAMBA2, engine, generate, random_prompt, tiny_model
from tests.invariance.conftest import scheduler
from tests.models.harness import (
    LOSSLESS,
    PROMPTS,
    backends,
    change_attention,
    prompt_logprobs,
    worst,
)
from tests.models.pictures import image_processors


@dataclass(frozen=True)
class Hybrid:
    """A tiny model, and the engine's arguments with which vLLM's CPU kernels serve it."""

    model_type: str
    shape: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=lambda: {"enable_prefix_caching": False})

    @property
    def path(self) -> str:
        return tiny_model(self.model_type, **self.shape)


HYBRIDS = {
    "lfm2": Hybrid(
        "lfm2",
        dict(
            num_hidden_layers=4,
            layer_types=("conv", "full_attention") * 2,
            conv_L_cache=3,
            conv_dim=128,
            conv_dim_out=128,
            block_dim=128,
            block_ff_dim=256,
        ),
        dict(enable_prefix_caching=True),
    ),
    "granite-4": Hybrid(
        "granitemoehybrid",
        dict(
            num_hidden_layers=4,
            layer_types=("mamba", "attention") * 2,
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=64,
            **MAMBA2,
        ),
    ),
    "nemotron-h": Hybrid(
        "nemotron_h",
        dict(
            num_hidden_layers=4,
            hybrid_override_pattern="M*M*",
            head_dim=64,
            mamba_num_heads=8,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=1,
            chunk_size=64,
        ),
    ),
    "falcon-h1": Hybrid("falcon_h1", dict(head_dim=64, mamba_d_ssm=256, **MAMBA2)),
}

_GATED_DELTA_NET: dict[str, Any] = dict(
    num_hidden_layers=4,
    layer_types=("linear_attention",) * 3 + ("full_attention",),
    head_dim=64,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
)
_EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
)
GATED_DELTA_NETS = {
    "qwen3-next": Hybrid("qwen3_next", _GATED_DELTA_NET | _EXPERTS),
    "qwen3.5": Hybrid("qwen3_5_text", _GATED_DELTA_NET),
}
# vLLM's default for states depends on the processor, and with it where prefix hits may end.
STATES: dict[str, Any] = dict(dtype="bfloat16", mamba_ssm_cache_dtype="float32")


@pytest.mark.parametrize("name", some([*HYBRIDS], [0]))
def test_lossless_codec_equals_vllms_own_attention(name: str) -> None:
    hybrid = HYBRIDS[name]
    with engine(hybrid.path, "auto", **hybrid.settings) as llm:
        expected = generate(llm, PROMPTS, 20)
    with engine(hybrid.path, "kivi_raw", **hybrid.settings) as llm:
        assert backends(llm) == {"KIVI"}
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS

        # The same comparison must see a mistake.
        change_attention(llm, scale=0.02)
        assert worst(generate(llm, PROMPTS[:1], 20), expected[:1]) > 1e-3


@pytest.mark.parametrize("name", some([*GATED_DELTA_NETS], [0]))
def test_gated_delta_nets(name: str) -> None:
    """In bf16, which vLLM's kernel wants, with prefix hits: within the noise of other chunks."""
    path = GATED_DELTA_NETS[name].path
    prompts = [random_prompt(n, seed=n) for n in (300, 77, 513, 900)]
    found = {}
    for dtype, chunk in (("auto", 1024), ("auto", 100), ("kivi_raw", 1024)):
        # vLLM's module of Qwen3.5 has that of its images too.
        start = engine(path, dtype, max_num_batched_tokens=chunk, **STATES)
        with image_processors(), start as llm:
            first, again = (generate(llm, prompts, 20) for _ in range(2))
            found[dtype, chunk] = [a.tokens for a in first], np.array(prompt_logprobs(llm, prompts))
    assert [a.num_cached_tokens for a in again] == [0, 0, 512, 512]
    assert [a.tokens for a in again] == [a.tokens for a in first]
    (tokens, truth), (_, other), (ours, got) = found.values()
    assert ours == tokens
    # Without AVX-512's bf16 vLLM's attention rounds in another way than ours.
    share = 0.1 if torch.cpu._is_avx512_bf16_supported() else 1
    assert np.abs(got - truth).mean() < share * np.abs(other - truth).mean()


@pytest.mark.slow
def test_vllm_does_not_take_back_what_rejected_drafts_did_to_states() -> None:
    """Why drafts are refused: once vLLM's CPU kernels do, this fails, and they need not be."""
    hybrid = HYBRIDS["granite-4"]
    drafts = dict(
        method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3
    )
    prompts = [random_prompt(500, seed=500), random_prompt(250, seed=250)]
    found = []
    for speculation in (None, drafts):
        settings = dict(hybrid.settings, speculative_config=speculation)
        with engine(hybrid.path, "auto", **settings) as llm:
            found.append(generate(llm, prompts, 16))
    assert worst(*found) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "stride", "found"), [(0, 512, [512, 1024, 1500]), (256, 256, [512, 1024, 1280, 1500])]
)
def test_prompts_are_cut_where_states_are_kept(most: int, stride: int, found: list[int]) -> None:
    """Also where another group, of tails here, has blocks of fewer tokens."""
    path = GATED_DELTA_NETS["qwen3-next"].path
    prompt = random_prompt(1500, seed=1)
    settings: dict[str, Any] = STATES | dict(max_model_len=2048, max_num_batched_tokens=700)
    options = {"residual_length": 32, "hit_stride": most}
    with engine(path, "kivi_raw", kivi=options, **settings) as llm:
        core = scheduler(llm)
        ends = [0]
        assert core.block_size == stride
        schedule = core.schedule

        def watched(*args: Any) -> Any:
            scheduled = schedule(*args)
            ends.extend(ends[-1] + n for n in scheduled.num_scheduled_tokens.values())
            return scheduled

        core.schedule = watched
        answers = [generate(llm, [prompt], 20)[0] for _ in range(3)]
    assert ends[1 : 1 + len(found)] == found
    assert [a.num_cached_tokens for a in answers] == [0, found[-2], found[-2]]
    assert len({a.tokens for a in answers}) == 1
