"""Wrong options: each message names the value and the good ones."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.refusals.configs import config_only, engine_config, refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 32},
            "kivi.group_size is 32, but under recipe 'best' a dtype has its own (kivi2 16, "
            "kivi_k3v2 32, kivi3 32, kivi_k4v3 32, kivi4 32): leave it out or make it 16; recipe "
            "'paper' takes 32, 64, 128",
        ),
        (
            {"recipe": "paper", "group_size": "32"},
            "kivi.group_size under recipe 'paper' is '32', but must be one of: 32, 64, 128",
        ),
        (
            {"residual_length": 96},
            "kivi.residual_length is 96, but must be one of: 0, 32, 64, 128",
        ),
        (
            {"residual_length": False},
            "kivi.residual_length is False, but must be one of: 0, 32, 64, 128",
        ),
        ({"prefill": "fast"}, "kivi.prefill is 'fast', but must be one of: exact, cached"),
        ({"recipe": "great"}, "kivi.recipe is 'great', but must be one of: best, paper"),
        ({"sink_tokens": 5}, "kivi.sink_tokens is 5, but must be one of: 0, 4, 8, 16"),
        (
            {"sink_tokens": 0},
            "kivi.sink_tokens is 0, but recipe 'best' needs them: ranges of least squared error "
            "give up the first token's outliers, on which attention rests; set kivi.sink_tokens to "
            "4, or kivi.recipe to 'paper'",
        ),
        (
            {"token_budget": 1000},
            "kivi.token_budget is 1000, but must be 0 (a generated token reads all), or a multiple "
            "of 128 from 1024 on, for example 4096",
        ),
        (
            {"token_budget": 2048, "prefill": "cached"},
            "kivi.prefill 'cached' promises that an answer depends on its prompt alone, but "
            "kivi.token_budget 2048 makes that of a preempted request depend on when that was; "
            "leave one of the two out",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_value(options: dict[str, Any], message: str) -> None:
    assert refusal(additional_config={"kivi": options}) == message


KNOWN = "recipe, group_size, sink_tokens, residual_length, prefill, "
KNOWN += "token_budget, dense_layers, estimate, hit_stride"


def test_unknown_option() -> None:
    message = refusal(additional_config={"kivi": {"bits": 2}})
    assert "unknown option 'bits'" in message
    assert "--additional-config" in message
    assert message.endswith(f"the options are: {KNOWN}")


@pytest.mark.parametrize("name", ["rotate_values", "clip"])
def test_options_that_the_recipe_decides_now(name: str) -> None:
    message = refusal(additional_config={"kivi": {name: False}})
    assert message == (
        f"unknown option {name!r} in the 'kivi' entry of --additional-config; recipe 'best' "
        f"includes it, recipe 'paper' does not; the options are: {KNOWN}"
    )


@pytest.mark.parametrize("dtype", ["kivi_k3v2", "kivi3", "kivi_k4v3"])
def test_recipe_paper_of_what_was_not_published(dtype: str) -> None:
    options = {"kivi": {"recipe": "paper"}}
    assert refusal(kv_cache_dtype=dtype, additional_config=options) == (
        f"kivi.recipe 'paper' is KIVI as published, which has no {dtype}; leave kivi.recipe out, "
        "or use --kv-cache-dtype kivi2 or kivi4"
    )


def test_dtype_that_was() -> None:
    assert refusal(kv_cache_dtype="kivi_k4v2") == (
        "--kv-cache-dtype kivi_k4v2 is no more; use kivi_k4v3, which takes fewer bytes and loses "
        "less"
    )


def test_model_in_float64() -> None:
    """As an argument it is refused; a checkpoint's is another one from the start, says vLLM."""
    assert refusal(dtype=torch.float64) == (
        "the KIVI cache needs a bfloat16, float16 or float32 model, not float64; set --dtype to "
        "one of them"
    )
    config = engine_config(config_only(dtype="float64"), dtype="auto")
    assert config.model_config.dtype == torch.bfloat16


def test_sinks_that_a_page_cannot_hold() -> None:
    options = {"kivi": {"sink_tokens": 16}}
    message = refusal(config_only(head_dim=64), dtype="float32", additional_config=options)
    assert message == (
        "kivi.sink_tokens is 16, but a page holds 10 tokens of float32; use 8 at most"
    )


@pytest.mark.parametrize("options", [3, [1], "group_size=64", None], ids=repr)
def test_options_that_are_no_object(options: Any) -> None:
    message = refusal(additional_config={"kivi": options})
    assert f"must be an object, got {options!r}" in message
    assert '--additional-config \'{"kivi": {"residual_length": 32}}\'' in message


@pytest.mark.parametrize(
    ("head_size", "group_size", "remedy"),
    [(96, 64, "use 32"), (160, 128, "use 32"), (192, 128, "use 32 or 64")],
)
def test_group_size_that_does_not_divide_the_head_size(
    head_size: int, group_size: int, remedy: str
) -> None:
    options = {"kivi": {"recipe": "paper", "group_size": group_size}}
    message = refusal(config_only(head_dim=head_size), additional_config=options)
    assert f"kivi.group_size {group_size} does not divide" in message
    assert f"head size {head_size}" in message
    assert message.endswith(remedy)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 16},
        {"residual_length": 128},
        {"prefill": "cached"},
        {"recipe": "paper"},
        {"recipe": "best", "sink_tokens": 8},
        {"recipe": "paper", "group_size": 64, "sink_tokens": 4},
        {"token_budget": 1152, "dense_layers": 0},
    ],
    ids=str,
)
def test_good_options_are_taken(options: dict[str, Any]) -> None:
    config = engine_config(config_only(head_dim=64), additional_config={"kivi": options})
    assert config.cache_config.cache_dtype == "kivi2"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What we log while vLLM's configuration is made."""
    import vllm.logger

    messages: list[str] = []

    def say(message: str, *args: object) -> None:
        messages.append(message % args)

    def logger(name: str, original: Any = vllm.logger.init_logger) -> Any:
        ours = name == "vllm.kivi_vllm"
        return SimpleNamespace(info=say, warning=say) if ours else original(name)

    monkeypatch.setattr(vllm.logger, "init_logger", logger)
    return messages


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_options_without_the_dtype_are_only_warned_of(dtype: str, said: list[str]) -> None:
    engine_config(kv_cache_dtype=dtype, additional_config={"kivi": {"group_size": 7}})
    message = f"the 'kivi' options have no effect with --kv-cache-dtype {dtype}"
    assert said == [message]


@pytest.mark.parametrize(
    ("dtype", "options", "lines"),
    [
        ("kivi2", {}, 1),
        ("kivi2", {"recipe": "paper"}, 0),  # who asks for KIVI itself means it
        ("kivi_k3v2", {}, 0),
        ("kivi_raw", {}, 0),
        ("auto", {}, 0),
    ],
    ids=str,
)
def test_the_least_bits_name_what_loses_less(
    dtype: str, options: dict, lines: int, said: list[str]
) -> None:
    additional = {"kivi": options} if options else {}
    engine_config(kv_cache_dtype=dtype, additional_config=additional)
    message = (
        "kivi2 has 2-bit keys: kivi_k3v2 takes a little more memory and loses much less "
        "(docs/quality.md)"
    )
    assert said == [message] * lines


@pytest.mark.parametrize(
    ("budget", "layers", "line"),
    [
        (
            2048,
            1,
            "kivi.token_budget 2048: a generated token selects 16 of up to 32 pages of each head, "
            "by their keys, in all layers but the first",
        ),
        (
            2048,
            2,
            "kivi.token_budget 2048 selects nothing: kivi.dense_layers is 2, and the model has 2",
        ),
        (1024, 0, "8 of up to 32 pages of each head, by their keys, in all layers"),
        (
            4096,
            1,
            "kivi.token_budget 4096 selects nothing: sequences have up to 32 pages of 128 tokens, "
            "all of which are read",
        ),
        (0, 2, None),
    ],
)
def test_the_log_says_what_a_budget_selects(
    budget: int, layers: int, line: str | None, said: list[str]
) -> None:
    options = {"kivi": {"token_budget": budget, "dense_layers": layers}}
    engine_config(
        kv_cache_dtype="kivi_k3v2",
        additional_config=options,
        max_model_len=4096,
        kv_cache_memory_bytes=64 << 20,
    )
    assert len(said) == (line is not None)
    assert line is None or said[0].endswith(line)


def test_a_budget_on_a_device_that_has_it_for_other_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from kivi_vllm.ops import dispatch

    operators = dispatch.backend("cpu").operators
    limits = dataclasses.replace(operators.limits, selects=("best",))
    monkeypatch.setattr(operators, "limits", limits)
    options = {"token_budget": 2048, "recipe": "paper"}
    assert refusal(additional_config={"kivi": options}).endswith(
        "kivi.token_budget is not there for recipe 'paper' on CPUs; leave it out, or kivi.recipe"
    )
    engine_config(
        additional_config={"kivi": {"token_budget": 2048}}, kv_cache_memory_bytes=64 << 20
    )


def test_an_estimate_that_a_device_has_not(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from kivi_vllm.ops import dispatch

    operators = dispatch.backend("cpu").operators
    keys = {"kivi": {"token_budget": 2048, "estimate": "keys"}}
    engine_config(additional_config=keys, kv_cache_memory_bytes=64 << 20)
    limits = dataclasses.replace(operators.limits, estimates=("ranges",))
    monkeypatch.setattr(operators, "limits", limits)
    assert refusal(additional_config=keys).endswith(
        "kivi.estimate 'keys' is not there on CPUs; leave it out, or use one of: ranges"
    )
    said.clear()
    left_out = {"kivi": {"token_budget": 2048, "dense_layers": 0}}
    engine_config(additional_config=left_out, max_model_len=4096, kv_cache_memory_bytes=64 << 20)
    assert "by their ranges" in said[0]


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_what_is_refused_with_our_dtypes_is_left_alone_with_others(dtype: str) -> None:
    config = engine_config(
        config_only(head_dim=80), kv_cache_dtype=dtype, block_size=64, enable_lora=True
    )
    assert config.cache_config.block_size == 64
