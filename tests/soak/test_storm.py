"""Requests in waves, cancelled, preempted, drafted: no page lost, no answer changed, no growth."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine import Answer
from tests.invariance.conftest import scheduler
from tests.offload import settle
from tests.soak.checks import assert_flat, assert_idle
from tests.soak.engines import Kind, quiet_answers, small_engine
from tests.soak.settings import LONG, REQUESTS, SECONDS, SEED
from tests.soak.storm import Storm, make_prompts

SHORT_KINDS = [
    Kind("kivi2", 0, "ngram"),
    Kind("kivi2", 0, "eagle", "foreseeable"),
    Kind("kivi2", 0),
    Kind("kivi2", 0, model="windows"),
    Kind("kivi_raw", 0, model="hybrid"),
]
LONG_KINDS = [
    Kind("kivi2", 32, "ngram"),
    Kind("kivi2", 32, "eagle", "foreseeable"),
    Kind("kivi2", 32),
    Kind("kivi4", 0, "ngram"),
    Kind("kivi2", 32, "ngram", "windows"),
    Kind("kivi2", 32, "ngram", offload=True),
    Kind("kivi2", 0, model="windows", offload=True),
]
KINDS = SHORT_KINDS + LONG_KINDS if LONG else SHORT_KINDS

HAPPENED = (
    "finished",
    "requests with a hit",
    "preemptions",
    "cancelled in prefill",
    "cancelled in decode",
    "cancelled before its first step",
)
"""What a storm must have done to have shown anything."""

PROMPTS = make_prompts(120 if LONG else 40, random.Random(SEED))


@pytest.fixture(scope="module")
def quiet() -> Callable[[Kind], list[Answer]]:
    """The answers of `PROMPTS`; drafts do not change them."""
    known: dict[tuple[str, int, str], list[Answer]] = {}

    def answers(kind: Kind) -> list[Answer]:
        key = kind.dtype, kind.residual, kind.model
        if key not in known:
            known[key] = quiet_answers(kind, PROMPTS)
        return known[key]

    return answers


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.slow
def test_storm(kind: Kind, quiet: Any, poison: Any, offloading: Any, record_property: Any) -> None:
    print(f"KIVI_SOAK_SEED={SEED} KIVI_SOAK_REQUESTS={REQUESTS}")  # what repeats a failure
    truth = quiet(kind)
    with small_engine(kind) as llm:
        poison(llm)
        storm = Storm(llm, PROMPTS, truth, SEED)
        storm.run(REQUESTS, SECONDS)
        if kind.offload:
            settle(llm)
            storm.counts |= offloading.counts
        pages = assert_idle(llm, scheduler(llm))
        grown = assert_flat(storm.rss)
        record_property(
            "soak", f"seed {SEED}, {storm.report()}, pages free: {pages} of {pages}, {grown}"
        )
        expected = [*HAPPENED, "drafts accepted"] if kind.drafts else [*HAPPENED]
        if not kind.hits:
            expected.remove("requests with a hit")
        if kind.offload:
            expected.append("blocks loaded")
        missing = [name for name in expected if not storm.counts[name]]
        assert not missing, f"nothing was tested of {missing}: {storm.report()}"
        if kind.drafts:
            assert storm.counts["drafts"] > storm.counts["drafts accepted"]
