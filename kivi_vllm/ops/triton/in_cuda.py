"""Launches as the kernels in CUDA C++ take them."""

from __future__ import annotations

import torch

from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.step import AttentionParams, DeviceStep
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
    budget: int = 0,
    pages: int = 0,
) -> cuda.Variant:
    """What they are compiled for; `columns` are tiles and columns of a tile, `budget` is pages."""
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
        BUDGET=budget,
        PAGES=pages,
    )


def fields(
    query: torch.Tensor,
    step: DeviceStep,
    paged: Pages,
    raw: RawTokens | None,
    params: AttentionParams,
) -> dict[str, int | float]:
    """What all of them take: addresses, and strides in bytes."""
    slopes, size = params.alibi_slopes, query.element_size()
    found: dict[str, int | float] = {
        **({} if raw is None else _raw_fields(raw, size)),
        "query": query.data_ptr(),
        "query_token": query.stride(0) * size,
        "query_head": query.stride(1) * size,
        "query_start_loc": step.query_start_loc.data_ptr(),
        "seq_lens": step.seq_lens.data_ptr(),
        "pages": paged.pages.data_ptr(),
        "page_block": paged.block_stride,
        "page_page": paged.page_stride,
        "page_head": paged.head_stride,
        "table": paged.table.data_ptr(),
        "table_row": paged.table_row * 4,  # entries are int32
        "slopes": 0 if slopes is None else slopes.data_ptr(),
        "scale": params.scale,
    }
    return found


def _raw_fields(raw: RawTokens, size: int) -> dict[str, int | float]:
    """Where full-precision tokens are; numbers of `size` bytes."""
    tables = {"table": "ring_table", "table_row": "ring_row"}
    found: dict[str, int | float] = {}
    for name, x in raw._asdict().items():
        entry = 4 if name.endswith("_row") else size
        found[tables.get(name, name)] = x.data_ptr() if isinstance(x, torch.Tensor) else x * entry
    return found
