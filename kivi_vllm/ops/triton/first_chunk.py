"""Attention where nothing is cached yet: the step's own keys and values, by a library.

In the `exact` prefill mode, the first chunk of a prompt sees only itself, at full
precision: plain causal attention, which FlashAttention does best. The choice is made
once for every kind of layer, and logged.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch

from kivi_vllm.ops.step import AttentionParams

OWN = "this project's Triton kernel"


class FirstChunk(Protocol):
    """Causal attention of sequences that lie one after the other."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        starts: torch.Tensor,
        lens: list[int],
        params: AttentionParams,
    ) -> None:
        """Attend.

        Args:
            query, output: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size].
            starts: [num_seqs + 1] int32 on the device, from 0 on.
            lens: tokens of each sequence.
            params: of the layer.

        """


def choose(params: AttentionParams, head_size: int, dtype: torch.dtype) -> FirstChunk | None:
    """The best function there is for a layer; None: the project's own prefill kernel."""
    if dtype == torch.float32:
        return _chosen(None, "float32")
    alibi, cap = params.alibi_slopes is not None, params.logits_soft_cap > 0
    sink_logits = params.sink_logits is not None
    reasons = []
    for make in (_flash_attention, _xformers):
        try:
            function: Any = make(alibi, cap, sink_logits, head_size)
            return _chosen(function, "")
        except (ImportError, NotImplementedError) as error:
            reasons.append(str(error))
    return _chosen(None, "; ".join(reasons))


@functools.cache
def _chosen(function: Any, why: str) -> FirstChunk | None:
    """Say what was chosen, once."""
    name = OWN if function is None else function.__module__
    logger = logging.getLogger("vllm.kivi_vllm")
    logger.info("KIVI prefill with nothing cached: %s%s", name, f" ({why})" if why else "")
    return function


@functools.cache
def _flash_attention(alibi: bool, cap: bool, sink_logits: bool, head_size: int) -> FirstChunk:
    """vLLM's FlashAttention.

    Raises:
        ImportError: this vLLM has none.
        NotImplementedError: it has none for such layers on this GPU.

    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(
        requires_alibi=alibi, requires_softcap=cap, has_sinks=sink_logits, head_size=head_size
    )
    if version is None or (sink_logits and version < 3):  # 2 has no `s_aux`
        raise NotImplementedError("vLLM's FlashAttention does not serve these layers here")

    def attend(query, key, value, output, starts, lens, params):
        window, logits = params.sliding_window, params.sink_logits
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=max(lens),
            max_seqlen_k=max(lens),
            softmax_scale=params.scale,
            causal=True,
            window_size=[window - 1, 0] if window else None,
            softcap=params.logits_soft_cap,
            alibi_slopes=params.alibi_slopes,
            # Of the model's dtype, as vLLM loads and passes them.
            s_aux=None if logits is None else logits.to(query.dtype),
            fa_version=version,
        )

    attend.__module__ = flash_attn_varlen_func.__module__ + f", version {version}"
    return attend


@functools.cache
def _xformers(alibi: bool, cap: bool, sink_logits: bool, head_size: int) -> FirstChunk:
    """xformers' memory-efficient attention.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it cannot do what the layers ask.

    """
    if alibi or cap or sink_logits:
        raise NotImplementedError("xformers has no ALiBi, soft cap or sink logits for GQA")
    from xformers.ops import memory_efficient_attention_forward
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    def attend(query, key, value, output, starts, lens, params):
        bias = BlockDiagonalCausalMask.from_seqlens(lens)
        if params.sliding_window:
            bias = bias.make_local_attention(params.sliding_window)
        num_kv_heads = key.shape[1]
        q = query.unflatten(1, (num_kv_heads, -1))  # [tokens, kv heads, group, D]
        k, v = (x.unsqueeze(2).expand(q.shape) for x in (key, value))
        out = memory_efficient_attention_forward(
            q[None], k[None], v[None], attn_bias=bias, scale=params.scale
        )
        output.copy_(out[0].flatten(1, 2))

    attend.__module__ = memory_efficient_attention_forward.__module__
    return attend
