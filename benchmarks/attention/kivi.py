"""This project's operators over pools of pages and rings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.attention.cases import KIVI_DTYPES, B, Shape
from benchmarks.attention.memory import Ranges, allocate, replicate, shuffled
from benchmarks.attention.timing import Call
from benchmarks.attention.work import TEMPLATE, Seen, Work, rows
from kivi_vllm.config import KiviConfig
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.codec import decode_pages
from kivi_vllm.ops.contract import Operators
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import ring_entry, ring_slot
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
        last_visible=step.last_visible,
        generated=_generated(step).to(device),
    )


def _generated(step: Step) -> torch.Tensor:
    made = torch.zeros(step.block_table.shape[0], dtype=torch.bool)
    for row in step.rows:
        made[row.index] = row.generated
    return made


@dataclass(frozen=True)
class Place:
    """Where pools lie and what computes there.

    `kind` says whose operators, `cpu` or `cuda`: Triton interpreted is `cuda` too. `allocate` gives
    a tensor of so many bytes. The width of block tables is a multiple of `columns`.
    """

    kind: str
    device: torch.device
    allocate: Callable[[int], torch.Tensor]
    columns: int = 1

    @property
    def operators(self) -> Operators:
        """The operators that vLLM would run here."""
        return dispatch.operators(self.kind)

    def step(self, of: Sequence[Row], table: torch.Tensor) -> Any:
        """A step as the operators take it, with all that its layers share computed."""
        step = self.operators.step(batch_of(Step(list(of), table, per_position=False)))
        for name, member in vars(type(step)).items():
            if isinstance(member, functools.cached_property):
                getattr(step, name)
        return step

    def table(self, ids: torch.Tensor) -> torch.Tensor:
        """Page ids [..., n] as a table on the device, with zeros up to its width."""
        more = -ids.shape[-1] % self.columns
        return torch.nn.functional.pad(ids, (0, more)).to(self.device)


CPU = Place("cpu", torch.device("cpu"), allocate)


class Pool:
    """Cache pages for `sets` batches of `batch` sequences with `blocks` blocks of 128 tokens each.

    A subclass has the pool's `nbytes`, and those that attending of a step reads; it fills all
    blocks with given ones in turn.
    """

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place = CPU
    ) -> None:
        self.shape, self.name, self.place = shape, name, place
        self.sets, self.batch, self.blocks = sets, batch, blocks
        self.tables = shuffled(sets, batch, blocks, seed=1).to(place.device)

    def prepare(self: Any) -> None:
        """Take the memory, and fill it."""
        template = Work(self.shape, 1, TEMPLATE, TEMPLATE, self.place.device)
        self.allocate()
        self.fill(template.key, template.value)


class TokenPool(Pool):
    """A pool of blocks that hold tokens by themselves: `token_bytes` for each."""

    token_bytes: int

    @property
    def nbytes(self) -> int:
        """Of the whole pool."""
        return self.sets * self.batch * self.blocks * B * self.token_bytes

    def read_bytes(self, work: Work) -> int:
        """Bytes that attending of one batch reads."""
        return work.batch * work.end * self.token_bytes

    def allocate(self) -> None:
        """Take the memory."""
        self.memory = self.place.allocate(self.nbytes)

    def slots(self, i: int, start: int, end: int) -> torch.Tensor:
        """The slot mapping [batch * (end - start)] of those positions of all sequences of set i."""
        at = torch.arange(start, end, device=self.place.device)
        return (self.tables[i][:, at // B].long() * B + at % B).flatten()


class KiviPool(Pool):
    """Pages and rings of the cache `name`, one of `KIVI_DTYPES`."""

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place = CPU
    ) -> None:
        super().__init__(shape, name, sets, batch, blocks, place)
        self.tables = place.table(self.tables + 1)  # page 0 means that there is none
        dtype, recipe = KIVI_DTYPES[name]
        config = KiviConfig.from_options(dtype, {"recipe": recipe})
        self.fmt = PageFormat.of(config, shape.head_size, torch.bfloat16)
        self.ring_pages = ring_entry(B, self.fmt.raw_tokens)
        self.block_bytes = shape.num_kv_heads * self.fmt.page_bytes
        raw_pages = self.ring_pages + (self.fmt.sink_tokens > 0)
        unused = 1 + (self.fmt.sink_tokens > 0)
        self.nbytes = (sets * batch * (blocks + raw_pages) + unused) * self.block_bytes
        # A block's pages are different ones; in the long run they come again.
        entries = torch.arange((blocks + 2) * self.ring_pages) % self.ring_pages
        ring = shuffled(sets, batch, self.ring_pages, seed=2)[..., entries].contiguous()
        self.ring_tables = ring.to(place.device)
        self.sink_tables = (shuffled(sets, batch, 1, seed=3) + 1).to(place.device)
        self.params = AttentionParams(scale=shape.head_size**-0.5)
        self._layers: dict[tuple[int, tuple[Row, ...]], tuple[Any, LayerCache]] = {}

    def read_bytes(self, work: Work) -> int:
        """Bytes that attending of one batch reads: packed blocks, raw tokens, sinks."""
        blocks = (work.end - work.new) // B
        raw_tokens = work.end - blocks * B + self.fmt.sink_tokens
        return self.batch * (blocks * self.block_bytes + raw_tokens * self.shape.token_bytes)

    def allocate(self) -> None:
        """Take the memory."""
        heads = self.shape.num_kv_heads
        packed = (1 + self.sets * self.batch * self.blocks) * self.block_bytes
        self.pages = self.place.allocate(packed).view(-1, 1, heads, self.fmt.page_bytes)
        raw = self.place.allocate(self.nbytes - packed).view(-1, heads, self.fmt.page_bytes)
        raw = self.fmt.as_raw(raw)
        self.ring, self.sinks = raw.tensor_split([self.sets * self.batch * self.ring_pages])

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all pages and rings with whole blocks [n * 128, num_kv_heads, head_size]."""
        template = KiviPool(self.shape, self.name, 1, 1, len(key) // B, self.place)
        template.allocate()
        ids = 1 + torch.arange(len(key) // B, dtype=torch.int32).view(1, 1, -1)
        template.tables = self.place.table(ids)
        template.store("store_blocks", 0, rows(1, len(key), len(key)), key, value)()
        replicate(self.pages[1:], template.pages[1:])
        tokens = torch.cat([key, value], -1)
        whole = len(tokens) // self.fmt.raw_tokens * self.fmt.raw_tokens
        replicate(self.ring, tokens[:whole].unflatten(0, (-1, self.fmt.raw_tokens)).transpose(1, 2))
        if len(self.sinks):
            replicate(self.sinks[1:], template.sinks[1:])

    def layer(self, i: int, of: Sequence[Row]) -> tuple[Any, LayerCache]:
        """A step over set i and the layer's caches, which all calls of the step share."""
        key = i, tuple(of)
        if key not in self._layers:
            sinks = Raw(self.sinks, self.sink_tables[i]) if self.fmt.sink_tokens else None
            ring = Raw(self.ring, self.ring_tables[i])
            cache = LayerCache(self.fmt, self.pages, ring, sinks=sinks)
            self._layers[key] = self.place.step(of, self.tables[i]), cache
        return self._layers[key]

    def store(
        self, name: str, i: int, of: Sequence[Row], key: torch.Tensor, value: torch.Tensor
    ) -> Call:
        """A call of `store_blocks` or `store_ring` on set i."""
        return partial(getattr(self.place.operators, name), *self.layer(i, of), key, value)

    def attention(self, i: int, work: Work, params: AttentionParams | None = None) -> Call:
        """A call of `attend` on set i, with other params than the pool's if there are some."""
        own = (work.query, work.key, work.value, params or self.params, work.output)
        return partial(self.place.operators.attend, *self.layer(i, work.rows), *own)

    def of_a_step(self, work: Work) -> dict[str, list[Call]]:
        """The calls of a step by operator, over each set.

        At decode `store_blocks` completes a block in every sequence, and `store_blocks_idle` finds
        nothing to do.
        """

        def store(name: str, of: Sequence[Row]) -> list[Call]:
            return [self.store(name, i, of, work.key, work.value) for i in range(self.sets)]

        calls = {
            "attend": [self.attention(i, work) for i in range(self.sets)],
            "store_ring": store("store_ring", work.rows),
            "store_blocks": store("store_blocks", work.rows),
        }
        if work.new == 1:
            calls["store_blocks_idle"] = calls["store_blocks"]
            all_complete = rows(work.batch, 1, (work.end // B + 1) * B)
            calls["store_blocks"] = store("store_blocks", all_complete)
        return calls

    def ranges(self, i: int, work: Work) -> Ranges:
        """What a decode step reads of set i: packed blocks, the ring, sinks, its own."""
        blocks, raw_tokens = work.end // B, work.end % B - 1
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
            page, slot = ring_entry(at, per_page), ring_slot(at, per_page)
            count = min(per_page - slot, end - at)
            starts = rings[:, page, None] + slot * token + heads
            ranges += [(start, count * token) for start in starts.flatten().tolist()]
            at += count
        if self.fmt.sink_tokens and blocks:
            starts = self.sinks.data_ptr() + self.sink_tables[i].long() * self.block_bytes + heads
            ranges += [(start, self.fmt.sink_tokens * token) for start in starts.flatten().tolist()]
        return ranges + [(x.data_ptr(), x.nbytes) for x in (work.key, work.value)]

    def seen(self, row: int, work: Work, in_order: bool = False) -> Seen:
        """What a sequence of the first set sees."""
        own = slice(row * work.new, (row + 1) * work.new)
        cached = work.end - work.new
        packed, d = cached // B * B, self.shape.head_size
        at = torch.arange(packed, cached, device=work.device)
        per_page = self.fmt.raw_tokens
        pages = self.ring_tables[0, row, ring_entry(at, per_page)].long()
        ring = self.ring[pages, :, ring_slot(at, per_page)]  # [n, num_kv_heads, 2 * D]
        raw_k = torch.cat([ring[..., :d], work.key[own]])
        raw_v = torch.cat([ring[..., d:], work.value[own]])

        def tokens(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = self.tables[0, row, start // B : min(end, packed) // B].long()
            k, v = decode_pages(self.pages[blocks, 0], self.fmt)  # [n, num_kv_heads, 128, D]
            if start == 0 and len(k) and (n := self.fmt.sink_tokens):
                kept = self.sinks[self.sink_tables[0, row].long(), :, :n].float()
                k[:1, :, :n], v[:1, :, :n] = kept[..., :d], kept[..., d:]
            raw = slice(max(start, packed) - packed, max(end, packed) - packed)
            return (
                torch.cat([k.transpose(1, 2).flatten(0, 1), raw_k[raw].float()]),
                torch.cat([v.transpose(1, 2).flatten(0, 1), raw_v[raw].float()]),
            )

        return tokens
