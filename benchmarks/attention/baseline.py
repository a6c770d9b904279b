"""vLLM's own CPU attention, called the way its backend calls it."""

from __future__ import annotations

import functools
from functools import partial

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.attention.cases import SHAPES, VLLM_DTYPES, B, Shape
from benchmarks.attention.check import KeyValue
from benchmarks.attention.kivi import CPU, Place, TokenPool
from benchmarks.attention.memory import Ranges, replicate
from benchmarks.attention.timing import Call
from benchmarks.attention.work import Work

_STORAGE = {"bf16": torch.bfloat16, "fp8": torch.uint8}


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


class VllmPool(TokenPool):
    """Blocks of vLLM's cache `name`, a key of `VLLM_DTYPES`."""

    def __init__(
        self, shape: Shape, name: str, sets: int, batch: int, blocks: int, place: Place = CPU
    ) -> None:
        super().__init__(shape, name, sets, batch, blocks, place)
        self.kv_cache_dtype = VLLM_DTYPES[name]
        self.isa = _get_attn_isa(torch.bfloat16, B, shape.head_size, self.kv_cache_dtype)
        self.token_bytes = shape.token_bytes * _STORAGE[name].itemsize // 2
        self._steps: dict[Work, torch.Tensor] = {}

    def allocate(self) -> None:
        """Take the memory."""
        super().allocate()
        shape = (-1, self.shape.num_kv_heads, 2 * B, self.shape.head_size)
        cache = self.memory.view(_STORAGE[self.name]).view(shape)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Fill all blocks with these whole blocks [n * 128, num_kv_heads, head_size], in turn."""
        template = VllmPool(self.shape, self.name, 1, 1, len(key) // B, self.place)
        template.allocate()
        template.writer(0, 0, len(key), key, value)()
        block = B * self.token_bytes
        written = template.memory.view(-1, block)[template.tables.flatten().long()]
        replicate(self.memory.view(-1, block), written)

    def writer(self, i: int, start: int, end: int, key: torch.Tensor, value: torch.Tensor) -> Call:
        """A call that writes positions start..end-1 of the sequences of set i, one after another.

        Key and value are [batch * (end - start), num_kv_heads, head_size].
        """
        args = (key, value, self.key_cache, self.value_cache, self.slots(i, start, end), self.isa)
        return partial(ops.cpu_attn_reshape_and_cache, *args, kv_cache_dtype=self.kv_cache_dtype)

    def _metadata(self, work: Work) -> torch.Tensor:
        """What vLLM computes once a step for all layers."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.batch,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_size,
            seq_lens=work.lens,
            dtype=torch.bfloat16,
            query_start_loc=work.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def attention(self, i: int, work: Work) -> Call:
        """A call of the attention of set i."""
        if work not in self._steps:
            self._steps[work] = self._metadata(work)
        return partial(
            ops.cpu_attention_with_kv_cache,
            query=work.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=work.output,
            query_start_loc=work.starts,
            seq_lens=work.lens,
            scale=work.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.tables[i],
            softcap=0.0,
            scheduler_metadata=self._steps[work],
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def ranges(self, i: int, work: Work) -> Ranges:
        """What attending over set i reads.

        Whole blocks, one range per head; of a last, partial block as many bytes from the start of
        its keys and of its values as its tokens take (some of vLLM's layouts spread those of the
        keys).
        """
        heads, half = self.shape.num_kv_heads, B * self.token_bytes // self.shape.num_kv_heads // 2
        whole, rest = divmod(work.end, B)
        blocks = self.memory.data_ptr() + self.tables[i].long() * B * self.token_bytes
        starts = blocks[..., None] + torch.arange(heads) * 2 * half  # [batch, blocks, heads]
        ranges = [(start, 2 * half) for start in starts[:, :whole].flatten().tolist()]
        if rest:
            last = starts[:, whole].flatten().tolist()
            ranges += [(at + side, half * rest // B) for side in (0, half) for at in last]
        return ranges


def checked(
    shape: Shape, name: str, work: Work, cached: int, key: torch.Tensor, value: torch.Tensor
) -> KeyValue:
    """A `check.Variant` of vLLM's attention over the cache `name`."""
    pool = VllmPool(shape, name, 1, work.batch, -(-work.end // B))
    pool.allocate()
    pool.writer(0, 0, work.end, key.flatten(0, 1), value.flatten(0, 1))()
    pool.attention(0, work)()
    return key, value
