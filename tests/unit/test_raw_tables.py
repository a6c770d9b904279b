"""Tables of full-precision tokens, as the steps of vLLM leave them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kivi_vllm.attention.layer import RawMetadataBuilder


def tables_of(table: torch.Tensor, max_num_seqs: int) -> torch.Tensor:
    """The table that a step with `table` leaves with a cache."""
    cache: Any = SimpleNamespace(table=None)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"ring": cache}),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )
    builder: Any = SimpleNamespace(vllm_config=config, layer_names=["ring"])
    step: Any = SimpleNamespace(block_table_tensor=table)
    assert RawMetadataBuilder.build(builder, 0, step).step is None
    found: torch.Tensor = cache.table
    return found


@pytest.mark.parametrize(("first", "rows"), [(0, 4), (6, 2)])
def test_it_has_the_rows_of_the_buffer(first: int, rows: int) -> None:
    """A draft's pass has rows of padding where the step had none: one request, a graph of four."""
    buffer = torch.arange(8 * 5, dtype=torch.int32).view(8, 5)
    found = tables_of(buffer[first : first + 1, :3], max_num_seqs=4)
    assert found.data_ptr() == buffer[first].data_ptr()
    assert torch.equal(found, buffer[first : first + rows, :3])


def test_it_loses_no_row() -> None:
    """A profiling step may have more than there will be sequences."""
    table = torch.zeros(6, 5, dtype=torch.int32)
    assert tables_of(table, max_num_seqs=4).shape == (6, 5)
