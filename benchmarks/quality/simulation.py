"""The rule of a KIVI cache, simulated in `transformers`' model: a second implementation.

A window is computed at once. Position t sees position s as it was iff s >= F(t) =
max(0, 128 * floor(t / 128) - R) or s < sink_tokens, and as its page gives it back otherwise.
Nothing here is shared with the engine but the codec and the configuration: no pages, rings, chunks
or kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.quality.models import TransformersModel
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import BLOCK_SIZE, KiviConfig
from kivi_vllm.ops.codec import decode_pages, encode_pages
from kivi_vllm.ops.format import PageFormat

NAME = "kivi_simulated"


class SimulatedModel(TransformersModel):
    """A KIVI dtype's rule inside `transformers`.

    Args:
        row: with the dtype and its options.
        arguments: see `TransformersModel`.

    """

    def __init__(self, row: CacheRow, arguments: dict[str, Any]) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = KiviConfig.from_options(row.dtype, {**row.options, "prefill": "cached"})
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention(config))
        super().__init__(arguments, NAME)
        facts = self.model.config
        if getattr(facts, "sliding_window", None) and getattr(facts, "use_sliding_window", True):
            raise UserError(
                "the simulation has no sliding windows, and this model does", "leave the row out"
            )


def as_cached(
    k: torch.Tensor, v: torch.Tensor, config: KiviConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What pages give back of a sequence's blocks: k, v [heads, n * 128, D] -> the same, fp32."""
    fmt = PageFormat.of(config, k.shape[-1], k.dtype)
    k_blocks, v_blocks = (x.unflatten(-2, (-1, BLOCK_SIZE)).contiguous() for x in (k, v))
    pages = encode_pages(k_blocks, v_blocks, fmt)
    first = encode_pages(k_blocks[:, :1], v_blocks[:, :1], fmt, config.sink_tokens)
    pages = torch.cat([first, pages[:, 1:]], 1)
    k_back, v_back = decode_pages(pages, fmt)
    return k_back.flatten(-3, -2), v_back.flatten(-3, -2)


def attention(config: KiviConfig) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function for `transformers` in which positions see what the cache would hold."""
    residual, sinks = config.residual_length, config.sink_tokens

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """One layer: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
        q, k, v = query[0].float(), key[0], value[0]
        (kv_heads, tokens, size) = k.shape
        scale = size**-0.5 if scaling is None else scaling
        whole = tokens // BLOCK_SIZE * BLOCK_SIZE
        kd, vd = k.float().clone(), v.float().clone()
        if whole:
            kd[:, :whole], vd[:, :whole] = as_cached(k[:, :whole], v[:, :whole], config)
        kd[:, :sinks], vd[:, :sinks] = k[:, :sinks].float(), v[:, :sinks].float()

        out = torch.empty_like(q)
        q = q.unflatten(0, (kv_heads, -1))  # [Hkv, Hq / Hkv, T, D]
        for start in range(0, tokens, BLOCK_SIZE):
            end = min(start + BLOCK_SIZE, tokens)
            first_raw = max(0, start - residual)
            keys = torch.cat([kd[:, :first_raw], k[:, first_raw:end].float()], 1)
            values = torch.cat([vd[:, :first_raw], v[:, first_raw:end].float()], 1)
            scores = q[:, :, start:end] @ keys[:, None].mT * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            t, s = torch.arange(start, end)[:, None], torch.arange(end)
            scores.masked_fill_((s > t).to(scores.device), -torch.inf)
            out[:, start:end] = (scores.softmax(-1) @ values[:, None]).flatten(0, 1)
        return out.to(query.dtype).transpose(0, 1)[None], None

    return attend
