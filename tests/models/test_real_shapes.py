"""How many sequences real models' caches hold, by vLLM's own accounting on their configurations."""

from __future__ import annotations

import pytest

pytest.importorskip("pandas")

from benchmarks.published import read
from benchmarks.reach.__main__ import LENGTHS, rows
from tests.choice import some

# The least that `kivi2` must hold in 40 GiB, in terms of bf16's, at `LENGTHS`.
LEAST = {
    "Gemma-3-27B": (5.2, 5.2, 5.2),
    "gpt-oss-120b": (4.8, 5.0, 5.2),
    "Qwen3-Next-80B-A3B": (2.1, 3.5, 4.5),
    "Llama-4-Scout": (5.6, 6.0, 6.2),
}


@pytest.mark.parametrize("name", some([*LEAST], [0]))
def test_sequences_in_40_gib(name: str) -> None:
    """Also what is published of them."""
    found = rows(name, 40 << 30, ("auto", "kivi2"))
    held = {(row["cache_dtype"], row["max_model_len"]): row.get("sequences") for row in found}
    for length, least in zip(LENGTHS, LEAST[name], strict=True):
        assert held["kivi2", length] >= least * held["auto", length], length
    published = read("reach", "rows", model=name).set_index(["cache_dtype", "max_model_len"])
    assert held == {key: published["sequences"][key] for key in held}


def test_a_model_that_is_not_served_says_why() -> None:
    (row,) = rows("DeepSeek-R1", 40 << 30, ("kivi2",), (8192,))
    assert "latent attention" in row["refused"] and "tokens" not in row
