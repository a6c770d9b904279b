"""The launch of `_decode` as the kernel in CUDA C++ takes it."""

from __future__ import annotations

from typing import Any

import torch

from kivi_vllm.ops.cuda import decode as cuda
from kivi_vllm.ops.step import AttentionParams
from kivi_vllm.ops.triton.page import PageConstants
from kivi_vllm.ops.triton.softmax import Rules
from kivi_vllm.ops.triton.tokens import Pages, RawTokens


def variant(
    constants: PageConstants,
    rules: Rules,
    dtype: torch.dtype,
    gqa: int,
    columns: tuple[int, int],
    masked: bool,
) -> cuda.Variant:
    """What it is compiled for; `columns` are tiles and columns of a tile."""
    return cuda.Variant(
        D=constants.D,
        K_BITS=constants.K_BITS,
        V_BITS=constants.V_BITS,
        G=constants.G,
        SINKS=constants.SINKS,
        PER_BLOCK=constants.PER_BLOCK,
        RING=constants.RING,
        TAIL=max(1, constants.TAIL),
        R=rules.R,
        GQA=gqa,
        TILES=columns[0],
        N=columns[1],
        MASKED=masked,
        BF16=dtype == torch.bfloat16,
        CAP=float(rules.CAP),
        ALIBI=rules.ALIBI,
        WINDOW=rules.WINDOW,
        CHUNK=rules.CHUNK,
    )


def fields(
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    paged: Pages,
    raw: RawTokens,
    params: AttentionParams,
    splits: int,
    partial: torch.Tensor,
    statistics: torch.Tensor,
) -> dict[str, int | float]:
    """What it takes: addresses, and strides in bytes."""
    slopes = params.alibi_slopes
    given: dict[str, Any] = {
        "query": query,
        "query_token": query.stride(0),
        "query_head": query.stride(1),
        **raw._asdict(),
    }
    size = query.element_size()
    numbers = {name: x * size for name, x in given.items() if isinstance(x, int)}
    rows = {  # of tables, whose entries are int32
        "table_row": paged.table_row * 4,
        "ring_row": raw.table_row * 4,
        "tails_row": raw.tails_row * 4,
        "sinks_row": raw.sinks_row * 4,
    }
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    tensors |= {"ring_table": raw.table, "table": paged.table, "pages": paged.pages}
    tensors |= {"query_start_loc": query_start_loc, "seq_lens": seq_lens}
    tensors |= {"partial": partial, "statistics": statistics}
    return {
        **numbers,
        **rows,
        **{name: x.data_ptr() for name, x in tensors.items()},
        "page_block": paged.block_stride,
        "page_page": paged.page_stride,
        "page_head": paged.head_stride,
        "slopes": 0 if slopes is None else slopes.data_ptr(),
        "scale": params.scale,
        "splits": splits,
    }
