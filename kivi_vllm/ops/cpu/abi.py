"""The structs that Python packs for the kernels: `csrc/abi.h` once more, by name.

All fields are 64 bits wide. What is packed lies in the order of these tuples, and `Library`
compares them, names and offsets, with those that it was compiled with.
"""

from __future__ import annotations

import struct

Fields = tuple[tuple[str, struct.Struct], ...]

_INTEGER, _DOUBLE = struct.Struct("=q"), struct.Struct("=d")


def _fields(names: str, **others: struct.Struct) -> Fields:
    """Fields of these names: integers or addresses, but for `others`."""
    return tuple((name, others.get(name, _INTEGER)) for name in names.split())


def _packed(fields: Fields) -> struct.Struct:
    return struct.Struct("=" + "".join(kind.format.lstrip("=") for _, kind in fields))


ROW_FIELDS = _fields("index q0 q1 a b generated")  # `Step.row_array`
RAW_FIELDS = _fields(
    "data block_stride head_stride token_stride num_blocks page_tokens table table_stride "
    "table_width"
)
TENSOR_FIELDS = _fields("data token_stride head_stride")
RAW, TENSOR = _packed(RAW_FIELDS), _packed(TENSOR_FIELDS)

COMMON_FIELDS = _fields(
    "rows num_rows per_position decode_len k_bits v_bits group_size two_level head_size dtype "
    "num_kv_heads pages page_block_stride page_stride page_head_stride num_blocks pages_per_block "
    "block_table block_table_stride block_table_width ring tails num_tails residual_length sinks "
    "sink_tokens key value threads",
    **dict(ring=RAW, sinks=RAW, key=TENSOR, value=TENSOR),
)
"""Of a KiviCall: what all calls of a step need."""

QUERY_FIELDS = _fields(
    "query output out_dtype num_heads scale soft_cap alibi_slopes sliding_window sink_logits "
    "chunk_size last_visible token_budget estimate_channels selected selected_counts "
    "selected_width counted",
    **dict(query=TENSOR, output=TENSOR, scale=_DOUBLE, soft_cap=_DOUBLE),
)
"""The rest, which `select` and `attend` alone need."""

COMMON, QUERY = _packed(COMMON_FIELDS), _packed(QUERY_FIELDS)

STRUCTS = {
    "KiviRow": ROW_FIELDS,
    "KiviRaw": RAW_FIELDS,
    "KiviTensor": TENSOR_FIELDS,
    "KiviCall": COMMON_FIELDS + QUERY_FIELDS,
}


def offsets() -> list[tuple[str, int]]:
    """What `kivi_fields` must say: where each field begins, then the size of each struct."""
    begins, ends = [], []
    for name, fields in STRUCTS.items():
        at = 0
        for field, kind in fields:
            begins.append((f"{name}.{field}", at))
            at += kind.size
        ends.append((name, at))
    return begins + ends
