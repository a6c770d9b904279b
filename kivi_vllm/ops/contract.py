"""What attention asks of the kernels of a device: the operators, and the limits they have.

A backend of the operators is a module with the names of `Operators`; `reference` is the first
and the truth for the others. `dispatch` knows which one serves a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch

from kivi_vllm.config import HEAD_SIZES, Estimate, KiviConfig
from kivi_vllm.ops.format import RAW_DTYPES
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.step import AttentionParams, Batch, Layer, LayerCache


@dataclass(frozen=True)
class Limits:
    """What a backend serves.

    Attributes:
        devices: what its devices are called in messages.
        head_sizes: head sizes of its kernels.
        model_dtypes: dtypes of models.
        min_capability: oldest compute capability of a device, and the name of that
            generation; None where devices have none.
        decodes_first: the requests of a step must be in this order: those of at most
            `decode_len` tokens, then the longer ones.
        selects: the recipes for whose pages `select` is there.
        estimates: what it chooses by (`AttentionParams.estimate`).
        needs_eager: what has been asked for that looks at the device in every step, which a
            captured graph cannot: `NAME=value` of the environment. Empty: nothing.

    """

    devices: str
    head_sizes: tuple[int, ...] = HEAD_SIZES
    model_dtypes: tuple[torch.dtype, ...] = RAW_DTYPES
    min_capability: tuple[tuple[int, int], str] | None = None
    decodes_first: bool = False
    selects: tuple[str, ...] = ("best", "paper")
    estimates: tuple[str, ...] = get_args(Estimate)
    needs_eager: str = ""

    def estimate(self, config: KiviConfig) -> Estimate:
        """What pages are chosen by: what was asked for, or the best that there is."""
        if config.estimate is not None:
            return config.estimate
        return next(each for each in config.estimates if each in self.estimates)

    def serves(self, capability: Any) -> bool:
        """Whether a device of this compute capability is new enough; None: it is not known."""
        oldest = self.min_capability
        return capability is None or oldest is None or tuple(capability)[:2] >= oldest[0]


class Operators(Protocol):
    """One attention layer's step, and what must be there before it.

    A step is made for all layers together. Each layer then calls `store_blocks`, `attend`, or
    `attend_selected` if it has a `token_budget`, and `store_ring`, in this order. What they mean is
    `reference`'s; what they take besides, and raise, is theirs.
    """

    limits: Limits

    def step(self, batch: Batch) -> Any:
        """What the others take of a batch."""

    def prepare(self, layer: Layer, params: AttentionParams) -> AttentionParams:
        """Make ready for a layer, before the engine measures how much memory is left.

        Args:
            layer: its form, and the largest decode that it will meet.
            params: what the model asks for.

        Returns:
            the params that `attend` wants for this layer.

        """

    def store_blocks(
        self, step: Any, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Quantize the blocks that the step completes; keep their last R tokens."""

    def select(
        self,
        step: Any,
        cache: LayerCache,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
    ) -> Selection | None:
        """Choose the pages that the step's generated tokens read; None: all tokens read all.

        What is chosen holds until the next choice.
        """

    def attend(
        self,
        step: Any,
        cache: LayerCache,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        output: torch.Tensor,
        selection: Selection | None = None,
    ) -> None:
        """Attend causally over pages, residual and the step itself."""

    def attend_selected(
        self,
        step: Any,
        cache: LayerCache,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        output: torch.Tensor,
    ) -> None:
        """`select`, and `attend` over what it chose."""

    def store_ring(
        self, step: Any, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write the step's last tokens into the ring."""
