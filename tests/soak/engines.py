"""The engines of the soak: a quiet one with room for all, and one that is too small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from kivi_vllm.attention.groups.admission import Forecast
from tests.drafts import eagle, foreseeable
from tests.engine import MAMBA2, Answer, engine, gemma3, generate, tiny_model
from tests.offload import offloaded
from tests.soak.storm import MAX_PROMPT, MAX_TOKENS


@dataclass(frozen=True)
class Kind:
    """A cache dtype, its residual length, who makes drafts ("": nobody), and a kind of model.

    With `offload`, prefixes that the pool has no room for are kept elsewhere.
    """

    dtype: str
    residual: int
    drafts: str = ""
    model: str = "plain"
    offload: bool = False

    def __str__(self) -> str:
        drafts = f"-{self.drafts}" if self.drafts else ""
        model = "" if self.model == "plain" else f"-{self.model}"
        offload = "-offload" if self.offload else ""
        return f"{self.dtype}-R{self.residual}{drafts}{model}{offload}"

    @property
    def hits(self) -> bool:
        """Whether prefix caching is on: vLLM's Mamba-2 fails on the CPU with it."""
        return self.model != "hybrid"

    @property
    def kivi(self) -> dict[str, Any]:
        """The plugin's options: answers depend on the prompt alone."""
        return {"prefill": "cached", "residual_length": self.residual}


BLOCKS = {"plain": 36, "foreseeable": 36, "windows": 48, "hybrid": 36}
"""Of the small engine's pool, by kind of model."""

OFFLOADED = 8 << 20
"""Bytes of the offloaded pool: too few for all, so that it forgets too."""


def model(kind: str = "plain") -> str:
    """A random model whose answers repeat themselves now and then, as n-gram drafts need.

    Eight query heads share a kv head: so many rows the CPU kernels always take the same way, in
    decode and in prefill. Up to four read full-precision tokens in place, in another order of
    summation, with what `exact_products` is there to keep out: 1e-7, and now and then a code.
    """
    shape: dict[str, Any] = dict(
        num_attention_heads=16, num_key_value_heads=2, head_dim=32, initializer_range=0.1
    )
    if kind == "foreseeable":  # a second layer that changes little, as EAGLE's drafts need
        return foreseeable(heads=16, head_dim=32)
    if kind == "windows":  # pages come two to a block where there is no window
        return gemma3("wwf", **shape)
    if kind == "hybrid":
        return tiny_model("falcon_h1", **shape, mamba_d_ssm=256, **MAMBA2)
    return tiny_model(**shape)


def quiet_answers(kind: Kind, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """Each prompt's greedy answer, alone in an engine without hits, drafts or want."""
    with engine(model(kind.model), kind.dtype, kivi=kind.kivi, enable_prefix_caching=False) as llm:
        return [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in prompts]


@contextmanager
def small_engine(kind: Kind) -> Iterator[Any]:
    """An engine for 16 requests at a time with pages for about two of the longest.

    It admits a request as soon as its own pages are free, whatever the others will
    take: a storm of preemptions, which `Forecast` is there to prevent.
    """
    settings: dict[str, Any] = dict(
        kivi=kind.kivi,
        num_gpu_blocks_override=BLOCKS[kind.model] + (14 if kind.residual else 0),
        max_num_batched_tokens=256,
        max_model_len=MAX_PROMPT + MAX_TOKENS,
        max_num_seqs=16,
        enable_prefix_caching=kind.hits,
    )
    path = model(kind.model)
    if kind.drafts == "ngram":
        settings["speculative_config"] = dict(
            method="ngram", num_speculative_tokens=4, prompt_lookup_min=2, prompt_lookup_max=4
        )
    elif kind.drafts == "eagle":
        settings["speculative_config"] = dict(
            method="eagle", num_speculative_tokens=4, model=eagle(path)
        )
    if kind.offload:
        settings |= offloaded(OFFLOADED)
    reckless = patch.object(Forecast, "most_pages", lambda *_: 0)
    with reckless, engine(path, kind.dtype, **settings) as llm:
        yield llm
