"""This project's operators over pools of pages and rings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.attention.cases import KIVI_DTYPES, B, Shape
from benchmarks.attention.memory import Ranges, allocate, replicate, shuffled
from benchmarks.attention.timing import Call
from kivi_vllm.config import KiviConfig
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.contract import Operators
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import AttentionParams, Batch, LayerCache, Raw, Row, Step


def batch_of(step: Step) -> Batch:
    """What an engine would know of a step; requests without tokens in it have length 0."""
    n, device = step.block_table.shape[0], step.block_table.device
    lens, ends = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    for row in step.rows:
        lens[row.index], ends[row.index] = row.q1 - row.q0, row.b
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()])
    if any(starts[row.index] != row.q0 for row in step.rows):
        raise ValueError("the rows of a step must lie in the order of their requests")
    return Batch(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=ends.to(device),
        seq_lens_cpu=ends,
        block_table=step.block_table,
        num_tokens=int(starts[-1]),
        max_query_len=int(lens.max()) if n else 0,
        per_position=step.per_position,
        decode_len=step.decode_len,
    )


@dataclass(frozen=True)
class Place:
    """Where pools lie and what computes there.

    Attributes:
        kind: whose operators, `cpu` or `cuda`: Triton interpreted is `cuda` too.
        device: of all tensors.
        allocate: gives a tensor of so many bytes, on huge pages if asked for.
        columns: the width of block tables is a multiple of this.

    """

    kind: str
    device: torch.device
    allocate: Callable[[int, bool], torch.Tensor]
    columns: int = 1

    @property
    def operators(self) -> Operators:
        """The operators that vLLM would run here."""
        return dispatch.operators(self.kind)

    def step(self, of: list[Row], table: torch.Tensor) -> Any:
        """A step as the operators take it, with all that its layers share computed."""
        step = self.operators.step(batch_of(Step(of, table, per_position=False)))
        for name, member in vars(type(step)).items():
            if isinstance(member, functools.cached_property):
                getattr(step, name)
        return step

    def table(self, ids: torch.Tensor) -> torch.Tensor:
        """Page ids [..., n] as a table on the device, with zeros up to its width."""
        more = -ids.shape[-1] % self.columns
        return torch.nn.functional.pad(ids, (0, more)).to(self.device)


CPU = Place("cpu", torch.device("cpu"), allocate)


def operators() -> Operators:
    """The operators that vLLM would run on this processor."""
    return CPU.operators


def rows(batch: int, new: int, end: int) -> list[Row]:
    """A step of `new` tokens in each of `batch` sequences, which then have `end`."""
    return [Row(i, i * new, (i + 1) * new, end - new, end) for i in range(batch)]


class KiviPool:
    """Pages and rings for `sets` batches of sequences.

    Args:
        shape: of the layer.
        name: one of `KIVI_DTYPES`.
        sets, batch, blocks: how many batches, sequences each, page blocks each.
        place: where.

    """

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place = CPU
    ) -> None:
        self.shape, self.name = shape, name
        self.sets, self.batch, self.blocks, self.place = sets, batch, blocks, place
        dtype, recipe = KIVI_DTYPES[name]
        config = KiviConfig.from_options(dtype, {"recipe": recipe})
        self.fmt = PageFormat.of(config, shape.head_size, torch.bfloat16)
        self.ring_pages = 1 + -(-B // self.fmt.raw_tokens)
        self.block_bytes = shape.num_kv_heads * self.fmt.page_bytes
        raw_pages = self.ring_pages + (self.fmt.sink_tokens > 0)
        self.nbytes = sets * batch * (blocks + raw_pages) * self.block_bytes
        self.tables = place.table(shuffled(sets, batch, blocks, seed=1))
        # A block's pages are different ones; in the long run they come again.
        entries = torch.arange((blocks + 2) * B // self.fmt.raw_tokens + 1) % self.ring_pages
        ring = shuffled(sets, batch, self.ring_pages, seed=2)[..., entries].contiguous()
        self.ring_tables = ring.to(place.device)
        self.sink_tables = shuffled(sets, batch, 1, seed=3).to(place.device)
        self.params = AttentionParams(scale=shape.head_size**-0.5)
        self._layers: dict[tuple[int, tuple[Row, ...]], tuple[Any, LayerCache]] = {}

    def read_bytes(self, blocks: int, raw_tokens: int) -> int:
        """Bytes that attending of one batch reads: packed blocks, raw tokens, sinks."""
        raw_tokens += self.fmt.sink_tokens
        return self.batch * (blocks * self.block_bytes + raw_tokens * self.shape.token_bytes)

    def allocate(self, huge_pages: bool) -> None:
        """Take the memory."""
        heads = self.shape.num_kv_heads
        packed = self.sets * self.batch * self.blocks * self.block_bytes
        pages = self.place.allocate(packed, huge_pages)
        raw = self.place.allocate(self.nbytes - packed, huge_pages)
        self.pages = pages.view(-1, heads, self.fmt.page_bytes)
        per_page = (heads, self.fmt.raw_tokens, 2 * self.shape.head_size)
        tokens = raw.view(torch.bfloat16).view(-1, *per_page)
        self.ring, self.sinks = tokens.tensor_split([self.sets * self.batch * self.ring_pages])

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all pages and rings with whole blocks [n * 128, num_kv_heads, head_size]."""
        template = KiviPool(self.shape, self.name, 1, 1, len(key) // B, self.place)
        template.allocate(False)
        ids = torch.arange(len(key) // B, dtype=torch.int32).view(1, 1, -1)
        template.tables = self.place.table(ids)
        step = template.step(0, rows(1, len(key), len(key)))
        self.place.operators.store_blocks(step, template.cache(0), key, value)
        replicate(self.pages, template.pages)
        tokens = torch.cat([key, value], -1)
        whole = len(tokens) // self.fmt.raw_tokens * self.fmt.raw_tokens
        replicate(self.ring, tokens[:whole].unflatten(0, (-1, self.fmt.raw_tokens)).transpose(1, 2))
        if len(self.sinks):
            replicate(self.sinks, template.sinks)

    def cache(self, i: int) -> LayerCache:
        """The layer's caches as a step over set i sees them."""
        sinks = Raw(self.sinks, self.sink_tables[i]) if self.fmt.sink_tokens else None
        ring = Raw(self.ring, self.ring_tables[i])
        return LayerCache(self.fmt, self.pages, ring, sinks=sinks)

    def step(self, i: int, of: list[Row]) -> Any:
        """A step over set i, prefill exact, as the operators take it."""
        return self.place.step(of, self.tables[i])

    def layer(self, i: int, of: list[Row]) -> tuple[Any, LayerCache]:
        """The step over set i and the layer's caches, which all calls of a step share."""
        key = i, tuple(of)
        if key not in self._layers:
            self._layers[key] = self.step(i, of), self.cache(i)
        return self._layers[key]

    def store(
        self, name: str, i: int, of: list[Row], key: torch.Tensor, value: torch.Tensor
    ) -> Call:
        """A call of `store_blocks` or `store_ring` on set i."""
        operator = getattr(self.place.operators, name)
        return partial(operator, *self.layer(i, of), key, value)

    def attention(
        self,
        i: int,
        of: list[Row],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> Call:
        """A call of `attend` on set i; query and output [tokens, num_heads, head_size]."""
        attend = self.place.operators.attend
        return partial(attend, *self.layer(i, of), query, key, value, self.params, output)

    def ranges(self, i: int, blocks: int, raw_tokens: int) -> Ranges:
        """What attending on set i reads, but for the step's own tokens.

        Args:
            i: the set.
            blocks: packed blocks of each sequence, one range per head.
            raw_tokens: tokens in its ring after those.

        """
        heads = torch.arange(self.shape.num_kv_heads) * self.fmt.page_bytes
        starts = self.pages.data_ptr() + self.tables[i, :, :blocks].long() * self.block_bytes
        ranges = [
            (at, self.fmt.page_bytes) for at in (starts[..., None] + heads).flatten().tolist()
        ]
        rings = self.ring.data_ptr() + self.ring_tables[i].long() * self.block_bytes
        token = 2 * self.shape.head_size * 2  # bytes of one token of one head
        per_page, at = self.fmt.raw_tokens, blocks * B
        end = at + raw_tokens
        while at < end:
            page, slot = divmod(at, per_page)
            count = min(per_page - slot, end - at)
            starts = rings[:, page, None] + slot * token + heads
            ranges += [(start, count * token) for start in starts.flatten().tolist()]
            at += count
        if self.fmt.sink_tokens and blocks:
            starts = self.sinks.data_ptr() + self.sink_tables[i].long() * self.block_bytes + heads
            ranges += [(start, self.fmt.sink_tokens * token) for start in starts.flatten().tolist()]
        return ranges
