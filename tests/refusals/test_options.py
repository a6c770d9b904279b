"""Wrong options: each message names the value and the good ones."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.refusals.configs import config_only, engine_config, refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, "kivi.group_size is 48, but must be one of: 32, 64, 128"),
        ({"group_size": "32"}, "kivi.group_size is '32', but must be one of: 32, 64, 128"),
        (
            {"residual_length": 96},
            "kivi.residual_length is 96, but must be one of: 0, 32, 64, 128",
        ),
        (
            {"residual_length": False},
            "kivi.residual_length is False, but must be one of: 0, 32, 64, 128",
        ),
        ({"prefill": "fast"}, "kivi.prefill is 'fast', but must be one of: exact, cached"),
        ({"recipe": "great"}, "kivi.recipe is 'great', but must be one of: paper, best"),
        ({"sink_tokens": 5}, "kivi.sink_tokens is 5, but must be one of: 0, 4, 8, 16"),
        ({"rotate_values": 1}, "kivi.rotate_values is 1, but must be one of: False, True"),
        ({"clip": "yes"}, "kivi.clip is 'yes', but must be one of: False, True"),
        (
            {"sink_tokens": 0},
            "kivi.clip needs kivi.sink_tokens: a range of least squared error gives up the first "
            "token's outliers, on which attention rests; set kivi.sink_tokens to 4, or kivi.clip "
            "to false",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_value(options: dict[str, Any], message: str) -> None:
    assert refusal(additional_config={"kivi": options}) == message


def test_unknown_option() -> None:
    message = refusal(additional_config={"kivi": {"bits": 2}})
    assert "unknown option 'bits'" in message
    assert "--additional-config" in message
    known = "recipe, group_size, residual_length, prefill, sink_tokens, rotate_values, clip"
    assert message.endswith(known)


def test_recipes_are_for_what_is_quantized() -> None:
    message = refusal(kv_cache_dtype="kivi_raw", additional_config={"kivi": {"clip": True}})
    assert "kivi.clip" in message
    options = {"kivi": {"rotate_values": True}}
    message = refusal(kv_cache_dtype="kivi_raw", additional_config=options)
    assert "kivi.rotate_values changes how numbers are quantized, and kivi_raw does not" in message


def test_sinks_that_a_page_cannot_hold() -> None:
    options = {"kivi": {"sink_tokens": 16}}
    message = refusal(config_only(head_dim=64), dtype="float32", additional_config=options)
    assert message == (
        "kivi.sink_tokens is 16, but a page holds 12 tokens of float32; use 8 at most"
    )


@pytest.mark.parametrize("options", [3, [1], "group_size=64", None], ids=repr)
def test_options_that_are_no_object(options: Any) -> None:
    message = refusal(additional_config={"kivi": options})
    assert f"must be an object, got {options!r}" in message
    assert '--additional-config \'{"kivi": {"group_size": 32}}\'' in message


@pytest.mark.parametrize(
    ("head_size", "group_size", "remedy"),
    [(96, 64, "use 32"), (160, 128, "use 32"), (192, 128, "use 32 or 64")],
)
def test_group_size_that_does_not_divide_the_head_size(
    head_size: int, group_size: int, remedy: str
) -> None:
    message = refusal(
        config_only(head_dim=head_size), additional_config={"kivi": {"group_size": group_size}}
    )
    assert f"kivi.group_size {group_size} does not divide" in message
    assert f"head size {head_size}" in message
    assert message.endswith(remedy)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 64},
        {"residual_length": 128},
        {"prefill": "cached"},
        {"recipe": "paper"},
        {"recipe": "best", "sink_tokens": 8},
        {"recipe": "paper", "rotate_values": True},
        {"clip": False, "sink_tokens": 0},
    ],
    ids=str,
)
def test_good_options_are_taken(options: dict[str, Any]) -> None:
    config = engine_config(config_only(head_dim=64), additional_config={"kivi": options})
    assert config.cache_config.cache_dtype == "kivi2"


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_options_without_the_dtype_are_only_warned_of(
    dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("vllm.kivi_vllm")
    logger.addHandler(caplog.handler)
    try:
        engine_config(kv_cache_dtype=dtype, additional_config={"kivi": {"group_size": 7}})
    finally:
        logger.removeHandler(caplog.handler)
    assert f"the 'kivi' options have no effect with --kv-cache-dtype {dtype}" in caplog.messages


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_what_is_refused_with_our_dtypes_is_left_alone_with_others(dtype: str) -> None:
    config = engine_config(
        config_only(head_dim=80), kv_cache_dtype=dtype, block_size=64, enable_lora=True
    )
    assert config.cache_config.block_size == 64
