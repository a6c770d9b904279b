"""Pools of others' cache pages on the GPU, and what is in them."""

from __future__ import annotations

import torch

from benchmarks.attention.cases import B, Shape
from benchmarks.attention.kivi import Place, TokenPool
from benchmarks.attention.memory import replicate
from benchmarks.attention.work import Seen, Work

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class PagedPool(TokenPool):
    """Blocks of K and V, one number after the other, of one of `PLAIN_DTYPES`.

    They lie as vLLM's GPU backends lay them by default: [pages, tokens of a page,
    num_kv_heads, K and V]. A page may be any part of a block of 128 tokens.
    """

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place
    ) -> None:
        super().__init__(shape, name, sets, batch, blocks, place)
        self.dtype = PLAIN_DTYPES.get(name, torch.bfloat16)
        self.token_bytes = shape.token_bytes * self.dtype.itemsize // 2

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
        parts = torch.arange(B // size, dtype=torch.int32, device=self.place.device)
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


class TurboQuantPool(PagedPool):
    """vLLM's TurboQuant cache, `PRESET`: one slot of bytes a token and kv head."""

    PRESET = "turboquant_4bit_nc"

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place
    ) -> None:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        super().__init__(shape, name, sets, batch, blocks, place)
        self.config = TurboQuantConfig.from_cache_dtype(self.PRESET, shape.head_size)
        self.token_bytes = shape.num_kv_heads * self.config.slot_size_aligned
        d = shape.head_size
        centroids = get_centroids(d, self.config.centroid_bits)
        self.centroids = centroids.to(place.device, torch.float32).contiguous()
        ordered = self.centroids.sort()[0]
        self.midpoints = (ordered[:-1] + ordered[1:]) / 2
        rotation, signs = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        while len(rotation) < d:  # Hadamard's
            rotation = torch.kron(signs, rotation)
        self.rotation = (rotation / d**0.5).to(place.device)

    def pages_of(self, memory: torch.Tensor, size: int) -> torch.Tensor:
        """Memory as [pages, size, num_kv_heads, bytes of a slot]."""
        return memory.view(-1, size, self.shape.num_kv_heads, self.config.slot_size_aligned)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all blocks with these whole blocks [n * 128, num_kv_heads, head_size], in turn."""
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        template = torch.zeros(len(key) * self.token_bytes, dtype=torch.uint8, device=key.device)
        triton_turboquant_store(
            key,
            value,
            self.pages_of(template, B),
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
