"""What the engine reports to hold in 256 MiB, for a model of SmolLM2-135M's shape."""

from __future__ import annotations

import functools
import tempfile

import pytest

from kivi_vllm.cli import demo
from tests.engine import BASE, engine
from tests.models.harness import capacity


@functools.cache
def _model() -> str:
    """Only a config: the attention's shape is the real one, the rest is small."""
    from transformers import LlamaConfig

    shape = dict(
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=144,
        max_position_embeddings=8192,
    )
    path = tempfile.mkdtemp(prefix="kivi-capacity-")
    LlamaConfig(**{**BASE, **shape}, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


@functools.cache
def _tokens(
    kv_cache_dtype: str, max_model_len: int, max_num_seqs: int = 256, recipe: str = "best"
) -> int:
    with engine(
        _model(),
        kv_cache_dtype,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=max_model_len,
        kv_cache_memory_bytes=256 << 20,
        max_num_seqs=max_num_seqs,
        **({} if kv_cache_dtype == "auto" else {"kivi": {"recipe": recipe}}),
    ) as llm:
        return capacity(llm)


def test_sequences_of_4096_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert _tokens("auto", 4096) == 11_648
    # The demo's, which it has from the config alone.
    demo._main(_model(), str(256 << 20), "4096")
    assert demo.PLANNED.findall(capsys.readouterr().out) == ["11648"]
    assert _tokens("kivi2", 4096, recipe="paper") >= 4.4 * 11_648
    assert _tokens("kivi2", 4096) >= 4.8 * 11_648
    assert _tokens("kivi_k3v2", 4096) >= 4.3 * 11_648


@pytest.mark.slow
def test_sequences_of_8192_tokens() -> None:
    assert _tokens("kivi2", 8192) >= 5.5 * _tokens("auto", 8192)
    assert _tokens("kivi_k3v2", 8192) >= 4.8 * _tokens("auto", 8192)


@pytest.mark.slow
def test_nothing_is_reserved_for_the_number_of_sequences() -> None:
    assert _tokens("kivi2", 4096, max_num_seqs=8) == _tokens("kivi2", 4096)
