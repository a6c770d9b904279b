"""Who attends: this project's operators, and others' called as vLLM calls them.

A contender is made for one set of a pool and one step, and gives a call without arguments that
writes to `work.output`, or returns a tensor. What a step computes once for all layers (tables,
metadata, scratch) is made with it and not timed. It raises where it cannot run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from benchmarks.attention.cases import KIVI_DTYPES
from benchmarks.attention.gpu.pools import PagedPool, TurboQuantPool
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.timing import Call
from benchmarks.attention.work import Work

Maker = Callable[[Any, int, Work], Call]


class Contender(NamedTuple):
    """One implementation over one cache.

    `make` gives its call for set i of the pool `cache`; `limit` is that of its relative error
    against float64 on what the cache holds. It takes part in `sections`. It may know no block
    tables and go through a sequence's blocks `in_order`.
    """

    cache: str
    make: Maker
    limit: float
    sections: tuple[str, ...] = ("decode",)
    in_order: bool = False


def served(pool: KiviPool, i: int, work: Work) -> Call:
    """`attend` as vLLM runs it where nothing is cached: by a library."""
    from kivi_vllm.ops.triton.first_chunk import choose

    library = choose(pool.params, work.shape.head_size, torch.bfloat16)
    if library is None:
        raise RuntimeError("no library: what is served is kivi2")
    return pool.attention(i, work, replace(pool.params, first_chunk=library))


def sdpa(pool: PagedPool, i: int, work: Work) -> Call:
    """PyTorch's own attention, over the pool's blocks in the order in which they lie."""
    k, v = (x.unflatten(0, (pool.sets, pool.batch, -1))[i] for x in pool.pages(128))
    k, v = (x.flatten(1, 2)[:, : work.end].transpose(1, 2) for x in (k, v))
    query = work.query.unflatten(0, (work.batch, work.new)).transpose(1, 2)
    mask = None
    if 1 < work.new < work.end:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(work.new, work.end)
    how = {"attn_mask": mask, "is_causal": work.new == work.end > 1, "scale": work.scale}
    how["enable_gqa"] = query.shape[1] != k.shape[1]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, k, v, **how)
    return lambda: attend().transpose(1, 2)


def flash(page: int, pool: PagedPool, i: int, work: Work) -> Call:
    """vLLM's FlashAttention over pages of `page` tokens; 16: as vLLM serves.

    That is: with the scheduler's metadata made once a step, and, at decode, at most as many
    splits as in its CUDA graphs. Otherwise FlashAttention decides by itself.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=work.shape.head_size)
    if version is None:
        raise RuntimeError("vLLM has no FlashAttention for this device")
    arguments = _paged(pool, i, work, page)
    if pool.name == "fp8":
        scales = _one(work.device).expand(work.batch, work.shape.num_kv_heads)
        arguments |= dict.fromkeys(("q_descale", "k_descale", "v_descale"), scales)
    if page == 16 and version == 3:
        arguments["num_splits"] = 32 if work.new == 1 else 0
        arguments["scheduler_metadata"] = fa_utils.get_scheduler_metadata(
            batch_size=work.batch,
            max_seqlen_q=work.new,
            max_seqlen_k=work.end,
            num_heads_q=work.shape.num_heads,
            num_heads_kv=work.shape.num_kv_heads,
            headdim=work.shape.head_size,
            cache_seqlens=work.lens,
            qkv_dtype=arguments["q"].dtype,
            cu_seqlens_q=work.starts,
            page_size=page,
            causal=True,
            num_splits=arguments["num_splits"],
        )
    return partial(fa_utils.flash_attn_varlen_func, fa_version=version, **arguments)


def unified(pool: PagedPool, i: int, work: Work) -> Call:
    """vLLM's attention in Triton."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    heads, kv_heads = work.shape.num_heads, work.shape.num_kv_heads
    # As `TritonAttentionMetadataBuilder`: up to so many sequences are split into 16 segments.
    threshold, segments = 128 // kv_heads, 16
    count = min(threshold, work.batch * work.new)
    width = 1 << (work.shape.head_size - 1).bit_length()
    scratch = partial(torch.empty, dtype=torch.float32, device=work.device)
    descale = _one(work.device).expand(work.batch, kv_heads)
    return partial(
        unified_attention,
        **_paged(pool, i, work, 16),
        window_size=(-1, -1),
        softcap=0,
        q_descale=_one(work.device) if pool.name == "fp8" else None,
        k_descale=descale,
        v_descale=descale,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=segments,
        softmax_segm_output=scratch(count, heads, segments, width),
        softmax_segm_max=scratch(count, heads, segments),
        softmax_segm_expsum=scratch(count, heads, segments),
        kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if pool.name == "fp8" else KVQuantMode.NONE,
    )


def flashinfer(pool: PagedPool, i: int, work: Work) -> Call:
    """FlashInfer's decode over pages of 16 tokens."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, shape = 16, work.shape
    count = -(-work.end // page)
    last = work.end - (count - 1) * page
    steps = torch.arange(work.batch + 1, dtype=torch.int32, device=work.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(work.device), "NHD", use_tensor_cores=shape.num_heads // shape.num_kv_heads >= 4
    )
    wrapper.plan(
        steps * count,
        pool.table(i, page)[:, :count].flatten(),
        torch.full_like(steps[1:], last),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        page,
        q_data_type=torch.bfloat16,
        kv_data_type=pool.dtype,
        sm_scale=work.scale,
    )
    return partial(wrapper.run, work.query, pool.pages(page), out=work.output)


def turboquant(pool: TurboQuantPool, i: int, work: Work) -> Call:
    """vLLM's TurboQuant decode."""
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    splits, config = 32, pool.config
    scratch = partial(torch.empty, dtype=torch.float32, device=work.device)
    return partial(
        triton_turboquant_decode_attention,
        query=work.query,
        kv_cache=pool.pages_of(pool.memory, 16),
        block_table=pool.table(i, 16),
        seq_lens=work.lens,
        Pi=pool.rotation,
        centroids=pool.centroids,
        scale=work.scale,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
        norm_correction=config.norm_correction,
        PiT=pool.rotation,
        mid_o_buf=scratch(work.batch, work.shape.num_heads, splits, work.shape.head_size + 1),
        output_buf=work.output,
        lse_buf=scratch(work.batch, work.shape.num_heads),
        max_num_kv_splits=splits,
    )


def writer(pool: PagedPool, i: int, work: Work) -> Call:
    """vLLM's store of a step's tokens into its bf16 cache."""
    from vllm._custom_ops import reshape_and_cache_flash

    one, slots = _one(work.device), pool.slots(i, work.end - work.new, work.end)
    args = (work.key, work.value, *pool.pages(128), slots, "auto", one, one)
    return partial(reshape_and_cache_flash, *args)


def _paged(pool: PagedPool, i: int, work: Work, page: int) -> dict[str, Any]:
    """What attention over pages takes: the query of the cache's dtype, as vLLM gives it."""
    k, v = pool.pages(page)
    return {
        "q": work.query.to(pool.dtype),
        "k": k,
        "v": v,
        "out": work.output,
        "cu_seqlens_q": work.starts,
        "max_seqlen_q": work.new,
        "seqused_k": work.lens,
        "max_seqlen_k": work.end,
        "softmax_scale": work.scale,
        "causal": True,
        "block_table": pool.table(i, page),
    }


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


OURS = 0.01
"""Limit of the relative error; rounding the output to bf16 makes about 0.002."""

BOTH = ("decode", "prefill")

CONTENDERS: dict[str, Contender] = {
    "kivi2": Contender("kivi2", KiviPool.attention, OURS, BOTH),
    "kivi2_served": Contender("kivi2", served, OURS, ("prefill",)),
    "flash_bf16": Contender("bf16", partial(flash, 16), 0.02, BOTH),
    "flash_fp8": Contender("fp8", partial(flash, 16), 0.2),
    "sdpa_bf16": Contender("bf16", sdpa, 0.02, BOTH, in_order=True),
    **{
        name: Contender(name, KiviPool.attention, OURS)
        for name in reversed(KIVI_DTYPES)
        if name != "kivi2"
    },
    "flash128_bf16": Contender("bf16", partial(flash, 128), 0.02, BOTH),
    "flash128_fp8": Contender("fp8", partial(flash, 128), 0.2),
    "triton_bf16": Contender("bf16", unified, 0.02),
    "triton_fp8": Contender("fp8", unified, 0.2),
    "flashinfer_bf16": Contender("bf16", flashinfer, 0.02),
    "flashinfer_fp8": Contender("fp8", flashinfer, 0.2),
    # Against what was quantized: this only tells garbage.
    "turboquant": Contender("turboquant", turboquant, 0.6),
}
"""By name, the most important first: where memory is short, the last are left out."""
