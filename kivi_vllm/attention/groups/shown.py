"""Cache groups in words, for `kivi-vllm plan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec

from kivi_vllm.attention.groups.pages import ANY_PAGES
from kivi_vllm.attention.groups.ring import RingSpec
from kivi_vllm.attention.groups.sinks import SinkSpec
from kivi_vllm.attention.groups.tails import TailSpec

STATES = "states"
RING, TAILS, SINKS = (
    "ring: the newest tokens",
    "tails: the last tokens of blocks",
    "sinks: the first tokens",
)


@dataclass(frozen=True)
class Part:
    """What layers of one kind take of the pool.

    Attributes:
        what: the kind, in words.
        layers: how many there are.
        groups: how many block tables they have.
        tokens: of each layer in a block; 0 for states and tails, of which it holds one a layer.
        blocks: which a sequence of the greatest length can take, over all groups.

    """

    what: str
    layers: int
    groups: int
    tokens: int
    blocks: int


def parts(groups: Iterable[KVCacheGroupSpec], vllm_config: VllmConfig) -> list[Part]:
    """The groups, those of one kind together."""
    found: dict[tuple[str, int], list[KVCacheGroupSpec]] = defaultdict(list)
    for group in groups:
        found[words(group.kv_cache_spec)].append(group)
    return [
        Part(
            what=what,
            layers=sum(len(group.layer_names) for group in alike),
            groups=len(alike),
            tokens=tokens,
            # As vLLM counts them.
            blocks=sum(
                cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
                for spec in (group.kv_cache_spec for group in alike)
            ),
        )
        for (what, tokens), alike in found.items()
    ]


def layers_differ(found: Iterable[Part]) -> bool:
    """Whether a model's layers are of several kinds."""
    return sum(part.what not in (RING, TAILS, SINKS) for part in found) > 1


def hits_at(groups: Iterable[KVCacheGroupSpec], vllm_config: VllmConfig) -> int | None:
    """Tokens on whose multiples prefix hits land; None without prefix caching."""
    if not vllm_config.cache_config.enable_prefix_caching:
        return None
    return lcm(*(group.kv_cache_spec.block_size for group in groups))


def words(spec: Any) -> tuple[str, int]:
    """The kind of a group's caches, and the tokens of a layer in one of its blocks."""
    one = next(iter(getattr(spec, "kv_cache_specs", {0: spec}).values()))
    seen = "all tokens"
    if window := getattr(one, "sliding_window", None):
        seen = f"window of {window:,}"
    elif chunk := getattr(one, "attention_chunk_size", None):
        seen = f"chunks of {chunk:,}"
    if isinstance(one, ANY_PAGES):
        return f"pages, {seen}", one.block_size
    match one:
        case RingSpec():
            return RING, one.page_tokens
        case TailSpec():
            return TAILS, 0
        case SinkSpec():
            return SINKS, one.num_tokens
        case MambaSpec():
            return STATES, 0
        case _:
            return f"{str(one.dtype).removeprefix('torch.')}, {seen}", one.block_size
