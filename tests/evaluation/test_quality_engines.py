"""Rows in child processes: hidden states, divergence, answers, and engines that fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common.child import ChildError
from benchmarks.quality import engine as engines
from benchmarks.quality import perplexity
from benchmarks.quality.engine import Engine, arguments
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError
from tests.engine import random_prompt, tiny_model
from tests.evaluation import stub_worker

LENGTH = 500
WINDOWS = {"random": [random_prompt(LENGTH, seed=n) for n in (1, 2)]}
LENGTHS = (300, LENGTH)


def _engine(name: str) -> Engine:
    row = CacheRow.parse(name)
    given: dict[str, Any] = dict(
        dtype="float32",
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=200,  # a window takes three steps
        skip_tokenizer_init=True,
    )
    return Engine(row, arguments(row, tiny_model(), LENGTH, **given))


@pytest.fixture(scope="module")
def reference() -> list[np.ndarray]:
    with _engine("auto") as engine:
        seen: list[int] = []
        states, figures = perplexity.measure(engine, WINDOWS, LENGTHS, on_done=seen.append)
        assert seen == [1, 2]
        assert [x.shape for x in states] == [(LENGTH - 1, 128)] * 2
        # Decoding a text's own tokens gives what computing all of them as a prompt does.
        decoded = engine.decoded_states(WINDOWS["random"][0], 60)
        np.testing.assert_allclose(decoded, states[0][-59:], atol=1e-3)
        assert engine.facts["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
        assert engine.facts["kv_cache_tokens"] >= LENGTH
        for figure in figures:
            assert figure["kl"]["value"] == 0 and figure["top1"]["value"] == 1
        prompts = [window[:50] for window in WINDOWS["random"]]
        answers = engine.generate(prompts, 5, ignore_eos=True)
        # The state at a prompt's end gives the first token of its answer.
        for prompt, answer, mine in zip(prompts, answers, states, strict=True):
            assert len(answer.token_ids) == 5
            wanted = answer.token_ids[:1]
            one = engine.compare(mine[len(prompt) - 1 :][:1], mine[:1], wanted)
            again = engine.compare(mine[: len(prompt)], None, [*prompt[1:], *wanted])
            assert one.nll_reference[0] == pytest.approx(again.nll_reference.iloc[-1], abs=1e-5)
            assert one.nll_reference[0] < np.log(512), "the most probable of 512 tokens"
    return states


def _divergence(name: str, reference: list[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """Hidden states of a row, and its KL to the reference by length."""
    with _engine(name) as engine:
        states, figures = perplexity.measure(engine, WINDOWS, LENGTHS, reference)
    assert [figure["length"] for figure in figures] == list(LENGTHS)
    assert [figure["tokens"] for figure in figures] == [2 * 149, 2 * 249]
    return states, [figure["kl"]["value"] for figure in figures]


@pytest.mark.slow
def test_a_budget_shows_where_tokens_are_decoded() -> None:
    """And nowhere else: a prompt's tokens read all."""
    window, states = random_prompt(1400, seed=3), []
    for name in ("kivi4:prefill=exact", "kivi4:token_budget=1024,dense_layers=1"):
        row = CacheRow.parse(name)
        options: dict[str, Any] = dict(kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True)
        given = arguments(row, tiny_model(), len(window), dtype="float32", **options)
        with Engine(row, given) as engine:
            states.append((engine.hidden_states(window[:-1]), engine.decoded_states(window, 60)))
    assert np.array_equal(states[0][0], states[1][0])
    difference = np.abs(states[0][1] - states[1][1]).max(-1)
    assert difference.shape == (59,) and (difference > 1e-3).all()


@pytest.mark.slow
def test_verbatim_pages_do_not_diverge(reference: list[np.ndarray]) -> None:
    states, kl = _divergence("kivi_raw", reference)
    assert max(map(abs, kl)) < 1e-6
    np.testing.assert_allclose(states[0], reference[0], atol=1e-3)


@pytest.mark.slow
def test_the_engine_and_the_simulation_agree(
    reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIVI_VLLM_CPU_ISA", "reference")  # the kernels round differently
    states, kl = _divergence("kivi2", reference)
    assert min(kl) > 0.01, "two bits make a difference"
    with _engine("simulated:kivi2") as engine:
        simulated, figures = perplexity.measure(engine, WINDOWS, LENGTHS, states)
        with pytest.raises(UserError, match="perplexity section only"):
            engine.generate([[1, 2, 3]], 4)
    # A sum in another order may turn a code at the middle between two.
    assert max(figure["kl"]["value"] for figure in figures) < 0.02 * min(kl)
    np.testing.assert_allclose(simulated[0][:128], reference[0][:128], atol=1e-4)


# --------------------------------------------------------------- what goes wrong


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start quickly, and do what `stub_worker` says."""
    monkeypatch.setattr(engines, "start", stub_worker.start)


ROW = CacheRow.parse("auto")


@pytest.mark.usefixtures("stub")
def test_prompts_that_are_too_long() -> None:
    with Engine(ROW, arguments(ROW, "m", LENGTH)) as engine:
        with pytest.raises(UserError, match=r"a prompt of 500 tokens and 1 to generate .* 500"):
            engine.hidden_states(list(range(LENGTH)))
        with pytest.raises(UserError, match="do not fit"):
            engine.generate([[1, 2, 3]], LENGTH)
        assert len(engine.hidden_states([1, 2, 3])) == 3
        seen: list[int] = []
        answers = engine.generate([[1], [2]], 4, on_done=seen.append)
        assert [answer.token_ids for answer in answers] == [[1], [2]] and seen == [1, 2]
    assert not engine.log.exists()


@pytest.mark.usefixtures("stub")
def test_an_engine_that_does_not_start() -> None:
    with pytest.raises(ChildError, match="engine of auto failed: RuntimeError: no such") as found:
        Engine(ROW, arguments(ROW, "fail", LENGTH))
    assert "what was going on" in str(found.value)
    [log] = re.findall(r"The end of (\S+):", str(found.value))
    assert "Traceback" in Path(log).read_text(), "the message names it: it is kept"
    Path(log).unlink()
