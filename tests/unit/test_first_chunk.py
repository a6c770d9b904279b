"""Which library attends where nothing is cached, and that it is given the right things."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import AttentionParams, DeviceStep, LayerCache, Raw
from kivi_vllm.ops.triton import first_chunk, operators

PARAMS = AttentionParams(0.125)


@pytest.fixture(autouse=True)
def any_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators.checks, "check_query", lambda *_: None)


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_compiled", set())


@pytest.fixture(autouse=True)
def nothing_chosen_yet() -> Any:
    caches = (first_chunk._chosen, first_chunk._flash_attention, first_chunk._xformers)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def cache_of(num_kv_heads: int) -> LayerCache:
    fmt = PageFormat(2, 2, 32, 64, torch.bfloat16, two_level=True)
    pages = torch.zeros(2, 1, num_kv_heads, fmt.page_bytes, dtype=torch.uint8)
    ring = Raw(torch.zeros(2, num_kv_heads, 32, 128), torch.zeros(4, 8, dtype=torch.int32))
    return LayerCache(fmt, pages, ring)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    sink_logits: torch.Tensor | None = None,
) -> Any:
    """Causal attention of one sequence, [n, heads, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    n = q.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    if window:
        mask = mask.triu(1 - window)
    if sink_logits is not None:
        scores = (q @ k.repeat_interleave(len(q) // len(k), 0).mT) * scale
        weights = scores.masked_fill(~mask, -torch.inf).exp()
        shares = weights / (weights.sum(-1, keepdim=True) + sink_logits.exp()[:, None, None])
        return (shares @ v.repeat_interleave(len(q) // len(v), 0)).transpose(0, 1)
    gqa = q.shape[0] != k.shape[0]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa
    )
    return out.transpose(0, 1)


def flash(q: Any, k: Any, v: Any, out: Any, **given: Any) -> None:
    """What vLLM's `flash_attn_varlen_func` does, of what is asked of it here."""
    starts = given["cu_seqlens_q"].tolist()
    assert given["causal"] and given["fa_version"] == 3
    assert given["max_seqlen_q"] == max(b - a for a, b in pairwise(starts))
    window = given["window_size"][0] + 1 if given["window_size"] else 0
    for a, b in pairwise(starts):
        parts = (q[a:b], k[a:b], v[a:b])
        out[a:b] = attention(*parts, given["softmax_scale"], window, given["s_aux"])


def with_flash(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    name = "vllm.v1.attention.backends.fa_utils"
    install(
        monkeypatch,
        name,
        flash_attn_varlen_func=flash,
        get_flash_attn_version=lambda **_: version,
    )


class Mask:
    """xformers' BlockDiagonalCausalMask."""

    def __init__(self, lens: list[int], window: int = 0) -> None:
        self.lens, self.window = lens, window

    @classmethod
    def from_seqlens(cls, lens: list[int]) -> Mask:
        return cls(lens)

    def make_local_attention(self, window: int) -> Mask:
        return Mask(self.lens, window)


def memory_efficient(q: Any, k: Any, v: Any, attn_bias: Mask, scale: float) -> torch.Tensor:
    """xformers' function: [1, tokens, kv heads, group, D], K and V expanded."""
    out, at = torch.empty_like(q), 0
    for n in attn_bias.lens:
        one = slice(at, at + n)
        parts = (x[0, one].flatten(1, 2) for x in (q, k, v))
        part = attention(*parts, scale, attn_bias.window)
        out[0, one] = part.view(out[0, one].shape)
        at += n
    return out


def with_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "xformers", __path__=[])
    install(monkeypatch, "xformers.ops", memory_efficient_attention_forward=memory_efficient)
    install(monkeypatch, "xformers.ops.fmha", __path__=[])
    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalCausalMask=Mask)


def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", None)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("library", ["flash", "xformers", "flash with sink logits"])
def test_first_chunks_behind_decodes(
    library: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library != "xformers":
        with_flash(monkeypatch, 3)
    else:
        without_flash(monkeypatch)
        with_xformers(monkeypatch)
    logits = torch.randn(6) if library == "flash with sink logits" else None
    params = AttentionParams(0.125, sliding_window=window, sink_logits=logits)
    function = first_chunk.choose(params, 64, torch.bfloat16)
    assert function is not None
    calls: list[str] = []
    monkeypatch.setattr(operators, "decode", lambda *_: calls.append("decode"))
    monkeypatch.setattr(operators, "prefill", lambda *_: calls.append("prefill"))
    starts = torch.tensor([0, 1, 3, 23, 33], dtype=torch.int32)
    ends = torch.tensor([50, 60, 20, 10], dtype=torch.int32)
    table = torch.zeros(4, 1, dtype=torch.int32)
    lens = [20, 10]
    step = DeviceStep(starts, ends, table, 2, 3, 33, 20, False, 2, True, lens)
    q, k, v = torch.randn(40, 12, 64).split([6, 3, 3], 1)
    output = torch.full((40, 6, 64), torch.nan)
    cache = cache_of(3)
    for _ in range(2):
        operators.attend(step, cache, q, k, v, replace(params, first_chunk=function), output)
    # The kernel runs once, so that it is compiled before the first request with a history.
    assert calls == ["decode", "prefill", "decode"]
    for a, b in ((3, 23), (23, 33)):
        wanted = attention(q[a:b], k[a:b], v[a:b], 0.125, window, logits)
        torch.testing.assert_close(output[a:b], wanted)
    assert output[:3].isnan().all() and output[33:].isnan().all()


@pytest.mark.parametrize("chunk_size", [128, 256])
def test_prompts_longer_than_a_chunk_go_to_the_own_kernel(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(operators, "prefill", lambda *_: calls.append("own"))
    starts, ends = torch.tensor([0, 200]), torch.tensor([200])
    step = DeviceStep(starts, ends, ends[None], 0, 0, 200, 200, False, 1, True, [200])
    cache = cache_of(1)
    params = replace(PARAMS, chunk_size=chunk_size, first_chunk=lambda *_: calls.append("library"))
    x = torch.zeros(200, 1, 64)
    for _ in range(2):
        operators.attend(step, cache, x, x, x, params, x)
    # The own kernel runs once in any case.
    assert calls == (["own", "own"] if chunk_size == 128 else ["own", "library", "library"])


@pytest.mark.parametrize(
    "change",
    [
        dict(nothing_cached=False),
        dict(per_position=True),
        dict(last_visible=torch.tensor([0, 3, 3, 3, 4], dtype=torch.int32)),
    ],
    ids=["history", "cached", "images"],
)
def test_what_is_not_plain_goes_to_the_own_kernel(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(operators, "prefill", lambda *_: calls.append("prefill"))
    starts, ends = torch.tensor([0, 5]), torch.tensor([5])
    settings: dict[str, Any] = dict(per_position=False, nothing_cached=True, prefill_lens=[5])
    step = DeviceStep(starts, ends, ends[None], 0, 0, 5, 5, **{**settings, **change})
    cache = cache_of(1)
    x = torch.zeros(5, 1, 64)
    for _ in range(2):
        operators.attend(step, cache, x, x, x, replace(PARAMS, first_chunk=pytest.fail), x)
    assert calls == ["prefill", "prefill"]


def test_what_no_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flash(monkeypatch, None)
    with_xformers(monkeypatch)
    capped = AttentionParams(0.125, logits_soft_cap=30.0)
    assert first_chunk.choose(capped, 64, torch.bfloat16) is None
    assert first_chunk.choose(PARAMS, 64, torch.float32) is None
    assert first_chunk.choose(PARAMS, 64, torch.bfloat16) is not None
    first_chunk._flash_attention.cache_clear()
    with_flash(monkeypatch, 2)
    assert first_chunk.choose(PARAMS, 64, torch.bfloat16) is not None
    logits = replace(PARAMS, sink_logits=torch.zeros(6))
    assert first_chunk.choose(logits, 64, torch.bfloat16) is None  # FlashAttention 3 has them
    without_flash(monkeypatch)
    first_chunk._flash_attention.cache_clear()
    for name in ("xformers.ops", "xformers.ops.fmha.attn_bias"):
        monkeypatch.setitem(sys.modules, name, None)
    first_chunk._xformers.cache_clear()
    assert first_chunk.choose(PARAMS, 64, torch.bfloat16) is None
