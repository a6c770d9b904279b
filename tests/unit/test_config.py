"""Options and names: what is accepted, and what a refusal says."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kivi_vllm.attention.options import kivi_config
from kivi_vllm.config import DTYPES, KiviConfig, KiviConfigError, is_kivi
from kivi_vllm.ops.format import PageFormat

# Bits of keys and of values, group size under recipe "best", whether there is a recipe "paper".
TABLE = {
    "kivi2": (2, 2, 16, True),
    "kivi_k3v2": (3, 2, 32, False),
    "kivi3": (3, 3, 32, False),
    "kivi_k4v3": (4, 3, 32, False),
    "kivi4": (4, 4, 32, True),
    "kivi_raw": (0, 0, 32, True),
}
GOOD = {
    "recipe": "best, paper",
    "residual_length": "0, 32, 64, 128",
    "prefill": "exact, cached",
    "sink_tokens": "0, 4, 8, 16",
}
BAD_VALUES: list[tuple[str, Any]] = [
    *(("recipe", v) for v in ("", "Best", "great", True, None, ["best"])),
    *(("residual_length", v) for v in (1, 31, 96, 127, 129, 256, -1, 0.0, "0", False, None, {})),
    *(("prefill", v) for v in ("", "Exact", "exact ", "fast", True, 0, None, ["exact"])),
    *(("sink_tokens", v) for v in (1, 5, 32, -4, 4.0, "4", True, None)),
]
BAD_GROUPS: list[Any] = [0, 1, 31, 33, 256, -32, 32.0, "32", True, None, [32]]


@pytest.mark.parametrize(("option", "value"), BAD_VALUES, ids=[f"{o}={v!r}" for o, v in BAD_VALUES])
def test_bad_value_is_refused_with_the_good_ones(option: str, value: Any) -> None:
    message = f"kivi.{option} is {value!r}, but must be one of: {GOOD[option]}"
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {option: value})
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig("kivi2", **{"recipe": "best", "group_size": 16, "sink_tokens": 4, option: value})


@pytest.mark.parametrize("value", [-128, 1, 100, 129, 128.0, "128", True, None], ids=repr)
def test_a_bad_hit_stride_is_refused_with_an_example(value: Any) -> None:
    message = (
        f"kivi.hit_stride is {value!r}, but must be a multiple of 128, such as 512, or 0 (as many "
        "tokens as fill the blocks of the pool)"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {"hit_stride": value})


@pytest.mark.parametrize("value", [*BAD_GROUPS, 32, 64], ids=repr)
def test_group_size_of_recipe_best_is_the_dtypes_own(value: Any) -> None:
    message = (
        f"kivi.group_size is {value!r}, but under recipe 'best' a dtype has its own (kivi2 16, "
        "kivi_k3v2 32, kivi3 32, kivi_k4v3 32, kivi4 32): leave it out or make it 16; recipe "
        "'paper' takes 32, 64, 128"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {"group_size": value})
    with pytest.raises(KiviConfigError, match=r"leave it out or make it 32$"):  # no paper
        KiviConfig.from_options("kivi_k3v2", {"group_size": 16})
    with pytest.raises(KiviConfigError, match=r"is 32\.0, but"):
        KiviConfig.from_options("kivi_k3v2", {"group_size": 32.0})
    # The one that a dtype has may be said.
    own = KiviConfig.from_options("kivi2", {"group_size": 16})
    assert own == KiviConfig.from_options("kivi2", {})


@pytest.mark.parametrize("value", [*BAD_GROUPS, 16], ids=repr)
def test_group_size_of_recipe_paper_is_refused_with_the_good_ones(value: Any) -> None:
    message = f"kivi.group_size under recipe 'paper' is {value!r}, but must be one of: 32, 64, 128"
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {"recipe": "paper", "group_size": value})


@pytest.mark.parametrize(
    "value", [128, 896, 1025, 1023, -1024, 2048.0, "2048", True, None], ids=repr
)
def test_a_token_budget_out_of_range(value: Any) -> None:
    message = (
        f"kivi.token_budget is {value!r}, but must be 0 (a generated token reads all), or a "
        "multiple of 128 from 1024 on, for example 4096"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {"token_budget": value})


@pytest.mark.parametrize("value", [-1, 2.0, "2", True, None], ids=repr)
def test_dense_layers_out_of_range(value: Any) -> None:
    message = f"kivi.dense_layers is {value!r}, but must be a number of layers: 0 or more"
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {"dense_layers": value})


def test_what_a_token_budget_cannot_go_with() -> None:
    with pytest.raises(
        KiviConfigError, match=r"needs the ranges of quantized keys, which kivi_raw"
    ):
        KiviConfig.from_options("kivi_raw", {"token_budget": 2048})
    with pytest.raises(KiviConfigError, match=r"'cached' promises .* leave one of the two out$"):
        KiviConfig.from_options("kivi2", {"token_budget": 2048, "prefill": "cached"})
    keys = {"token_budget": 2048, "estimate": "keys"}
    with pytest.raises(KiviConfigError, match=r"'keys' is there for .* recipe 'best', not 'paper'"):
        KiviConfig.from_options("kivi2", keys | {"recipe": "paper"})
    with pytest.raises(KiviConfigError, match=r"kivi.estimate is 'means', .* one of: ranges, keys"):
        KiviConfig.from_options("kivi2", {"estimate": "means"})
    assert KiviConfig.from_options("kivi2", keys).estimate == "keys"
    assert KiviConfig.from_options("kivi2", {}).estimates == ("keys", "ranges")
    assert KiviConfig.from_options("kivi2", {"recipe": "paper"}).estimates == ("ranges",)
    for good in (0, 1024, 1152, 4096):
        assert KiviConfig.from_options("kivi2", {"token_budget": good}).token_budget == good


@pytest.mark.parametrize("dtype", ["kivi_k3v2", "kivi3", "kivi_k4v3"])
def test_what_kivi_has_not_published_has_no_recipe_paper(dtype: str) -> None:
    message = (
        f"kivi.recipe 'paper' is KIVI as published, which has no {dtype}; leave kivi.recipe out, "
        "or use --kv-cache-dtype kivi2 or kivi4"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options(dtype, {"recipe": "paper"})


def test_recipe_best_needs_sinks() -> None:
    with pytest.raises(KiviConfigError, match=r"sink_tokens is 0, .* to 4, or .* to 'paper'$"):
        KiviConfig.from_options("kivi2", {"sink_tokens": 0})
    with pytest.raises(KiviConfigError, match=r"sink_tokens is 0, .* set kivi\.sink_tokens to 4$"):
        KiviConfig.from_options("kivi_k3v2", {"sink_tokens": 0})


@pytest.mark.parametrize(
    "dtype",
    ["kivi", "kivi_k2v3", "KIVI2", "kivi2 ", "", "auto", "fp8", "turboquant", 2, None, True],
)
def test_bad_dtype_is_refused_with_the_good_ones(dtype: Any) -> None:
    message = (
        f"--kv-cache-dtype is {dtype!r}, but must be one of: "
        "kivi2, kivi_k3v2, kivi3, kivi_k4v3, kivi4, kivi_raw"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options(dtype, {})


@pytest.mark.parametrize("options", [{}, {"recipe": "paper"}, {"group_size": 32}], ids=str)
def test_the_dtype_that_was_is_refused_with_its_successor(options: dict[str, Any]) -> None:
    message = (
        "--kv-cache-dtype kivi_k4v2 is no more; use kivi_k4v3, which takes fewer bytes and loses "
        "less"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi_k4v2", options)


@pytest.mark.parametrize("name", ["rotate_values", "clip"])
def test_the_options_that_were_are_parts_of_the_recipe(name: str) -> None:
    message = (
        f"unknown option {name!r} in the 'kivi' entry of --additional-config; recipe 'best' "
        "includes it, recipe 'paper' does not; the options are: recipe, group_size, sink_tokens, "
        "residual_length, prefill, token_budget, dense_layers, estimate, hit_stride"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        KiviConfig.from_options("kivi2", {name: True})


@pytest.mark.parametrize("name", ["groupsize", "Group_Size", "bits", "dtype", "block_size", "", 32])
@pytest.mark.parametrize("beside", [{}, {"group_size": 16}], ids=["alone", "beside-a-good-one"])
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


@pytest.mark.parametrize("dtype", TABLE)
def test_defaults(dtype: str) -> None:
    k_bits, v_bits, group_size, published = TABLE[dtype]
    config = KiviConfig.from_options(dtype, {})
    sinks = 0 if dtype == "kivi_raw" else 4
    assert config == KiviConfig(dtype, "best", group_size, sinks, 0, "exact")
    assert (config.k_bits, config.v_bits) == (k_bits, v_bits)
    if published:
        config = KiviConfig.from_options(dtype, {"recipe": "paper"})
        assert config == KiviConfig(dtype, "paper", 32, 0, 0, "exact")


def test_every_dtype_is_in_the_table() -> None:
    assert {name: tuple(dtype) for name, dtype in DTYPES.items()} == TABLE


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("residual_length", [0, 32, 64, 128])
@pytest.mark.parametrize("prefill", ["exact", "cached"])
@pytest.mark.parametrize("sink_tokens", [0, 4, 8, 16])
def test_good_values_pass(
    group_size: int, residual_length: int, prefill: str, sink_tokens: int
) -> None:
    options = {"group_size": group_size, "residual_length": residual_length, "prefill": prefill}
    options |= {"recipe": "paper", "sink_tokens": sink_tokens}
    config = KiviConfig.from_options("kivi4", options)
    assert dataclasses.asdict(config).items() >= {"dtype": "kivi4", **options}.items()


def test_config_is_frozen_and_hashable() -> None:
    config = KiviConfig.from_options("kivi2", {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group_size = 64  # type: ignore[misc]
    assert {config: 1}[KiviConfig("kivi2", "best", 16, 4)] == 1
    assert config != KiviConfig("kivi2", "best", 16, 8)


def test_error_is_a_value_error() -> None:
    assert issubclass(KiviConfigError, ValueError)  # vLLM reports those as the user's


@pytest.mark.parametrize("name", ["auto", "kivi", "KIVI2", None, 2, torch.bfloat16], ids=str)
def test_what_is_not_ours(name: object) -> None:
    assert not is_kivi(name)


@pytest.mark.parametrize("name", [*TABLE, "kivi_k4v2"])
def test_what_is_ours(name: str) -> None:
    """What was is too, so that it is we who refuse it."""
    assert is_kivi(name)


@pytest.mark.parametrize(
    ("additional", "sinks"),
    [({"kivi": {"sink_tokens": 8}}, 8), ({"kivi": {}}, 4), ({"other": 1}, 4), (None, 4)],
    ids=str,
)
def test_from_vllm(additional: Any, sinks: int) -> None:
    vllm_config: Any = SimpleNamespace(
        additional_config=additional, cache_config=SimpleNamespace(cache_dtype="kivi_k4v3")
    )
    assert kivi_config(vllm_config) == KiviConfig("kivi_k4v3", "best", 32, sinks)


def test_what_is_not_quantized_takes_any_sinks() -> None:
    for recipe in ("best", "paper"):
        options = {"recipe": recipe, "sink_tokens": 8}
        assert KiviConfig.from_options("kivi_raw", options).sink_tokens == 8


def test_from_vllm_refuses_too() -> None:
    vllm_config: Any = SimpleNamespace(
        additional_config={"kivi": {"group_size": 48}},
        cache_config=SimpleNamespace(cache_dtype="kivi2"),
    )
    with pytest.raises(KiviConfigError, match=r"kivi\.group_size is 48, .* 32, 64, 128$"):
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
def test_group_size_of_recipe_paper_must_divide_the_head_size(
    group_size: int, head_size: int, usable: str
) -> None:
    config = KiviConfig("kivi2", "paper", group_size, 0)
    message = (
        f"kivi.group_size {group_size} does not divide this model's head size {head_size}; "
        f"use {usable}"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(config, head_size, torch.bfloat16)


@pytest.mark.parametrize("head_size", [0, -64, 16, 40, 72, 100, 224, 384, 1024])
@pytest.mark.parametrize("dtype", TABLE)
def test_head_size_is_refused_with_the_good_ones(dtype: str, head_size: int) -> None:
    message = (
        f"head size {head_size} is not supported by the KIVI cache "
        "(supported: 32, 64, 80, 96, 112, 128, 160, 192, 256, 512); "
        "serve this model with --kv-cache-dtype auto or fp8"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(KiviConfig.from_options(dtype, {}), head_size, torch.bfloat16)


@pytest.mark.parametrize("raw_dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_model_dtype_is_refused_with_the_good_ones(raw_dtype: torch.dtype) -> None:
    name = str(raw_dtype).removeprefix("torch.")
    message = (
        f"the KIVI cache needs a bfloat16, float16 or float32 model, not {name}; set --dtype to "
        "one of them"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(KiviConfig.from_options("kivi2", {}), 64, raw_dtype)


@pytest.mark.parametrize(
    ("dtype", "head_size", "raw", "sinks", "held", "most"),
    [
        ("kivi2", 64, torch.float32, 16, 10, 8),
        ("kivi_k3v2", 128, torch.float32, 16, 11, 8),
        ("kivi4", 64, torch.float32, 16, None, None),  # 17 fit
        ("kivi2", 64, torch.bfloat16, 16, None, None),
    ],
)
def test_sinks_must_fit_a_page(
    dtype: str, head_size: int, raw: torch.dtype, sinks: int, held: int | None, most: int | None
) -> None:
    config = KiviConfig.from_options(dtype, {"sink_tokens": sinks})
    if held is None:
        PageFormat.of(config, head_size, raw)
        return
    message = (
        f"kivi.sink_tokens is {sinks}, but a page holds {held} tokens of float32; use {most} at "
        "most"
    )
    with pytest.raises(KiviConfigError, match=f"^{re.escape(message)}$"):
        PageFormat.of(config, head_size, raw)


def test_kernels_have_groups_of_16_and_32_tokens() -> None:
    assert {dtype.group_size for dtype in DTYPES.values()} == {16, 32}
