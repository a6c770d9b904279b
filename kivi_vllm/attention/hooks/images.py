"""Images whose tokens see each other are computed in one step.

What an image's tokens see of those after them must be in the same step. vLLM's scheduler means
to see to that (`disable_chunked_mm_input`), but its CPU platform does not ask for it, and a step
that begins at an image (0.32), or within one, after a prefix hit, may still end within it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kivi_vllm.config import is_kivi

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def see_each_other(vllm_config: VllmConfig) -> bool:
    """Whether the tokens of an image see each other in this model, over one of our caches."""
    model = vllm_config.model_config
    return is_kivi(vllm_config.cache_config.cache_dtype) and bool(model.is_mm_prefix_lm)


def ask_for_whole(vllm_config: VllmConfig) -> None:
    """Let vLLM keep images whole; it then refuses steps of fewer tokens than one has."""
    if see_each_other(vllm_config):
        vllm_config.scheduler_config.disable_chunked_mm_input = True


def whole_images(original: Callable) -> Callable:
    """`Scheduler._try_schedule_encoder_inputs`, for steps that do not end within an image."""

    def _try_schedule_encoder_inputs(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if see_each_other(self.vllm_config):
            end = _end_of_step(request, num_computed_tokens, num_new_tokens)
            num_new_tokens = end - num_computed_tokens
        return original(self, request, num_computed_tokens, num_new_tokens, *args, **kwargs)

    return _try_schedule_encoder_inputs


def _end_of_step(request: Any, start: int, num_tokens: int) -> int:
    """Where a step of at most so many tokens from `start` on ends, and within no image."""
    end = start + num_tokens
    for feature in request.mm_features:
        for first, last in feature.mm_position.extract_embeds_range():
            if first < end <= last:
                return max(start, first)
    return end
