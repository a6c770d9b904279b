"""The page format: what the bytes of one block of one kv head mean.

A page holds `BLOCK_SIZE` = 128 tokens. A layer's are `[blocks of the pool, k, num_kv_heads,
page_bytes]` bytes, k pages to a block of the pool; all that matters here is that the
`page_bytes` of one (block, kv head) are contiguous. They hold, in this order
(D = head_size, b = bits, G = group_size, little endian throughout), under recipe "best":

| field   | type  | shape              | bytes    | meaning                                |
|---------|-------|--------------------|----------|----------------------------------------|
| k_low   | fp16  | [D]                | 2·D      | the channel's least zero               |
| k_step  | fp16  | [D]                | 2·D      | its unit of scales and zeros           |
| k_range | uint8 | [128/G, D]         | 128·D/G  | of G tokens: scale and zero in steps   |
| k_codes | uint8 | [b, D/4, 16, 4]    | 16·D·b   | see `codes`                            |
| v_mean  | fp16  | [D]                | 2·D      | what the channel's values share        |
| v_scale | fp16  | [128]              | 256      | one per token                          |
| v_codes | uint8 | [D/32, 8b, 16, 4]  | 16·D·b   | see `codes`                            |

and nothing up to the next multiple of 128 bytes. So a token and kv head take
D·(k_bits + v_bits)/8 + D·(6/128 + 1/G) + 2 bytes: 80 at D = 128 with 2 bits and G = 16, where
bf16 takes 512. With u = a byte of k_range and r = `zero_step`(k_bits),

    key   = code · (u mod 16)·k_step + (k_low + r·⌊u / 16⌋·k_step)
    value = v_scale · (code - (2^b - 1)/2 + v_mean),  after `codec.rotate`:

a sum of values over tokens is rotated back. Under recipe "paper" a page is KIVI's:

| field   | type  | shape              | bytes    | meaning                         |
|---------|-------|--------------------|----------|---------------------------------|
| k_scale | fp16  | [128/G, D]         | 256·D/G  | one per channel and G tokens    |
| k_zero  | fp16  | [128/G, D]         | 256·D/G  |                                 |
| k_codes | uint8 | [b, D/4, 16, 4]    | 16·D·b   | see `codes`                     |
| v_scale | fp16  | [D/G, 128]         | 256·D/G  | one per token and G channels    |
| v_zero  | fp16  | [D/G, 128]         | 256·D/G  |                                 |
| v_codes | uint8 | [D/32, 8b, 16, 4]  | 16·D·b   | see `codes`                     |

with key or value = code · scale + zero.

**Sinks.** With `sink_tokens` = S, the codes of the first S tokens of a sequence's first
block stand for nothing: those tokens are read at full precision from elsewhere.

`kivi_raw` has two fields instead, `k_codes` and `v_codes`, which are [128, D] in
the model's dtype.

The same bytes, taken for the full-precision cache of recent tokens, hold up to
`raw_tokens` tokens of K and V in the model's dtype: see `PageFormat.raw_tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from kivi_vllm.config import (
    BLOCK_SIZE,
    HEAD_SIZES,
    PADDED_HEAD_SIZES,
    PAPER_GROUP_SIZES,
    RAW_BITS,
    SINK_TOKENS,
    KiviConfig,
    KiviConfigError,
)
from kivi_vllm.ops.codes import key_shape, value_shape

RAW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Field:
    """One field of a page: `shape` of `dtype` at byte `offset`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the field takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """Read the field of `pages` [..., page_bytes] uint8 -> [..., *shape]."""
        part = pages[..., self.offset : self.offset + self.nbytes].contiguous()
        return part.view(self.dtype).unflatten(-1, self.shape)


@dataclass(frozen=True)
class PageFormat:
    """Byte layout of one block of one kv head.

    Attributes:
        k_bits, v_bits: 2, 3, 4 or `RAW_BITS`.
        group_size: G, dividing `BLOCK_SIZE`, and of a paper page the head size.
        head_size: D, of keys and of values.
        raw_dtype: the model's dtype.
        two_level: whether the page is that of recipe "best".
        sink_tokens: see above.

    Raises:
        KiviConfigError: a head size or dtype that is not supported, a group size
            that does not divide the head size, or sinks that do not fit a page.

    """

    k_bits: int
    v_bits: int
    group_size: int
    head_size: int
    raw_dtype: torch.dtype
    two_level: bool
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.head_size not in HEAD_SIZES:
            good = sorted([*HEAD_SIZES, *PADDED_HEAD_SIZES])
            raise KiviConfigError(
                f"head size {self.head_size} is not supported by the KIVI cache (supported: "
                f"{', '.join(map(str, good))}); serve this model with --kv-cache-dtype auto or fp8"
            )
        if not self.two_level and self.head_size % self.group_size:
            good = [g for g in PAPER_GROUP_SIZES if self.head_size % g == 0]
            raise KiviConfigError(
                f"kivi.group_size {self.group_size} does not divide this model's head size "
                f"{self.head_size}; use {' or '.join(map(str, good))}"
            )
        if self.raw_dtype not in RAW_DTYPES:
            raise KiviConfigError(
                "the KIVI cache needs a bfloat16, float16 or float32 model, not "
                f"{str(self.raw_dtype).removeprefix('torch.')}; set --dtype to one of them"
            )
        if self.sink_tokens > self.raw_tokens:
            raise KiviConfigError(
                f"kivi.sink_tokens is {self.sink_tokens}, but a page holds {self.raw_tokens} "
                f"tokens of {str(self.raw_dtype).removeprefix('torch.')}; use "
                f"{max(n for n in SINK_TOKENS if n <= self.raw_tokens)} at most"
            )

    def __hash__(self) -> int:  # of every call of an operator
        return self._hash

    @cached_property
    def _hash(self) -> int:  # of integers, so that it may travel to another process
        return hash((self.k_bits, self.v_bits, self.page_bytes, self.raw_tokens, self.sink_tokens))

    @classmethod
    def of(cls, config: KiviConfig, head_size: int, raw_dtype: torch.dtype) -> PageFormat:
        """The format that `config` asks for in a layer of this head size and dtype.

        Its head size is the layer's, or that of `PADDED_HEAD_SIZES`.
        """
        return cls(
            config.k_bits,
            config.v_bits,
            config.group_size,
            PADDED_HEAD_SIZES.get(head_size, head_size),
            raw_dtype,
            config.recipe == "best",
            config.sink_tokens,
        )

    @property
    def is_raw(self) -> bool:
        """Whether pages hold K and V verbatim."""
        return self.k_bits == RAW_BITS

    @cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of a page by name, in the order of their bytes."""
        d, g = self.head_size, self.group_size
        spec: list[tuple[str, torch.dtype, tuple[int, ...]]]
        if self.is_raw:
            spec = [(name, self.raw_dtype, (BLOCK_SIZE, d)) for name in ("k_codes", "v_codes")]
        elif self.two_level:
            spec = [
                ("k_low", torch.float16, (d,)),
                ("k_step", torch.float16, (d,)),
                ("k_range", torch.uint8, (BLOCK_SIZE // g, d)),
                ("k_codes", torch.uint8, key_shape(self.k_bits, d)),
                ("v_mean", torch.float16, (d,)),
                ("v_scale", torch.float16, (BLOCK_SIZE,)),
                ("v_codes", torch.uint8, value_shape(self.v_bits, d)),
            ]
        else:
            spec = [
                ("k_scale", torch.float16, (BLOCK_SIZE // g, d)),
                ("k_zero", torch.float16, (BLOCK_SIZE // g, d)),
                ("k_codes", torch.uint8, key_shape(self.k_bits, d)),
                ("v_scale", torch.float16, (d // g, BLOCK_SIZE)),
                ("v_zero", torch.float16, (d // g, BLOCK_SIZE)),
                ("v_codes", torch.uint8, value_shape(self.v_bits, d)),
            ]
        fields: dict[str, Field] = {}
        offset = 0
        for name, dtype, shape in spec:
            fields[name] = Field(name, dtype, shape, offset)
            offset += fields[name].nbytes
        return fields

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one block of one kv head: a multiple of its tokens."""
        last = list(self.fields.values())[-1]
        return -(-(last.offset + last.nbytes) // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one kv head (vLLM's `state_content_bytes`)."""
        return self.page_bytes // BLOCK_SIZE

    @property
    def raw_token_bytes(self) -> int:
        """Bytes of K and V of one token in the model's dtype."""
        return 2 * self.head_size * self.raw_dtype.itemsize

    @cached_property
    def raw_tokens(self) -> int:
        """Full-precision tokens (K and V) that one page's bytes hold.

        20, 23, 27, 31 and 35 tokens for `kivi2`, `kivi_k3v2`, `kivi3`, `kivi_k4v3` and `kivi4` of
        16-bit models with head sizes of 64 and 128. Pages of `kivi_raw` could hold 128, but take
        32 like their quantized kin, so that the diagnostic runs through as many pages.
        """
        tokens = self.page_bytes // self.raw_token_bytes
        return min(tokens, 32) if self.is_raw else tokens

    def as_raw(self, pages: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Pages [..., n] uint8 -> [..., tokens, 2 * D] of `raw_dtype`, K before V.

        `tokens`: of a page, as far as its n bytes hold them; None: `raw_tokens`.
        """
        count = self.raw_tokens if tokens is None else tokens
        held = pages[..., : count * self.raw_token_bytes]
        return held.unflatten(-1, (-1, self.raw_token_bytes)).view(self.raw_dtype)
