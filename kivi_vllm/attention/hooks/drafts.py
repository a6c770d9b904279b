"""Draft models: their layers are ours too, in the groups of the model's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from kivi_vllm.config import KiviConfigError


def proposer() -> Any:
    """vLLM's class of proposers with a model of their own, where its worker has imported it."""
    module = sys.modules.get("vllm.v1.spec_decode.llm_base_proposer")
    return module and module.SpecDecodeBaseProposer


def without_residual(original: Callable) -> Callable:
    """`SpecDecodeBaseProposer.load_model`, for a draft's layers that have several groups each.

    vLLM wants all that a draft adds in one group, whose table its passes get. That is the group of
    pages; rings, tails and sinks have theirs from the step (see `RawMetadataBuilder`).
    """

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kivi_vllm.attention.layer import RawCache

        result = original(self, *args, **kwargs)
        context = self.vllm_config.compilation_config.static_forward_context
        names = self._draft_attn_layer_names
        ours = {name for name in names if isinstance(context[name], RawCache)}
        if ours:
            self._draft_attn_layer_names = names - ours
            _check_windows([context[name] for name in self._draft_attn_layer_names])
        return result

    return load_model


def _check_windows(layers: list[Any]) -> None:
    windows = {getattr(layer, "sliding_window", None) for layer in layers}
    if len(windows) > 1:
        found = " and ".join(sorted(str(window or "none") for window in windows))
        raise KiviConfigError(
            f"the draft model has layers of several windows ({found}), which vLLM's model runner "
            "does not serve; use another draft model, or method ngram"
        )


def flag_groups(vllm_config: Any, groups: list[Any]) -> None:
    """Let prefix hits end one block before what EAGLE and MTP have in the cache.

    What a draft's layer keeps of a token depends on the next one, which is another one there.
    vLLM 0.32 knows the groups of drafts by the last layer (MTP), or takes all (EAGLE): of our
    groups, where a layer has several, all. 0.33 drops none: its hashes know the next token.
    """
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.use_eagle_block_drop():
        for group in groups:
            group.is_eagle_group = True
