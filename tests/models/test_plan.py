"""`kivi-vllm plan` and a real engine give the same figures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kivi_vllm.attention.groups import shown
from kivi_vllm.cli import plan
from kivi_vllm.cli.errors import UserError
from tests.engine import engine, tiny_model
from tests.models.test_hybrids import HYBRIDS

WINDOWED: dict[str, Any] = dict(
    num_hidden_layers=4,
    head_dim=64,
    sliding_window=256,
    query_pre_attn_scalar=64,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("family", "shape", "dtype", "residual"),
    [
        ("llama", {}, "auto", 0),
        ("llama", {}, "kivi2", 0),
        ("llama", {}, "kivi4", 32),
        ("gemma2", WINDOWED, "auto", 0),
        ("gemma2", WINDOWED, "kivi_k4v3", 0),
        ("lfm2", HYBRIDS["lfm2"].shape, "kivi2", 32),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "",
)
def test_plan_is_what_the_engine_reports(
    family: str, shape: dict[str, Any], dtype: str, residual: int
) -> None:
    model = tiny_model(family, **shape)
    options = {"kivi": {"residual_length": residual}} if residual else {}
    common: dict[str, Any] = dict(additional_config=options, max_num_batched_tokens=512)
    planned = plan.capacity(model, dtype, 24 << 20, 1024, dtype="float32", **common)
    with engine(model, dtype, kv_cache_memory_bytes=24 << 20, **common) as llm:
        reported = llm.llm_engine.vllm_config.cache_config
        assert planned.tokens == reported.kv_cache_size_tokens
        assert planned.sequences == reported.kv_cache_max_concurrency
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert planned.hits_at == scheduler.kv_cache_manager.coordinator.scheduler_block_size
        groups = scheduler.kv_cache_config.kv_cache_groups
        assert planned.parts == shown.parts(groups, llm.llm_engine.vllm_config)
    assert planned.tokens > 1024


def test_a_model_that_needs_numbers_while_it_is_built() -> None:
    model = tiny_model("falcon", alibi=True, new_decoder_architecture=False)
    with pytest.raises(ValueError, match=r"ALiBi slopes, which a plan has not; `vllm serve`"):
        plan.capacity(model, "kivi2", 24 << 20, 1024)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512mib", 512 << 20),
        ("268435456", 268435456),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "much", "-1GiB", "0", "20 GiX", "1e9", "1,5GB", "1.5.5GB", "8GB or 16GB", "20G", "20Gbit"],
)
def test_no_memory(text: str) -> None:
    with pytest.raises(UserError, match="is not a size") as caught:
        plan.parse_memory(text)
    assert "20GiB" in caught.value.remedy


def test_options_that_are_no_object() -> None:
    with pytest.raises(UserError, match="is no JSON object"):
        plan.plan_table("model", "1GiB", None, "residual_length=32")


def _said(capsys: pytest.CaptureFixture[str], model: str) -> dict[str, list[str]]:
    """Rows of the second table that `plan` prints, by what they name; empty without one."""
    plan.plan_table(model, "24MiB", 1024)
    _, *second = capsys.readouterr().err.split("a sequence of 1,024 tokens")
    rows = [
        re.findall(r"[^│\s][^│]*", line) for line in "".join(second).splitlines() if "│" in line
    ]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_layers_that_differ_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 layers, 4 have a window: their pages fill the block, the others' come in twos."""
    monkeypatch.setattr(plan, "CACHE_DTYPES", ("kivi_k3v2",))
    kinds = ("sliding_attention", "sliding_attention", "full_attention") * 2
    shape = WINDOWED | dict(num_hidden_layers=6, layer_types=kinds)
    said = _said(capsys, tiny_model("gemma2", **shape))
    assert said.pop("pages, all tokens")[:3] == ["2", "1", "256"]
    assert said.pop("pages, window of 256")[:3] == ["4", "1", "128"]
    assert [name.split(":")[0] for name in said] == ["ring", "sinks"]
    shares = [float(cells[-1].rstrip(" %")) for cells in said.values()]
    assert 0 < sum(shares) < 100


def test_states_are_said_to_bound_the_gain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CACHE_DTYPES", ("kivi_k3v2",))
    plan.plan_table(HYBRIDS["lfm2"].path, "24MiB", 1024)
    said = capsys.readouterr().err
    assert re.search(r"states +│ +2 │", said) and "they bound the gain" in said


def test_layers_that_are_alike_need_no_second_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CACHE_DTYPES", ("kivi_k3v2",))
    assert _said(capsys, tiny_model("llama")) == {}
