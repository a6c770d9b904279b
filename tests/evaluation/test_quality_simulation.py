"""The simulation's attention against its rule, position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality import models, simulation
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import BLOCK_SIZE, QUANTIZED_DTYPES, KiviConfig
from kivi_vllm.ops.format import PageFormat
from tests.engine import random_prompt, tiny_model
from tests.unit import kivi_numpy

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 32, 300


def _expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, config: KiviConfig, residual: int | None = None
) -> np.ndarray:
    """Each position alone, float64; q [Hq, T, D], k and v [Hkv, T, D] -> [T, Hq, D].

    Pages are those of `kivi_numpy`; `residual` is the configuration's where it is not given.
    """
    residual = config.residual_length if residual is None else residual
    fmt = PageFormat.of(config, SIZE, torch.float32)
    kd, vd = k.copy(), v.copy()
    for head in range(KV_HEADS) if not fmt.is_raw else ():
        for at in range(0, TOKENS // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
            block = np.s_[head, at : at + BLOCK_SIZE]
            page = kivi_numpy.encode_page(
                k[block].astype(np.float32),
                v[block].astype(np.float32),
                fmt,
                0 if at else config.sink_tokens,
            )
            kd[block], vd[block] = kivi_numpy.decode_page(page, fmt)
    sinks = np.s_[:, : config.sink_tokens]
    kd[sinks], vd[sinks] = k[sinks], v[sinks]
    out = np.empty((TOKENS, HEADS, SIZE))
    for t in range(TOKENS):
        first_raw = max(0, BLOCK_SIZE * (t // BLOCK_SIZE) - residual)
        raw = (np.arange(t + 1) >= first_raw)[:, None]
        for h in range(HEADS):
            g = h * KV_HEADS // HEADS
            keys = np.where(raw, k[g, : t + 1], kd[g, : t + 1])
            values = np.where(raw, v[g, : t + 1], vd[g, : t + 1])
            scores = keys @ q[h, t] * 0.2
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("residual", [0, 32, 128])
@pytest.mark.parametrize(
    "name", [*QUANTIZED_DTYPES, "kivi2:recipe=paper", "kivi4:recipe=paper", "kivi_raw"]
)
def test_every_position_sees_what_the_rule_says(name: str, residual: int) -> None:
    row = CacheRow.parse(name)
    config = KiviConfig.from_options(row.dtype, {**row.options, "residual_length": residual})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, TOKENS, SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    out, _ = simulation.attention(config)(None, q, k, v, None, scaling=0.2)
    arrays = [x[0].double().numpy() for x in (q, k, v)]
    expected = _expected(*arrays, config)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=2e-5)
    if row.dtype != "kivi_raw":
        wrong = _expected(*arrays, config, residual=128 - residual)
        least = {2: 0.01, 3: 0.005, 4: 0.002}[config.v_bits]
        assert np.abs(wrong - expected).max() > least, "the residual makes a difference"


def test_first_tokens_stay_as_they_are() -> None:
    k, v = torch.randn(2, 1, 1, 200, SIZE, generator=torch.Generator().manual_seed(1))
    q = torch.zeros(1, 1, 200, SIZE)  # the mean of what is seen
    config = KiviConfig.from_options("kivi2", {})
    out, _ = simulation.attention(config)(None, q, k, v, None)
    _, vd = simulation.as_cached(k[0, :, :128], v[0, :, :128], config)
    seen = torch.cat([v[0, 0, :4], vd[0, 4:128], v[0, 0, 128:151]])
    torch.testing.assert_close(out[0, 150, 0], seen.mean(0), atol=1e-5, rtol=0)


def test_soft_cap() -> None:
    q, k, v = torch.randn(3, 1, 1, 8, SIZE, generator=torch.Generator().manual_seed(2))
    out, _ = simulation.attention(KiviConfig.from_options("kivi2", {}))(
        None, q, k, v, None, scaling=3.0, softcap=2.0
    )
    scores = 2.0 * torch.tanh(q[0, 0] @ k[0, 0].T * 3.0 / 2.0)
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out[0, :, 0], scores.softmax(-1) @ v[0, 0])


def test_chunks_through_a_cache_see_what_is_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that keeps what it is given, they make what one step makes."""
    folder = tiny_model()  # it imports the library anew
    import transformers

    def whole(config: object, **settings: object) -> transformers.DynamicCache:
        assert settings["nbits"] == 2 and settings["residual_length"] == 64
        return transformers.DynamicCache()

    monkeypatch.setattr(transformers, "QuantizedCache", whole)
    row = CacheRow.parse("transformers:kv2:residual_length=64")
    given = dict(model=folder, dtype="float32", max_model_len=TOKENS)
    model, window = models.QuantizedCacheModel(row, given), random_prompt(TOKENS, seed=3)
    states = models.TransformersModel.hidden_states(model, window)
    assert states.shape[0] == TOKENS
    np.testing.assert_allclose(model.hidden_states(window), states, atol=1e-4)
    alone = models.TransformersModel.hidden_states(model, window[models.CHUNK :])
    assert np.abs(alone - states[models.CHUNK :]).max() > 0.01, "what is before makes a difference"
    with pytest.raises(UserError, match="shorter than 128 tokens"):
        models.QuantizedCacheModel(row, {**given, "max_model_len": 127})
