"""What the KIVI cache refuses of speculation at start, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kivi_vllm.config import KiviConfigError
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHODS = ("ngram", "suffix", "eagle", "eagle3", "mtp", "draft_model")
"""Speculative methods that are served."""

_OTHER_DRAFTS = "use another draft model, or method ngram"


def problems(vllm_config: VllmConfig) -> Iterator[str]:
    """What the KIVI cache does not serve of the drafts that an engine is to make."""
    from vllm.platforms import current_platform

    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None:
        return
    if speculative.method not in METHODS:
        yield (
            f"speculation with {speculative.method!r} is not supported; "
            f"use one of: {', '.join(METHODS)}"
        )
        return
    if speculative.parallel_drafting:
        yield (
            "drafts that are made in parallel are not supported; "
            'leave "parallel_drafting" out of --speculative-config'
        )
    if speculative.use_gemma4_mtp():
        yield (
            "Gemma-4's MTP is not supported: its layers read the caches of the model's; "
            f"{_OTHER_DRAFTS}"
        )
    if speculative.use_multi_module_mtp():
        modules = speculative.draft_model_config.hf_config.num_nextn_predict_layers
        yield (f"MTP of {modules} modules for as many tokens is not tested; {_OTHER_DRAFTS}")
    dtype = vllm_config.cache_config.cache_dtype
    if speculative.kv_cache_dtype not in (None, dtype):
        yield (
            f"a draft's layers share groups with the model's, so their cache dtype is {dtype}, not "
            f'{speculative.kv_cache_dtype}; leave "kv_cache_dtype" out of --speculative-config'
        )
    if speculative.uses_draft_kv_cache():
        yield from _draft_layers(vllm_config)
    if model.is_hybrid:
        why = (
            "vLLM's CPU kernels do not take back what rejected drafts did to states, whatever "
            "the cache, and answers are wrong"
            if current_platform.is_cpu()
            else "that is not tested"
        )
        yield f"speculation with a hybrid model: {why}; leave out --speculative-config"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        why = (
            "vLLM's workers fail at start, whatever the cache, as the first stages have no drafter"
            if current_platform.is_cpu()
            else "that is not tested"
        )
        yield (
            f"speculation in a pipeline: {why}; leave out --speculative-config or "
            "--pipeline-parallel-size"
        )


def _draft_layers(vllm_config: VllmConfig) -> Iterator[str]:
    """What of a draft's layers the cache cannot hold, as far as its configuration tells."""
    from kivi_vllm.attention.options import kivi_config

    assert vllm_config.speculative_config is not None
    draft = vllm_config.speculative_config.draft_model_config
    if draft.use_mla:
        yield f"the draft has multi-head latent attention (MLA); {_OTHER_DRAFTS}"
        return
    config, dtype = kivi_config(vllm_config), vllm_config.model_config.dtype
    try:
        PageFormat.of(config, draft.get_head_size(), dtype)
    except KiviConfigError as error:
        yield f"the draft's layers: {error}; {_OTHER_DRAFTS}"
