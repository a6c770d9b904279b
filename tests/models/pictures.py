"""Tiny random-weight models that see images, whole: weights, tokenizer and processor."""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.engine import BASE, VOCAB, Answer, answer, sampling

TEXT_TOKENS = 480
"""Token ids below are text; the special ones of a model are above."""


@dataclass(frozen=True)
class Seeing:
    """A model's folder, and the tokens that stand for one image in its prompts."""

    path: str
    image: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the seeds of the random images in them."""

    tokens: tuple[int, ...]
    images: tuple[int, ...] = ()


@contextmanager
def image_processors() -> Iterator[None]:
    """Let vLLM import its models for images where torchvision is not installed.

    They import what needs it, but nothing in these tests calls it: the processors are those on
    Pillow. Only a video processor has no such other form, so there are no videos.
    """
    from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
    from transformers.processing_utils import VideosKwargs
    from transformers.utils import is_torchvision_available

    names = ("", ".transforms", ".transforms.v2", ".transforms.v2.functional")
    # vLLM asks how large a video would be, though the tests allow none.
    sizes = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    edges = dict(shortest_edge=1024, longest_edge=4096)
    no_videos = SimpleNamespace(valid_kwargs=VideosKwargs, size=edges, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        if not is_torchvision_available():  # the answer is kept from here on
            for name in names:
                patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        for processor in (Qwen2_5_VLProcessor, Qwen3VLProcessor):
            parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
            patch.setattr(processor, "get_attributes", parts)
            patch.setattr(processor, "video_processor", no_videos, raising=False)
        yield


def _image(seed: int, height: int = 336, width: int = 308) -> Any:
    import numpy as np
    from PIL import Image

    noise = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ask(llm: Any, prompts: Sequence[Prompt], max_tokens: int = 12) -> list[Answer]:
    """Greedy answers of `prompts`, all in one batch."""
    inputs: list[dict[str, Any]] = [{"prompt_token_ids": list(p.tokens)} for p in prompts]
    for given, prompt in zip(inputs, prompts, strict=True):
        if prompt.images:
            given["multi_modal_data"] = {"image": [_image(seed) for seed in prompt.images]}
    outputs = llm.generate(inputs, sampling(max_tokens), use_tqdm=False)
    return [answer(output) for output in outputs]


def tokenizer(special: Sequence[str] = (), **named: str) -> Any:
    """Words are numbers, and `special` ends the vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(VOCAB - len(special))}
    words |= {word: len(words) + i for i, word in enumerate(special)}
    numbers = Tokenizer(WordLevel(words, unk_token="0"))
    numbers.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=numbers,
        unk_token="0",
        bos_token="1",
        eos_token="2",
        pad_token="0",
        additional_special_tokens=list(special),
        **({"extra_special_tokens": named} if named else {}),
    )


def _save(config: Any, processor: Any, model_class: str) -> str:
    """Write a model of random weights and its processor; returns the folder."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    path = Path(tempfile.mkdtemp(prefix=f"kivi-{config.model_type}-"))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).float()
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # of Gemma-3: zeros would see nothing
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    # Towers of CLIP and SigLIP, under the names that published weights have.
    file = path / "model.safetensors"
    short = re.compile(r"vision_tower\.(?!vision_model\.)")
    tensors = load_file(file).items()
    save_file({short.sub("vision_tower.vision_model.", k): v for k, v in tensors}, file)
    return str(path)


@functools.cache
def llava() -> Seeing:
    """LLaVA-1.5: CLIP and Llama; an image is 144 tokens."""
    import transformers as hf

    numbers = tokenizer(["<image>"])
    image = numbers.convert_tokens_to_ids("<image>")
    side = 168
    vision = hf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
        projection_dim=64,
        initializer_factor=4.0,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**BASE),
        image_token_id=image,
        image_token_index=image,
        vision_feature_layer=-2,
        image_seq_length=144,
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=numbers,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    path = _save(config, processor, "LlavaForConditionalGeneration")
    return Seeing(path, (image,))


_QWEN_WORDS = (
    *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"),
    *("<|im_start|>", "<|im_end|>"),
)


def _qwen(kind: str, text: dict[str, Any], vision: dict[str, Any], patch: int) -> Seeing:
    import transformers as hf

    numbers = tokenizer(_QWEN_WORDS)
    start, image, end, video = numbers.convert_tokens_to_ids(list(_QWEN_WORDS[:4]))
    config = getattr(hf, f"{kind}Config")(
        text_config={**BASE, **text},
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            patch_size=patch,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=BASE["hidden_size"],
            **vision,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    side = 2 * patch
    processor = getattr(hf, f"{kind}Processor")(
        image_processor=hf.Qwen2VLImageProcessorPil(
            min_pixels=side**2,
            max_pixels=160 * side**2,
            patch_size=patch,
            merge_size=2,
            temporal_patch_size=2,
        ),
        tokenizer=numbers,
    )
    path = _save(config, processor, f"{kind}ForConditionalGeneration")
    return Seeing(path, (start, image, end))


@functools.cache
def qwen2_5_vl() -> Seeing:
    """Qwen2.5-VL: rotary positions of three axes; an image is 132 tokens."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    return _qwen(
        "Qwen2_5_VL",
        dict(rope_parameters=rope),
        dict(window_size=56, fullatt_block_indexes=[1], hidden_act="silu"),
        patch=14,
    )


@functools.cache
def qwen3_vl() -> Seeing:
    """Qwen3-VL: features of the image enter several layers."""
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 10000.0}
    return _qwen(
        "Qwen3VL",
        dict(rope_parameters=rope, head_dim=64),
        dict(deepstack_visual_indexes=[0], num_position_embeddings=576),
        patch=16,
    )


@functools.cache
def gemma3() -> Seeing:
    """Gemma-3: the tokens of an image, 100, attend to each other in both directions."""
    import transformers as hf

    names = ("boi_token", "eoi_token", "image_token")
    words = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    numbers = tokenizer(
        ["\n", "\n\n", "\n\n\n", "\n\n\n\n", *words], **dict(zip(names, words, strict=True))
    )
    start, end, image = numbers.convert_tokens_to_ids(list(words))
    side, tokens = 140, 100
    text = dict(
        head_dim=64,
        sliding_window=128,
        query_pre_attn_scalar=64,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=7,
        vision_use_head=False,
    )
    config = hf.Gemma3Config(
        text_config={**BASE, "model_type": "gemma3_text", **text},
        vision_config={"model_type": "siglip_vision_model", **vision},
        mm_tokens_per_image=tokens,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessorPil(
            size={"height": side, "width": side}, image_seq_length=tokens
        ),
        tokenizer=numbers,
        image_seq_length=tokens,
    )
    path = _save(config, processor, "Gemma3ForConditionalGeneration")
    return Seeing(path, (start,))


FAMILIES: dict[str, Callable[[], Seeing]] = {
    "llava": llava,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
}
