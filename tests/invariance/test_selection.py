"""Generated tokens that choose pages, in an engine: what they read, and what changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kivi_vllm.ops.cpu import operators as native
from kivi_vllm.ops.select import COUNTED, Selection
from kivi_vllm.ops.step import AttentionParams
from tests.choice import some
from tests.drafts import eagle, foreseeable
from tests.engine import Answer, engine, gemma3n, generate, random_prompt, tiny_model
from tests.invariance.conftest import scheduler, use
from tests.models.test_hybrids import HYBRIDS
from tests.unit.selecting import unread_poisoned

PREFIX = random_prompt(1100, seed=1)
PROMPTS = [PREFIX + random_prompt(n, seed=seed) for seed, n in enumerate((300, 300, 40))]
PROMPTS.append(random_prompt(200, seed=9))
DRAFTS = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
SETTINGS: dict[str, Any] = dict(max_model_len=1536, kv_cache_memory_bytes=64 << 20)


def model() -> str:
    return tiny_model(num_hidden_layers=3)


def published() -> list[float]:
    """The metrics of what was seen and read."""
    from prometheus_client import REGISTRY

    labels = {"engine": "0"}
    names = ("kivi:pages_seen_total", "kivi:pages_read_total")
    return [REGISTRY.get_sample_value(name, labels) or 0.0 for name in names]


def poisoning(poisoned: list[int]) -> Any:
    """A look for `budget`: what a choice leaves out is NaN; notes how many pages that are."""

    def look(step: Any, cache: Any, selection: Selection | None, attend: Any) -> None:
        with unread_poisoned(step, cache, selection, AttentionParams(1.0)) as pages:
            poisoned.append(pages)
            attend()

    return look


@pytest.fixture
def budget(operators: Any) -> Any:
    """Makes an engine's operators choose by another budget, and lets a test look at each choice."""
    use(operators, native)

    def start(tokens: int, look: Any = lambda step, cache, selection, attend: attend()) -> None:
        def attend_selected(step: Any, cache: Any, *args: Any) -> None:
            *others, params, output = args
            own = (step, cache, *others, replace(params, token_budget=tokens))
            selection = native.select(*own)
            look(step, cache, selection, lambda of=selection: native.attend(*own, output, of))

        operators.attend_selected = attend_selected

    return start


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k3v2"])
def test_a_budget_that_suffices_changes_no_bit(dtype: str, preempted: list[str]) -> None:
    """With chunks, hits, drafts and preemption: the same answers, to the last bit."""
    # Long answers: what a new request leaves free is not enough for them.
    prompts = [random_prompt(n, seed=n) for n in (250, 240, 120, 340)]
    prompts.append(prompts[3][:300])
    answers = []
    for kivi in ({}, {"token_budget": 1024, "dense_layers": 0}):
        COUNTED.zero_()
        with engine(
            model(),
            dtype,
            kivi=kivi,
            speculative_config=DRAFTS,
            max_num_batched_tokens=200,
            # A sequence, and little more: of 2 bits, a page holds fewer tokens of the ring.
            num_gpu_blocks_override={"kivi2": 19, "kivi_k3v2": 18}[dtype],
            max_model_len=512,
        ) as llm:
            answers.append(generate(llm, prompts, 150) + generate(llm, prompts[:1], 5))
        assert preempted
        preempted.clear()
        assert any(answer.num_cached_tokens for answer in answers[-1])
        seen, read = COUNTED.tolist()
        assert seen == read and bool(seen) == bool(kivi)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("dtype", "estimate"),
    some([("kivi2", "ranges"), ("kivi_k3v2", "ranges"), ("kivi2", "keys")], [0]),
)
def test_what_is_not_chosen_is_not_read(dtype: str, estimate: str, budget: Any) -> None:
    """Answers with NaN in all other pages are the same; a list of another row is noticed."""
    poisoned: list[int] = []

    def swapped(step: Any, cache: Any, selection: Selection | None, attend: Any) -> None:
        with unread_poisoned(step, cache, selection, AttentionParams(1.0)):
            if selection is None:
                return attend()
            attend(replace(selection, blocks=selection.blocks.flip(0)))

    options = {"token_budget": 1024, "dense_layers": 1, "estimate": estimate}
    answers: dict[str, list[Answer]] = {}
    with engine(
        model(),
        dtype,
        kivi=options,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **SETTINGS,
    ) as llm:
        budget(2048)
        answers["dense"] = generate(llm, PROMPTS[:2], 12)
        budget(384)
        COUNTED.zero_()
        before = published()
        answers["selected"] = generate(llm, PROMPTS[:2], 12)
        seen, read = COUNTED.tolist()
        assert [now - then for now, then in zip(published(), before, strict=True)] == [seen, read]
        # Of two layers and two heads: 11 tokens after the prompts' last ones.
        ends = [len(prompt) for prompt in PROMPTS[:2]]
        assert seen == 2 * 2 * sum(t // 128 for end in ends for t in range(end, end + 11))
        assert read == 2 * 2 * 2 * 11 * 3
        budget(384, poisoning(poisoned))
        answers["watched"] = generate(llm, PROMPTS[:2], 12)
        assert sum(poisoned) > 300
        budget(384, swapped)
        answers["swapped"] = generate(llm, PROMPTS[:2], 12)
        # A prompt's tokens read all, in whatever chunks: so does its last one, alone in its step.
        budget(384, poisoning(poisoned))
        poisoned.clear()
        scheduler(llm).max_num_scheduled_tokens = len(PROMPTS[3]) - 1
        COUNTED.zero_()
        generate(llm, PROMPTS[3:], 1)
        assert not COUNTED.any() and not any(poisoned)
    assert answers["watched"] == answers["selected"]
    for other in ("dense", "swapped"):
        pairs = zip(answers[other], answers["selected"], strict=True)
        assert not max(a.difference(b) for a, b in pairs) <= 1e-3, other
    assert all(torch.tensor(a.logprobs).isfinite().all() for a in answers["watched"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "eagle"])
def test_each_draft_chooses_for_itself(method: str, budget: Any) -> None:
    """Drafts and neighbours change nothing but the order of sums."""

    def watch(step: Any, cache: Any, selection: Selection | None, attend: Any) -> None:
        with unread_poisoned(step, cache, selection, AttentionParams(1.0)):
            attend()
        for row in step.rows if selection else ():
            widths.append(row.b - row.a)

    widths: list[int] = []
    options = {"token_budget": 1024, "dense_layers": 0}
    answers = []
    path, proposing = model(), DRAFTS
    if method == "eagle":
        path = foreseeable()
        proposing = dict(method="eagle", model=eagle(path), num_speculative_tokens=3)
    for drafts in ({}, {"speculative_config": proposing}):
        widths.clear()
        with engine(
            path, "kivi4", kivi=options, enable_prefix_caching=False, **drafts, **SETTINGS
        ) as llm:
            budget(256, watch)
            together = generate(llm, PROMPTS[1:3], 24)
            alone = [generate(llm, [prompt], 24)[0] for prompt in PROMPTS[1:3]]
        assert (max(widths) > 1) == bool(drafts)
        answers += [together, alone]
    for other in answers[1:]:
        for got, want in zip(other, answers[0], strict=True):
            assert got.difference(want) < 0.02


@pytest.mark.slow
def test_layers_that_share_a_cache_choose_for_themselves(budget: Any) -> None:
    """Of Gemma-3n: its windows are smaller than the budget, the other layers select."""
    poisoned: list[int] = []
    windows: set[int] = set()

    options = {"token_budget": 1024, "dense_layers": 0}
    prompts = [random_prompt(900, seed=1), random_prompt(777, seed=2)]
    more = {"enable_prefix_caching": False, **SETTINGS}
    with engine(gemma3n(), "kivi_k3v2", kivi=options, **more) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for layer in context.values():
            if (impl := getattr(layer, "impl", None)) is not None:
                assert bool(impl.params.token_budget) == (impl.params.sliding_window == 0)
                windows.add(impl.params.sliding_window)
        budget(256)
        plain = generate(llm, prompts, 8)
        budget(256, poisoning(poisoned))
        COUNTED.zero_()
        watched = generate(llm, prompts, 8)
    assert windows == {0, 200}
    assert watched == plain
    seen, read = COUNTED.tolist()
    assert 0 < read < seen and any(poisoned)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "granite-4"])
def test_layers_beside_states_choose(name: str, budget: Any) -> None:
    """Of hybrid models; what their layers do not choose is not read."""
    poisoned: list[int] = []
    hybrid = HYBRIDS[name]
    settings = hybrid.settings | SETTINGS | {"enable_prefix_caching": False}
    options = {"token_budget": 1024, "dense_layers": 0}
    with engine(hybrid.path, "kivi_k3v2", kivi=options, **settings) as llm:
        budget(2048)
        dense = generate(llm, PROMPTS[:2], 8)
        budget(256)
        selected = generate(llm, PROMPTS[:2], 8)
        budget(256, poisoning(poisoned))
        COUNTED.zero_()
        watched = generate(llm, PROMPTS[:2], 8)
    assert watched == selected
    assert max(a.difference(b) for a, b in zip(selected, dense, strict=True)) > 1e-3
    seen, read = COUNTED.tolist()
    assert 0 < read < seen and any(poisoned)
