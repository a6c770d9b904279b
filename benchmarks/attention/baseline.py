"""vLLM's own CPU attention, called the way its backend calls it."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.attention.cases import SHAPES, VLLM_DTYPES, B, Shape
from benchmarks.attention.check import BATCH, Outputs, truth
from benchmarks.attention.memory import Ranges, allocate, replicate, shuffled
from benchmarks.attention.timing import Call

_STORAGE = {"bf16": torch.bfloat16, "fp8": torch.uint8}


def load() -> None:
    """Load vLLM's kernels; once a process."""
    current_platform.import_kernels()


@functools.cache
def refused() -> dict[str, str]:
    """Keys of `VLLM_DTYPES` that vLLM does not have on this processor, with what it says."""
    reasons = {}
    for name in VLLM_DTYPES:
        try:
            VllmPool(next(iter(SHAPES.values())), name, 1, 1, 1)
        except NotImplementedError as error:
            reasons[name] = str(error)
    return reasons


def names() -> list[str]:
    """Keys of `VLLM_DTYPES` that can be measured here."""
    return [name for name in VLLM_DTYPES if name not in refused()]


class VllmPool:
    """Blocks of vLLM's cache for `sets` batches of sequences.

    Args:
        shape: of the layer.
        name: a key of `VLLM_DTYPES`.
        sets, batch, blocks: how many batches, sequences each, blocks each.

    """

    def __init__(self, shape: Shape, name: str, sets: int, batch: int, blocks: int) -> None:
        self.shape, self.name = shape, name
        self.kv_cache_dtype = VLLM_DTYPES[name]
        self.sets, self.batch, self.blocks = sets, batch, blocks
        self.isa = _get_attn_isa(torch.bfloat16, B, shape.head_size, self.kv_cache_dtype)
        self.block_bytes = B * shape.token_bytes * _STORAGE[name].itemsize // 2
        self.nbytes = sets * batch * blocks * self.block_bytes
        self.tables = shuffled(sets, batch, blocks, seed=1)

    def allocate(self, huge_pages: bool) -> None:
        """Take the memory."""
        memory, s = allocate(self.nbytes, huge_pages), self.shape
        self._pages = memory.view(-1, self.block_bytes)
        cache = memory.view(_STORAGE[self.name]).view(-1, s.num_kv_heads, 2 * B, s.head_size)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all blocks with these whole blocks [n * 128, num_kv_heads, head_size], in turn."""
        count = len(key) // B
        template = VllmPool(self.shape, self.name, 1, 1, count)
        template.tables = torch.arange(count, dtype=torch.int32).view(1, 1, count)
        template.allocate(False)
        template.store(0, 0, key, value)
        replicate(self._pages, template._pages)

    def read_bytes(self, tokens: int) -> int:
        """Bytes that attending of one batch over `tokens` tokens each reads."""
        return self.batch * tokens * self.block_bytes // B

    def slots(self, i: int, row: int, start: int, end: int) -> torch.Tensor:
        """The slot mapping (int64) of positions start..end-1 of a sequence of set i."""
        at = torch.arange(start, end)
        return self.tables[i, row, at // B].long() * B + at % B

    def writer(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
        """A call that writes tokens [n, num_kv_heads, head_size] to slots [n]."""
        args = (key, value, self.key_cache, self.value_cache, slots, self.isa)
        return partial(ops.cpu_attn_reshape_and_cache, *args, kv_cache_dtype=self.kv_cache_dtype)

    def store(self, i: int, row: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a whole sequence of set i."""
        self.writer(self.slots(i, row, 0, len(key)), key, value)()

    def plan(self, new: int, end: int) -> dict[str, Any]:
        """What vLLM computes once a step for all layers.

        Args:
            new: tokens of each sequence in the step.
            end: tokens of each after it.

        """
        s = self.shape
        starts = torch.arange(0, self.batch * new + 1, new, dtype=torch.int32)
        lens = torch.full((self.batch,), end, dtype=torch.int32)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.batch,
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_size,
            seq_lens=lens,
            dtype=torch.bfloat16,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return {"query_start_loc": starts, "seq_lens": lens, "scheduler_metadata": metadata}

    def attention(
        self, i: int, plan: dict[str, Any], query: torch.Tensor, output: torch.Tensor
    ) -> Call:
        """A call of the attention of set i; query and output [tokens, num_heads, head_size]."""
        return partial(
            ops.cpu_attention_with_kv_cache,
            query=query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=output,
            scale=self.shape.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.tables[i],
            softcap=0.0,
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
            **plan,
        )

    def ranges(self, i: int, tokens: int) -> Ranges:
        """What attending over `tokens` tokens of set i reads.

        Whole blocks, one range per head; of a last, partial block as many bytes from the start of
        its keys and of its values as its tokens take (some of vLLM's layouts spread those of the
        keys).
        """
        heads = self.shape.num_kv_heads
        size = self.block_bytes // heads
        whole, rest = divmod(tokens, B)
        blocks = self._pages.data_ptr() + self.tables[i].long() * self.block_bytes
        starts = blocks[..., None] + torch.arange(heads) * size  # [batch, blocks, heads]
        ranges = [(start, size) for start in starts[:, :whole].flatten().tolist()]
        if rest:
            last = starts[:, whole].flatten().tolist()
            half = size // 2
            ranges += [(at + side, half * rest // B) for side in (0, half) for at in last]
        return ranges


def checked(
    shape: Shape,
    name: str,
    cached: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> Outputs:
    """A `check.Variant` of vLLM's attention over the cache `name`."""
    new, total = query.shape[1], key.shape[1]
    pool = VllmPool(shape, name, 1, BATCH, -(-total // B))
    pool.allocate(False)
    for row in range(BATCH):
        pool.store(0, row, key[row], value[row])
    output = torch.full_like(query, float("nan"))
    pool.attention(0, pool.plan(new, total), query.flatten(0, 1), output.flatten(0, 1))()
    return output, torch.stack([truth(*row) for row in zip(query, key, value, strict=True)])
