"""Options and names: what is accepted, and what a refusal says."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kivi_vllm.attention.options import kivi_config
from kivi_vllm.config import KiviConfig, KiviConfigError, is_kivi
from kivi_vllm.ops.format import PageFormat

BITS = {"kivi2": (2, 2), "kivi_k4v2": (4, 2), "kivi4": (4, 4), "kivi_raw": (0, 0)}
GOOD = {
    "group_size": "32, 64, 128",
    "residual_length": "0, 32, 64, 128",
    "prefill": "exact, cached",
}
BAD_VALUES: list[tuple[str, Any]] = [
    *(("group_size", v) for v in (0, 1, 16, 31, 33, 256, -32, 32.0, "32", True, None, [32])),
    *(("residual_length", v) for v in (1, 31, 96, 127, 129, 256, -1, 0.0, "0", False, None, {})),
    *(("prefill", v) for v in ("", "Exact", "exact ", "fast", True, 0, None, ["exact"])),
]


@pytest.mark.parametrize(("option", "value"), BAD_VALUES, ids=[f"{o}={v!r}" for o, v in BAD_VALUES])
def test_bad_value_is_refused_with_the_good_ones(option: str, value: Any) -> None:
    message = f"kivi.{option} is {value!r}, but must be one of: {GOOD[option]}"
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {option: value})
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig("kivi2", **{option: value})


@pytest.mark.parametrize(
    "dtype", ["kivi", "kivi3", "KIVI2", "kivi2 ", "", "auto", "fp8", "turboquant", 2, None, True]
)
def test_bad_dtype_is_refused_with_the_good_ones(dtype: Any) -> None:
    message = (
        f"--kv-cache-dtype is {dtype!r}, but must be one of: kivi2, kivi_k4v2, kivi4, kivi_raw"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options(dtype, {})


@pytest.mark.parametrize("name", ["groupsize", "Group_Size", "bits", "dtype", "block_size", "", 32])
@pytest.mark.parametrize("beside", [{}, {"group_size": 64}], ids=["alone", "beside-a-good-one"])
def test_unknown_option_is_refused_with_the_known_ones(name: Any, beside: dict) -> None:
    message = f"unknown option {name!r} in the 'kivi' entry of --additional-config; "
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}") as error:
        KiviConfig.from_options("kivi2", {**beside, name: 32})
    listed = str(error.value).split("the options are: ")[1].split(", ")
    assert set(GOOD) <= set(listed)
    assert "dtype" not in listed


@pytest.mark.parametrize("options", [None, [], ["group_size"], "exact", 32, True, ()], ids=repr)
def test_options_must_be_an_object(options: Any) -> None:
    message = f"the 'kivi' entry of --additional-config must be an object, got {options!r}; "
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}.*for example:"):
        KiviConfig.from_options("kivi2", options)


@pytest.mark.parametrize("dtype", BITS)
def test_defaults(dtype: str) -> None:
    config = KiviConfig.from_options(dtype, {})
    recipe = (0, False, False) if dtype == "kivi_raw" else (4, True, True)
    assert config == KiviConfig(dtype, 32, 0, "exact", *recipe)
    assert (config.k_bits, config.v_bits) == BITS[dtype]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("residual_length", [0, 32, 64, 128])
@pytest.mark.parametrize("prefill", ["exact", "cached"])
def test_good_values_pass(group_size: int, residual_length: int, prefill: str) -> None:
    options = {"group_size": group_size, "residual_length": residual_length, "prefill": prefill}
    config = KiviConfig.from_options("kivi4", options)
    assert dataclasses.asdict(config).items() >= {"dtype": "kivi4", **options}.items()


def test_config_is_frozen_and_hashable() -> None:
    config = KiviConfig("kivi2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group_size = 64  # type: ignore[misc]
    assert {config: 1}[KiviConfig("kivi2")] == 1
    assert config != KiviConfig("kivi2", group_size=64)


def test_error_is_a_value_error() -> None:
    assert issubclass(KiviConfigError, ValueError)  # vLLM reports those as the user's


@pytest.mark.parametrize("name", [*BITS, "auto", "kivi", "KIVI2", None, 2, torch.bfloat16], ids=str)
def test_is_kivi(name: object) -> None:
    assert is_kivi(name) == (name in list(BITS))


@pytest.mark.parametrize(
    ("additional", "group_size"),
    [({"kivi": {"group_size": 64}}, 64), ({"kivi": {}}, 32), ({"other": 1}, 32), (None, 32)],
    ids=str,
)
def test_from_vllm(additional: Any, group_size: int) -> None:
    vllm_config: Any = SimpleNamespace(
        additional_config=additional, cache_config=SimpleNamespace(cache_dtype="kivi_k4v2")
    )
    best: dict[str, Any] = {"sink_tokens": 4, "rotate_values": True, "clip": True}
    wanted = KiviConfig("kivi_k4v2", group_size=group_size, **best)
    assert kivi_config(vllm_config) == wanted


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (4, True, True)),
        ({"recipe": "best"}, (4, True, True)),
        ({"recipe": "paper"}, (0, False, False)),
        ({"recipe": "paper", "sink_tokens": 8, "clip": True}, (8, False, True)),
        ({"rotate_values": False}, (4, False, True)),
        ({"sink_tokens": 0, "clip": False}, (0, True, False)),
    ],
    ids=str,
)
def test_recipes(options: dict[str, Any], wanted: tuple) -> None:
    config = KiviConfig.from_options("kivi2", options)
    assert (config.sink_tokens, config.rotate_values, config.clip) == wanted


def test_nothing_is_done_to_what_is_not_quantized() -> None:
    assert KiviConfig.from_options("kivi_raw", {}) == KiviConfig("kivi_raw")
    assert KiviConfig.from_options("kivi_raw", {"sink_tokens": 8}).sink_tokens == 8
    with pytest.raises(KiviConfigError, match=r"kivi\.clip changes .* kivi_raw does not quantize"):
        KiviConfig.from_options("kivi_raw", {"sink_tokens": 8, "clip": True})


def test_from_vllm_refuses_too() -> None:
    vllm_config: Any = SimpleNamespace(
        additional_config={"kivi": {"group_size": 48}},
        cache_config=SimpleNamespace(cache_dtype="kivi2"),
    )
    with pytest.raises(KiviConfigError, match=r"kivi\.group_size is 48, .*: 32, 64, 128$"):
        kivi_config(vllm_config)


@pytest.mark.parametrize(
    ("group_size", "head_size", "usable"),
    [
        (64, 32, "32"),
        (64, 96, "32"),
        (64, 160, "32"),
        (128, 32, "32"),
        (128, 64, "32 or 64"),
        (128, 96, "32"),
        (128, 160, "32"),
        (128, 192, "32 or 64"),
    ],
)
def test_group_size_must_divide_the_head_size(group_size: int, head_size: int, usable: str) -> None:
    config = KiviConfig("kivi2", group_size=group_size)
    message = (
        f"kivi.group_size {group_size} does not divide this model's head size {head_size}; "
        f"use {usable}"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(config, head_size, torch.bfloat16)


@pytest.mark.parametrize("head_size", [0, -64, 16, 40, 80, 100, 112, 224, 512])
@pytest.mark.parametrize("dtype", BITS)
def test_head_size_is_refused_with_the_good_ones(dtype: str, head_size: int) -> None:
    message = (
        f"head size {head_size} is not supported by the KIVI cache "
        "(supported: 32, 64, 96, 128, 160, 192, 256); "
        "serve this model with --kv-cache-dtype auto or fp8"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(KiviConfig(dtype), head_size, torch.bfloat16)


@pytest.mark.parametrize("raw_dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_model_dtype_is_refused_with_the_good_ones(raw_dtype: torch.dtype) -> None:
    message = (
        f"the KIVI cache needs a bfloat16, float16 or float32 model, not {raw_dtype}; set --dtype"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(KiviConfig("kivi2"), 64, raw_dtype)
