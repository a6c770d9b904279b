"""The groups of models whose layers differ: who shares a table, and how full blocks are."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.attention.groups.admission import PageGroup
from kivi_vllm.attention.groups.pages import page_spec, whole_blocks
from kivi_vllm.attention.groups.planner import MOST_STATE_GROUPS, Plan, is_needed, plan
from kivi_vllm.attention.groups.ring import ring_spec
from kivi_vllm.attention.groups.sinks import sink_spec
from kivi_vllm.attention.groups.tails import tail_spec
from kivi_vllm.ops.format import PageFormat

FMT = PageFormat(2, 2, 16, 128, torch.bfloat16, two_level=True, sink_tokens=4)
LARGE = replace(FMT, head_size=256)


def layer(
    name: str, window: int | None = None, fmt: PageFormat = FMT, heads: int = 8, tails: int = 0
) -> dict[str, Any]:
    """All cache specs of one attention layer."""
    specs: dict[str, Any] = {name: page_spec(heads, fmt, window)}
    specs[f"{name}.kivi_ring"] = ring_spec(heads, fmt, 0, 1 + tails, window or 0)
    specs |= {f"{name}.kivi_tail{i}": tail_spec(heads, fmt, 0, None) for i in range(tails)}
    specs[f"{name}.kivi_sinks"] = sink_spec(heads, fmt)
    return specs


def gemma(full: int, windowed: int, window: int = 1024, **kwargs: Any) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    for i in range(full + windowed):
        specs |= layer(f"layers.{i}", None if i < full else window, **kwargs)
    return specs


def states(number: int, bytes_each: int) -> dict[str, Any]:
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(block_size=128, shapes=((bytes_each,),), dtypes=(torch.uint8,))
    return {f"mamba.{i}": spec for i in range(number)}


def layers_of(group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    return getattr(spec, "kv_cache_specs", dict.fromkeys(group.layer_names, spec))


def group_bytes(group: Any) -> int:
    return sum(spec.page_size_bytes for spec in layers_of(group).values())


def named(made: Plan, kind: str) -> list[Any]:
    return [g for g in made.groups if all(type(s).__name__ == kind for s in layers_of(g).values())]


def test_layers_that_are_alike_need_no_plan() -> None:
    assert not is_needed(gemma(4, 0).values())
    assert not is_needed(gemma(0, 4).values())
    assert is_needed(gemma(1, 1).values())
    assert is_needed((gemma(4, 0) | states(1, 100)).values())
    assert is_needed((gemma(4, 0) | layer("other", heads=4)).values())
    assert not is_needed(states(4, 100).values())  # not ours


def test_every_layer_is_in_one_group() -> None:
    specs = gemma(2, 10, tails=2) | states(30, 1 << 20)
    made = plan(specs, 8192, align=True)
    assert sorted(name for g in made.groups for name in g.layer_names) == sorted(specs)


def test_windows_beside_full_attention() -> None:
    made = plan(gemma(10, 52), 131072, align=False)
    (full,), (windowed,) = named(made, "PageSpec"), named(made, "WindowPageSpec")
    assert full.kv_cache_spec.block_size == made.hit_stride == 5 * 128
    assert windowed.kv_cache_spec.block_size == 128
    block = group_bytes(windowed)
    assert 0.95 * block < group_bytes(full) <= block
    (ring,), (sinks,) = named(made, "RingSpec"), named(made, "SinkSpec")
    tokens = ring.kv_cache_spec.page_tokens
    assert ring.kv_cache_spec.num_states == tokens
    assert block - 62 * 8 * 512 < group_bytes(ring) == 62 * 8 * 512 * tokens <= block
    assert sinks.kv_cache_spec.num_states == 4
    assert sinks.kv_cache_spec.block_size == made.hit_stride
    assert ring.kv_cache_spec.page_groups == (PageGroup(5, 0), PageGroup(1, 1024))


def test_rings_of_several_head_sizes_are_one_group() -> None:
    specs = gemma(2, 0, fmt=LARGE, heads=4) | {f"w.{k}": v for k, v in gemma(0, 6).items()}
    made = plan(specs, 8192, align=False)
    (ring,) = named(made, "RingSpec")
    assert {spec.page_tokens for spec in layers_of(ring).values()} == {
        next(iter(layers_of(ring).values())).page_tokens
    }
    assert {spec.tokens_per_state for spec in layers_of(ring).values()} == {
        Fraction(128, next(iter(layers_of(ring).values())).page_tokens)
    }
    assert len(layers_of(ring)) == 8


def test_tails_fill_blocks_and_no_more() -> None:
    made = plan(gemma(10, 52, tails=1), 131072, align=False)
    block = max(map(group_bytes, made.groups))
    parts = named(made, "TailSpec")
    assert len(parts) == 2 and sum(len(g.layer_names) for g in parts) == 62
    assert max(map(group_bytes, parts)) <= block == group_bytes(named(made, "WindowPageSpec")[0])
    (ring,) = named(made, "RingSpec")
    assert ring.kv_cache_spec.num_others == 3  # two groups of tails, and the sinks


@pytest.mark.parametrize("number", [1, 7, 36, 100])
def test_states_lie_side_by_side(number: int) -> None:
    made = plan(gemma(4, 0) | states(number, 5 << 20), 1 << 20, align=True)
    groups = named(made, "MambaSpec")
    assert len(groups) <= MOST_STATE_GROUPS
    assert {g.kv_cache_spec.block_size for g in groups} == {made.hit_stride}
    sizes = [len(g.layer_names) for g in groups]
    assert sum(sizes) == number and max(sizes) - min(sizes) <= 1
    block = max(map(group_bytes, made.groups))
    (pages,) = named(made, "PageSpec")
    assert group_bytes(pages) > block - group_bytes(pages) / (made.hit_stride // 128)


def test_a_hit_stride_makes_blocks_of_states_smaller_then_leaves_gaps() -> None:
    """As of Granite-4: three states of 2 MiB a block, of which 18 pages would fill one."""
    specs = gemma(4, 0) | states(36, 2 << 20)
    made = plan(specs, 1 << 20, align=True)
    assert (made.hit_stride, len(named(made, "MambaSpec"))) == (19 * 128, 12)
    for most, groups, pages in ((1664, 18, 12), (1024, 36, 6), (512, 36, 4)):
        made = plan(specs, 1 << 20, True, most)
        assert made.hit_stride == pages * 128 <= most
        found = named(made, "MambaSpec")
        assert len(found) == groups
        assert {g.kv_cache_spec.block_size for g in found} == {made.hit_stride}
        assert max(map(group_bytes, made.groups)) == 36 // groups * (2 << 20)
    windows = plan(gemma(10, 52), 131072, False, 256)
    assert windows.hit_stride == 256


def test_attention_chunks_have_a_group_of_their_own() -> None:
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    specs = gemma(4, 0)
    for i in range(12):
        name, chunk = f"chunked.{i}", 8192
        specs |= {name: page_spec(8, FMT, chunk=chunk)}
        specs |= {f"{name}.kivi_ring": ring_spec(8, FMT, 0, 1, chunk=chunk)}
    assert is_needed(specs.values())
    made = plan(specs, 131072, align=False)
    (full,), (chunked,), (ring,) = (
        named(made, kind) for kind in ("PageSpec", "ChunkPageSpec", "RingSpec")
    )
    assert [len(group.layer_names) for group in (full, chunked)] == [4, 12]
    assert (full.kv_cache_spec.block_size, chunked.kv_cache_spec.block_size) == (384, 128)
    assert made.hit_stride == 384
    assert next(iter(layers_of(ring).values())).page_groups == (
        PageGroup(3),
        PageGroup(1, chunk=8192),
    )
    # vLLM's own search in such layers takes no blocks of several sizes.
    other = ChunkedLocalAttentionSpec(
        block_size=128,
        num_kv_heads=8,
        head_size=128,
        dtype=torch.bfloat16,
        attention_chunk_size=8192,
    )
    assert plan(specs | {"skipped": other}, 131072, align=False).hit_stride == 128


def test_no_block_is_longer_than_a_sequence() -> None:
    made = plan(gemma(1, 0) | states(4, 50 << 20), 1000, align=False)
    assert made.hit_stride == 8 * 128


def test_room_for_sinks_where_states_and_pages_are_small() -> None:
    fmt = replace(FMT, sink_tokens=16)
    made = plan(gemma(1, 1, fmt=fmt), 8192, align=False)
    (sinks,), (ring,) = named(made, "SinkSpec"), named(made, "RingSpec")
    assert sinks.kv_cache_spec.num_states == 16
    assert ring.kv_cache_spec.page_tokens >= 16


@pytest.mark.parametrize(("tokens", "blocks"), [(127, 0), (128, 1), (384, 1), (511, 1), (512, 2)])
def test_a_block_comes_with_its_first_page(tokens: int, blocks: int) -> None:
    assert whole_blocks(tokens, 3 * 128) == blocks * 3 * 128


def test_blocks_that_requests_hold() -> None:
    lengths = np.array([0, 127, 128, 640, 641, 768, 5000])
    assert PageGroup(5).held(lengths).tolist() == [0, 0, 1, 1, 1, 2, 8]
    assert PageGroup(1, 300).held(lengths).tolist() == [0, 0, 1, 4, 4, 4, 4]
    assert PageGroup(1, chunk=640).held(lengths).tolist() == [0, 0, 1, 5, 5, 1, 4]


def test_hits_land_on_multiples_of_the_largest_block() -> None:
    """Nine and seven pages of the small groups fit a block: nine and three are taken."""
    specs = gemma(7, 0) | {f"a.{k}": v for k, v in gemma(0, 9, window=1024).items()}
    specs |= {f"b.{k}": v for k, v in gemma(0, 63, window=512).items()}
    made = plan(specs, 131072, align=False)
    assert [s.kv_cache_spec.block_size // 128 for s in named(made, "PageSpec")] == [9]
    assert sorted(s.kv_cache_spec.block_size // 128 for s in named(made, "WindowPageSpec")) == [
        1,
        3,
    ]
    assert made.hit_stride == 9 * 128
