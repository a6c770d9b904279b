"""Which layers share a block table, and what a pool block holds of each.

vLLM's pool hands out blocks of one size. With the block as the outermost dimension of the
layout, a block holds whatever its group puts into it, one layer's part after the other. A
model whose layers all have the same pages needs no more than vLLM's own grouping. In any other
model (windows beside full attention, states of Mamba layers, several head sizes), the groups
are made here so that blocks are full:

- **pages**: a group for those that see everything, one for each window, and one for those with
  attention chunks. The largest makes the size of a block; the others' pages come several to a
  block, so `block_size` is a multiple of 128 tokens, and prefix hits land on multiples of all;
- **rings** of all layers: as many tokens a page as fit;
- **sinks** of all layers; **tails**: as many layers a group as fit;
- **states**, as many layers a group as fit, in at most `MOST_STATE_GROUPS` groups;
- **others**: layers with another cache dtype, by vLLM's kinds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

from kivi_vllm.attention.groups.admission import PageGroup
from kivi_vllm.attention.groups.base import of_tokens
from kivi_vllm.attention.groups.pages import ANY_PAGES
from kivi_vllm.attention.groups.ring import RingSpec
from kivi_vllm.attention.groups.sinks import SinkSpec
from kivi_vllm.attention.groups.tails import TailSpec
from kivi_vllm.attention.options import kivi_config
from kivi_vllm.config import BLOCK_SIZE

MOST_STATE_GROUPS = 12
"""Each group has a block table of its own, which costs the scheduler time; each state more in a
block makes prefix hits coarser."""

Specs = dict[str, Any]


def is_needed(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether layers with these cache specs, ours among them, need groups of our making."""
    pages, raw, others = set(), set(), set()
    for spec in specs:
        if isinstance(spec, ANY_PAGES):
            pages.add(spec)
        elif isinstance(spec, (RingSpec, SinkSpec, TailSpec)):
            raw.add(spec.page_size_bytes)
        else:
            others.add(spec)
    return bool(pages) and (len(pages) > 1 or len(raw) > 1 or bool(others))


def plan_for(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> Plan:
    """`plan` for an engine."""
    align = vllm_config.cache_config.mamba_cache_mode == "align"
    stride = kivi_config(vllm_config).hit_stride
    return plan(specs, vllm_config.model_config.max_model_len, align, stride)


def plan(
    specs: Mapping[str, KVCacheSpec], max_model_len: int, align: bool, most_stride: int = 0
) -> Plan:
    """Groups of all layers.

    Args:
        specs: cache specs by layer name.
        max_model_len: longest sequence; no block holds more than that many tokens need.
        align: whether prefix caching keeps states at multiples of the hit stride (vLLM's
            `mamba_cache_mode` "align"), so that their blocks are that long.
        most_stride: largest hit stride that may be, a multiple of 128; 0: any. Blocks of states
            are made smaller for it, in more groups, and those of pages are left with gaps.

    """
    kinds = _Kinds.of(specs)
    most = cdiv(min(max_model_len, most_stride or max_model_len), BLOCK_SIZE)
    block_bytes = max(_bytes(layers) for layers in [*kinds.pages.values(), *kinds.others.values()])
    block_bytes = max(block_bytes, _sink_bytes(kinds))
    states = kinds.states
    if states:
        largest = max(spec.page_size_bytes for spec in states.values())
        fit = cdiv(len(states), MOST_STATE_GROUPS)
        if most_stride:
            fit = min(fit, most * min(map(_bytes, kinds.pages.values())) // largest)
        fit = max(1, block_bytes // largest, fit)
        num_state_groups = cdiv(len(states), fit)
        block_bytes = max(block_bytes, cdiv(len(states), num_state_groups) * largest)
    groups: list[Specs] = []
    page_groups = []
    # vLLM's search for hits in layers with attention chunks takes blocks of one size only.
    if any(seen.chunk for _, seen in kinds.others):
        most = 1
    fitting = _pages_a_block(kinds, block_bytes, most)
    for seen in sorted(kinds.pages, key=lambda seen: not _of_draft_model(kinds.pages[seen])):
        layers, pages = kinds.pages[seen], fitting[seen]
        groups.append(_replaced(layers, block_size=pages * BLOCK_SIZE))
        page_groups.append(replace(seen, pages=pages))
    stride = max(fitting.values()) * BLOCK_SIZE  # the others divide it
    tails = [part for layers in kinds.tails.values() for part in _parts(layers, block_bytes)]
    # Layers with another cache dtype hold a block for every 128 tokens. (States are not foreseen:
    # a request holds one or two blocks of each group of theirs, from its first token on.)
    held_by_others = [seen for _, seen in kinds.others]
    num_others = len(tails) + bool(kinds.sinks)
    groups += [
        _rings(kinds.rings, block_bytes, (*page_groups, *held_by_others), num_others),
        *tails,
    ]
    if kinds.sinks:
        groups.append(
            {
                name: replace(spec, **of_tokens(spec.token_bytes, spec.num_tokens, stride))
                for name, spec in kinds.sinks.items()
            }
        )
    if states:
        size = {"block_size": stride} if align else {}
        names = list(states)
        groups += [
            _replaced({name: states[name] for name in names[i::num_state_groups]}, **size)
            for i in range(num_state_groups)
        ]
    groups += kinds.others.values()
    return Plan([_group(layers) for layers in groups], stride)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    groups: as vLLM wants them.
    hit_stride: tokens on whose multiples prefix hits land.

    """

    groups: list[KVCacheGroupSpec]
    hit_stride: int


@dataclass(frozen=True)
class _Kinds:
    """Cache specs by what they are; pages by what their layers see, tails by their number."""

    pages: dict[PageGroup, Specs] = field(default_factory=lambda: defaultdict(dict))
    rings: Specs = field(default_factory=dict)
    tails: dict[str, Specs] = field(default_factory=lambda: defaultdict(dict))
    sinks: Specs = field(default_factory=dict)
    states: Specs = field(default_factory=dict)
    others: dict[tuple[type, PageGroup], Specs] = field(default_factory=lambda: defaultdict(dict))

    @staticmethod
    def of(specs: Mapping[str, KVCacheSpec]) -> _Kinds:
        kinds = _Kinds()
        for name, spec in specs.items():
            if isinstance(spec, ANY_PAGES):
                kinds.pages[_seen(spec)][name] = spec
            elif isinstance(spec, RingSpec):
                kinds.rings[name] = spec
            elif isinstance(spec, TailSpec):
                kinds.tails[name.rpartition(".")[2]][name] = spec
            elif isinstance(spec, SinkSpec):
                kinds.sinks[name] = spec
            elif isinstance(spec, MambaSpec):
                kinds.states[name] = spec
            else:
                kinds.others[type(spec), _seen(spec)][name] = spec
        return kinds


def _seen(spec: Any) -> PageGroup:
    """What a layer sees, as a group of one page a block."""
    window, chunk = (getattr(spec, name, 0) for name in ("sliding_window", "attention_chunk_size"))
    return PageGroup(1, window or 0, chunk or 0)


def _bytes(layers: Specs) -> int:
    return sum(spec.page_size_bytes for spec in layers.values())


def _of_draft_model(layers: Specs) -> bool:
    """Whether a draft model's layers are among them: vLLM's runner takes the first group for it."""
    return any(name.startswith("draft_model.") for name in layers)


def _pages_a_block(kinds: _Kinds, block_bytes: int, most: int) -> dict[PageGroup, int]:
    """Pages of each group in a block.

    All divide the largest: hits land on their least common multiple.
    """
    fitting = {w: min(block_bytes // _bytes(layers), most) for w, layers in kinds.pages.items()}
    largest = max(fitting.values())
    return {w: max(k for k in range(1, n + 1) if largest % k == 0) for w, n in fitting.items()}


def _sink_bytes(kinds: _Kinds) -> int:
    """Of one block of sinks, and so of a ring page of as many tokens."""
    sinks = kinds.sinks.values()
    return sum(spec.num_kv_heads * spec.token_bytes * spec.num_tokens for spec in sinks)


def _replaced(layers: Specs, **changes: Any) -> Specs:
    return {name: replace(spec, **changes) for name, spec in layers.items()}


def _rings(
    rings: Specs, block_bytes: int, page_groups: tuple[PageGroup, ...], num_others: int
) -> Specs:
    """The rings of all layers, with pages of as many tokens as fit a block."""
    token_bytes = sum(spec.num_kv_heads * spec.token_bytes for spec in rings.values())
    # No more than fit a page of quantized tokens of the same bytes: with `kivi_raw`, which
    # takes fewer than it could, the layer tells pages by their shape (see `KiviAttentionImpl`).
    most = max(spec.page_tokens for spec in rings.values())
    fit = max(1, block_bytes // token_bytes)
    raw = any(spec.token_bytes == spec.state_content_bytes for spec in rings.values())
    tokens = min(fit, most if raw else BLOCK_SIZE)
    return {
        name: replace(
            spec,
            page_tokens=tokens,
            page_groups=page_groups,
            num_others=num_others,
            **of_tokens(spec.token_bytes, tokens, BLOCK_SIZE),
        )
        for name, spec in rings.items()
    }


def _parts(layers: Specs, block_bytes: int) -> list[Specs]:
    """Layers in as few groups as fit a block, evenly."""
    names = list(layers)
    number = cdiv(_bytes(layers), block_bytes)
    while True:
        parts = [{name: layers[name] for name in names[i::number]} for i in range(number)]
        if all(_bytes(part) <= block_bytes for part in parts):
            return parts
        number += 1


def _group(layers: Specs) -> KVCacheGroupSpec:
    first = next(iter(layers.values()))
    # A plain spec where it can be: vLLM adds layers that share a cache to such groups only.
    if all(spec == first for spec in layers.values()):
        return KVCacheGroupSpec(list(layers), first)
    spec = UniformTypeKVCacheSpecs.from_specs(layers)
    assert spec is not None, layers
    return KVCacheGroupSpec(list(layers), spec)
