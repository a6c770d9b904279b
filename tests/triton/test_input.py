"""What the Triton kernels refuse, before any of them runs, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.attention.kivi import batch_of
from kivi_vllm.ops.step import LayerCache, Raw
from tests.triton.device import DEVICE, Triton
from tests.unit.test_native_input import WRONG, change, inputs


def placed(x: Any) -> Any:
    """`x` on the device, tensors inside of dataclasses too; what is on another one stays there."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE) if x.is_cpu else x
    if isinstance(x, Raw):
        return Raw(placed(x.cache), placed(x.table))
    if isinstance(x, LayerCache):
        tails = tuple(map(placed, x.tails))
        pages, ring, sinks = placed(x.pages), placed(x.ring), placed(x.sinks)
        return replace(x, pages=pages, ring=ring, tails=tails, sinks=sinks)
    if hasattr(x, "block_table"):
        return replace(x, block_table=placed(x.block_table))
    return x


def call(given: dict[str, Any]) -> None:
    given = {name: placed(x) for name, x in given.items()}
    step, cache, key, value = (given[name] for name in ("step", "cache", "key", "value"))
    Triton.store_blocks(step, cache, key, value)
    Triton.attend(step, cache, given["query"], key, value, given["params"], given["output"])
    Triton.store_ring(step, cache, key, value)


def test_good_input_is_taken() -> None:
    call(inputs())


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n, all_ in WRONG.items() for i in range(len(all_))]
)
def test_wrong_tensors_are_named(name: str, i: int) -> None:
    for _ in range(2):  # what was good once does not let the next one through
        with pytest.raises(ValueError, match=name.split(".", 1)[-1].replace("ring.cache", "ring")):
            call(change(name, WRONG[name][i]))
        call(inputs())


@pytest.mark.parametrize("name", ["alibi_slopes", "sink_logits"])
def test_wrong_numbers_of_heads_are_named(name: str) -> None:
    good = torch.zeros(4, device=DEVICE)
    for wrong in (good[:3], good.to(torch.bfloat16), good[None]):
        call(change("params", lambda p: replace(p, **{name: good})))
        with pytest.raises(ValueError, match=f"{name} is"):
            call(change("params", lambda p, wrong=wrong: replace(p, **{name: wrong})))


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="1 tails of 24 tokens cannot hold residual_length 32"):
        call(change("cache", lambda c: replace(c, tails=c.tails[:1])))


@pytest.mark.parametrize("name", ["query", "key", "output"])
def test_unaligned_tensors_are_named(name: str) -> None:
    """Kernels read 16 bytes at a time."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape)

    with pytest.raises(ValueError, match=f"{name} lies at .* multiples of 16"):
        call(change(name, shifted))


def test_rows_out_of_order() -> None:
    step = inputs()["step"]
    with pytest.raises(ValueError, match="in the order of their requests"):
        batch_of(replace(step, rows=[replace(step.rows[0], q0=1, q1=4)]))


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
@pytest.mark.parametrize("name", ["step.block_table", "cache.ring.table", "cache.tails"])
def test_page_ids_out_of_range(name: str, bad: int) -> None:
    """With the check that these tests turn on."""

    def spoil(x: Any) -> Any:
        if isinstance(x, tuple):
            return (x[0], Raw(x[1].cache, spoil(x[1].table)))
        x = x.clone()
        x[0, -1 if "ring" in name else 0] = bad  # the ring's last page is written
        return x

    with pytest.raises(ValueError, match=f"has page {bad} for request 0, of 8 pages"):
        call(change(name, spoil))


def with_sinks(**other: Any) -> dict[str, Any]:
    """Good input with sinks, but for what `other` replaces of them."""

    def kept(cache: LayerCache) -> LayerCache:
        fmt = replace(cache.fmt, sink_tokens=4)
        sinks = Raw(cache.ring.cache.clone(), cache.ring.table.clone())
        return replace(cache, fmt=fmt, sinks=replace(sinks, **other))

    return change("cache", kept)


def test_what_fits_another_layer_is_not_taken_here() -> None:
    """A query of four heads, over a cache of two kv heads and then over one of three."""
    call(inputs())

    def of_three(x: Any) -> Any:
        if isinstance(x, Raw):
            return replace(x, cache=x.cache[:, [0, 1, 0]])
        return x[:, :, [0, 1, 0]] if x.dtype == torch.uint8 else x[:, [0, 1, 0]]

    given = inputs()
    cache = given["cache"]
    cache = replace(cache, pages=of_three(cache.pages), ring=of_three(cache.ring))
    cache = replace(cache, tails=tuple(map(of_three, cache.tails)))
    three = {name: of_three(given[name]) for name in ("key", "value")}
    with pytest.raises(ValueError, match=r"query is .*, but must be .* a multiple of 3, 64\]"):
        call({**given, **three, "cache": cache})


def test_tails_lie_alike() -> None:
    def apart(tails: tuple[Raw, ...]) -> tuple[Raw, ...]:
        return tails[0], replace(tails[1], cache=torch.cat([tails[1].cache] * 2, -1)[..., :128])

    with pytest.raises(ValueError, match="tails must have the same strides"):
        call(change("cache.tails", apart))


def test_wrong_sinks_are_named() -> None:
    call(with_sinks())
    good = with_sinks()["cache"]
    for name, bad in (
        ("cache", good.sinks.cache.float()),
        ("cache", good.sinks.cache[:, :1]),
        ("table", good.sinks.table.long()),
        ("table", good.sinks.table[:0]),
    ):
        with pytest.raises(ValueError, match=rf"sinks.{name} is"):
            call(with_sinks(**{name: bad}))
    with pytest.raises(ValueError, match="sinks"):
        call({**with_sinks(), "cache": replace(good, sinks=None)})
    with pytest.raises(ValueError, match=r"sinks.cache is .*, but must be .*, 4 to 128, >= 128\]"):
        call(with_sinks(cache=good.sinks.cache[:, :, :3]))
    call(with_sinks(cache=torch.cat([good.sinks.cache] * 2, -1)[..., :128]))  # strides of their own
    for page in (-1, 8):
        with pytest.raises(ValueError, match=f"sinks.table has page {page} for request 0, of 8"):
            call(with_sinks(table=torch.full((1, 2), page, dtype=torch.int32)))
