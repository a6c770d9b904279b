"""A user without one of our dtypes sees no change at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tests.engine import tiny_model
from tests.models.child import results, results_in_child


def has_fp8() -> bool:
    """Whether vLLM has an fp8 cache on this processor."""
    try:
        _get_attn_isa(torch.float32, 128, 64, "fp8")
    except NotImplementedError:  # x86 without AVX-512
        return False
    return True


NEEDS_FP8 = pytest.mark.skipif(not has_fp8(), reason="vLLM has no fp8 cache on this processor")


@pytest.mark.parametrize("dtype", ["auto", pytest.param("fp8", marks=NEEDS_FP8)])
def test_other_dtypes_are_the_same_with_and_without_the_plugin(dtype: str, tmp_path: Path) -> None:
    model = tiny_model()
    runs = [dict(kv_cache_dtype=dtype)]
    [without] = results_in_child(tmp_path, model, runs, VLLM_PLUGINS="none-of-them")
    [with_plugin] = results(model, runs)
    assert (without.pop("kivi_dtypes"), with_plugin.pop("kivi_dtypes")) == (False, True)
    assert with_plugin == without
    assert without["backends"] == ["CPU_ATTN"]
    assert without["logprobs"] and without["capacity"]
