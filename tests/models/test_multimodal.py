"""Models that see images: the same answers as on vLLM's own cache, and images told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kivi_vllm.cli import plan
from tests.choice import some
from tests.engine import SETTINGS as BASE_SETTINGS
from tests.engine import Answer, engine, random_prompt
from tests.invariance.conftest import scheduler
from tests.models.harness import LOSSLESS, backends, capacity, worst
from tests.models.pictures import (
    FAMILIES,
    TEXT_TOKENS,
    Prompt,
    Seeing,
    ask,
    gemma3,
    image_processors,
)

SETTINGS: dict[str, Any] = dict(
    skip_tokenizer_init=False,
    limit_mm_per_prompt={"image": 2, "video": 0},
)


@pytest.fixture(scope="module", autouse=True)
def _images() -> Iterator[None]:
    with image_processors():
        yield


def _text(length: int, seed: int) -> tuple[int, ...]:
    return tuple(token % TEXT_TOKENS for token in random_prompt(length, seed))


def _prompts(model: Seeing) -> tuple[list[Prompt], Prompt]:
    """Prompts with an image, with none and with two; and the first with another image.

    An image is more than a block of tokens, and the first one begins in the second block.
    """
    one = _text(140, 1) + model.image + _text(150, 2)
    two = _text(10, 4) + model.image + _text(5, 5) + model.image + _text(300, 6)
    return [Prompt(one, (1,)), Prompt(_text(300, 3)), Prompt(two, (2, 3))], Prompt(one, (4,))


def _rounds(llm: Any, model: Seeing) -> list[list[Answer]]:
    """Answers to all prompts, to all again, and to the one with another image."""
    prompts, other = _prompts(model)
    return [ask(llm, prompts), ask(llm, prompts), ask(llm, [other])]


@pytest.mark.parametrize("family", some([*FAMILIES], [0]))
def test_images_with_the_lossless_codec_equal_vllms_own_attention(family: str) -> None:
    model = FAMILIES[family]()
    with engine(model.path, "auto", **SETTINGS) as llm:
        assert backends(llm) == {"CPU_ATTN"}
        expected = _rounds(llm, model)
    [seen, *_], _, [other] = expected
    assert other.tokens != seen.tokens, "the model does not look: nothing is tested"

    options = dict(kivi={"prefill": "cached"}, max_num_batched_tokens=200)
    with engine(model.path, "kivi_raw", **options, **SETTINGS) as llm:
        assert backends(llm) == {"KIVI"}
        got = _rounds(llm, model)
        reported = capacity(llm)
    for answers, wanted in zip(got, expected, strict=True):
        assert worst(answers, wanted) < LOSSLESS
    # Again: all whole blocks, images too. The other image: only the block of text before it.
    cached = [[answer.num_cached_tokens for answer in answers] for answers in got]
    assert cached[0] == [0, 0, 0]
    assert cached[1][:2] == [384, 256] and cached[1][2] >= 512
    assert cached[2] == [128]

    # Planned from the shape of the text model, which is not that of the tower.
    memory, length = int(BASE_SETTINGS["kv_cache_memory_bytes"]), BASE_SETTINGS["max_model_len"]
    planned = plan.capacity(
        model.path, "kivi_raw", memory, length, dtype="float32", max_num_batched_tokens=200
    )
    assert planned.tokens == reported


@pytest.mark.slow
def test_pages_that_cross_from_image_to_image_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the image in a page's hash, hits give another image's answer."""
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(
        kv_cache_utils, "_gen_mm_extra_hash_keys", lambda request, start, end, index: ([], index)
    )
    model = FAMILIES["llava"]()
    prompts, other = _prompts(model)
    with engine(model.path, "kivi_raw", kivi={"prefill": "cached"}, **SETTINGS) as llm:
        [before] = ask(llm, [other])
        assert llm.reset_prefix_cache()
        [seen] = ask(llm, prompts[:1])
        [crossed] = ask(llm, [other])
    assert crossed.num_cached_tokens == 384
    assert seen.tokens != before.tokens
    assert crossed.difference(before) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_quantized_answers_do_not_depend_on_chunks(family: str) -> None:
    model = FAMILIES[family]()
    prompts, _ = _prompts(model)
    with engine(model.path, "kivi2", kivi={"prefill": "cached"}, **SETTINGS) as llm:
        whole = ask(llm, prompts)
        for chunk in (100, 200):
            assert llm.reset_prefix_cache()
            scheduler(llm).max_num_scheduled_tokens = chunk
            assert worst(ask(llm, prompts), whole) < 1e-2
        assert worst(ask(llm, prompts), whole) < 1e-2  # on cached prefixes


@pytest.mark.slow
def test_model_of_images_that_is_served_for_text() -> None:
    """Gemma-3 without its images; with them: `test_images`."""
    model = gemma3().path
    only_text: dict[str, Any] = dict(skip_tokenizer_init=False, language_model_only=True)
    prompts = [_text(n, n) for n in (300, 77, 128, 513)]
    inputs = [Prompt(prompt) for prompt in prompts]
    with engine(model, "auto", **only_text) as llm:
        expected = ask(llm, inputs)
    with engine(model, "kivi_raw", max_num_batched_tokens=200, **only_text) as llm:
        assert backends(llm) == {"KIVI"}
        assert worst(ask(llm, inputs), expected) < LOSSLESS
