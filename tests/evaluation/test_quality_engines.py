"""Rows in child processes: hidden states, divergence, answers, and engines that fail."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import child_engine, perplexity
from benchmarks.quality.child_engine import Engine, EngineError, Settings
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import members
from tests.engine import random_prompt, tiny_model

LENGTH = 500
WINDOWS = {"random": [random_prompt(LENGTH, seed=n) for n in (1, 2)]}
LENGTHS = (300, LENGTH)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(
        tiny_model(),
        max_model_len=LENGTH,
        dtype="float32",
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=200,  # a window takes three steps
        prefill="cached",
        extra=dict(skip_tokenizer_init=True),
    )


@pytest.fixture(scope="module")
def reference(settings: Settings) -> list[np.ndarray]:
    with Engine(settings, CacheRow.parse("auto")) as engine:
        seen: list[int] = []
        states = perplexity.states(engine, WINDOWS, seen.append)
        assert seen == [1, 2]
        assert [x.shape for x in states] == [(LENGTH - 1, 128)] * 2
        assert engine.facts["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
        assert engine.facts["kv_cache_tokens"] >= LENGTH
        for figure in perplexity.compare(engine, WINDOWS, states, states, LENGTHS):
            assert figure.figures.kl.value == 0 and figure.figures.top1.value == 1
        prompts = [window[:50] for window in WINDOWS["random"]]
        answers = engine.generate(prompts, 5, ignore_eos=True)
        # The state at a prompt's end gives the first token of its answer.
        for prompt, answer, mine in zip(prompts, answers, states, strict=True):
            assert len(answer.token_ids) == 5
            wanted = answer.token_ids[:1]
            figures = engine.compare(mine[len(prompt) - 1 :][:1], mine[:1], wanted)
            again = engine.compare(mine[: len(prompt)], mine[: len(prompt)], [*prompt[1:], *wanted])
            assert figures.nll_reference[0] == pytest.approx(again.nll_reference[-1], abs=1e-5)
            assert figures.nll_reference[0] < np.log(512), "the most probable of 512 tokens"
    return states


def _divergence(
    settings: Settings, name: str, reference: list[np.ndarray]
) -> tuple[list[np.ndarray], list[float]]:
    """Hidden states of a row, and its KL to the reference by length."""
    with Engine(settings, CacheRow.parse(name)) as engine:
        states = perplexity.states(engine, WINDOWS)
        figures = perplexity.compare(engine, WINDOWS, reference, states, LENGTHS)
    assert [figure.length for figure in figures] == list(LENGTHS)
    assert [figure.figures.tokens for figure in figures] == [2 * 149, 2 * 249]
    return states, [figure.figures.kl.value for figure in figures]


def test_verbatim_pages_do_not_diverge(settings: Settings, reference: list[np.ndarray]) -> None:
    states, kl = _divergence(settings, "kivi_raw", reference)
    assert max(map(abs, kl)) < 1e-6
    np.testing.assert_allclose(states[0], reference[0], atol=1e-3)


def test_the_engine_and_the_simulation_agree(
    settings: Settings, reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIVI_VLLM_CPU_ISA", "reference")  # the kernels round differently
    states, kl = _divergence(settings, "kivi2", reference)
    assert min(kl) > 0.01, "two bits make a difference"
    with Engine(settings, CacheRow.parse("simulated:kivi2")) as engine:
        simulated = perplexity.states(engine, WINDOWS)
        figures = perplexity.compare(engine, WINDOWS, states, simulated, LENGTHS)
        with pytest.raises(UserError, match="perplexity section only"):
            engine.generate([[1, 2, 3]], 4)
    # A sum in another order may turn a code at the middle between two.
    assert max(figure.figures.kl.value for figure in figures) < 0.02 * min(kl)
    np.testing.assert_allclose(simulated[0][:128], reference[0][:128], atol=1e-4)


# --------------------------------------------------------------- what goes wrong


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children start at once, and do what `stub_worker` says."""
    monkeypatch.setattr(child_engine, "WORKER", "tests.evaluation.stub_worker")


ROW = CacheRow.parse("auto")


def _stub(behaviour: str = "") -> Settings:
    return Settings(behaviour, max_model_len=LENGTH)


@pytest.mark.usefixtures("stub")
def test_prompts_that_are_too_long() -> None:
    with Engine(_stub(), ROW) as engine:
        with pytest.raises(UserError, match=r"500 tokens and 1 to generate do not fit .* 500"):
            engine.hidden_states([list(range(LENGTH))])
        with pytest.raises(UserError, match="do not fit"):
            engine.generate([[1, 2, 3]], LENGTH)
        assert len(engine.hidden_states([[1, 2, 3]])) == 1


@pytest.mark.usefixtures("stub")
def test_a_users_mistake_does_not_end_the_engine() -> None:
    with Engine(_stub(), ROW) as engine:
        with pytest.raises(UserError, match="a mistake") as found:
            engine.generate(["mistake"], 4)
        assert not isinstance(found.value, EngineError) and found.value.remedy == "mend it"
        seen: list[int] = []
        answers = engine.generate(["a", "b"], 4, on_done=seen.append)
        assert [answer.text for answer in answers] == ["a", "b"] and seen == [1, 2]


@pytest.mark.usefixtures("stub")
def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(EngineError, match="engine of auto failed: RuntimeError: no such") as found,
        Engine(_stub("fail"), ROW, log=log),
    ):
        pass
    assert str(log) in str(found.value) and "what was going on" in str(found.value)
    assert "Traceback" in log.read_text()


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(("how", "status"), [("kill", "-9"), ("exit", "3"), ("orphan", "3")])
def test_a_child_that_dies_is_an_error_with_its_log(how: str, status: str) -> None:
    with (
        pytest.raises(EngineError, match=f"ended with status {status}") as found,
        Engine(_stub(), ROW) as engine,
    ):
        assert engine._child is not None
        pid = engine._child.process.pid
        start = time.monotonic()
        engine.generate([how], 4)
    assert time.monotonic() - start < 20
    assert "what was going on" in str(found.value) and str(engine.log) in str(found.value)
    assert engine.log.exists(), "the message names it"
    shutil.rmtree(engine.log.parent)
    assert not members(pid)


@pytest.mark.usefixtures("stub")
def test_a_child_does_not_outlive_those_that_ask() -> None:
    with Engine(_stub(), ROW) as engine:
        assert engine._child is not None
        process = engine._child.process
        assert process.stdin is not None
        process.stdin.write(b'{"op": "generate", "prompts": ["sleep"]}\n')
        process.stdin.close()  # as when the parent is killed
        assert process.wait(20) == 0
    assert not engine.log.exists()


@pytest.mark.usefixtures("stub")
def test_long_answers_pass_the_pipe_whole() -> None:
    with Engine(_stub(), ROW) as engine:
        prompts = [str(n) * 200_000 for n in range(5)]
        assert [answer.text for answer in engine.generate(prompts, 4)] == prompts
