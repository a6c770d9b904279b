"""A causal model that makes embeddings: prompts alone, in chunks, on cached prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import engine, random_prompt, tiny_model
from tests.invariance.conftest import scheduler
from tests.models.harness import LOSSLESS, PROMPTS, backends
from tests.models.pictures import tokenizer

SETTINGS: dict[str, Any] = dict(runner="pooling", convert="embed", skip_tokenizer_init=False)


def _model() -> str:
    path = tiny_model("qwen3", head_dim=64)
    tokenizer().save_pretrained(path)  # vLLM wants one here, though the prompts are token ids
    return path


def _embed(llm: Any, prompts: Any = PROMPTS) -> tuple[torch.Tensor, list[int]]:
    """Embeddings [n, 128] of length 1, and how many tokens of each prompt were cached."""
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    outputs = llm.embed(inputs, use_tqdm=False)
    found = torch.tensor([output.outputs.embedding for output in outputs])
    return found, [output.num_cached_tokens for output in outputs]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.slow
def test_embeddings_with_the_lossless_codec_equal_vllms_own_attention() -> None:
    others = [random_prompt(len(p), seed=1000 + len(p)) for p in PROMPTS]
    with engine(_model(), "auto", **SETTINGS) as llm:
        assert backends(llm) == {"CPU_ATTN"}
        expected, _ = _embed(llm)
        # What the comparison below must see: other tokens, other embeddings.
        assert _difference(_embed(llm, others)[0], expected) > 0.1
    options = dict(kivi={"prefill": "cached"}, max_num_batched_tokens=200)
    with engine(_model(), "kivi_raw", **options, **SETTINGS) as llm:
        assert backends(llm) == {"KIVI"}
        for cached in ([0, 0, 0, 0], [256, 0, 0, 512]):
            found, hits = _embed(llm)
            assert hits == cached
            assert _difference(found, expected) < LOSSLESS


@pytest.mark.slow
def test_quantized_embeddings_do_not_depend_on_chunks() -> None:
    with engine(_model(), "kivi2", kivi={"prefill": "cached"}, **SETTINGS) as llm:
        whole, _ = _embed(llm)
        for chunk in (48, 200):
            assert llm.reset_prefix_cache()
            scheduler(llm).max_num_scheduled_tokens = chunk
            found, _ = _embed(llm)
            assert _difference(found, whole) < 1e-3
        again, hits = _embed(llm)
        assert hits == [256, 0, 0, 512]
        assert _difference(again, whole) < 1e-3
    with engine(_model(), "auto", **SETTINGS) as llm:
        full, _ = _embed(llm)
    # Negative control: pages were read, and are not what was put into them.
    assert _difference(whole[[0, 3]], full[[0, 3]]) > 1e-2
