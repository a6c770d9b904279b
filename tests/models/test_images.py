"""Images whose tokens see each other: Gemma-3 as transformers computes it, and told apart.

vLLM's own attention on CPUs does not let them see each other, so it is no truth here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.choice import some
from tests.engine import Answer, engine, random_prompt
from tests.invariance.conftest import scheduler
from tests.models.harness import LOSSLESS, backends, change_attention, worst
from tests.models.pictures import (
    TEXT_TOKENS,
    Prompt,
    _image,
    ask,
    gemma3,
    image_processors,
)

SETTINGS: dict[str, Any] = dict(
    skip_tokenizer_init=False,
    limit_mm_per_prompt={"image": 2, "video": 0},
)
CACHED = {"prefill": "cached"}


@pytest.fixture(scope="module", autouse=True)
def _images() -> Iterator[None]:
    with image_processors():
        yield


def _text(length: int, seed: int) -> tuple[int, ...]:
    return tuple(token % TEXT_TOKENS for token in random_prompt(length, seed))


def seeing_prompts() -> tuple[list[Prompt], Prompt]:
    """Prompts with an image, with none and with two; and the first with another image.

    An image is 100 tokens between two others; the first one goes beyond position 256, where
    a hit may end: blocks of the pool hold two pages.
    """
    image = gemma3().image
    one = _text(200, 1) + image + _text(150, 2)
    two = _text(10, 4) + image + _text(5, 5) + image + _text(250, 6)
    return [Prompt(one, (1,)), Prompt(_text(300, 3)), Prompt(two, (2, 3))], Prompt(one, (4,))


def by_transformers(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Answer]:
    """What transformers says of the answers: its own best tokens, given those before."""
    import transformers as hf

    path = gemma3().path
    model = hf.Gemma3ForConditionalGeneration.from_pretrained(path).eval()
    processor = hf.AutoProcessor.from_pretrained(path)
    words = processor.tokenizer
    names = [words.boi_token, words.image_token, words.eoi_token]
    start, seen, end = words.convert_tokens_to_ids(names)
    image = [start, *[seen] * processor.image_seq_length, end]
    out = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [t for token in prompt.tokens for t in (image if token == start else [token])]
        given: dict[str, Any] = {"input_ids": torch.tensor([[*ids, *answer.tokens]])}
        given["token_type_ids"] = (given["input_ids"] == seen).int()
        if prompt.images:
            pictures = [_image(seed) for seed in prompt.images]
            pixels = processor.image_processor(pictures, return_tensors="pt")
            given["pixel_values"] = pixels["pixel_values"]
        with torch.no_grad():
            logits = model(**given).logits[0, len(ids) - 1 : -1]
        best = logits.log_softmax(-1).max(-1)
        out.append(Answer(tuple(best.indices.tolist()), tuple(best.values.tolist())))
    return out


def _difference(llm: Any, prompts: Sequence[Prompt]) -> float:
    answers = ask(llm, prompts)
    return worst(answers, by_transformers(prompts, answers))


def test_the_lossless_codec_equalsby_transformers() -> None:
    prompts, other = seeing_prompts()
    settings = dict(max_num_batched_tokens=130, kivi=CACHED, **SETTINGS)
    with engine(gemma3().path, "kivi_raw", **settings) as llm:
        assert backends(llm) == {"KIVI"}
        answers = ask(llm, prompts)
        assert worst(answers, by_transformers(prompts, answers)) < LOSSLESS
        # Again: whole blocks, images too; the first hit ends within an image.
        again = ask(llm, prompts)
        assert worst(again, answers) < LOSSLESS
        assert [a.num_cached_tokens for a in answers] == [0, 0, 0]
        assert [a.num_cached_tokens for a in again] == [256, 256, 256]
        # Another image behind the same text: nothing of the first one is taken for it.
        [third] = ask(llm, [other])
        assert third.num_cached_tokens == 0 and third.difference(answers[0]) > 10 * LOSSLESS
        assert worst([third], by_transformers([other], [third])) < LOSSLESS


def test_gemma4_takes_images_from_layers_without_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's function, on the metadata of two groups of pages and of a ring."""
    from vllm import forward_context
    from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration

    from kivi_vllm.attention.metadata import KiviMetadata
    from kivi_vllm.ops.step import Step

    table, seen = torch.zeros(1, 1), torch.tensor([1, 1])
    groups = [KiviMetadata(Step([], table, last_visible=seen)) for _ in range(2)]
    metadata = {f"model.layers.{i}.self_attn.attn": group for i, group in enumerate(groups)}
    metadata["model.layers.1.self_attn.attn.ring"] = KiviMetadata(None)
    context = SimpleNamespace(attn_metadata=metadata)
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)
    model = SimpleNamespace(_full_attn_layer_idxs={1})
    Gemma4ForConditionalGeneration._clear_mm_prefix_for_full_attn_layers(model)
    assert groups[0].step.last_visible is seen and groups[1].step.last_visible is None


@pytest.mark.slow
def test_images_that_do_not_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: causal attention, as vLLM's own is on CPUs."""
    from kivi_vllm.attention import metadata

    monkeypatch.setattr(metadata, "last_visible", lambda *_: None)
    prompts, _ = seeing_prompts()
    with engine(gemma3().path, "kivi_raw", kivi=CACHED, **SETTINGS) as llm:
        assert _difference(llm, prompts[:1]) > 10 * LOSSLESS


@pytest.mark.slow
def test_steps_that_end_within_an_image_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of `hooks.images`: vLLM's scheduler on a CPU splits images."""
    from kivi_vllm.attention.hooks import images

    monkeypatch.setattr(images, "see_each_other", lambda vllm_config: False)
    prompts, _ = seeing_prompts()
    with engine(
        gemma3().path, "kivi_raw", kivi=CACHED, max_num_batched_tokens=130, **SETTINGS
    ) as llm:
        assert _difference(llm, prompts[:1]) > 10 * LOSSLESS


@pytest.mark.slow
def test_steps_too_short_for_an_image_are_refused() -> None:
    settings = dict(kivi=CACHED, max_num_batched_tokens=99, **SETTINGS)
    with (
        pytest.raises(ValueError, match=r"max_tokens_per_mm_item \(1\d\d\) is larger"),
        engine(gemma3().path, "kivi2", **settings),
    ):
        pass


@pytest.mark.parametrize(
    ("dtype", "options"),
    some([("kivi2", {}), ("kivi2", {"residual_length": 32, "sink_tokens": 8})], []),
    ids=["kivi2", "kivi2-R32"],
)
def test_quantized_answers_do_not_depend_on_the_schedule(
    dtype: str, options: dict[str, Any]
) -> None:
    prompts, _ = seeing_prompts()
    kivi = CACHED | options
    with engine(gemma3().path, dtype, kivi=kivi, **SETTINGS) as llm:
        whole = [ask(llm, [prompt])[0] for prompt in prompts]
        for chunk in (102, 150, 300):
            assert llm.reset_prefix_cache()
            scheduler(llm).max_num_scheduled_tokens = chunk
            assert worst(ask(llm, prompts), whole) < 1e-2
        ask(llm, prompts)  # tails are kept for a prefix that is known to come again
        again = ask(llm, prompts)  # on cached prefixes
        assert [a.num_cached_tokens for a in again] == [256, 256, 256]
        assert worst(again, whole) < 1e-2
        change_attention(llm, scale=0.2)  # negative control
        assert worst(ask(llm, prompts), whole) > 1e-2
