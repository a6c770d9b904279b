"""A user without one of our dtypes sees no change at all."""

from __future__ import annotations

from pathlib import Path

from tests.engine import tiny_model
from tests.models.child import results, results_in_child


def test_other_dtypes_are_the_same_with_and_without_the_plugin(tmp_path: Path) -> None:
    model = tiny_model()
    runs = [dict(kv_cache_dtype=dtype) for dtype in ("auto", "fp8")]
    without = results_in_child(tmp_path, model, runs, VLLM_PLUGINS="none-of-them")
    with_plugin = results(model, runs)
    assert [run.pop("kivi_dtypes") for run in without] == [False, False]
    assert [run.pop("kivi_dtypes") for run in with_plugin] == [True, True]
    assert with_plugin == without

    auto, fp8 = without
    assert auto["backends"] == fp8["backends"] == ["CPU_ATTN"]
    assert auto["logprobs"] != fp8["logprobs"]
    assert fp8["capacity"] == 4 * auto["capacity"]
