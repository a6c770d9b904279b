"""Rows as users write them."""

from __future__ import annotations

import pytest

from benchmarks.quality import rows
from benchmarks.quality.__main__ import CACHES
from benchmarks.quality.engine import arguments
from benchmarks.quality.rows import HISTORY_CHUNK, CacheRow
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import QUANTIZED_DTYPES


@pytest.mark.parametrize(
    ("text", "dtype", "options", "kind"),
    [
        ("auto", "auto", {}, "vllm"),
        (" fp8 ", "fp8", {}, "vllm"),
        (
            "kivi2:residual_length=32,prefill=cached",
            "kivi2",
            {"residual_length": 32, "prefill": "cached"},
            "vllm",
        ),
        (
            "simulated:kivi4:recipe=paper,group_size=64",
            "kivi4",
            {"recipe": "paper", "group_size": 64},
            "simulated",
        ),
        ("transformers:kv2:backend=hqq", "kv2", {"backend": "hqq"}, "transformers"),
    ],
)
def test_rows_are_read(text: str, dtype: str, options: dict, kind: str) -> None:
    row = CacheRow.parse(text)
    assert (row.name, row.dtype, row.options, row.kind) == (text.strip(), dtype, options, kind)


def test_the_default_rows_have_every_dtype_and_recipe() -> None:
    rows = [CacheRow.parse(name) for name in CACHES]
    assert rows[0].dtype == "auto" and rows[-1].kind == "transformers"
    ours = {(row.dtype, row.options.get("recipe", "best")) for row in rows if row.is_kivi}
    best = {(name, "best") for name in QUANTIZED_DTYPES}
    assert ours == best | {("kivi2", "paper"), ("kivi4", "paper")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no cache dtype ''"),
        ("kivi5", "no cache dtype 'kivi5'"),
        ("auto:group_size=32", "auto has no options"),
        ("kivi_k4v2", "no more; use kivi_k4v3"),
        ("kivi_k3v2:recipe=paper", "has no kivi_k3v2"),
        ("kivi2:residual_length=33", "kivi.residual_length is 33"),
        ("kivi2:residual_length=32.0", "kivi.residual_length is 32.0"),
        ("kivi2:group=32", "unknown option 'group'"),
        ("kivi2:group_size", "'group_size' is not option=value"),
        ("kivi2:group_size=32,", "'' is not option=value"),
        ("kivi2:group_size=32,group_size=64", "given twice"),
        ("simulated:auto", "only the KIVI dtypes can be simulated"),
        ("transformers:kv3", "no transformers row 'kv3'"),
        ("transformers:kv2:backend=gptq", "bad option backend=gptq"),
    ],
)
def test_mistakes_show_at_once(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        CacheRow.parse(text)
    assert found.value.remedy


def test_values_have_types() -> None:
    row = CacheRow.parse("kivi2:recipe=paper,group_size=64,prefill=exact")
    assert row.options == {"recipe": "paper", "group_size": 64, "prefill": "exact"}
    assert type(row.options["group_size"]) is int


def _arguments(name: str, **others: object) -> dict:
    return arguments(CacheRow.parse(name), "m", 512, **others)


def test_engine_arguments() -> None:
    kivi = _arguments("kivi2:residual_length=32")
    assert kivi["additional_config"] == {"kivi": {"prefill": "cached", "residual_length": 32}}
    exact = _arguments("kivi2:prefill=exact")
    assert exact["additional_config"] == {"kivi": {"prefill": "exact"}}, "the row's own wins"
    auto = _arguments("auto", seed=7)
    assert "additional_config" not in auto
    assert "max_num_batched_tokens" not in auto and auto["seed"] == 7


def test_only_foreign_quantized_caches_take_small_steps() -> None:
    names = ("auto", "fp8", "kivi2", "simulated:kivi2", "transformers:kv2")
    chunks = [_arguments(name).get("max_num_batched_tokens") for name in names]
    assert chunks == [None, HISTORY_CHUNK, None, None, None]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.DISTRIBUTIONS, "quanto", "no-such-thing")
    assert CacheRow.parse("transformers:kv2").missing == "pip install no-such-thing"
    assert CacheRow.parse("kivi2").missing is None
    monkeypatch.setitem(rows.DISTRIBUTIONS, "quanto", "pandas")
    assert CacheRow.parse("transformers:kv2").missing is None
