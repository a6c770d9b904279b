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


@pytest.mark.slow
def test_other_dtypes_are_the_same_with_and_without_the_plugin(tmp_path: Path) -> None:
    model = tiny_model()
    dtypes = ["auto", "fp8"] if has_fp8() else ["auto"]
    runs = [dict(kv_cache_dtype=dtype) for dtype in dtypes]
    without = results_in_child(tmp_path, model, runs, VLLM_PLUGINS="none-of-them")
    with_plugin = results(model, runs)
    assert {run.pop("kivi_dtypes") for run in without} == {False}
    assert {run.pop("kivi_dtypes") for run in with_plugin} == {True}
    for run in (*with_plugin, *without):
        del run["pages_counted"]  # of the whole process, which other tests share
    assert with_plugin == without
    assert [run["backends"] for run in without] == [["CPU_ATTN"]] * len(dtypes)
    if has_fp8():
        auto, fp8 = without
        assert auto["logprobs"] != fp8["logprobs"]
        assert fp8["capacity"] == 4 * auto["capacity"]
