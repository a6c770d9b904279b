"""What the native kernels refuse, before any of them runs, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kivi_vllm.ops.cpu import operators
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import AttentionParams, LayerCache, Raw, Row, Step

BF16 = torch.bfloat16


def inputs() -> dict[str, Any]:
    """Good arguments of the three operators, by name."""
    fmt = PageFormat(2, 2, 32, 64, BF16, two_level=False)
    pages = torch.zeros(8, 1, 2, fmt.page_bytes, dtype=torch.uint8)
    raw = torch.zeros(8, 2, fmt.raw_tokens, 128, dtype=BF16)
    table = torch.arange(1, 7, dtype=torch.int32)[None]
    tail = Raw(raw.clone(), table.clone())
    ring = Raw(raw, torch.arange(13, dtype=torch.int32)[None] % 7 + 1)
    return dict(
        step=Step([Row(0, 0, 3, 254, 257)], table),
        cache=LayerCache(fmt, pages, ring, (tail, tail), 32),
        query=torch.zeros(3, 4, 64, dtype=BF16),
        key=torch.zeros(3, 2, 64, dtype=BF16),
        value=torch.zeros(3, 2, 64, dtype=BF16),
        params=AttentionParams(0.1),
        output=torch.zeros(3, 4, 64, dtype=BF16),
    )


def call(given: dict[str, Any]) -> None:
    kv = (given["step"], given["cache"], given["key"], given["value"])
    operators.store_blocks(*kv)
    operators.attend(
        given["step"],
        given["cache"],
        *(given[name] for name in ("query", "key", "value", "params", "output")),
    )
    operators.store_ring(*kv)


def change(name: str, how: Any) -> dict[str, Any]:
    """`inputs` with one tensor replaced; `cache.ring.table` means that one."""
    given = inputs()
    head, *path = name.split(".")

    def replaced(owner: Any, path: list[str]) -> Any:
        if not path:
            return how(owner)
        return replace(owner, **{path[0]: replaced(getattr(owner, path[0]), path[1:])})

    given[head] = replaced(given[head], path)
    return given


WRONG = {
    "query": [
        lambda x: x.float(),
        lambda x: x[:, :3],
        lambda x: x[:2],
        lambda x: x[0],
        lambda x: x.to("meta"),
    ],
    "key": [lambda x: x.half(), lambda x: x[:, :1], lambda x: x.mT.contiguous().mT],
    "value": [lambda x: x[..., :32], lambda x: x[:1], lambda x: x[None]],
    "output": [lambda x: x.double(), lambda x: x[:, :2], lambda x: x.mT.contiguous().mT],
    "cache.pages": [
        lambda x: x.int(),
        lambda x: x[..., :-1],
        lambda x: x[..., None],
        lambda x: x[:, 0],
        lambda x: x[:, :0],
    ],
    "cache.ring.cache": [
        lambda x: x.float(),
        lambda x: x[:, :1],
        lambda x: x[..., :127],
        lambda x: x[:, :, :0],
        lambda x: x.repeat(1, 1, 6, 1),
    ],
    "cache.ring.table": [lambda x: x.long(), lambda x: x[0], lambda x: x[:0]],
    "step.block_table": [lambda x: x.long(), lambda x: x.repeat(2, 2)[:, ::2]],
}


def test_good_input_is_taken() -> None:
    call(inputs())


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n, all_ in WRONG.items() for i in range(len(all_))]
)
def test_wrong_tensors_are_named(name: str, i: int) -> None:
    with pytest.raises(ValueError, match=name.split(".", 1)[-1].replace("ring.cache", "ring")):
        call(change(name, WRONG[name][i]))


def test_what_fits_elsewhere_is_not_taken_here() -> None:
    """Forms of tensors that have passed are remembered: of these ones for that cache."""
    call(inputs())
    with pytest.raises(ValueError, match="key is"):  # a good query and output
        call(
            change("key", lambda x: x.new_zeros(3, 4, 64))
            | {"value": torch.zeros(3, 4, 64).to(BF16)}
        )
    far = inputs()
    far["cache"] = replace(far["cache"], pages=far["cache"].pages.to("meta"))
    far |= {name: far[name].to("meta") for name in ("key", "value")}
    with pytest.raises(ValueError, match="pages is"):
        call(far)
    with pytest.raises(ValueError, match="key is"):
        call(inputs() | {name: far[name] for name in ("key", "value")})


@pytest.mark.parametrize("name", ["alibi_slopes", "sink_logits"])
def test_wrong_numbers_of_heads_are_named(name: str) -> None:
    call(change("params", lambda p: replace(p, **{name: torch.zeros(4)})))
    for wrong in (
        torch.zeros(3),
        torch.zeros(4, dtype=BF16),
        torch.zeros(8)[::2],
        torch.zeros(1, 4),
        torch.zeros(4, device="meta"),
    ):
        with pytest.raises(ValueError, match=f"{name} is"):
            call(change("params", lambda p, wrong=wrong: replace(p, **{name: wrong})))


def test_wrong_tails_are_named() -> None:
    with pytest.raises(ValueError, match="1 tails of 24 tokens cannot hold residual_length 32"):
        call(change("cache", lambda c: replace(c, tails=c.tails[:1])))
    with pytest.raises(ValueError, match=r"tails have pages of \[16, 24\] tokens, but all must"):
        call(change("cache.tails", lambda x: (x[0], replace(x[1], cache=x[1].cache[:, :, :16]))))


@pytest.mark.parametrize(
    "row",
    [
        Row(0, 0, 3, -1, 2),
        Row(0, 0, 3, 0, 257),
        Row(0, 0, 3, 257, 254),
        Row(0, 597, 600, 0, 257),
        Row(-1, 0, 3, 254, 257),
        Row(0, -1, 2, 254, 257),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(row: Row) -> None:
    with pytest.raises(
        ValueError, match=r"a row's positions and tokens do not fit|is .*, but must"
    ):
        call(change("step.rows", lambda rows: [row]))


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="residual_length is 256, but must be"):
        call(change("cache", lambda c: replace(c, residual_length=256)))
    for bits, group, two_level in (
        ((2, 4), 32, False),
        ((3, 2), 32, False),
        ((2, 2), 16, False),
        ((2, 2), 32, True),
        ((4, 2), 32, True),
    ):
        fmt = PageFormat(*bits, group, 64, BF16, two_level)
        with pytest.raises(ValueError, match=r"no format of . and . bits"):
            call(change("cache.fmt", lambda _, fmt=fmt: fmt))


def test_good_after_bad_and_bad_after_good() -> None:
    """What was recognized once does not let the next one through."""
    for _ in range(2):
        call(inputs())
        with pytest.raises(ValueError, match="query is"):
            call(change("query", lambda x: x.float()))


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
@pytest.mark.parametrize(
    "name", ["step.block_table", "cache.ring.table", "cache.tails"], ids=lambda n: n.split(".")[-1]
)
def test_page_ids_out_of_range(name: str, bad: int) -> None:
    def spoil(x: Any) -> Any:
        if isinstance(x, tuple):
            return (Raw(x[0].cache, spoil(x[0].table)), *x[1:])
        x = x.clone()
        x[0, -1 if "ring" in name else 1] = bad  # the ring's last page is written
        return x

    given = change(name, spoil)
    before = given["cache"].pages.clone()
    with pytest.raises(ValueError, match=r"outside of its cache \(pages: 8, ring: 8\)"):
        call(given)
    assert torch.equal(given["cache"].pages, before)


def test_a_block_that_attention_reads_has_a_page() -> None:
    """A row from position 130 on reads one; through a window of two, none."""
    given = inputs()
    step = given["step"]
    given["step"] = replace(
        step, rows=[Row(0, 0, 3, 130, 133)], block_table=torch.zeros_like(step.block_table)
    )
    given["cache"] = replace(given["cache"], tails=(), residual_length=0)
    with pytest.raises(ValueError, match=r"attention reads has no page \(id 0\)"):
        call(given)
    call({**given, "params": AttentionParams(0.1, sliding_window=2)})


def test_table_too_narrow() -> None:
    for name in ("step.block_table", "cache.ring.table"):
        with pytest.raises(ValueError, match="too few columns"):
            call(change(name, lambda x: x[:, : x.shape[1] // 6]))


def test_entries_that_nobody_needs() -> None:
    """Of the ring: those of blocks that were complete before the step."""

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, : 128 // 24] = -1
        return x

    call(change("cache.ring.table", spoil))
