"""Pools of cache pages on the GPU, and what is in them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.attention.cases import B, Shape
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.gpu.work import Seen, Work
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.memory import replicate, shuffled
from benchmarks.attention.tokens import TEMPLATE_BLOCKS, Tokens
from benchmarks.common.machine import GIB
from kivi_vllm.ops.codec import decode_pages

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

MOST_SETS, SET_BYTES = 16, 2 * GIB
"""Calls over different caches in one graph: as many as fit into so many bytes, at most 16."""


class PagedPool:
    """Blocks of K and V, one number after the other, for `sets` batches of sequences.

    They lie as vLLM's GPU backends lay them by default: [pages, tokens of a page,
    num_kv_heads, K and V]. A page may be any part of a block of 128 tokens.

    Args:
        shape: of the layer.
        name: a key of `PLAIN_DTYPES`.
        sets, batch, blocks: how many batches, sequences each, blocks each.
        gpu: where.

    """

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, gpu: Gpu
    ) -> None:
        self.shape, self.name, self.gpu = shape, name, gpu
        self.sets, self.batch, self.blocks = sets, batch, blocks
        self.dtype = PLAIN_DTYPES[name]
        self.token_bytes = shape.token_bytes * self.dtype.itemsize // 2
        self.nbytes = sets * batch * blocks * B * self.token_bytes
        self.tables = shuffled(sets, batch, blocks, seed=1).to(gpu.device)

    def read_bytes(self, work: Work) -> int:
        """Bytes that attending of one batch reads."""
        return work.batch * work.end * self.token_bytes

    def allocate(self) -> None:
        """Take the memory."""
        self.memory = self.gpu.allocate(self.nbytes)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all blocks with these whole blocks [n * 128, num_kv_heads, head_size], in turn."""
        tokens = torch.cat([key, value], -1).to(self.dtype).view(torch.uint8)
        replicate(self.memory.view(-1, B * self.token_bytes), tokens.view(len(key) // B, -1))

    def pages(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V caches [pages, size, num_kv_heads, head_size]."""
        s = self.shape
        both = self.memory.view(self.dtype).view(-1, size, s.num_kv_heads, 2 * s.head_size)
        return both[..., : s.head_size], both[..., s.head_size :]

    def table(self, i: int, size: int) -> torch.Tensor:
        """[batch, blocks * 128 / size] int32: the page ids of set i."""
        parts = torch.arange(B // size, dtype=torch.int32, device=self.gpu.device)
        return (self.tables[i, :, :, None] * (B // size) + parts).flatten(1)

    def seen(self, row: int, work: Work, in_order: bool = False) -> Seen:
        """What a sequence of the first set sees; `in_order`: its blocks as they lie."""
        return self._seen(*self.pages(B), row, in_order)

    def _seen(self, k: torch.Tensor, v: torch.Tensor, row: int, in_order: bool) -> Seen:
        """As `seen`, with K and V of pages by number: [pages, 128, num_kv_heads, head_size]."""
        table = self.tables[0, row].long()
        if in_order:
            table = row * self.blocks + torch.arange(self.blocks, device=table.device)

        def tokens(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = table[start // B : -(-end // B)] % len(k)
            return k[blocks].flatten(0, 1)[: end - start], v[blocks].flatten(0, 1)[: end - start]

        return tokens


class QuantizedPool(KiviPool):
    """This project's pages and rings on a GPU."""

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, gpu: Gpu
    ) -> None:
        super().__init__(shape, name, sets, batch, blocks, gpu.place)

    def allocate(self, huge_pages: bool = False) -> None:
        """Take the memory."""
        super().allocate(huge_pages)

    def read_bytes(self, work: Work) -> int:  # type: ignore[override]
        """Bytes that attending of one batch reads: packed blocks and raw tokens."""
        blocks = (work.end - work.new) // B
        return super().read_bytes(blocks, work.end - blocks * B)

    def seen(self, row: int, work: Work, in_order: bool = False) -> Seen:
        """What a sequence of the first set sees."""
        own = slice(row * work.new, (row + 1) * work.new)
        cached = work.end - work.new
        packed, d = cached // B * B, self.shape.head_size
        at = torch.arange(packed, cached, device=work.device)
        per_page = self.fmt.raw_tokens
        pages = self.ring_tables[0, row, at // per_page].long()
        ring = self.ring[pages, :, at % per_page]  # [n, num_kv_heads, 2 * D]
        raw_k = torch.cat([ring[..., :d], work.key[own]])
        raw_v = torch.cat([ring[..., d:], work.value[own]])

        def tokens(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = self.tables[0, row, start // B : min(end, packed) // B].long()
            k, v = decode_pages(self.pages[blocks], self.fmt)  # [n, num_kv_heads, 128, D]
            if start == 0 and len(k) and (n := self.fmt.sink_tokens):
                kept = self.sinks[self.sink_tables[0, row].long(), :, :n].float()
                k[:1, :, :n], v[:1, :, :n] = kept[..., :d], kept[..., d:]
            raw = slice(max(start, packed) - packed, max(end, packed) - packed)
            return (
                torch.cat([k.transpose(1, 2).flatten(0, 1), raw_k[raw].float()]),
                torch.cat([v.transpose(1, 2).flatten(0, 1), raw_v[raw].float()]),
            )

        return tokens


class TurboQuantPool(PagedPool):
    """vLLM's TurboQuant cache, `PRESET`: one slot of bytes a token and kv head."""

    PRESET = "turboquant_4bit_nc"

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, gpu: Gpu
    ) -> None:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        super().__init__(shape, "bf16", sets, batch, blocks, gpu)
        self.name = name
        self.config = TurboQuantConfig.from_cache_dtype(self.PRESET, shape.head_size)
        self.token_bytes = shape.num_kv_heads * self.config.slot_size_aligned
        self.nbytes = sets * batch * blocks * B * self.token_bytes
        d = shape.head_size
        centroids = get_centroids(d, self.config.centroid_bits)
        self.centroids = centroids.to(gpu.device, torch.float32).contiguous()
        ordered = self.centroids.sort()[0]
        self.midpoints = (ordered[:-1] + ordered[1:]) / 2
        rotation = torch.ones(1, 1)
        while len(rotation) < d:  # Hadamard's
            top = torch.cat([rotation, rotation], 1)
            rotation = torch.cat([top, torch.cat([rotation, -rotation], 1)])
        self.rotation = (rotation / d**0.5).to(gpu.device)

    def slots(self, memory: torch.Tensor, size: int) -> torch.Tensor:
        """Memory as [pages, size, num_kv_heads, bytes of a slot]."""
        return memory.view(-1, size, self.shape.num_kv_heads, self.config.slot_size_aligned)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all blocks with these whole blocks [n * 128, num_kv_heads, head_size], in turn."""
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        template = torch.zeros(len(key) * self.token_bytes, dtype=torch.uint8, device=key.device)
        triton_turboquant_store(
            key,
            value,
            self.slots(template, B),
            torch.arange(len(key), dtype=torch.int32, device=key.device),
            self.rotation,
            self.midpoints,
            mse_bits=self.config.key_mse_bits,
            key_packed_size=self.config.key_packed_size,
            value_quant_bits=self.config.effective_value_quant_bits,
            key_fp8=self.config.key_fp8,
        )
        block = B * self.token_bytes
        replicate(self.memory.view(-1, block), template.view(-1, block))
        self._key, self._value = key, value

    def seen(self, row: int, work: Work, in_order: bool = False) -> Seen:
        """What was stored, before it was quantized."""
        k, v = (x.unflatten(0, (-1, B)) for x in (self._key, self._value))
        return self._seen(k, v, row, in_order)  # page n has block n % len(k)


Pool = PagedPool | QuantizedPool


def make(shape: Shape, name: str, sets: int, batch: int, blocks: int, gpu: Gpu) -> Pool:
    """The pool `name`, not yet allocated.

    Raises:
        ImportError: vLLM's part of it is not there.

    """
    if name in PLAIN_DTYPES:
        return PagedPool(shape, name, sets, batch, blocks, gpu)
    kind = TurboQuantPool if name == "turboquant" else QuantizedPool
    return kind(shape, name, sets, batch, blocks, gpu)


def fitting(
    gpu: Gpu,
    memory: int | None,
    shape: Shape,
    blocks: dict[str, int],
    batch: int,
    most: int,
    told: Callable[[str], None],
) -> tuple[dict[str, Pool], dict[str, str]]:
    """Filled pools of those caches that fit; why not of the others.

    Args:
        gpu: where.
        memory: bytes that they may take together; None: what is free.
        shape: of the layer.
        blocks: by cache, the most important first: blocks of a sequence.
        batch: sequences.
        most: batches at the most; fewer where they would take more than `SET_BYTES`.
        told: is told each cache before it is made.

    """
    pools: dict[str, Pool] = {}
    reasons: dict[str, str] = {}
    for name, count in blocks.items():
        try:
            pools[name] = make(shape, name, 1, batch, count, gpu)
        except Exception as error:  # whatever others' code raises is a reason to do without
            reasons[name] = brief(error)
    free = gpu.free_bytes()
    free = free if memory is None else min(free, memory)
    of_all = sum(pool.nbytes for pool in pools.values())
    sets = min(2 if gpu.smoke else most, most, max(1, min(SET_BYTES, free) // of_all))
    left = free
    template = Tokens(shape, TEMPLATE_BLOCKS * B, gpu.device)
    for name in list(pools):
        pool = pools[name] = make(shape, name, sets, batch, blocks[name], gpu)
        if pool.nbytes > left:
            del pools[name]
            reasons[name] = (
                f"no room: its cache needs {pool.nbytes / GIB:.3g} GiB, of {free / GIB:.3g} free "
                f"{left / GIB:.3g} were left"
            )
            continue
        told(name)
        try:
            pool.allocate()
            pool.fill(template.key, template.value)
        except Exception as error:
            del pools[name]
            gpu.finish()
            reasons[name] = brief(error)
            continue
        left -= pool.nbytes
    return pools, reasons
