"""transformers' own quantized cache as a row: an idea like KIVI's, with other groups."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.quality.rows import TRANSFORMERS_BITS, CacheRow
from benchmarks.quality.simulation import TransformersModel
from kivi_vllm.cli.errors import UserError

PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}
"""Backends to the module that they need and the distribution that has it."""

CHUNK = 128
"""Tokens of a step: what is older is read from the cache."""


def missing(row: CacheRow) -> str | None:
    """What has to be installed for a row; None if nothing."""
    if row.kind != "transformers":
        return None
    module, distribution = PACKAGES[row.options.get("backend", "quanto")]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        found = False
    return None if found else f"pip install {distribution}"


class QuantizedCacheModel(TransformersModel):
    """`transformers.QuantizedCache` in a model of `transformers`, teacher-forced in chunks.

    Args:
        row: whose dtype is a key of `TRANSFORMERS_BITS`.
        arguments: see `TransformersModel`; `max_model_len` too.

    """

    def __init__(self, row: CacheRow, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self.settings = dict(
            backend=row.options.get("backend", "quanto"),
            nbits=TRANSFORMERS_BITS[row.dtype],
            q_group_size=row.options.get("group_size", 32),
            residual_length=row.options.get("residual_length", 128),
        )
        if arguments.get("max_model_len", 0) < CHUNK:
            raise UserError(f"windows shorter than {CHUNK} tokens are never quantized", "longer")

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """The final hidden states, chunk by chunk through the cache."""
        import torch
        from transformers import QuantizedCache

        cache = QuantizedCache(config=self.model.config, **self.settings)
        found = []
        with torch.inference_mode():
            for at in range(0, len(window), CHUNK):
                ids = torch.tensor([list(window[at : at + CHUNK])], device=self.device)
                output = self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
                found.append(output.last_hidden_state[0].float().cpu())
        states: np.ndarray = torch.cat(found).numpy()
        return states
